"""Running statistics, and normalising by them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Normalizer", "RunningMoments"]


class RunningMoments(nn.Module):
    """Mean and variance of everything seen so far, which never forget.

    Args:
        shape: Shape of one sample.
    """

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.mean: Tensor
        self.var: Tensor
        self.count: Tensor
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.tensor(1e-4))

    @torch.no_grad()
    def merge(self, batch: Tensor) -> None:
        """Count a batch in, (N, *shape)."""
        batch_mean, batch_var, batch_count = batch.mean(0), batch.var(0, correction=0), len(batch)
        total = self.count + batch_count
        delta = batch_mean - self.mean
        moment = self.var * self.count + batch_var * batch_count + delta.square() * self.count * batch_count / total
        self.mean += delta * batch_count / total
        self.var.copy_(moment / total)
        self.count.copy_(total)

    def deviation(self) -> Tensor:
        """Give the standard deviation, (*shape)."""
        return (self.var + 1e-5).sqrt()


class Normalizer(RunningMoments):
    """Observations in units of their running deviation from their running mean, (..., O).

    Args:
        width: O.
        active: False passes observations on as they are.
        limit: Clip to this many deviations, so that a feature which hardly ever changed does no harm when it does.
    """

    def __init__(self, width: int, active: bool = True, limit: float | None = None) -> None:
        super().__init__((width,))
        self.active, self.limit = active, limit

    def forward(self, observations: Tensor) -> Tensor:
        """Normalise (..., O)."""
        if not self.active:
            return observations
        scaled = (observations - self.mean) / self.deviation()
        return scaled if self.limit is None else scaled.clamp(-self.limit, self.limit)
