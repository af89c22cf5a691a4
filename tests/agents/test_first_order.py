"""First-order returns, targets and critic updates, on an env whose numbers are worked by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor, nn

from pwm_gym.agents.first_order import critic_targets, fit_critic, rollout, rollout_returns
from pwm_gym.agents.latent_actor import LatentActor
from pwm_gym.differentiable import DifferentiableVectorEnv
from pwm_gym.networks import EnsembleMLP

GAMMA = 0.5


class Line(DifferentiableVectorEnv):
    """Points on a line, x' = x + u and r = -x² - u²; those that end go on from x = 4.

    Args:
        start: x_0, (B, 1).
        truncated: Steps (t, env) that end by a time limit.
        terminated: Steps (t, env) that end for good.
        continues: The continuation probability of each step, the same for all envs; None for 1 - terminated.
        bound: Actions are in [-bound, bound].
    """

    def __init__(
        self,
        start: Sequence[float],
        truncated: Sequence[tuple[int, int]] = (),
        terminated: Sequence[tuple[int, int]] = (),
        continues: Sequence[float] | None = None,
        bound: float = 10.0,
    ) -> None:
        self.device = torch.device("cpu")
        self.num_envs = len(start)
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.single_action_space = spaces.Box(np.float32(-bound), np.float32(bound), (1,))
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.x = torch.tensor(start, dtype=torch.float64).unsqueeze(-1)  # (B, 1)
        self.truncated, self.terminated, self.continues = set(truncated), set(terminated), continues
        self.t = 0
        self.actions: list[Tensor] = []

    def _flags(self, steps: set[tuple[int, int]]) -> Tensor:
        return torch.tensor([(self.t, i) in steps for i in range(self.num_envs)])

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        assert actions.shape == (self.num_envs, 1)
        self.actions.append(actions.detach())
        rewards = -(self.x.square() + actions.square()).squeeze(-1)
        led_to = self.x + actions
        terminated, truncated = self._flags(self.terminated), self._flags(self.truncated)
        continue_prob = 1.0 - terminated.double()
        if self.continues is not None:
            continue_prob = torch.full((self.num_envs,), self.continues[self.t], dtype=torch.float64)
        infos: dict[str, Any] = {"continue_prob": continue_prob}
        ended = terminated | truncated
        if ended.any():
            infos |= {"final_obs": led_to, "_final_obs": ended}
        self.x = torch.where(ended.unsqueeze(-1), torch.full_like(led_to, 4.0), led_to)
        self.t += 1
        return self.x, rewards, terminated, truncated, infos

    def detach(self) -> Tensor:
        self.x = self.x.detach()
        return self.x


class Gain(nn.Module):
    """The policy u = k x, without noise; its entropy is said to be 7."""

    use_sde = False

    def __init__(self, k: float = -0.5, bound: float = 10.0) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(k, dtype=torch.float64))
        self.bound = bound

    def sample_noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.zeros(count, 1)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.k * x / self.bound, torch.full_like(x.squeeze(-1), 7.0)


class Slopes(nn.Module):
    """Two critics, 2x and 3x; the smaller counts."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([3.0 * x, 2.0 * x]).squeeze(-1)


def run(env: Line, horizon: int, actor: Any = None, **kwargs: Any) -> tuple[Any, Any]:
    actor = actor or Gain()
    return actor, rollout(env, env.detach(), actor, horizon, torch.Generator().manual_seed(0), **kwargs)


# With k = -1/2 and x_0 = 1:  x = 1, 1/2, 1/4, 1/8;  u = -1/2, -1/4, -1/8;  r = -5/4 x² = -1.25, -0.3125, -0.078125;
# V(x) = 2x.


def test_one_step_return_and_its_gradient():
    actor, window = run(Line([1.0]), 1)
    returns = rollout_returns(window, Slopes(), GAMMA)
    # J = -(1 + k²) + γ 2 (1 + k) = -1.25 + 0.5;  dJ/dk = -2k + 1
    assert returns.tolist() == [-0.75]
    assert torch.autograd.grad(returns.sum(), actor.k)[0] == 2.0
    assert critic_targets(window, Slopes(), GAMMA, 0.95).tolist() == [[-0.75]]


