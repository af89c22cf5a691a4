"""What TD-MPC2 plans with beside a world model: an ensemble of values Q(z, a) and a policy prior."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from stable_baselines3.common.utils import polyak_update
from torch import Tensor, nn

from pwm_gym.networks import NormedEnsemble, mlp

__all__ = ["PolicyPrior", "PriorSample", "ValueEnsemble"]

LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0  # of the policy prior


class ValueEnsemble(nn.Module):
    """TD-MPC2's values (arXiv:2310.16828, sec. 3.1): categoricals over symlog bins, with slowly moving target copies.

    Args:
        num_q: Members E.
        in_features: Width of the input.
        hidden: Widths of the hidden layers.
        num_bins: Bins of a categorical.
        activation: Makes the hidden activations.
        dropout: Probability of dropping a unit of the first layer, in training mode; targets are never dropped.

    Example:
        >>> ValueEnsemble(5, 8, [16], 101, nn.Mish, 0.01)(torch.zeros(3, 8)).shape
        torch.Size([5, 3, 101])
    """

    def __init__(
        self,
        num_q: int,
        in_features: int,
        hidden: list[int],
        num_bins: int,
        activation: Callable[[], nn.Module],
        dropout: float,
    ) -> None:
        super().__init__()
        self.online = NormedEnsemble(num_q, in_features, hidden, num_bins, activation, dropout)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def initialise(self) -> None:
        """Initialise as TD-MPC2 does, with a zero last layer: at first, all values are 0."""
        for weight in self.online.linear_weights():
            nn.init.trunc_normal_(weight, std=0.02)
        nn.init.zeros_(self.online.linear_weights()[-1])
        self.update_target(1.0)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the members; the targets stay in evaluation mode."""
        super().train(mode)
        self.target.eval()
        return self

    def update_target(self, tau: float) -> None:
        """Move the targets towards the members: target <- (1 - τ) target + τ member."""
        polyak_update(self.online.parameters(), self.target.parameters(), tau)

    def forward(self, x: Tensor, target: bool = False) -> Tensor:
        """Evaluate all members, or their target copies, on (..., in): logits, (E, ..., num_bins)."""
        return (self.target if target else self.online)(x)


class PriorSample(NamedTuple):
    """What the policy prior answers."""

    actions: Tensor  # (..., A), tanh(μ + σ ε)
    mean: Tensor  # (..., A), tanh(μ)
    log_std: Tensor  # (..., A), of the Gaussian before tanh
    entropy: Tensor  # (...), TD-MPC2's bonus: -A log N(u; μ, σ) of the Gaussian before tanh


class PolicyPrior(nn.Module):
    """TD-MPC2's policy prior (arXiv:2310.16828, eq. 4): a squashed Gaussian whose mean and σ depend on z.

        a = tanh(u),    u = μ(z) + σ(z) ε,    log σ = -10 + 6 (1 + tanh s(z))

    Args:
        in_features: Width of the input.
        hidden: Widths of the hidden layers.
        action_dim: Width of an action A.
        activation: Makes the hidden activations.

    Example:
        >>> prior = PolicyPrior(8, [16], 2, nn.Mish)
        >>> prior(torch.zeros(3, 8), torch.zeros(3, 2)).actions.shape
        torch.Size([3, 2])
    """

    def __init__(
        self, in_features: int, hidden: list[int], action_dim: int, activation: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.net = mlp(in_features, hidden, 2 * action_dim, activation)

    def forward(self, x: Tensor, noise: Tensor, mask: Tensor | None = None) -> PriorSample:
        """Act.

        The entropy bonus is that of TD-MPC2's code, where the correction for tanh cancels out and the number of action
        dimensions multiplies; dimensions that are padding don't count.

        Args:
            x: (..., in).
            noise: ε, (..., A); zeros for the mode.
            mask: 1 for the task's own action dimensions and 0 for padding, which expands to (..., A); None for all.
        """
        mean, raw = self.net(x).chunk(2, -1)  # (..., A) each
        log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(raw) + 1.0)
        mask = torch.ones_like(noise) if mask is None else mask.expand_as(noise)
        mean, log_std, noise = mean * mask, log_std * mask, noise * mask
        log_prob = ((-0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi)) * mask).sum(-1)  # (...)
        actions = torch.tanh(mean + noise * log_std.exp())
        return PriorSample(actions, torch.tanh(mean), log_std, -log_prob * mask.sum(-1))
