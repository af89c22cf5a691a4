"""The average of a network's recent weights, which acts better than the latest ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["WeightAverage"]


class WeightAverage(nn.Module):
    """Copies of modules with the average of their weights over about the last `share` of their updates.

    After update t = 1, 2, ...:

        w̄_t = w̄_{t-1} + (w_t - w̄_{t-1}) / (1 + share (t - 1))

    Update s then weighs about (s / t)^(1/share - 1): the average forgets in proportion to how long it has been
    learning, and so needs to know no horizon (the power profile of Karras et al. 2024, arXiv:2312.02696, eq. 3).
    Buffers are those of the last update.

    Args:
        modules: By name.
        share: In [0, 1]; 0 for the latest weights alone, 1 for the mean of all.

    Raises:
        ValueError: If `share` is out of range.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> average = WeightAverage({"net": net}, share=1.0)
        >>> for value in (2.0, 4.0):
        ...     net.bias.data.fill_(value)
        ...     average.update({"net": net})
        tensor([2.])
        tensor([4.])
        >>> average.copies["net"].bias.item()
        3.0
    """

    updates: Tensor

    def __init__(self, modules: Mapping[str, nn.Module], share: float) -> None:
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"`share` must be in [0, 1], got {share}.")
        super().__init__()
        self.share = share
        self.copies = nn.ModuleDict({n: copy.deepcopy(module).requires_grad_(False) for n, module in modules.items()})
        self.register_buffer("updates", torch.zeros(()))

    @property
    def started(self) -> bool:
        """Whether an update was counted since the last `reset`."""
        return bool(self.updates > 0)

    @torch.no_grad()
    def reset(self) -> None:
        """Forget everything: the next update starts anew."""
        self.updates.zero_()

    @torch.no_grad()
    def update(self, modules: Mapping[str, nn.Module]) -> None:
        """Count an update of the modules in."""
        weight = 1.0 / (1.0 + self.share * self.updates)
        self.updates += 1
        averages, latest = list[Tensor](), list[Tensor]()
        for name, module in modules.items():
            averages += self.copies[name].parameters()
            latest += module.parameters()
            for ours, theirs in zip(self.copies[name].buffers(), module.buffers(), strict=True):
                ours.copy_(theirs)
        torch._foreach_lerp_(averages, latest, [weight] * len(averages))