def test_three_step_returns_and_targets():
    _, window = run(Line([1.0, 2.0]), 3)
    assert window.observations.squeeze(-1).tolist() == [[1.0, 2.0], [0.5, 1.0], [0.25, 0.5]]
    assert window.next_observations.squeeze(-1).tolist() == [[0.5, 1.0], [0.25, 0.5], [0.125, 0.25]]
    assert window.rewards.tolist() == [[-1.25, -5.0], [-0.3125, -1.25], [-0.078125, -0.3125]]
    assert window.ends.tolist() == [[False, False], [False, False], [True, True]]
    assert window.continues.unique().tolist() == [1.0]
    assert window.entropy.unique().tolist() == [7.0]
    assert [*window.boundaries] == [2]
    # J = -1.25 - γ 0.3125 - γ² 0.078125 + γ³ 0.25;  from x_0 = 2, rewards are 4 and values 2 times as large
    assert rollout_returns(window, Slopes(), GAMMA).tolist() == [-1.39453125, -5.640625]
    # λ = 1/2:  G_2 = -0.078125 + γ 0.25;  G_1 = -0.3125 + γ (0.5/2 + G_2/2);  G_0 = -1.25 + γ (1/2 + G_1/2)
    targets = critic_targets(window, Slopes(), GAMMA, 0.5)
    assert targets[:, 0].tolist() == [-1.0439453125, -0.17578125, 0.046875]
    assert not targets.requires_grad


@pytest.mark.parametrize(
    ("end", "returned", "targets"),
    [
        # Row 1 from x_0 = 2:  x = 2, 1, then 1/2, where the episode ends, and on from 4:  u = -2, x = 2;
        # r = -5, -1.25, -20;  V = 2, 1, 4.
        # Truncated:  J = (-5 - γ 1.25 + γ² 1) + (-20 + γ 4);  G_1 = -1.25 + γ 1;  G_0 = -5 + γ (2/2 + G_1/2)
        ("truncated", -23.375, [-4.6875, -0.75, -18.0]),
        # Terminated:  J = (-5 - γ 1.25) + (-20 + γ 4);  G_1 = -1.25
        ("terminated", -23.625, [-4.8125, -1.25, -18.0]),
    ],
)
def test_an_episode_that_ends_in_mid_window_is_a_segment_of_its_own(end: str, returned: float, targets: list[float]):
    _, window = run(Line([1.0, 2.0], **{end: [(1, 1)]}), 3)
    assert [*window.boundaries] == [1, 2]
    assert window.next_observations.squeeze(-1).tolist() == [[0.5, 1.0], [0.25, 0.5], [0.125, 2.0]]
    assert window.observations[2].squeeze(-1).tolist() == [0.25, 4.0]
    assert window.ends.tolist() == [[False, False], [False, True], [True, True]]
    assert rollout_returns(window, Slopes(), GAMMA).tolist() == [-1.39453125, returned]
    assert critic_targets(window, Slopes(), GAMMA, 0.5)[:, 1].tolist() == targets


def test_an_end_in_the_last_step_is_bootstrapped_like_the_horizon():
    _, cut = run(Line([1.0], truncated=[(2, 0)]), 3)
    assert [*cut.boundaries] == [2]
    assert rollout_returns(cut, Slopes(), GAMMA).tolist() == [-1.39453125]
    _, terminated = run(Line([1.0], terminated=[(2, 0)]), 3)
    assert rollout_returns(terminated, Slopes(), GAMMA).tolist() == [-1.42578125]  # without γ³ 0.25


def test_continuation_probabilities_discount_what_comes_after():
    _, window = run(Line([1.0], continues=[0.8, 0.5, 0.25]), 3)
    # J = -1.25 - γ 0.8 0.3125 - γ² 0.8 0.5 0.078125 + γ³ 0.8 0.5 0.25 0.25
    assert rollout_returns(window, Slopes(), GAMMA).item() == pytest.approx(-1.3796875, abs=1e-12)
    # G_2 = -0.078125 + γ 0.25 0.25;  G_1 = -0.3125 + γ 0.5 (0.5/2 + G_2/2);  G_0 = -1.25 + γ 0.8 (1/2 + G_1/2)
    targets = critic_targets(window, Slopes(), GAMMA, 0.5).squeeze(-1).tolist()
    assert targets == pytest.approx([-1.101171875, -0.255859375, -0.046875], abs=1e-12)


