"""What TD-MPC2 learns beside PWM's world model: values by temporal differences, and a policy prior that climbs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pwm_gym.functional import clip_gradients, frozen, two_hot_cross_entropy
from pwm_gym.training.ranks import Ranks
from pwm_gym.world_model import WorldModel

__all__ = ["PlanningLearner", "episode_discount"]

_PERCENTILES = (0.05, 0.95)  # between which the values' spread is measured


def episode_discount(episode_length: int) -> float:
    """Choose γ by the length of an episode, as TD-MPC2 does: 1 - 5/L, in [0.95, 0.995].

    Args:
        episode_length: Decisions in an episode L.

    Example:
        >>> episode_discount(500), episode_discount(100)
        (0.99, 0.95)
    """
    share = episode_length / 5
    return min(max((share - 1) / share, 0.95), 0.995)


class PlanningLearner:
    """Learns a world model's value ensemble and policy prior along with it (TD-MPC2, arXiv:2310.16828, eq. 3 and 4).

    It goes into `update_world_model`, which adds `value_loss` to the model's loss and then calls `update_prior`.

    Args:
        world_model: A model with value ensemble and policy prior.
        learning_rate: Of the policy prior's Adam.
        entropy_coef: Weight of the prior's entropy bonus.
        tau: How far targets, and the scale of values, move in an update. In [0, 1].
        max_grad_norm: Bound of the prior's gradient norm.
        seed: Of the noise of the prior's actions, and of which members are compared; or a generator of the caller's, on
            the model's device, to draw both from.
        ranks: The processes that learn together, each from its part of a batch; None alone.

    Attributes:
        optimizer: The prior's Adam.
        scale: Running spread of the values, (), which they are divided by for the prior.

    Raises:
        ValueError: If the model lacks either part.

    Example:
        >>> from pwm_gym.world_model import WorldModelConfig
        >>> config = WorldModelConfig.preset("1M", observation_dim=3, action_dim=1, planning=True)
        >>> learner = PlanningLearner(WorldModel(config))
        >>> learner.update_prior(torch.rand(4, 8, 128), rho=0.5)["prior_loss"].shape
        torch.Size([])
    """

    def __init__(
        self,
        world_model: WorldModel,
        learning_rate: float = 3e-4,
        entropy_coef: float = 1e-4,
        tau: float = 0.01,
        max_grad_norm: float = 20.0,
        seed: int | torch.Generator = 0,
        ranks: Ranks | None = None,
    ) -> None:
        if world_model.value is None or world_model.policy_prior is None:
            raise ValueError(
                "expected a world model with value ensemble and policy prior, got one without. Make it with "
                "WorldModelConfig.preset(..., planning=True)."
            )
        self._model, self._value, self._ranks = world_model, world_model.value, ranks or Ranks()
        self._parameters = list(world_model.policy_prior.parameters())
        self.optimizer = torch.optim.Adam(self._parameters, lr=learning_rate, eps=1e-5, fused=True)
        self.entropy_coef, self.tau, self.max_grad_norm = entropy_coef, tau, max_grad_norm
        self.scale = torch.ones((), dtype=world_model.dtype, device=world_model.device)
        self._owns_generator = isinstance(seed, int)
        self._generator = torch.Generator(world_model.device).manual_seed(seed) if isinstance(seed, int) else seed

    def value_loss(
        self,
        latents: Tensor,
        actions: Tensor,
        rewards: Tensor,
        terminated: Tensor,
        next_latents: Tensor,
        task: int | Tensor | None = None,
    ) -> Tensor:
        """Score the values of all members against one temporal-difference target.

            y_t = r_t + γ (1 - end_t) min_{i,j} Q'(z'_t, a'_t),    a'_t ~ π(z'_t)
            loss_t = mean_e CE(Q_e(z_t, a_t), y_t)

        The minimum is over two target members drawn at random; γ is the task's own.

        Args:
            latents: z_t, (H, B, Z), of the model's unroll.
            actions: a_t, (H, B, A), in [-1, 1].
            rewards: r_t, (H, B), in task units.
            terminated: end_t, (H, B), bool.
            next_latents: z'_t, (H, B, Z), encodings of the real next observations.
            task: As in `WorldModel.encode`.

        Returns:
            The loss of each step of each window, (H, B).
        """
        model = self._model
        with torch.no_grad():
            following = model.prior(next_latents, task, noise=self._noise(next_latents)).actions  # (H, B, A)
            bootstrap = model.q(next_latents, following, task, "min", target=True, generator=self._generator)
            targets = rewards + model.discount(task) * ~terminated * bootstrap  # (H, B)
        logits = model.q_logits(latents, actions, task)  # (E, H, B, num_bins)
        config = model.config
        return two_hot_cross_entropy(logits, targets.expand(logits.shape[:-1]), config.vmin, config.vmax).mean(0)

    def _noise(self, z: Tensor) -> Tensor:
        """Draw the noise of actions at z, (T, B, Z): (T, B, A), this process's part of what all draw."""
        steps, rows = z.shape[:2]
        shape = steps, rows * self._ranks.size, self._model.config.action_dim
        noise = torch.randn(shape, generator=self._generator, dtype=z.dtype, device=z.device)
        return noise[:, self._ranks.part(shape[1])]

    def update_prior(
        self, latents: Tensor, rho: float, task: int | Tensor | None = None, lengths: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Take one gradient step on the policy prior, and move the target values.

            L = -1/(H+1) Σ_t ρ^t mean_B [Q(z_t, a_t) / S + α H_t],    a_t ~ π(z_t)

        Q is the mean of two members drawn at random, S the running spread of the values at t = 0 between the 5th and
        95th percentile, at least 1.

        Args:
            latents: z_t, (H + 1, B, Z); no gradient goes into them.
            rho: Weight ρ of later steps, in (0, 1].
            task: As in `WorldModel.encode`.
            lengths: Steps of each window, (B,), after which its latents don't count; None where all have H.

        Returns:
            The loss and what it is made of, without gradient.
        """
        latents, ranks = latents.detach(), self._ranks
        with ranks.whole(), frozen(self._value):  # only the prior's gradients are computed
            sample = self._model.prior(latents, task, noise=self._noise(latents))
            q = self._model.q(latents, sample.actions, task, "mean", generator=self._generator)  # (H + 1, B)
            levels = torch.tensor(_PERCENTILES, dtype=q.dtype, device=q.device)
            spread = ranks.gather(q[0].detach()).quantile(levels).diff()[0]
            self.scale.lerp_(spread.clamp(min=1.0).to(self.scale), self.tau)
            weights = rho ** torch.arange(len(q), dtype=q.dtype, device=q.device)  # (H + 1,)
            entropy = sample.entropy.to(q.dtype)
            worth = self.entropy_coef * entropy + q / self.scale  # (H + 1, B)
            if lengths is not None:
                worth = worth * (torch.arange(len(q), device=q.device).unsqueeze(1) <= lengths)
            loss = -(weights * worth.mean(1)).mean()
            gradients = torch.autograd.grad(loss, self._parameters)
        ranks.mean_(gradients)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        clip_gradients(self._parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._value.update_target(self.tau)
        return {"prior_loss": loss.detach(), "prior_entropy": entropy.detach().mean(), "value": q.detach().mean()}

    def state_dict(self) -> dict[str, Any]:
        """Give all that is not in the world model itself, to go on from."""
        state = {"optimizer": self.optimizer.state_dict(), "scale": self.scale.clone()}
        return {**state, "generator": self._generator.get_state()} if self._owns_generator else state

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Go on from what `state_dict` gave. It has to be complete; SB3 passes `strict` as it does to modules."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scale.copy_(state["scale"])
        if self._owns_generator:
            self._generator.set_state(state["generator"].cpu())
