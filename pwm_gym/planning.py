"""Planning in a world model: TD-MPC2's model-predictive path integral control, for several envs in one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pwm_gym.bf16 import fixed_weights
from pwm_gym.world_model import WorldModel

__all__ = ["Plan", "PlanNoise", "Planner"]

Task = int | Tensor | None
Prior = Callable[[Tensor, Tensor, Task], Tensor]
Values = Callable[[Tensor, Tensor, Task], Tensor]

_NO_HEADS = "Make it with WorldModelConfig.preset(..., planning=True)"
_MANY_ACTIONS = 20  # from so many dimensions on, two more iterations by default, as published


class PlanNoise(NamedTuple):
    """All randomness of one plan. B is the number of envs, or 1 for noise that all of them share."""

    prior: Tensor  # (H, B, P, A), N(0, 1), of the prior's rollouts
    samples: Tensor  # (I, H, B, S - P, A), N(0, 1), of the sampled actions
    terminal: Tensor  # (I, B, S, A), N(0, 1), of the prior's actions at the end of each trajectory
    members: Tensor  # (I, 2), uniform in [0, 1): which two members of the value ensemble count
    choice: Tensor  # (B, K), Gumbel(0, 1): which elite is acted on
    action: Tensor  # (B, A), N(0, 1), of exploration


class Plan(NamedTuple):
    """What planning found."""

    actions: Tensor  # (B, A), in [-1, 1], to be executed now
    mean: Tensor  # (H, B, A), of the final distribution over action sequences; the next plan begins with it
    std: Tensor  # (H, B, A)
    elites: Tensor  # (H, B, K, A), the best sequences of the last iteration, best first
    values: Tensor  # (B, K), their estimated returns, in the units of the values


class Planner:
    """MPPI as in TD-MPC2 (arXiv:2310.16828, sec. 3.2; Williams et al. 2015) on any `WorldModel`.

    Sequences of H actions are drawn from a Gaussian for each step, and some from a policy prior that is rolled out in
    the model. Each is worth what the model predicts of it:

        G = Σ_{t<H} γ^t c_t r_t + γ^H c_H V(z_H),    c_t = Π_{s<t} (1 - end_s)

    where end_s is the predicted probability that step s ended the episode, V(z_H) the mean of two members, drawn at
    random, of Q(z_H, a ~ π(z_H)). The Gaussian then moves to the K best sequences, weighted by exp(τ (G_k - max G)),
    several times over; the action is the first of one of them, drawn by its weight.

    The defaults are the published settings. One thing departs from TD-MPC2's code: the probability of an end weighs
    what follows, where the code cuts off at one half.

    Args:
        world_model: The model, which is used as it is at the time of each plan.
        prior: (z (..., Z), noise (..., A), task) to actions in [-1, 1], (..., A); noise is N(0, 1), of as many
            dimensions as z, and may have size 1 where it is shared. None for the model's own policy prior.
        values: (z (..., Z), actions (..., A), task) to V of each member, (E, ...), in the units of the model's
            rewards. None for the model's own value ensemble.
        gamma: Discount γ; None for the model's own.
        horizon: Steps of a plan H.
        iterations: Iterations I; None for 6, or 8 from 20 action dimensions on.
        num_samples: Sequences in an iteration S, those of the prior included.
        num_elites: Sequences that the Gaussian is fitted to K.
        num_prior: Sequences from the prior P.
        min_std: Lower bound of the Gaussian's σ.
        max_std: Upper bound, and where it begins.
        temperature: τ of the weights.

    Raises:
        ValueError: If an argument is out of range, or the model has no prior or values of its own and none are given.

    Example:
        >>> from pwm_gym import WorldModelConfig
        >>> model = WorldModel(WorldModelConfig.preset("1M", observation_dim=5, action_dim=2, planning=True))
        >>> planner = Planner(model)
        >>> plan = planner.plan(model.encode(torch.zeros(3, 5)), planner.draw(3))
        >>> plan.actions.shape, plan.mean.shape
        (torch.Size([3, 2]), torch.Size([3, 3, 2]))
    """

    def __init__(
        self,
        world_model: WorldModel,
        prior: Prior | None = None,
        values: Values | None = None,
        gamma: float | None = None,
        horizon: int = 3,
        iterations: int | None = None,
        num_samples: int = 512,
        num_elites: int = 64,
        num_prior: int = 24,
        min_std: float = 0.05,
        max_std: float = 2.0,
        temperature: float = 0.5,
    ) -> None:
        if iterations is None:
            iterations = 8 if world_model.config.action_dim >= _MANY_ACTIONS else 6
        if min(horizon, iterations, num_elites) < 1 or not max(num_elites, num_prior) <= num_samples or num_prior < 0:
            raise ValueError(
                f"expected `horizon`, `iterations` and `num_elites` >= 1, `num_prior` >= 0, and `num_samples` not "
                f"below the latter two, got {horizon}, {iterations}, {num_elites}, {num_prior} and {num_samples}."
            )
        if not 0.0 < min_std <= max_std or temperature < 0.0 or not (gamma is None or 0.0 <= gamma <= 1.0):
            raise ValueError(
                f"expected 0 < min_std <= max_std, temperature >= 0 and gamma in [0, 1], got {min_std}, {max_std}, "
                f"{temperature} and {gamma}."
            )
        self.world_model, self.gamma = world_model, gamma
        if prior is None:
            self._check_own_prior()
        if values is None:
            self._check_own_values()
        self.prior: Prior = prior or self._own_prior
        self.values: Values = values or self._own_values
        self.horizon, self.iterations = horizon, iterations
        self.num_samples, self.num_elites, self.num_prior = num_samples, num_elites, num_prior
        self.min_std, self.max_std, self.temperature = min_std, max_std, temperature

    def _check_own_prior(self) -> None:
        if self.world_model.policy_prior is None:
            raise ValueError(
                f"expected a world model with a policy prior, got one without. {_NO_HEADS}, or give `prior`."
            )

    def _check_own_values(self) -> None:
        if self.world_model.value is None:
            raise ValueError(
                f"expected a world model with a value ensemble, got one without. {_NO_HEADS}, or give `values`."
            )
        if not self.world_model.config.reward_in_task_units:
            raise ValueError(
                "expected rewards in task units, as the value ensemble's are, got a world model with "
                "reward_in_task_units=False. Give `values` in the model's own units."
            )

    def _own_prior(self, z: Tensor, noise: Tensor, task: Task) -> Tensor:
        return self.world_model.prior(z, task, noise=noise).actions

    def _own_values(self, z: Tensor, actions: Tensor, task: Task) -> Tensor:
        return self.world_model.q(z, actions, task)

    def draw(self, num_envs: int = 1, generator: torch.Generator | None = None) -> PlanNoise:
        """Draw the randomness of a plan.

        Args:
            num_envs: Envs B that are planned for; 1 for noise that all of them share.
            generator: On the model's device; None for torch's global one.
        """
        model, actions = self.world_model, self.world_model.config.action_dim
        options = {"dtype": model.dtype, "device": model.device}

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, **options)  # type: ignore[call-overload]

        exponential = torch.empty(num_envs, self.num_elites, **options)  # type: ignore[call-overload]
        return PlanNoise(
            normal(self.horizon, num_envs, self.num_prior, actions),
            normal(self.iterations, self.horizon, num_envs, self.num_samples - self.num_prior, actions),
            normal(self.iterations, num_envs, self.num_samples, actions),
            torch.rand(self.iterations, 2, generator=generator, **options),  # type: ignore[call-overload]
            exponential.exponential_(generator=generator).log().neg(),
            normal(num_envs, actions),
        )

    @torch.no_grad()
    @fixed_weights()
    def plan(
        self,
        z: Tensor,
        noise: PlanNoise,
        previous: Tensor | None = None,
        episode_start: Tensor | None = None,
        deterministic: bool = False,
        task: Task = None,
    ) -> Plan:
        """Plan for each env. It depends on nothing but the arguments and the model.

        Args:
            z: Latents of the present states, (B, Z).
            noise: As `draw` gives it, for B envs or for one.
            previous: `Plan.mean` of the step before, (H, B, A), which is begun with, a step on; None to begin at 0.
            episode_start: Which envs begin at 0 because their episode does, (B,), bool; None for none of them.
            deterministic: Leave exploration noise out.
            task: Index of the task, or one for each env, (B,); None for a single-task model.

        Raises:
            ValueError: If `previous` is not of this planner's shape.
        """
        task = task.unsqueeze(-1) if isinstance(task, Tensor) and task.ndim else task  # (B, 1), for all S sequences
        mask = self.world_model.action_mask(task)  # (A,) or (B, 1, A)
        step_mask = mask.squeeze(-2) if mask.ndim > 1 else mask  # (A,) or (B, A)
        mean = self._begin(z, previous, episode_start)  # (H, B, A)
        std = torch.full_like(mean, self.max_std)
        from_prior = self._roll_out_prior(z, noise.prior, task) * mask  # (H, B, P, A)
        for i in range(self.iterations):
            # Sample
            drawn = (mean.unsqueeze(2) + std.unsqueeze(2) * noise.samples[i]).clamp(-1.0, 1.0) * mask
            sequences = torch.cat([from_prior, drawn], 2)  # (H, B, S, A)
            # Evaluate
            returns = self._estimate(z, sequences, noise.terminal[i], noise.members[i], task)  # (B, S)
            values, best = returns.topk(self.num_elites, 1)  # (B, K)
            index = best[None, :, :, None].expand(self.horizon, -1, -1, mean.shape[-1])
            elites = sequences.gather(2, index)  # (H, B, K, A)
            # Fit
            weights = torch.softmax(self.temperature * values, 1)  # (B, K)
            mean = (weights[..., None] * elites).sum(2)  # (H, B, A)
            variance = (weights[..., None] * (elites - mean.unsqueeze(2)).square()).sum(2)
            std = variance.sqrt().clamp(self.min_std, self.max_std) * step_mask
        chosen = (weights.log() + noise.choice).argmax(1)  # (B,), by Gumbel's trick
        actions = elites[0, torch.arange(len(z), device=z.device), chosen]  # (B, A)
        if not deterministic:
            actions = (actions + std[0] * noise.action).clamp(-1.0, 1.0)
        return Plan(actions, mean, std, elites, values)

    def _begin(self, z: Tensor, previous: Tensor | None, episode_start: Tensor | None) -> Tensor:
        """Move the previous mean a step on, and to 0 where an episode begins."""
        shape = (self.horizon, len(z), self.world_model.config.action_dim)
        if previous is None:
            return z.new_zeros(shape)
        if previous.shape != shape:
            raise ValueError(
                f"expected the mean of a plan for as many envs and of the same horizon, (H, B, A) = {shape}, got "
                f"{tuple(previous.shape)}. Begin anew with None."
            )
        mean = torch.cat([previous[1:], torch.zeros_like(previous[:1])])
        return mean if episode_start is None else torch.where(episode_start[:, None], 0.0, mean)

    def _roll_out_prior(self, z: Tensor, noise: Tensor, task: Task) -> Tensor:
        """Let the prior act from z, (B, Z), with noise (H, B, P, A): sequences of actions, (H, B, P, A)."""
        z = z.unsqueeze(1).expand(-1, self.num_prior, -1)  # (B, P, Z)
        actions = []
        for t in range(self.horizon):
            actions.append(self.prior(z, noise[t], task))
            if t + 1 < self.horizon:
                z = self.world_model.next(z, actions[-1], task)
        return torch.stack(actions)

    def _estimate(self, z: Tensor, sequences: Tensor, noise: Tensor, members: Tensor, task: Task) -> Tensor:
        """Estimate returns, (B, S), of sequences (H, B, S, A) from z, (B, Z)."""
        model = self.world_model
        gamma = model.discount(task) if self.gamma is None else self.gamma
        z = z.unsqueeze(1).expand(-1, sequences.shape[2], -1)  # (B, S, Z)
        returns: Tensor | float = 0.0
        weight: Tensor | float = 1.0  # γ^t c_t
        for actions in sequences:
            z, reward = model(z, actions, task)  # (B, S, Z), (B, S)
            returns = returns + weight * reward
            weight = weight * gamma
            if model.predicts_termination:
                weight = weight * (1.0 - model.termination(z, task))
        values = self.values(z, self.prior(z, noise, task), task)  # (E, B, S)
        return returns + weight * values[_pair(members, len(values))].mean(0)


def _pair(uniform: Tensor, count: int) -> Tensor:
    """Choose two different members out of `count`, or the only one twice, by numbers in [0, 1), (2,)."""
    first = (uniform[0] * count).long()
    return torch.stack([first, (first + 1 + (uniform[1] * (count - 1)).long()) % count])