def test_detach_input_keeps_only_the_gradient_through_actions():
    # H = 2, γ = 1/2, V = 2x:  J = -(1 + k²) - (x_1² + u_1²)/2 + x_2/2,  x_1 = 1 + k,  u_1 = k x_1,  x_2 = x_1 + u_1.
    # In full du_1/dk = x_1 + k = 0:  dJ/dk = 1 - 0.5 + 0.5.  With x_1 hidden from the policy du_1/dk = x_1 = 1/2:
    # dJ/dk = 1 - (0.5 - 0.125) + 0.75.
    for detach_input, slope in ((False, 1.0), (True, 1.375)):
        actor, window = run(Line([1.0]), 2, detach_input=detach_input)
        returns = rollout_returns(window, Slopes(), GAMMA)
        assert torch.autograd.grad(returns.sum(), actor.k)[0] == slope


def test_no_gradient_crosses_an_episodes_end():
    env = Line([2.0], truncated=[(0, 0)])
    actor = Gain()
    _, window = run(env, 2, actor)
    second = window.rewards[1].sum()  # from x = 4, whatever the first action was:  r = -16 (1 + k²)
    assert torch.autograd.grad(second, actor.k)[0] == 16.0


def test_actions_are_scaled_to_the_envs_space():
    env = Line([1.0], bound=2.0)
    run(env, 1, Gain(k=-0.5, bound=1.0))  # the policy answers -1/2 in [-1, 1]
    assert env.actions[0].tolist() == [[-1.0]]


def test_a_rollout_starts_without_gradient_from_what_the_env_shows():
    env = Line([1.0])
    _, first = run(env, 1)
    _, second = run(env, 1)
    assert torch.equal(second.observations[0], first.next_observations[0])
    assert not second.observations[0].requires_grad


@pytest.mark.parametrize("use_sde", [False, True])
@pytest.mark.parametrize("ends", [{}, {"truncated": [(1, 0)]}, {"terminated": [(0, 1)]}], ids=str)
def test_gradients_equal_finite_differences(ends: dict[str, Any], use_sde: bool):
    torch.manual_seed(0)
    actor = LatentActor(1, 1, [3], nn.Mish, -1.0, -3.0, use_sde).double()
    critic = EnsembleMLP(2, 1, [4], nn.Mish).double().requires_grad_(False)

    def objective() -> Tensor:
        _, window = run(Line([0.3, -0.7], bound=1.0, continues=None if ends else [0.9, 0.8, 0.7], **ends), 3, actor)
        return (rollout_returns(window, critic, 0.9) + 0.1 * window.entropy.mean(0)).sum()

    gradients = torch.autograd.grad(objective(), list(actor.parameters()))
    step = 1e-6
    for parameter, gradient in zip(actor.parameters(), gradients, strict=True):
        flat, numeric = parameter.data.view(-1), []
        for i in range(len(flat)):
            value, results = flat[i].item(), []
            for shifted in (value + step, value - step):
                flat[i] = shifted
                results.append(objective().item())
            flat[i] = value
            numeric.append((results[0] - results[1]) / (2 * step))
        torch.testing.assert_close(gradient.flatten(), torch.tensor(numeric, dtype=torch.float64), rtol=1e-6, atol=1e-8)


# The critic's regression


def regression(seed: int = 0, **changes: Any) -> tuple[EnsembleMLP, dict[str, Tensor]]:
    """Fit two critics to y = 1 + x on (H, B) = (4, 8) points."""
    torch.manual_seed(0)
    critic = EnsembleMLP(2, 1, [16], nn.Mish)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    x = torch.linspace(-1.0, 1.0, 32).reshape(4, 8, 1).requires_grad_(True)
    arguments = {"epochs": 1, "minibatches": 4, "max_grad_norm": 100.0, **changes}
    generator = torch.Generator().manual_seed(seed)
    goals = arguments.pop("goals", 1.0 + x.detach().squeeze(-1))
    weights = arguments.pop("weights", torch.ones_like(goals))
    metrics = fit_critic(critic, optimizer, x, goals, weights, **arguments, generator=generator)
    assert x.grad is None
    return critic, metrics


