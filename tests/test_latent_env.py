"""LatentVectorEnv against direct WorldModel calls, finite differences, and a loop over single envs."""

import random
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from torch import Tensor

import pwm_gym  # noqa: F401  registers the envs
from pwm_gym.latent_env import LatentVectorEnv
from pwm_gym.replay import SequenceReplayBuffer
from pwm_gym.starts import Starts
from pwm_gym.world_model import WorldModel, WorldModelConfig

O = 3  # noqa: E741
A, Z = 2, 8
SAME_STEP, NEXT_STEP, DISABLED = AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED
every_mode = pytest.mark.parametrize("mode", [SAME_STEP, NEXT_STEP, DISABLED])


def make_model(
    seed: int = 0,
    observation_space: spaces.Space | None = None,
    action_space: spaces.Box | None = None,
    ends: bool = False,
    **config: Any,
) -> WorldModel:
    """Make a tiny model in float64 with weights so large that rewards, latents and ends depend on every action.

    With `ends`, the termination head predicts an end in about a fifth of all states.
    """
    fields = {"observation_dim": O, "action_dim": A, "latent_dim": Z, "encoder_dim": 12, "mlp_dim": 12} | config
    model = WorldModel(WorldModelConfig(**fields, simnorm_dim=4, num_bins=11), observation_space, action_space)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
        if ends:
            model.expect_termination()
            latents = [model.encode(2 * torch.rand((500, O), generator=generator) - 1)]
            for _ in range(3):
                latents.append(model.next(latents[-1], 2 * torch.rand((500, A), generator=generator) - 1))
            model.termination_head[-1].bias -= model.termination_logits(torch.cat(latents[1:])).quantile(0.8)
    return model.double().requires_grad_(False)


def make_env(model: WorldModel | None = None, start: Any = None, **kwargs: Any) -> LatentVectorEnv:
    model = model or make_model()
    if start is None and "latents" not in kwargs:
        start = uniform((20, model.config.observation_dim), seed=9)
    return LatentVectorEnv(model, start, **{"num_envs": 3, "horizon": 4} | kwargs)


