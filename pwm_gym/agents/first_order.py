"""First-order actor-critic updates on any differentiable VectorEnv: what PWM and SHAC share.

Where several policies are trained in one program (`PolicyBank`), B stands for (K, B): K tasks of B envs each. Means are
then taken within a task, and losses summed over tasks, so that each policy gets the gradient that it would get alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol

import torch
from stable_baselines3.common.utils import polyak_update
from torch import Tensor, nn

from pwm_gym.bf16 import fixed_weights
from pwm_gym.differentiable import DifferentiableVectorEnv
from pwm_gym.functional import clip_gradients, td_lambda_returns
from pwm_gym.networks import Stacked

__all__ = [
    "ActorCritic",
    "Rollout",
    "critic_targets",
    "fit_critic",
    "improve_actor",
    "improve_policy",
    "rollout",
    "rollout_returns",
]


CRITIC_MAX_GRAD_NORM = 100.0  # as in PWM
_ROWS = 512  # of which target values are computed at once: all need more memory than the rollout's graph did


class Policy(Protocol):
    """What `rollout` asks of an actor; `LatentActor` is one."""

    use_sde: bool

    def sample_noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw noise for `count` observations, (count, ...)."""

    def __call__(self, z: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Give actions in [-1, 1], (B, A), and -log π(a|z), (B,)."""


@dataclass
class Rollout:
    """H steps of B envs under the current policy, time first. Rewards, entropy and `boundaries` have their graph."""

    observations: Tensor  # (H, B, Z), what the policy acted on
    next_observations: Tensor  # (H, B, Z), where each step led, before any reset
    boundaries: dict[int, Tensor]  # the same with its graph, (B, Z), of each step t that may end an env's segment
    rewards: Tensor  # (H, B)
    continues: Tensor  # (H, B), in [0, 1]: probability that the episode goes on after the step
    ends: Tensor  # (H, B), bool: last step of its segment
    entropy: Tensor  # (H, B), -log π(a|z)
    finished: Tensor  # (H, B), bool: the step terminated or truncated its episode
    stiffness: Tensor | None  # (H, B), infos["jacobian_norm"] where the env tells it

    def by_task(self, count: int) -> Rollout:
        """View the envs as `count` tasks of as many envs each: (H, B, ...) as (H, K, B, ...)."""

        def view(x: Any) -> Any:
            if isinstance(x, dict):
                return {t: z.unflatten(0, (count, -1)) for t, z in x.items()}
            return x.unflatten(1, (count, -1)) if isinstance(x, Tensor) else x

        return Rollout(*(view(getattr(self, field.name)) for field in fields(self)))

    def survival(self) -> Tensor:
        """Compute the chance that the episode reaches each step of its segment, C_k = Π_{j<k} c_j, (H, B), detached."""
        chance, chances = torch.ones_like(self.continues[0]), []
        for continues, ends in zip(self.continues.detach(), self.ends, strict=True):
            chances.append(chance)
            chance = torch.where(ends, torch.ones_like(chance), chance * continues)
        return torch.stack(chances)

    def detach_(self) -> None:
        """Let go of the graph. Its nodes, small as they are, would keep what it held from being used again."""
        self.boundaries = {}
        for name in ("rewards", "continues", "entropy"):
            setattr(self, name, getattr(self, name).detach())
        self.stiffness = None if self.stiffness is None else self.stiffness.detach()


class ActorCritic(NamedTuple):
    """What `improve_policy` improves, of one policy or of several in one program."""

    actor: nn.Module
    critic: nn.Module  # V
    target: nn.Module  # its slowly moving copy, frozen
    actor_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer
    scale: Callable[[Tensor], Tensor]  # gives the returns' deviation, () from (B,)
    entropy_coefficient: Callable[[Tensor], Tensor]  # gives the entropy's weight, () from the mean entropy ()
    generator: (
        torch.Generator | Sequence[torch.Generator] | None
    )  # of the critic's minibatches; one for each of K tasks


def _to_action_space(env: DifferentiableVectorEnv, actions: Tensor) -> Tensor:
    """Scale actions in [-1, 1], (B, A), to the env's action space, (B, *shape)."""
    space = env.single_action_space
    low = torch.as_tensor(space.low, device=actions.device).flatten()  # type: ignore[attr-defined]
    high = torch.as_tensor(space.high, device=actions.device).flatten()  # type: ignore[attr-defined]
    return (low + (actions + 1.0) * 0.5 * (high - low)).reshape(env.action_space.shape)  # type: ignore[arg-type]


@fixed_weights()
def rollout(
    env: DifferentiableVectorEnv,
    observations: Tensor,
    actor: Policy,
    horizon: int,
    generator: torch.Generator | None = None,
    detach_input: bool = False,
) -> Rollout:
    """Let the actor drive the env for `horizon` steps, with gradients.

    Args:
        env: The env, reset or detached, whose current observations are `observations`.
        observations: (B, Z).
        actor: The policy.
        horizon: Steps H.
        generator: Of the actor's noise.
        detach_input: Hide the latents' gradient from the actor, so that it only learns through its actions' effects.
            The reference does so; passing the gradient learned better here.
    """
    path: list[tuple[Tensor, Tensor]] = []
    boundaries: dict[int, Tensor] = {}
    columns: list[tuple[Tensor, ...]] = []
    norms: list[Tensor] = []
    for t in range(horizon):
        seen = observations.detach() if detach_input else observations
        if t == 0 or not actor.use_sde:  # gSDE keeps its exploration matrices for the whole rollout
            noise = actor.sample_noise(env.num_envs, generator)
        actions, entropy = actor(seen, noise)  # (B, A), (B,)
        following, rewards, terminated, truncated, infos = env.step(_to_action_space(env, actions))
        led_to = following
        if "final_obs" in infos:
            led_to = torch.where(infos["_final_obs"].unsqueeze(-1), infos["final_obs"], following)
        if "final_obs" in infos or t == horizon - 1:
            boundaries[t] = led_to
        path.append((observations.detach(), led_to.detach()))
        finished = terminated | truncated
        ends = finished if t < horizon - 1 else torch.ones_like(terminated)
        columns.append((rewards, infos["continue_prob"], ends, entropy, finished))
        if "jacobian_norm" in infos:
            norms.append(infos["jacobian_norm"])
        observations = following
    acted_on, led_to_each = zip(*path, strict=True)
    if len(boundaries) == 1:  # each step led to where the next one began: one copy holds both
        whole = torch.stack((*acted_on, led_to_each[-1]))  # (H + 1, B, Z)
        seen, then = whole[:-1], whole[1:]
    else:
        seen, then = torch.stack(acted_on), torch.stack(led_to_each)
    rewards, continues, last, entropies, done = (torch.stack(column) for column in zip(*columns, strict=True))
    stiffness = torch.stack(norms) if norms else None
    env.detach()  # the graph is the rollout's alone
    return Rollout(seen, then, boundaries, rewards, continues, last, entropies, done, stiffness)


def rollout_returns(window: Rollout, critic: nn.Module, gamma: float, bootstrap_discount: float = 1.0) -> Tensor:
    """Compute the differentiable objective of the actor: each env's discounted return with bootstrapped values.

        J = Σ_segments [Σ_k γ^k C_k r_k + δ γ^n C_n min_e V_e(z_n)],    C_k = Π_{j<k} c_j

    SHAC (arXiv:2204.07137, eq. 5) and PWM (arXiv:2407.02466, eq. 4) with the continuation probabilities c in the
    discount. There δ = 1; PWM's released code weights V(z_H) by γ^(H+1), that is, δ = γ.

    Args:
        window: The rollout.
        critic: V, frozen.
        gamma: Discount γ.
        bootstrap_discount: δ.

    Returns:
        J, (B,), in task units.
    """
    horizon = len(window.rewards)
    discount = torch.ones_like(window.rewards[0])
    total = torch.zeros_like(discount)
    for t in range(horizon):
        total = total + discount * window.rewards[t]
        discount = gamma * window.continues[t] * discount
        if t in window.boundaries:
            ends = window.ends[t]
            value = bootstrap_discount * critic(window.boundaries[t]).amin(0)
            total = torch.where(ends, total + discount * value, total)
            discount = torch.where(ends, torch.ones_like(discount), discount)
    return total


def improve_actor(
    window: Rollout,
    actor: nn.Module,
    critic: nn.Module,
    optimizer: torch.optim.Optimizer,
    scale: Callable[[Tensor], Tensor],
    entropy_coefficient: Callable[[Tensor], Tensor],
    gamma: float,
    max_grad_norm: float,
    bootstrap_discount: float = 1.0,
) -> dict[str, Tensor]:
    """Step the actor up the gradient of the rollout's returns, in units of their deviation, and of its entropy.

    Args:
        window: The rollout, with its graph, which is freed.
        actor: Its parameters are learned.
        critic: V, frozen.
        optimizer: The actor's.
        scale: Gives the returns' deviation, () from (B,).
        entropy_coefficient: Gives the entropy's weight, () from the mean entropy ().
        gamma: Discount γ.
        max_grad_norm: Gradient clip.
        bootstrap_discount: As in `rollout_returns`.

    Returns:
        Metrics, () each; (K,) for K tasks.
    """
    returns = rollout_returns(window, critic, gamma, bootstrap_discount)  # (B,)
    entropy = window.entropy.mean((0, -1))
    deviation = scale(returns.detach())
    loss = -returns.mean(-1) / deviation - entropy_coefficient(entropy) * entropy
    optimizer.zero_grad(set_to_none=True)
    loss.sum().backward()
    grad_norm = _clip(actor, max_grad_norm)
    optimizer.step()
    return {
        "actor_loss": loss.detach(),
        "actor_grad_norm": grad_norm,
        "return": returns.detach().mean(-1),
        "reward": window.rewards.detach().mean((0, -1)),
        "entropy": entropy.detach(),
    }


def _clip(module: nn.Module, max_norm: float) -> Tensor:
    """Scale a module's gradient down to a norm of at most `max_norm`, of a `Stacked` one each member's by itself.

    Returns:
        The norm before, (); (K,) for K stacked members.
    """
    if not isinstance(module, Stacked):
        return clip_gradients(module.parameters(), max_norm)
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    norm = torch.stack([grad.flatten(1).norm(dim=1) for grad in grads]).norm(dim=0)  # (K,)
    share = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as PyTorch's own
    for grad in grads:
        grad.mul_(share.view(-1, *[1] * (grad.ndim - 1)))
    return norm


@torch.no_grad()
def critic_targets(window: Rollout, critic: nn.Module, gamma: float, td_lambda: float) -> Tensor:
    """Compute TD(λ) targets, (H, B), from the ensemble's minimum (PWM, eq. 5; see `td_lambda_returns`)."""
    steps = max(1, _ROWS // window.rewards[0].numel())
    next_values = torch.cat([critic(part).amin(0) for part in window.next_observations.split(steps)])  # (H, B)
    return td_lambda_returns(window.rewards, next_values, window.ends, gamma, td_lambda, window.continues)


def _pick(x: Tensor, rows: Tensor) -> Tensor:
    """Pick rows (N,) of x (M, ...), or (K, N) of (K, M, ...), of each task its own."""
    if rows.ndim == 1:
        return x.index_select(0, rows)  # on CPUs three times as fast as x[rows]
    return x[torch.arange(len(rows), device=rows.device).unsqueeze(-1), rows]


def fit_critic(
    critic: nn.Module,
    optimizer: torch.optim.Optimizer,
    observations: Tensor,
    targets: Tensor,
    weights: Tensor,
    epochs: int,
    minibatches: int,
    max_grad_norm: float,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> dict[str, Tensor]:
    """Regress every member of the critic on the targets, over shuffled minibatches.

        L = mean_{t,b} C_t mean_e (V_e(z_t) - y_t)²

    C is the chance that the episode got as far (`Rollout.survival`), as in DreamerV3 (arXiv:2301.04104): what a model
    imagines beyond an end that it foresees has no value, and its latents are of no kind that data has.

    Args:
        critic: V.
        optimizer: The critic's.
        observations: (H, B, Z).
        targets: (H, B).
        weights: C, (H, B).
        epochs: Passes over the rollout.
        minibatches: Minibatches in a pass.
        max_grad_norm: Gradient clip.
        generator: Of the shuffling; one for each of K tasks.

    Returns:
        Metrics, () each; (K,) for K tasks.
    """
    lead = targets.ndim - 2  # 1 where there is an axis of tasks, else 0
    inputs, goals, shares = (
        x.detach().movedim(0, lead).flatten(lead, lead + 1) for x in (observations, targets, weights)
    )
    count, device = goals.shape[-1], goals.device  # H B rows, (H B, Z) and twice (H B,), of each task
    losses = []
    for _ in range(epochs):
        if isinstance(generator, Sequence):
            order = torch.stack([torch.randperm(count, generator=g, device=device) for g in generator])  # (K, H B)
        else:
            order = torch.randperm(count, generator=generator, device=device)
        for chosen in order.chunk(minibatches, -1):
            errors = (critic(_pick(inputs, chosen)) - _pick(goals, chosen)).square()  # (E, N)
            loss = (_pick(shares, chosen) * errors).mean((0, -1))
            optimizer.zero_grad(set_to_none=True)
            loss.sum().backward()
            grad_norm = _clip(critic, max_grad_norm)
            optimizer.step()
            losses.append(loss.detach())
    return {"critic_loss": torch.stack(losses).mean(0), "critic_grad_norm": grad_norm}


def improve_policy(
    window: Rollout,
    nets: ActorCritic,
    *,
    gamma: float,
    td_lambda: float,
    tau: float,
    critic_epochs: int,
    critic_minibatches: int,
    max_grad_norm: float,
    bootstrap_discount: float = 1.0,
) -> dict[str, Tensor]:
    """Improve an actor and then its critics from one rollout: SHAC's update, and PWM's but for the world model.

    Args:
        window: The rollout, with its graph, which it loses.
        nets: What is improved.
        gamma: Discount γ.
        td_lambda: λ of the critic's targets.
        tau: Polyak coefficient of the target critic.
        critic_epochs: Passes over the rollout for the critics.
        critic_minibatches: Minibatches in a pass.
        max_grad_norm: Gradient clip of the actor.
        bootstrap_discount: As in `rollout_returns`.

    Returns:
        Metrics, () each; (K,) for K tasks.
    """
    metrics = improve_actor(
        window,
        nets.actor,
        nets.target,
        nets.actor_optimizer,
        nets.scale,
        nets.entropy_coefficient,
        gamma,
        max_grad_norm,
        bootstrap_discount,
    )
    window.detach_()
    targets = critic_targets(window, nets.target, gamma, td_lambda)
    metrics |= fit_critic(
        nets.critic,
        nets.critic_optimizer,
        window.observations,
        targets,
        window.survival(),
        critic_epochs,
        critic_minibatches,
        CRITIC_MAX_GRAD_NORM,
        nets.generator,
    )
    polyak_update(nets.critic.parameters(), nets.target.parameters(), tau)
    return metrics | {"value": targets.mean((0, -1))}