def same(first: EnsembleMLP, second: EnsembleMLP) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_every_member_of_the_critic_is_fitted():
    first, _ = regression()
    critic, metrics = regression(epochs=60)
    x = torch.linspace(-1.0, 1.0, 32).unsqueeze(-1)
    errors = (critic(x) - 1.0 - x.squeeze(-1)).square().mean(-1)
    assert errors.shape == (2,)
    assert errors.max() < 0.02
    assert errors.max() < 0.1 * (first(x) - 1.0 - x.squeeze(-1)).square().mean(-1).min()
    assert metrics["critic_loss"] > 0.0
    assert metrics["critic_grad_norm"] > 0.0


def test_shuffling_follows_the_generator():
    assert same(regression(seed=1)[0], regression(seed=1)[0])
    assert not same(regression(seed=1)[0], regression(seed=2)[0])
    torch.testing.assert_close(regression(1, minibatches=1)[1], regression(2, minibatches=1)[1])  # one batch of all


def test_the_loss_is_the_mean_over_members_and_points():
    critic = EnsembleMLP(2, 1, [], nn.Mish)  # linear
    with torch.no_grad():
        critic[0].weight.copy_(torch.tensor([0.0, 1.0]).reshape(2, 1, 1))
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.0)
    x, y = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[3.0], [5.0]])
    metrics = fit_critic(critic, optimizer, x, y, torch.ones(2, 1), 1, 1, 100.0)
    # V = 0, 0 and 1, 2:  (9 + 25 + 4 + 9) / 4
    assert metrics["critic_loss"].item() == 11.75
    metrics = fit_critic(critic, optimizer, x, y, torch.tensor([[1.0], [0.5]]), 1, 1, 100.0)
    assert metrics["critic_loss"].item() == (9 + 4 + 0.5 * (25 + 9)) / 4


def test_critics_are_not_fitted_to_what_no_episode_reaches():
    reached = torch.ones(4, 8)
    reached[2:] = 0.0
    wild = torch.where(reached > 0.0, 1.0 + torch.linspace(-1.0, 1.0, 32).reshape(4, 8), torch.tensor(1e3))
    assert same(regression(weights=reached, epochs=3)[0], regression(weights=reached, epochs=3, goals=wild)[0])
    assert not same(regression(epochs=3)[0], regression(epochs=3, goals=wild)[0])


def test_survival_is_the_chance_to_get_as_far_within_a_segment():
    _, window = run(Line([0.0, 0.0], continues=[0.5, 0.25, 0.125], truncated=[(1, 1)]), 3)
    assert window.survival().tolist() == [[1.0, 1.0], [0.5, 0.5], [0.125, 1.0]]
    assert not window.survival().requires_grad


def test_critic_gradients_are_clipped():
    metrics = regression(max_grad_norm=1e-9, minibatches=1)[1]
    assert metrics["critic_grad_norm"] > 1e-3  # reported before clipping
    torch.manual_seed(0)
    critic = EnsembleMLP(1, 1, [], nn.Mish)
    before = [p.detach().clone() for p in critic.parameters()]
    optimizer = torch.optim.SGD(critic.parameters(), lr=1.0)
    fit_critic(
        critic, optimizer, torch.ones(1, 4, 1), torch.full((1, 4), 100.0), torch.ones(1, 4), 1, 1, max_grad_norm=0.5
    )
    moved = torch.cat([(p - q).flatten() for p, q in zip(critic.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)


def test_value_at_the_end_can_be_discounted_once_more():
    # J = -1.25 + 1/2 (-0.3125) + 1/4 (-0.078125) + δ 1/8 V(1/8), V(1/8) = 1/4
    _, window = run(Line([1.0]), 3)
    assert rollout_returns(window, Slopes(), GAMMA, 0.5).tolist() == [-1.42578125 + 0.5 * 0.03125]


def test_an_axis_of_tasks_changes_no_return_and_no_target():
    _, window = run(Line([1.0, 2.0, -1.0, 0.5], terminated=[(1, 2)]), 3)
    several = window.by_task(2)
    assert several.rewards.shape == (3, 2, 2)
    assert torch.equal(rollout_returns(several, Slopes(), GAMMA).flatten(), rollout_returns(window, Slopes(), GAMMA))
    targets = critic_targets(several, Slopes(), GAMMA, 0.5)
    assert torch.equal(targets.flatten(1), critic_targets(window, Slopes(), GAMMA, 0.5))