def uniform(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


def set_end_probability(model: WorldModel, probability: float) -> None:
    """Make the termination head say the same everywhere."""
    model.expect_termination()
    last: Any = model.termination_head[-1]  # type: ignore[index]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(float(np.log(probability / (1 - probability))))


def queue(starts: Tensor) -> Any:
    """Sample starts one after another."""
    position = 0

    def sample(count: int, rng: np.random.Generator) -> Starts:
        nonlocal position
        position += count
        return Starts(starts[position - count : position])

    return sample


# Gradients. The return is a weighted sum of all that a reward or a critic looks at, so that nothing cancels.

T, B = 6, 3
WEIGHTS, VALUE = uniform((T, B), seed=1), uniform((Z,), seed=2)  # of the rewards; a linear critic
STARTS = uniform((2, B, O), seed=3)  # of the first reset, and of every later one

# Before which step which envs are reset, by the caller and by the env.
RESETS = {
    "none": SimpleNamespace(mode=DISABLED, horizon=T, masked={}, auto={}),
    "masked": SimpleNamespace(mode=DISABLED, horizon=T, masked={3: [1], 4: [0, 2]}, auto={}),
    "same step": SimpleNamespace(mode=SAME_STEP, horizon=4, masked={}, auto={4: [0, 1, 2]}),
    "same step, some": SimpleNamespace(mode=SAME_STEP, horizon=4, masked={2: [1]}, auto={4: [0, 2], 6: [1]}),
    "next step": SimpleNamespace(mode=NEXT_STEP, horizon=3, masked={}, auto={3: [0, 1, 2]}),
    "next step, some": SimpleNamespace(mode=NEXT_STEP, horizon=3, masked={1: [1]}, auto={3: [0, 2], 4: [1]}),
}
every_reset = pytest.mark.parametrize("resets", RESETS.values(), ids=RESETS)


def mask_of(envs: list[int]) -> np.ndarray:
    return np.isin(np.arange(B), envs)


def return_through_env(model: WorldModel, actions: Tensor, resets: Any) -> Tensor:
    """Sum weighted rewards and continuation probabilities, and the critic's values where an episode or all ends."""
    restarted = [i for t in sorted(resets.auto) for i in resets.auto[t]]
    env = LatentVectorEnv(model, queue(STARTS[1, restarted]), B, resets.horizon, resets.mode, termination="none")
    z, _ = env.reset(seed=0, options={"observations": STARTS[0]})
    total = torch.zeros((), dtype=torch.float64)
    for t in range(T):
        if t in resets.masked:
            options = {"reset_mask": mask_of(resets.masked[t]), "observations": STARTS[1]}
            z, _ = env.reset(options=options)
        z, reward, terminated, truncated, info = env.step(actions[t])
        total = total + (WEIGHTS[t] * (reward + info["continue_prob"])).sum()
        led_to = z
        if "final_obs" in info:
            led_to = torch.where(info["_final_obs"].unsqueeze(-1), info["final_obs"], z)
        if t < T - 1:
            total = total + (led_to @ VALUE)[terminated | truncated].sum()
    return total + (led_to @ VALUE).sum()


def return_from_model(model: WorldModel, actions: Tensor, resets: Any) -> Tensor:
    """Compute `return_through_env` env by env, from `WorldModel` alone."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(B):
        z = model.encode(STARTS[0, i : i + 1])  # (1, Z)
        for t in range(T):
            begins = i in resets.auto.get(t, [])
            if begins:
                total = total + (z @ VALUE).sum()
            if begins or i in resets.masked.get(t, []):
                z = model.encode(STARTS[1, i : i + 1])
            if begins and resets.mode == NEXT_STEP:  # the step is the reset: reward 0, and it goes on for certain
                total = total + WEIGHTS[t, i]
                continue
            action = actions[t, i : i + 1]
            total = total + WEIGHTS[t, i] * model.reward(z, action).sum()
            z = model.next(z, action)
            total = total + WEIGHTS[t, i] * (1 - model.termination(z)).sum()
        total = total + (z @ VALUE).sum()
    return total


def central_differences(f: Any, x: Tensor, step: float = 1e-5) -> Tensor:
    slope = torch.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.clone(), x.clone()
        up[index] += step
        down[index] -= step
        slope[index] = (f(up) - f(down)) / (2 * step)
    return slope


@every_reset
def test_gradient_for_all_actions_equals_that_of_direct_model_calls(resets):
    model = make_model(ends=True)
    actions = (0.9 * uniform((T, B, A), seed=4)).requires_grad_()
    ours, direct = return_through_env(model, actions, resets), return_from_model(model, actions, resets)
    torch.testing.assert_close(ours, direct, rtol=1e-12, atol=1e-12)
    (gradient,), (expected,) = torch.autograd.grad(ours, actions), torch.autograd.grad(direct, actions)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    ignored = torch.zeros(T, B, dtype=torch.bool)
    if resets.mode == NEXT_STEP:
        for t, envs in resets.auto.items():
            ignored[t, envs] = True
    assert torch.equal((gradient == 0).all(-1), ignored)


@every_reset
def test_gradient_for_all_actions_equals_central_finite_differences(resets):
    model = make_model(ends=True)
    actions = (0.9 * uniform((T, B, A), seed=4)).requires_grad_()
    (gradient,) = torch.autograd.grad(return_through_env(model, actions, resets), actions)
    with torch.no_grad():
        differences = central_differences(lambda x: return_through_env(model, x, resets), actions.detach())
    assert float((gradient - differences).norm() / differences.norm()) < 1e-6
    assert float(((gradient - differences).abs() / (differences.abs() + 1e-3)).max()) < 1e-6


@pytest.mark.parametrize("config", [{"regularizer": "none"}, {"regularizer": "spectral_norm"}, {"activation": "relu"}])
def test_gradient_equals_finite_differences_for_every_regularizer(config):
    model = make_model(**config).train()  # spectral norm in training mode would change with each call
    actions = (0.9 * uniform((T, B, A), seed=4)).requires_grad_()
    (gradient,) = torch.autograd.grad(return_through_env(model, actions, RESETS["masked"]), actions)
    with torch.no_grad():
        differences = central_differences(lambda x: return_through_env(model, x, RESETS["masked"]), actions.detach())
    assert float((gradient - differences).norm() / differences.norm()) < 1e-6


def test_gradient_of_a_fitted_float32_model_equals_direct_calls_exactly():
    model = make_model().float()
    env = make_env(model, num_envs=4, horizon=9)
    z, _ = env.reset(seed=0)
    expected_z = z
    actions = uniform((5, 4, A)).float().requires_grad_()
    total, direct = torch.zeros(4), torch.zeros(4)
    for t in range(5):
        z, reward, *_ = env.step(actions[t])
        direct = direct + model.reward(expected_z, actions[t])
        expected_z = model.next(expected_z, actions[t])
        total = total + reward
        assert torch.equal(z, expected_z)
    assert torch.equal(total, direct)
    assert torch.equal(torch.autograd.grad(total.sum(), actions)[0], torch.autograd.grad(direct.sum(), actions)[0])


# What a gradient does not cross


def gradient_or_zero(output: Tensor, actions: Tensor) -> Tensor:
    if not output.requires_grad:
        return torch.zeros_like(actions)
    return torch.autograd.grad(output, actions, retain_graph=True, materialize_grads=True)[0]


# Which actions a reward and a latent of step t depend on, with a horizon of 2.
REACHED: dict[AutoresetMode, list[tuple[list[int], list[int]]]] = {
    SAME_STEP: [([0], [0]), ([0, 1], []), ([2], [2]), ([2, 3], []), ([4], [4])],
    NEXT_STEP: [([0], [0]), ([0, 1], [0, 1]), ([], []), ([3], [3]), ([3, 4], [3, 4])],
}


@pytest.mark.parametrize("mode", REACHED)
def test_no_gradient_crosses_an_autoreset(mode):
    env = make_env(make_model(ends=True), horizon=2, autoreset_mode=mode, termination="none")
    env.reset(seed=0)
    actions = uniform((5, 3, A)).requires_grad_()
    for t, (by_reward, by_latent) in enumerate(REACHED[mode]):
        z, reward, _, _, info = env.step(actions[t])
        outputs = [(reward, by_reward), (info["continue_prob"], by_reward), (z @ VALUE, by_latent)]
        for output, expected in outputs:
            reached = (gradient_or_zero(output.sum(), actions) != 0).all(-1).all(-1)  # (5,)
            assert torch.nonzero(reached).flatten().tolist() == expected
            assert (gradient_or_zero(output.sum(), actions)[~reached] == 0).all()


def test_no_gradient_crosses_a_masked_reset_and_the_other_envs_keep_theirs():
    env = make_env(autoreset_mode=DISABLED)
    env.reset(seed=0)
    actions = uniform((3, 3, A)).requires_grad_()
    env.step(actions[0])
    before, *_ = env.step(actions[1])
    z, _ = env.reset(options={"reset_mask": np.array([False, True, False])})
    assert torch.equal(z[[0, 2]], before[[0, 2]])
    assert not torch.equal(z[1], before[1])
    _, reward, *_ = env.step(actions[2])
    for i in range(3):
        gradient = gradient_or_zero(reward[i], actions)
        assert (gradient[2, i] != 0).all()
        assert (gradient[:2, i] != 0).all() == (i != 1)
        others = [j for j in range(3) if j != i]
        assert (gradient[:, others] == 0).all()


def test_final_obs_carries_the_gradient_that_the_returned_latents_have_lost():
    env = make_env(horizon=2)
    env.reset(seed=0)
    actions = uniform((2, 3, A)).requires_grad_()
    env.step(actions[0])
    z, _, _, truncated, info = env.step(actions[1])
    assert truncated.all() and info["_final_obs"].all()
    assert not z.requires_grad
    assert (torch.autograd.grad((info["final_obs"] @ VALUE).sum(), actions)[0] != 0).all()


def test_changing_the_mask_after_a_reset_does_not_change_the_gradient():
    gradients = []
    for later in (False, True):
        env = make_env(autoreset_mode=DISABLED)
        env.reset(seed=0)
        actions = uniform((2, 3, A)).requires_grad_()
        env.step(actions[0])
        mask = np.array([False, True, False])
        env.reset(options={"reset_mask": mask})
        mask[:] = later
        gradients.append(torch.autograd.grad(env.step(actions[1])[1].sum(), actions)[0])
    assert torch.equal(*gradients)


def test_detach_cuts_the_graph_and_changes_no_number():
    def rewards(detach: bool) -> tuple[Tensor, Tensor]:
        env = make_env(horizon=9)
        env.reset(seed=0)
        actions = uniform((3, 3, A)).requires_grad_()
        env.step(actions[0])
        before, *_ = env.step(actions[1])
        if detach:
            z = env.detach()
            assert torch.equal(z, before) and not z.requires_grad
        _, reward, *_ = env.step(actions[2])
        return reward, torch.autograd.grad(reward.sum(), actions)[0]

    (reward, gradient), (cut_reward, cut_gradient) = rewards(detach=False), rewards(detach=True)
    assert torch.equal(reward, cut_reward)
    assert torch.equal(gradient[2], cut_gradient[2])
    assert (gradient[:2] != 0).all() and (cut_gradient[:2] == 0).all()


def test_no_grad_gives_the_same_numbers_without_a_graph():
    def latents() -> Tensor:
        env = make_env()
        env.reset(seed=0)
        actions = uniform((6, 3, A)).requires_grad_()
        return torch.stack([torch.cat([*env.step(a)[:2]][:1]) for a in actions])

    with torch.no_grad():
        without = latents()
    assert not without.requires_grad
    assert torch.equal(without, latents())


def test_parameters_get_gradients_unless_they_are_frozen():
    model = make_model().requires_grad_(True)
    env = make_env(model)
    env.reset(seed=0)
    _, reward, *_ = env.step(uniform((3, A)))
    reward.sum().backward()
    assert all(p.grad is not None for p in model.reward_head.parameters())
    assert all(p.grad is None for p in model.encoder.parameters())  # starts are data


# Autoreset modes against a loop over single envs


class OneEnv:
    """One imagined env, written out; the caller resets it."""

    def __init__(self, model: WorldModel, horizon: int) -> None:
        self.model, self.horizon = model, horizon
        self.needs_reset = False

    def reset(self, observation: Tensor) -> Tensor:
        self.z, self.elapsed, self.needs_reset = self.model.encode(observation[None]), 0, False
        return self.z[0]

    def step(self, action: Tensor) -> tuple[Tensor, float, bool, bool, float]:
        reward = float(self.model.reward(self.z, action[None]))
        self.z = self.model.next(self.z, action[None])
        end = float(self.model.termination(self.z))
        self.elapsed += 1
        terminated, truncated = end > 0.5, self.elapsed >= self.horizon
        self.needs_reset = terminated or truncated
        return self.z[0], reward, terminated, truncated, 1 - end


@every_mode
def test_autoreset_equals_a_loop_over_single_envs(mode):
    model, steps, num_envs = make_model(ends=True), 30, 5
    starts = uniform((200, O), seed=7)
    env = make_env(model, queue(starts), num_envs=num_envs, autoreset_mode=mode)
    pending = iter(starts)
    singles = [OneEnv(model, horizon=4) for _ in range(num_envs)]
    z, info = env.reset(seed=0)
    assert info == {}
    torch.testing.assert_close(z, torch.stack([single.reset(next(pending)) for single in singles]))
    actions = 1.2 * uniform((steps, num_envs, A), seed=5)
    terminations = truncations = alone = 0
    for t in range(steps):
        waiting = np.array([single.needs_reset for single in singles])
        if mode == DISABLED and waiting.any():
            z, _ = env.reset(options={"reset_mask": waiting})
            for i in np.flatnonzero(waiting):
                torch.testing.assert_close(z[i], singles[i].reset(next(pending)), rtol=1e-12, atol=1e-12)
        rows = []
        for i, single in enumerate(singles):
            if mode == NEXT_STEP and waiting[i]:
                rows.append((single.reset(next(pending)), 0.0, False, False, 1.0, None))
                continue
            latent, *rest = single.step(actions[t, i].clamp(-1, 1))
            final = None
            if mode == SAME_STEP and single.needs_reset:
                final, latent = latent, single.reset(next(pending))
            rows.append((latent, *rest, final))
        latents, rewards, terminated, truncated, goes_on, finals = zip(*rows, strict=True)
        got = env.step(actions[t])
        exact: Any = {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(got[0], torch.stack(latents), **exact)
        torch.testing.assert_close(got[1], torch.tensor(rewards, dtype=torch.float64), **exact)
        assert got[2].tolist() == list(terminated) and got[3].tolist() == list(truncated)
        info = got[4]
        torch.testing.assert_close(info["continue_prob"], torch.tensor(goes_on, dtype=torch.float64), **exact)
        ended = [final is not None for final in finals]
        assert set(info) == {"continue_prob"} | ({"final_obs", "_final_obs"} if any(ended) else set())
        if any(ended):
            assert info["_final_obs"].tolist() == ended
            for i in np.flatnonzero(ended):
                torch.testing.assert_close(info["final_obs"][i], finals[i], **exact)
        terminations, truncations = terminations + sum(terminated), truncations + sum(truncated)
        alone += 0 < sum(terminated) + sum(truncated) < num_envs
    assert min(terminations, truncations, alone) > 3  # otherwise this test tests nothing


@every_mode
def test_horizon_is_a_truncation_and_never_a_termination(mode):
    env = make_env(horizon=2, autoreset_mode=mode)
    env.reset(seed=0)
    flags = []
    for _ in range(2):
        _, _, terminated, truncated, info = env.step(torch.zeros(3, A))
        flags.append(truncated.tolist())
        assert terminated.dtype == truncated.dtype == torch.bool
        assert not terminated.any()
        assert (info["continue_prob"] == 1).all()
    assert flags == [[False] * 3, [True] * 3]


@every_mode
def test_a_masked_reset_gives_its_envs_a_whole_horizon(mode):
    env = make_env(horizon=3, autoreset_mode=mode)
    env.reset(seed=0)
    zeros = torch.zeros(3, A)
    env.step(zeros)
    env.step(zeros)
    env.reset(options={"reset_mask": np.array([True, False, False])})
    assert env.step(zeros)[3].tolist() == [False, True, True]
    if mode == DISABLED:
        env.reset(options={"reset_mask": np.array([False, True, True])})
    assert env.step(zeros)[3].tolist() == [False, False, False]
    # Env 0 has made its third step, the others their second, or in NEXT_STEP, where one went to the reset, their first.
    assert env.step(zeros)[3].tolist() == [True, False, False]


def test_a_masked_reset_ends_the_wait_of_next_step_autoreset():
    env = make_env(horizon=1, autoreset_mode=NEXT_STEP)
    env.reset(seed=0)
    env.step(torch.zeros(3, A))
    z, _ = env.reset(options={"reset_mask": np.array([True, False, False])})
    led_to, reward, _, truncated, _ = env.step(torch.zeros(3, A))
    assert truncated.tolist() == [True, False, False]
    assert (reward != 0).tolist() == [True, False, False]
    assert torch.equal(led_to[:1], env.world_model.next(z, torch.zeros(3, A, dtype=z.dtype))[:1])


# Predicted termination


def test_terminations_are_thresholded():
    model = make_model()
    set_end_probability(model, 0.6)
    for threshold, ends in [(0.5, True), (0.59, True), (0.61, False), (0.9, False)]:
        env = make_env(model, termination_threshold=threshold)
        env.reset(seed=0)
        _, _, terminated, truncated, info = env.step(torch.zeros(3, A))
        assert terminated.tolist() == [ends] * 3 and not truncated.any()
        torch.testing.assert_close(info["continue_prob"], torch.full((3,), 0.4, dtype=torch.float64))
        assert ("final_obs" in info) == ends


def test_terminations_are_sampled_with_their_probability():
    model = make_model()
    set_end_probability(model, 0.3)
    env = make_env(model, num_envs=500, horizon=100, termination="sample")
    env.reset(seed=0)
    ends = torch.stack([env.step(torch.zeros(500, A))[2] for _ in range(10)])
    assert abs(float(ends.double().mean()) - 0.3) < 0.02  # three standard deviations of 5000 samples
    assert not torch.equal(ends[0], ends[1])


def test_terminations_are_not_heeded_if_so_chosen_and_continue_prob_still_tells_of_them():
    model = make_model()
    set_end_probability(model, 0.99)
    env = make_env(model, termination="none")
    env.reset(seed=0)
    _, _, terminated, _, info = env.step(torch.zeros(3, A))
    assert not terminated.any()
    torch.testing.assert_close(info["continue_prob"], torch.full((3,), 0.01, dtype=torch.float64))


@pytest.mark.parametrize("termination", ["threshold", "sample", "none"])
def test_a_model_that_never_saw_an_end_predicts_none(termination):
    model = make_model()
    set_end_probability(model, 0.99)
    model.load_state_dict(model.state_dict() | {"seen_termination": torch.zeros(())})
    for model_without in (model, make_model(termination_head=False)):
        env = make_env(model_without, termination=termination)
        env.reset(seed=0)
        _, _, terminated, _, info = env.step(torch.zeros(3, A))
        assert not terminated.any() and (info["continue_prob"] == 1).all()


def test_a_termination_at_the_horizon_sets_both_flags():
    model = make_model()
    set_end_probability(model, 0.9)
    env = make_env(model, horizon=1)
    env.reset(seed=0)
    _, _, terminated, truncated, _ = env.step(torch.zeros(3, A))
    assert terminated.all() and truncated.all()


def test_continue_prob_is_differentiable():
    model = make_model(ends=True)
    env = make_env(model, termination="none")
    z, _ = env.reset(seed=0)
    action = uniform((3, A)).requires_grad_()
    *_, info = env.step(action)
    (gradient,) = torch.autograd.grad(info["continue_prob"].sum(), action)
    (expected,) = torch.autograd.grad(torch.sigmoid(-model.termination_logits(model.next(z, action))).sum(), action)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    assert (gradient != 0).all()


# Seeds


def trajectory(env: LatentVectorEnv, seed: int | None, steps: int = 12) -> list[Any]:
    face = env.numpy()
    rng = np.random.default_rng(0)
    result: list[Any] = [face.reset(seed=seed)]
    for _ in range(steps):
        result.append(face.step(rng.uniform(-1, 1, (env.num_envs, A)).astype(np.float32)))
        if env.autoreset_mode == DISABLED and (result[-1][2] | result[-1][3]).any():
            result.append(face.reset(options={"reset_mask": result[-1][2] | result[-1][3]}))
    return result


@every_mode
@pytest.mark.parametrize("termination", ["threshold", "sample"])
def test_equal_seeds_give_equal_trajectories_and_others_do_not(mode, termination):
    def run(seed: int | None) -> list[Any]:
        return trajectory(make_env(make_model(ends=True), autoreset_mode=mode, termination=termination), seed)

    assert data_equivalence(run(3), run(3), exact=True)
    assert not data_equivalence(run(3), run(4))
    assert not data_equivalence(run(None), run(None))


def test_a_reset_without_a_seed_goes_on_and_one_with_a_seed_begins_anew():
    model = make_model()
    set_end_probability(model, 0.5)
    env = make_env(model, num_envs=20, termination="sample")
    first, again, other = trajectory(env, 3), trajectory(env, 3), trajectory(env, None)
    assert data_equivalence(first, again, exact=True)
    assert not data_equivalence(first, other)
    assert env.np_random_seed == 3


def test_seeds_may_be_numpy_integers_or_sequences():
    env = make_env()
    z = env.reset(seed=5)[0]
    assert torch.equal(z, env.reset(seed=np.int64(5))[0])  # type: ignore[arg-type]
    assert torch.equal(env.reset(seed=[1, 2, 3])[0], env.reset(seed=[1, 2, 3])[0])
    with pytest.raises(gym.error.Error, match="greater or equal to zero"):
        env.reset(seed=-1)


def test_setting_np_random_decides_starts_and_sampled_terminations():
    model = make_model()
    set_end_probability(model, 0.5)

    def run(seed: int) -> list[Any]:
        env = make_env(model, num_envs=20, termination="sample")
        env.reset(seed=100)
        env.np_random = np.random.default_rng(seed)
        return trajectory(env, None)

    assert data_equivalence(run(0), run(0), exact=True)
    assert not data_equivalence(run(0), run(1))


@every_mode
def test_no_global_random_numbers_are_used(mode):
    env = make_env(make_model(ends=True), gym.make("Pendulum-v1"), autoreset_mode=mode, termination="sample")
    state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    trajectory(env, None)
    trajectory(env, 0)
    assert torch.equal(state[0], torch.get_rng_state())
    assert (state[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert state[2] == random.getstate()


def test_spectral_norm_does_not_drift_even_if_the_model_was_left_in_training_mode():
    model = make_model(regularizer="spectral_norm")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    env = make_env(model.train())
    model.train()
    first = trajectory(env, 0)
    model.train()
    assert data_equivalence(first, trajectory(env, 0), exact=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# Starts


def nearest(z: Tensor, known: Tensor, tolerance: float = 1e-12) -> set[int]:
    """Find which of the known latents are in z, and assert that nothing else is."""
    distance, index = (z.unsqueeze(1) - known.detach()).abs().amax(-1).min(1)
    assert float(distance.max()) <= tolerance
    return set(index.tolist())


def test_starts_from_observations_are_their_latents():
    model, observations = make_model(), uniform((7, O))
    latents = model.encode(observations)
    as_float32 = observations.float().numpy()
    for start, exact in [(observations, True), (observations.numpy(), True), (as_float32, False)]:
        z, _ = make_env(model, start, num_envs=40).reset(seed=0)
        assert nearest(z, latents, 1e-12 if exact else 1e-6) == set(range(7))  # all of them, sooner or later
        assert z.dtype == torch.float64 and not z.requires_grad


def test_starts_from_latents_are_these():
    latents = uniform((7, Z)).requires_grad_()
    for given in (latents, latents.detach().numpy(), latents.detach().float()):
        env = make_env(latents=given, num_envs=40)
        z, _ = env.reset(seed=0)
        assert z.dtype == torch.float64 and not z.requires_grad
        assert nearest(z, latents, 1e-6) == set(range(7))


def test_starts_from_a_real_env_are_its_initial_states():
    env = make_env(start=gym.make("Pendulum-v1"), num_envs=3)
    model = env.world_model
    z, _ = env.reset(seed=0)
    seeds = np.random.default_rng(0).integers(2**31, size=3)
    real = np.stack([gym.make("Pendulum-v1").reset(seed=int(seed))[0] for seed in seeds])
    torch.testing.assert_close(z, model.encode(model.preprocess(real)))


def test_a_real_env_is_reset_once_for_each_start_that_is_needed():
    class Counted(gym.Wrapper):
        resets = 0

        def reset(self, **kwargs: Any) -> Any:
            self.resets += 1
            return super().reset(**kwargs)

    start = Counted(gym.make("Pendulum-v1"))
    env = make_env(start=start, horizon=2)
    env.reset(seed=0)
    assert start.resets == 3
    env.step(torch.zeros(3, A))
    env.reset(options={"reset_mask": np.array([False, True, False])})
    assert start.resets == 4
    assert env.step(torch.zeros(3, A))[3].tolist() == [True, False, True]
    assert start.resets == 6


def fill(buffer: ReplayBuffer, count: int = 6) -> np.ndarray:
    """Store `count` steps of two envs, and return all observations that may start a rollout, (2 count, O)."""
    observations = uniform((count + 1, 2, O)).numpy().astype(np.float32)
    as_stored: Any = (lambda o: {"o": o}) if isinstance(buffer, DictReplayBuffer) else (lambda o: o)
    for t in range(count):
        step = as_stored(observations[t]), as_stored(observations[t + 1]), np.zeros((2, A)), np.zeros(2)
        buffer.add(*step, np.zeros(2, bool), [{}, {}])
    return observations[:-1].reshape(-1, O)


@pytest.mark.parametrize("kind", [ReplayBuffer, SequenceReplayBuffer, DictReplayBuffer])
def test_starts_from_a_replay_buffer_are_its_observations(kind):
    box, actions = spaces.Box(-1, 1, (O,)), spaces.Box(-1, 1, (A,))
    space: Any = spaces.Dict(o=box) if kind is DictReplayBuffer else box
    buffer = kind(20, space, actions, "cpu", n_envs=2)
    model = make_model(observation_space=space)
    env = make_env(model, buffer, num_envs=100)
    with pytest.raises(ValueError, match="empty"):
        env.reset(seed=0)
    stored = torch.from_numpy(fill(buffer)).double()
    z, _ = env.reset(seed=0)
    assert nearest(z, model.encode(stored)) == set(range(12))


def test_starts_from_a_dataset_are_its_observations_but_each_last():
    rng = np.random.default_rng(0)
    episodes = [SimpleNamespace(observations=rng.uniform(-1, 1, (length, O))) for length in (3, 5)]
    dataset = SimpleNamespace(iterate_episodes=lambda: iter(episodes))
    model = make_model()
    z, _ = make_env(model, dataset, num_envs=100).reset(seed=0)
    expected = model.encode(torch.from_numpy(np.concatenate([episode.observations[:-1] for episode in episodes])))
    assert nearest(z, expected) == set(range(6))


def test_starts_from_dict_observations():
    space = spaces.Dict(b=spaces.Box(-1, 1, (1,)), a=spaces.Box(-1, 1, (2,)))
    model = make_model(observation_space=space)
    observations = {"a": uniform((5, 2)), "b": uniform((5, 1), seed=1)}
    z, _ = make_env(model, observations, num_envs=50).reset(seed=0)
    expected = model.encode(model.preprocess(observations))
    assert nearest(z, expected) == set(range(5))
    env = make_env(model, None, num_envs=5, latents=torch.zeros(1, Z))
    torch.testing.assert_close(env.reset(options={"observations": observations})[0], expected)


def test_starts_from_a_function():
    asked = []

    def sample(count: int, rng: np.random.Generator) -> Starts:
        asked.append((count, rng))
        return Starts(np.full((count, O), 0.5))

    env = make_env(start=sample)
    z, _ = env.reset(seed=0)
    assert asked == [(3, env.np_random)]
    torch.testing.assert_close(z, env.world_model.encode(torch.full((3, O), 0.5, dtype=torch.float64)))
    env = make_env(start=lambda count, rng: Starts(np.zeros((count + 1, O))))
    with pytest.raises(ValueError, match="expected 3 starts from the start sampler, got 4"):
        env.reset()


def test_reset_options_give_the_starts():
    env = make_env(autoreset_mode=DISABLED)
    observations, latents = uniform((3, O), seed=5), uniform((3, Z), seed=6)
    z, _ = env.reset(options={"observations": observations.numpy()})
    torch.testing.assert_close(z, env.world_model.encode(observations))
    z, _ = env.reset(options={"observations": np.broadcast_to(observations[0].numpy(), (3, O))})  # a read-only array
    torch.testing.assert_close(z, env.world_model.encode(observations[:1]).expand(3, Z))
    for given in (latents, latents.numpy(), np.broadcast_to(latents.numpy(), (3, Z)), latents.tolist()):
        z, _ = env.reset(options={"latents": given})
        torch.testing.assert_close(z, latents, rtol=0.0, atol=1e-6)
    latents[0] = 9.0
    assert not (env.detach()[0] == 9.0).any()


def test_reset_options_are_used_in_masked_rows_only():
    env = make_env(autoreset_mode=DISABLED)
    before, _ = env.reset(seed=0)
    observations = torch.full((3, O), torch.nan, dtype=torch.float64)
    observations[1] = 0.5
    z, _ = env.reset(options={"observations": observations, "reset_mask": np.array([False, True, False])})
    assert torch.equal(z[[0, 2]], before[[0, 2]])
    torch.testing.assert_close(z[1:2], env.world_model.encode(observations[1:2]))


def test_a_reset_mask_may_be_a_tensor():
    env = make_env(autoreset_mode=DISABLED, horizon=1)
    env.reset(seed=0)
    z, _, terminated, truncated, _ = env.step(torch.zeros(3, A))
    after, _ = env.reset(options={"reset_mask": terminated | truncated})
    assert (z != after).any(-1).all()


# Actions


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 0.3], np.float32)),
        spaces.Box(-0.4, 0.4, (2,), np.float64),
        spaces.Box(np.array([[-2.0, 0.0], [1.0, -1.0]]), np.array([[2.0, 0.3], [4.0, 1.0]]), dtype=np.float64),
    ],
)
def test_actions_are_scaled_from_their_space_to_the_models(space):
    model = make_model(action_dim=int(np.prod(space.shape)), action_space=space)
    env = make_env(model, horizon=99)
    assert env.action_space.shape == (3, *space.shape)
    z, _ = env.reset(seed=0)
    low, high = torch.from_numpy(space.low).double(), torch.from_numpy(space.high).double()
    for unit in (uniform((3, *space.shape)), torch.ones(3, *space.shape), -torch.ones(3, *space.shape)):
        actions = low + (unit + 1) / 2 * (high - low)
        expected_z, expected_reward = model(z, unit.flatten(1).double())
        z, reward, *_ = env.step(actions)
        torch.testing.assert_close(z, expected_z)
        torch.testing.assert_close(reward, expected_reward)


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (-2.0, 2.0), (-0.4, 0.4), (0.1, 0.7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_actions_outside_are_clipped_without_gradient_and_the_bounds_keep_theirs(bounds, dtype):
    low, high = bounds
    model = make_model(action_space=spaces.Box(low, high, (A,), np.float32)).to(dtype)
    env = make_env(model, num_envs=4, horizon=99)
    outside, at = (low - 0.5, high + 0.5), (float(np.float32(low)), float(np.float32(high)))
    rewards, gradients = [], []
    for pair in (outside, at):
        action = torch.tensor([[pair[0]] * A, [pair[1]] * A] * 2, dtype=dtype, requires_grad=True)
        env.reset(seed=0)
        _, reward, *_ = env.step(action)
        rewards.append(reward.detach())
        gradients.append(torch.autograd.grad(reward.sum(), action)[0])
    assert torch.equal(*rewards)
    assert (gradients[0] == 0).all()
    assert (gradients[1] != 0).all()


def test_actions_of_another_float_type_are_converted():
    env = make_env(horizon=99)
    results = []
    for dtype in (torch.float32, torch.float64):
        env.reset(seed=0)
        results.append(env.step(torch.full((3, A), 0.5, dtype=dtype))[1])
    assert torch.equal(*results) and results[0].dtype == torch.float64


def test_changing_actions_or_returned_flags_later_does_not_change_the_env():
    def run(meddle: bool) -> Tensor:
        env = make_env(horizon=2, autoreset_mode=NEXT_STEP)
        env.reset(seed=0)
        latents = []
        for _ in range(5):
            actions = torch.full((3, A), 0.5)
            z, reward, terminated, truncated, info = env.step(actions)
            latents.append(z.clone())
            if meddle:
                for tensor in (actions, reward, info["continue_prob"]):
                    tensor.fill_(7.0)
                terminated.fill_(True)
                truncated.fill_(True)
        return torch.stack(latents)

    assert torch.equal(run(meddle=False), run(meddle=True))


def test_rewards_are_in_task_units_or_in_symlog_units():
    task_units, symlog_units = make_model(), make_model(reward_in_task_units=False)
    rewards = []
    for model in (task_units, symlog_units):
        env = make_env(model)
        z, _ = env.reset(seed=0)
        rewards.append(env.step(uniform((3, A)))[1])
    torch.testing.assert_close(rewards[0], torch.sign(rewards[1]) * torch.expm1(rewards[1].abs()))
    assert (rewards[0].abs() > rewards[1].abs()).all()


# Multi-task models


def test_a_multi_task_model_imagines_the_chosen_task():
    model = make_model(num_tasks=3, task_dim=4)
    observations, actions = uniform((3, O)), uniform((3, A))
    latents = []
    for task in range(3):
        env = LatentVectorEnv(model, observations, 3, task=task)
        z, _ = env.reset(options={"observations": observations})
        torch.testing.assert_close(z, model.encode(observations, task))
        z_next, reward, *_ = env.step(actions)
        torch.testing.assert_close(z_next, model.next(z, actions, task))
        torch.testing.assert_close(reward, model.reward(z, actions, task))
        latents.append(z)
    assert not torch.equal(latents[0], latents[1])


@pytest.mark.parametrize(
    ("num_tasks", "task", "message"),
    [
        (3, None, r"`task` must be in 0\.\.2: this world model is multi-task, got None"),
        (3, 3, r"`task` must be in 0\.\.2.*got 3"),
        (3, -1, r"`task` must be in 0\.\.2.*got -1"),
        (0, 0, "`task` must be None, got 0"),
    ],
)
def test_a_task_that_the_model_lacks_is_refused(num_tasks, task, message):
    with pytest.raises(ValueError, match=message):
        make_env(make_model(num_tasks=num_tasks), task=task)


# Bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"horizon": 0}, "`horizon` must be >= 1, got 0. Use horizon=16"),
        ({"horizon": -3}, "`horizon` must be >= 1, got -3"),
        ({"num_envs": 0}, "`num_envs` must be >= 1, got 0"),
        ({"termination": "always"}, r"`termination` must be one of \('threshold', 'sample', 'none'\), got 'always'"),
        ({"termination_threshold": 1.0}, "`termination_threshold` must be between 0 and 1, got 1.0"),
        ({"render_mode": "human"}, "`render_mode` must be None or 'rgb_array', got 'human'"),
        ({"latents": torch.zeros(2, Z)}, "expected `start` or `latents`, got both"),
        ({"start": None, "latents": torch.zeros(2, Z + 1)}, r"`latents` must have shape \(N, 8\).*got \(2, 9\)"),
        ({"start": None, "latents": torch.zeros(0, Z)}, r"N >= 1, got \(0, 8\)"),
        ({"start": None, "latents": torch.zeros(Z)}, r"`latents` must have shape \(N, 8\).*got \(8,\)"),
        ({"start": np.zeros((0, O))}, "at least one start observation"),
        ({"autoreset_mode": "Sometimes"}, "Sometimes"),
    ],
)
def test_arguments_out_of_range_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LatentVectorEnv(make_model(), **{"start": np.zeros((2, O)), "num_envs": 3} | kwargs)


def test_arguments_of_the_wrong_kind_are_refused():
    with pytest.raises(TypeError, match="expected a WorldModel, got Linear"):
        LatentVectorEnv(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected start observations .* got int"):
        LatentVectorEnv(make_model(), 3)


def test_the_autoreset_mode_may_be_given_by_its_value():
    env = make_env(autoreset_mode="NextStep")  # type: ignore[arg-type]
    assert env.metadata["autoreset_mode"] is NEXT_STEP is env.autoreset_mode
    assert make_env().metadata["autoreset_mode"] is SAME_STEP


@pytest.mark.parametrize(
    ("actions", "error", "message"),
    [
        (torch.zeros(2, A), ValueError, r"expected actions of shape \(3, 2\), got \(2, 2\)"),
        (torch.zeros(3, A + 1), ValueError, r"expected actions of shape \(3, 2\), got \(3, 3\)"),
        (torch.zeros(A), ValueError, r"expected actions of shape \(3, 2\), got \(2,\)"),
        (torch.zeros(3, A, device="meta"), ValueError, r"expected actions on cpu, got meta.*\.to\(env\.device\)"),
        (np.zeros((3, A)), TypeError, r"expected a tensor of shape \(3, 2\), got ndarray.*latent_env\.numpy\(\)"),
        (0.5, TypeError, "expected a tensor of shape .* got float"),
    ],
)
def test_wrong_actions_are_refused_and_leave_the_env_as_it_was(actions, error, message):
    env = make_env(horizon=1)
    z, _ = env.reset(seed=0)
    with pytest.raises(error, match=message):
        env.step(actions)
    assert torch.equal(env.detach(), z)
    assert env.step(torch.zeros(3, A))[3].all()


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([True, False, False], TypeError, "must be a bool array, got list"),
        (np.array([1, 0, 0]), TypeError, "must be a bool array, got ndarray of int64"),
        (torch.tensor([1.0, 0.0, 0.0]), TypeError, "must be a bool array, got ndarray of float32"),
        (None, TypeError, "must be a bool array, got NoneType"),
        (np.array([True, False]), ValueError, r"must have shape \(3,\), got \(2,\)"),
        (np.ones((3, 1), bool), ValueError, r"must have shape \(3,\), got \(3, 1\)"),
        (np.zeros(3, bool), ValueError, "must select at least one env, got all False"),
    ],
)
def test_wrong_reset_masks_are_refused_and_leave_the_env_as_it_was(mask, error, message):
    env = make_env()
    z, _ = env.reset(seed=0)
    random_state = env.np_random.bit_generator.state
    with pytest.raises(error, match=message):
        env.reset(options={"reset_mask": mask})
    with pytest.raises(error, match=message):
        env.reset(seed=1, options={"reset_mask": mask})
    assert torch.equal(env.detach(), z)
    assert env.np_random.bit_generator.state == random_state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": torch.zeros(2, Z)}, r"`options\['latents'\]` must have shape \(3, 8\), got \(2, 8\)"),
        ({"latents": torch.zeros(3, O)}, r"`options\['latents'\]` must have shape \(3, 8\), got \(3, 3\)"),
        ({"observations": np.zeros((2, O))}, r"`options\['observations'\]` must have shape \(3, 3\), got \(2, 3\)"),
        ({"observations": np.zeros((3, O + 1))}, "expected observations of"),
        ({"observations": np.zeros((3, O)), "latents": torch.zeros(3, Z)}, "got .'latents', 'observations'."),
        ({"physics_state": np.zeros((3, 4))}, "'physics_state' only beside one of them"),
        (
            {"latents": torch.zeros(3, Z), "physics_state": np.zeros((2, 4))},
            r"`options\['physics_state'\]` must have shape \(3, P\), got \(2, 4\)",
        ),
    ],
)
def test_starts_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_env().reset(options=options)


def test_the_callers_options_are_not_changed():
    env = make_env(autoreset_mode=DISABLED)
    env.reset(seed=0)
    mask, observations = np.array([False, True, False]), np.zeros((3, O))
    options = {"reset_mask": mask, "observations": observations}
    for face in (env, env.numpy()):
        face.reset(options=options)
        assert options == {"reset_mask": mask, "observations": observations}
        assert mask.tolist() == [False, True, False] and not observations.any()


def test_an_env_must_be_reset_before_it_is_used():
    env = make_env(render_mode="rgb_array")
    assert not env.has_started
    for use in (lambda: env.step(torch.zeros(3, A)), env.detach, env.render):
        with pytest.raises(gym.error.ResetNeeded, match=r"call reset\(\)"):
            use()
    with pytest.raises(gym.error.ResetNeeded, match="the first reset must be of all envs"):
        env.reset(options={"reset_mask": np.array([True, False, False])})
    env.reset(options={"reset_mask": np.ones(3, bool)})
    assert env.has_started


def test_stepping_ended_envs_needs_a_reset_with_autoreset_disabled():
    env = make_env(horizon=1, autoreset_mode=DISABLED)
    env.reset(seed=0)
    env.step(torch.zeros(3, A))
    with pytest.raises(gym.error.ResetNeeded, match=r"envs \[0, 1, 2\] have ended.*reset_mask"):
        env.step(torch.zeros(3, A))
    env.reset(options={"reset_mask": np.array([False, True, False])})
    with pytest.raises(gym.error.ResetNeeded, match=r"envs \[0, 2\] have ended"):
        env.step(torch.zeros(3, A))
    env.reset(options={"reset_mask": np.array([True, False, True])})
    env.step(torch.zeros(3, A))


def test_an_env_without_starts_says_how_to_give_them():
    env = LatentVectorEnv(make_model(), num_envs=3, horizon=1)
    with pytest.raises(ValueError, match="no start states. Give `start` or `latents`"):
        env.reset()
    env.reset(options={"observations": np.zeros((3, O))})
    with pytest.raises(ValueError, match="no start states"):  # the horizon is reached, and nothing is there to draw
        env.step(torch.zeros(3, A))


# Registration


def test_make_vec_makes_it():
    model, start = make_model(), np.zeros((2, O))
    env: Any = gym.make_vec(
        "pwm_gym/Latent-v0", num_envs=5, world_model=model, start=start, horizon=7, autoreset_mode=DISABLED
    )
    assert isinstance(env, LatentVectorEnv)
    assert (env.num_envs, env.horizon, env.autoreset_mode) == (5, 7, DISABLED)
    assert env.unwrapped is env and env.spec.id == "pwm_gym/Latent-v0" == env.numpy().spec.id
    assert str(env) == "LatentVectorEnv(pwm_gym/Latent-v0, num_envs=5)"
    assert env.reset(seed=0)[0].shape == (5, Z)
    env.close()
    assert env.closed


def test_make_fails_because_it_is_a_vector_env():
    with pytest.raises(gym.error.Error, match="entry_point is not specified"):
        gym.make("pwm_gym/Latent-v0")


def test_closing_leaves_the_callers_envs_open():
    start = gym.make("pwm_gym/pendulum-swingup-v0")
    env = make_env(make_model(action_dim=1), start)
    env.reset(seed=0)
    env.close()
    start.reset(seed=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_mode
def test_the_models_device_decides(mode):
    results = []
    for device in ("cpu", "cuda"):
        model = make_model(ends=True).to(device)
        env = make_env(model, uniform((20, O), seed=9), autoreset_mode=mode, num_envs=5)
        assert env.device.type == device
        env.reset(seed=0)
        actions = uniform((10, 5, A)).to(device).requires_grad_()
        total = torch.zeros(5, dtype=torch.float64, device=device)
        for action in actions:
            z, reward, terminated, truncated, info = env.step(action)
            tensors = (z, reward, terminated, truncated, *info.values())
            assert {t.device.type for t in tensors} == {device}
            total = total + reward
            if mode == DISABLED and (terminated | truncated).any():
                env.reset(options={"reset_mask": terminated | truncated})
        results.append((total.cpu(), torch.autograd.grad(total.sum(), actions)[0].cpu()))
        env = make_env(model, uniform((20, O), seed=9), termination="sample")
        assert data_equivalence(trajectory(env, 0), trajectory(env, 0), exact=True)
    torch.testing.assert_close(results[0], results[1])


# Several tasks in one env


def make_multi_task_model() -> WorldModel:
    return make_model(tasks=("slow", "fast", "far"), task_dim=3, observation_dims=(2, 3, 3), action_dims=(1, 2, 2))


def test_rows_of_several_tasks_step_as_an_env_of_each_would():
    model, order = make_multi_task_model(), ("far", "slow")
    env = LatentVectorEnv(model, num_envs=4, horizon=5, task=order)
    latents, actions = uniform((4, Z), seed=1), uniform((4, A), seed=2)
    env.reset(options={"latents": latents})
    z, rewards, _, _, infos = env.step(actions)
    for k, task in enumerate(order):
        rows = slice(2 * k, 2 * k + 2)
        single = LatentVectorEnv(model, num_envs=2, horizon=5, task=task)
        single.reset(options={"latents": latents[rows]})
        own = single.single_action_space.shape[0]  # what stands in the padding has no effect
        expected_z, expected_rewards, _, _, expected_infos = single.step(actions[rows, :own])
        torch.testing.assert_close(z[rows], expected_z)
        torch.testing.assert_close(rewards[rows], expected_rewards)
        torch.testing.assert_close(infos["continue_prob"][rows], expected_infos["continue_prob"])


def test_observations_of_several_tasks_are_encoded_each_with_its_own():
    model = make_multi_task_model()
    env = LatentVectorEnv(model, num_envs=2, task=("fast", "slow"))
    observations = uniform((2, O), seed=3)
    observations[1, 2] = 0.0  # padding
    z, _ = env.reset(options={"observations": observations})
    torch.testing.assert_close(z, model.encode(observations.double(), torch.tensor([1, 0])))


@pytest.mark.parametrize(
    "arguments", [{"num_envs": 3}, {"num_envs": 4, "latents": torch.zeros(1, Z)}, {"num_envs": 4, "task": ()}]
)
def test_several_tasks_need_as_many_envs_each_and_no_start(arguments):
    with pytest.raises(ValueError, match="several tasks"):
        LatentVectorEnv(make_multi_task_model(), **{"task": ("far", "slow"), **arguments})


def test_sampled_observations_are_those_that_starts_are_encoded_from():
    env = make_env()
    observations = env.sample_observations(5, np.random.default_rng(4))
    latents = env.sample_starts(5, np.random.default_rng(4))
    assert torch.equal(env.world_model.encode(observations), latents)
