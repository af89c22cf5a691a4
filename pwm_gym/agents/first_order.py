"""First-order actor-critic updates on any differentiable VectorEnv: what PWM and SHAC share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pwm_gym.differentiable import DifferentiableVectorEnv
from pwm_gym.functional import td_lambda_returns

__all__ = ["Rollout", "critic_targets", "fit_critic", "improve_actor", "rollout", "rollout_returns"]


class Policy(Protocol):
    """What `rollout` asks of an actor; `LatentActor` is one."""

    use_sde: bool

    def sample_noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw noise for `count` observations."""

    def __call__(self, z: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Give actions in [-1, 1], (B, A), and -log π(a|z), (B,)."""


class Rollout(NamedTuple):
    """H differentiable steps of B envs under the current policy, time first."""

    observations: Tensor  # (H, B, Z), what the policy acted on
    next_observations: Tensor  # (H, B, Z), where each step led, before any reset
    rewards: Tensor  # (H, B)
    continues: Tensor  # (H, B), in [0, 1]: probability that the episode goes on after the step
    ends: Tensor  # (H, B), bool: last step of its segment
    entropy: Tensor  # (H, B), -log π(a|z)
    finished: Tensor  # (H, B), bool: the step terminated or truncated its episode
    stiffness: Tensor | None  # (H, B), infos["jacobian_norm"] where the env tells it
    interrupted: bool  # whether a segment ends before the last row


def _to_action_space(env: DifferentiableVectorEnv, actions: Tensor) -> Tensor:
    """Scale actions in [-1, 1], (B, A), to the env's action space, (B, *shape)."""
    space = env.single_action_space
    low = torch.as_tensor(space.low, device=actions.device).flatten()  # type: ignore[attr-defined]
    high = torch.as_tensor(space.high, device=actions.device).flatten()  # type: ignore[attr-defined]
    return (low + (actions + 1.0) * 0.5 * (high - low)).reshape(env.action_space.shape)  # type: ignore[arg-type]


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
    columns: list[tuple[Tensor, ...]] = []
    norms: list[Tensor] = []
    interrupted = False
    for t in range(horizon):
        seen = observations.detach() if detach_input else observations
        if t == 0 or not actor.use_sde:  # gSDE keeps its exploration matrices for the whole rollout
            noise = actor.sample_noise(env.num_envs, generator)
        actions, entropy = actor(seen, noise)  # (B, A), (B,)
        following, rewards, terminated, truncated, infos = env.step(_to_action_space(env, actions))
        led_to = following
        if "final_obs" in infos:
            led_to = torch.where(infos["_final_obs"].unsqueeze(-1), infos["final_obs"], following)
            interrupted |= t < horizon - 1
        finished = terminated | truncated
        ends = finished if t < horizon - 1 else torch.ones_like(terminated)
        columns.append((observations, led_to, rewards, infos["continue_prob"], ends, entropy, finished))
        if "jacobian_norm" in infos:
            norms.append(infos["jacobian_norm"])
        observations = following
    stacked = [torch.stack(column) for column in zip(*columns, strict=True)]
    return Rollout(*stacked, torch.stack(norms) if norms else None, interrupted)  # type: ignore[arg-type, call-arg]


def rollout_returns(window: Rollout, critic: nn.Module, gamma: float) -> Tensor:
    """Compute the differentiable objective of the actor: each env's discounted return with bootstrapped values.

        J = Σ_segments [Σ_k γ^k C_k r_k + γ^n C_n min_e V_e(z_n)],    C_k = Π_{j<k} c_j

    SHAC (arXiv:2204.07137, eq. 5) and PWM (arXiv:2407.02466, eq. 4) with the continuation probabilities c in the
    discount. The reference weights V(z_H) by γ^(H+1); here it is γ^H.

    Args:
        window: The rollout.
        critic: V, frozen.
        gamma: Discount γ.

    Returns:
        J, (B,), in task units.
    """
    horizon = len(window.rewards)
    discount = torch.ones_like(window.rewards[0])
    total = torch.zeros_like(discount)
    for t in range(horizon):
        total = total + discount * window.rewards[t]
        discount = gamma * window.continues[t] * discount
        if t == horizon - 1:
            total = total + discount * critic(window.next_observations[t]).amin(0)
        elif window.interrupted:
            ends = window.ends[t]
            value = critic(window.next_observations[t]).amin(0)
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
    """
    returns = rollout_returns(window, critic, gamma)
    entropy = window.entropy.mean()
    deviation = scale(returns.detach())
    loss = -returns.mean() / deviation - entropy_coefficient(entropy) * entropy
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(actor.parameters(), max_grad_norm)
    optimizer.step()
    return {
        "actor_loss": loss.detach(),
        "actor_grad_norm": grad_norm,
        "return": returns.detach().mean(),
        "reward": window.rewards.detach().mean(),
        "entropy": entropy.detach(),
    }


@torch.no_grad()
def critic_targets(window: Rollout, critic: nn.Module, gamma: float, td_lambda: float) -> Tensor:
    """Compute TD(λ) targets, (H, B), from the ensemble's minimum (PWM, eq. 5; see `td_lambda_returns`)."""
    next_values = critic(window.next_observations).amin(0)  # (H, B)
    return td_lambda_returns(window.rewards, next_values, window.ends, gamma, td_lambda, window.continues)


def fit_critic(
    critic: nn.Module,
    optimizer: torch.optim.Optimizer,
    observations: Tensor,
    targets: Tensor,
    epochs: int,
    minibatches: int,
    max_grad_norm: float,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Regress every member of the critic on the targets, over shuffled minibatches.

    Args:
        critic: V.
        optimizer: The critic's.
        observations: (H, B, Z).
        targets: (H, B).
        epochs: Passes over the rollout.
        minibatches: Minibatches in a pass.
        max_grad_norm: Gradient clip.
        generator: Of the shuffling.
    """
    inputs, goals = observations.detach().flatten(0, 1), targets.flatten()  # (H B, Z), (H B,)
    losses = []
    for _ in range(epochs):
        order = torch.randperm(len(goals), generator=generator, device=goals.device)
        for chosen in order.chunk(minibatches):
            loss = (critic(inputs[chosen]) - goals[chosen]).square().mean()  # over (E, N)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(critic.parameters(), max_grad_norm)
            optimizer.step()
            losses.append(loss.detach())
    return {"critic_loss": torch.stack(losses).mean(), "critic_grad_norm": grad_norm}
