"""Each operation that was made faster, against PyTorch's own: forward and backward in turns, and both against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from speed_timing import clock, interleave, make_row, ratio
from torch import Tensor, nn

from pwm_gym.networks import EnsembleLayerNorm, Mish, NormedLinear, SimNorm

AT_LEAST = 0.02  # seconds of a turn
EXACT = 1e-5  # relative error of values and gradients against float64, at most


class GroupsLast(nn.Module):
    """SimNorm as TD-MPC2's files have it: groups of 8 neighbours, a softmax over the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., Z)."""
        return x.unflatten(-1, (-1, 8)).softmax(-1).flatten(-2)


class PlainEnsembleNorm(nn.LayerNorm):
    """PyTorch's LayerNorm with one scale and shift for all members."""


def _block(width: int, activation: nn.Module) -> nn.Module:
    """Make what follows the linear map in a block of the world model."""
    return nn.Sequential(*NormedLinear(width, width, activation)[1:])


# name -> (shape of the input, PyTorch's own modules, ours)
KERNELS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "SimNorm, (64, 512)": ((64, 512), GroupsLast, lambda: SimNorm(8)),
    "SimNorm, (512, 512)": ((512, 512), GroupsLast, lambda: SimNorm(8)),
    "Mish, (64, 512)": ((64, 512), nn.Mish, Mish),
    "Mish, (3, 2048, 400)": ((3, 2048, 400), nn.Mish, Mish),
    "LayerNorm and Mish, (64, 512)": ((64, 512), lambda: nn.Sequential(nn.LayerNorm(512), nn.Mish()), lambda: _block(512, Mish())),
    "LayerNorm and SimNorm, (64, 512)": (
        (64, 512), lambda: nn.Sequential(nn.LayerNorm(512), GroupsLast()), lambda: _block(512, SimNorm(8))),
    "Mish and LayerNorm, (3, 256, 400)": (
        (3, 256, 400), lambda: nn.Sequential(nn.Mish(), nn.LayerNorm(400)), lambda: nn.Sequential(Mish(), EnsembleLayerNorm(3, 400))),
    "Mish and LayerNorm, (3, 2048, 400)": (
        (3, 2048, 400), lambda: nn.Sequential(nn.Mish(), nn.LayerNorm(400)), lambda: nn.Sequential(Mish(), EnsembleLayerNorm(3, 400))),
}  # fmt: skip


def both_ways(module: nn.Module, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute an output and the gradient of its weighted sum."""
    x = x.detach().requires_grad_(True)
    y = module(x)
    return y.detach(), torch.autograd.grad(y, x, weight)[0]


def error(found: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


def measure_kernel(name: str, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Time one operation, and compare it with itself in float64.

    Returns:
        A row of ratios and one of errors.
    """
    shape, make_plain, make_ours = KERNELS[name]
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for _ in range(2))
    plain, ours = make_plain(), make_ours()
    for module in (plain, ours):
        module.requires_grad_(False)  # as in a frozen model
    work = {"plain": lambda: both_ways(plain, x, weight), "ours": lambda: both_ways(ours, x, weight)}
    seconds = interleave(work, rounds, clock(1), AT_LEAST)
    value = ratio(seconds["plain"], seconds["ours"])
    row = make_row("kernel", name, "PyTorch's own / ours", value, 1, rounds, seconds=float(np.median(seconds["ours"])))
    exact = both_ways(copy.deepcopy(ours).double(), x.double(), weight.double())
    errors = [error(*pair) for pair in zip(both_ways(ours, x, weight), exact, strict=True)]
    return row, {"kernel": name, "value_error": f"{errors[0]:.1e}", "gradient_error": f"{errors[1]:.1e}"}
