"""The stochastic policy on latents, with noise drawn anew at every step or, for gSDE, once for a rollout."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pwm_gym.networks import Layers

__all__ = ["LatentActor"]


class LatentActor(nn.Module):
    """A squashed Gaussian over actions given a latent: a = tanh(μ(z) + σ ε), σ independent of z.

    PWM's actor (arXiv:2407.02466): features f(z) from Linear, activation, LayerNorm blocks, a linear mean, and a log
    standard deviation that is a parameter with a lower bound.

    With `use_sde`, exploration is state-dependent (gSDE; Raffin et al. 2020, arXiv:2005.05719): the noise
    is a function of the state that stays the same over a rollout, so that exploration is smooth in time.

        a = tanh(μ(z) + f(z) W),    W_ij = σ_ij ε_ij,    and so    σ_j(z)² = Σ_i f_i(z)² σ_ij²

    `log_std_init` and `log_std_min` mean the noise on the action here too: the σ_ij are smaller by √F, since
    LayerNorm leaves features with a mean square of 1. As in SB3's SAC, gradients reach the features.

    Args:
        latent_dim: Width of a latent Z.
        action_dim: Width of an action A.
        net_arch: Widths of the hidden layers, the last of which is the features' F.
        activation_fn: Activation class.
        log_std_init: Initial log σ.
        log_std_min: Lower bound of log σ.
        use_sde: Make the noise a function of the state.
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        net_arch: list[int],
        activation_fn: type[nn.Module],
        log_std_init: float,
        log_std_min: float,
        use_sde: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = latent_dim
        for features in net_arch:
            layers += [nn.Linear(width, features), activation_fn(), nn.LayerNorm(features)]
            width = features
        self.features = Layers(*layers)
        self.mean = nn.Linear(width, action_dim)
        self._means: tuple[nn.Module, ...] = ()  # features, mean and both in one; a tuple hides them from `modules`
        self.use_sde = use_sde
        shape, offset = ((width, action_dim), 0.5 * math.log(width)) if use_sde else ((action_dim,), 0.0)
        self.log_std = nn.Parameter(torch.full(shape, log_std_init - offset))  # (A,), or (F, A) with gSDE
        self._lowest = log_std_min - offset

    def get_std(self) -> Tensor:
        """Give σ, (A,), or with gSDE the σ_ij of the exploration matrices, (F, A)."""
        return self.log_std.clamp(min=self._lowest).exp()

    def sample_noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ε ~ N(0, 1) for `count` latents: (count, A), or with gSDE (count, F, A), to be kept for a rollout."""
        shape = (count, *self.log_std.shape)
        return torch.randn(shape, generator=generator, device=self.log_std.device, dtype=self.log_std.dtype)

    def _mean(self, z: Tensor) -> Tensor:
        """Compute μ(z), (..., A), in one go with the features."""
        features, mean = self.features, self.mean
        if self._means[:2] != (features, mean):  # the first time, or someone replaced one
            self._means = (features, mean, Layers(features, mean))
        return self._means[2](z)

    def forward(self, z: Tensor, noise: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Act on latents.

        Args:
            z: (..., Z).
            noise: ε as `sample_noise` draws it, (..., A) or (..., F, A); None for the deterministic action tanh(μ).
            mask: 1 for the task's own action dimensions and 0 for padding, which expands to (..., A); None for all.

        Returns:
            Actions in [-1, 1], (..., A), 0 in padding, and the entropy estimate -log π(a|z), (...). Both are
            differentiable, with respect to σ too; for the deterministic action the second is that of ε = 0.
        """
        if self.use_sde:
            features = self.features(z)  # (..., F)
            mean = self.mean(features)  # (..., A)
            std = self.get_std()  # (F, A)
            log_std = 0.5 * torch.log(features.square() @ std.square() + 1e-6)  # (..., A)
            if noise is not None:
                deviation = (features.unsqueeze(-2) @ (std * noise)).squeeze(-2)  # (..., A)
                noise = deviation / log_std.exp()
        else:
            mean = self._mean(z)  # (..., A)
            log_std = self.log_std.clamp(min=self._lowest)  # (A,)
        noise = torch.zeros_like(mean) if noise is None else noise  # (..., A)
        pre_tanh = mean + log_std.exp() * noise
        # -log N(ε) + log σ + log(1 - tanh²(u)), and log(1 - tanh²(u)) = 2 (log 2 - u - softplus(-2u))
        squash = 2.0 * (math.log(2.0) - pre_tanh - nn.functional.softplus(-2.0 * pre_tanh))
        entropy = 0.5 * noise.square() + 0.5 * math.log(2.0 * math.pi) + log_std + squash  # (..., A)
        actions = torch.tanh(pre_tanh)
        if mask is not None:
            actions, entropy = actions * mask, entropy * mask
        return actions, entropy.sum(-1)
