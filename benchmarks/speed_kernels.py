"""Each operation that was made faster, against PyTorch's own in turns, forward and backward, and against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from speed_timing import clock, interleave, make_row, ratio
from speed_update import BF16, matmul_precision
from torch import Tensor, nn

from pwm_gym.networks import EnsembleLayerNorm, EnsembleLinear, Layers, Mish, NormedLinear, SimNorm

AT_LEAST = 0.02  # seconds of a turn
Case = tuple[tuple[int, ...], nn.Module, nn.Module]  # shape of the input, PyTorch's own modules, ours


class GroupsLast(nn.Module):
    """SimNorm as TD-MPC2's files have it: groups of 8 neighbours, a softmax over the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., Z)."""
        return x.unflatten(-1, (-1, 8)).softmax(-1).flatten(-2)


class OwnNorm(nn.Module):
    """PyTorch's LayerNorm, then scale and shift of each member."""

    def __init__(self, ensemble: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ensemble, 1, features))
        self.bias = nn.Parameter(torch.zeros(ensemble, 1, features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (E, N, F)."""
        return nn.functional.layer_norm(x, x.shape[-1:]) * self.weight + self.bias


def model_block(rows: int, width: int, own: nn.Module, ours: nn.Module) -> Case:
    """Compare a block of a frozen world model: linear, LayerNorm, activation."""
    linear, norm = nn.Linear(width, width), nn.LayerNorm(width)
    plain, fused = nn.Sequential(linear, norm, own), NormedLinear(width, width, ours)
    fused[0], fused[1] = linear, norm
    return (rows, width), plain.requires_grad_(False), fused.requires_grad_(False)


def critic_block(rows: int) -> Case:
    """Compare the second layer of three critics that learn: linear, Mish, LayerNorm."""
    linear = EnsembleLinear(3, 400, 200)
    nn.init.normal_(linear.weight, std=0.05)
    plain = nn.Sequential(linear, nn.Mish(), OwnNorm(3, 200))
    return (3, rows, 400), plain, Layers(linear, Mish(), EnsembleLayerNorm(3, 200))


KERNELS: dict[str, Callable[[], Case]] = {
    "SimNorm, (64, 512)": lambda: ((64, 512), GroupsLast(), SimNorm(8)),
    "SimNorm, (512, 512)": lambda: ((512, 512), GroupsLast(), SimNorm(8)),
    "Mish, (64, 512)": lambda: ((64, 512), nn.Mish(), Mish()),
    "Mish, (3, 2048, 400)": lambda: ((3, 2048, 400), nn.Mish(), Mish()),
    "linear, LayerNorm, Mish, (64, 512)": lambda: model_block(64, 512, nn.Mish(), Mish()),
    "linear, LayerNorm, Mish, (512, 512)": lambda: model_block(512, 512, nn.Mish(), Mish()),
    "linear, LayerNorm, SimNorm, (64, 512)": lambda: model_block(64, 512, GroupsLast(), SimNorm(8)),
    "3 x linear, Mish, LayerNorm, (256, 400)": lambda: critic_block(256),
    "3 x linear, Mish, LayerNorm, (2048, 400)": lambda: critic_block(2048),
}


def both_ways(module: nn.Module, x: Tensor, weight: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Compute an output, and the gradients of its weighted sum with respect to the input and what is learned."""
    x = x.detach().requires_grad_(True)
    y = module(x)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    return y.detach(), list(torch.autograd.grad(y, wanted, weight))


def error(found: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


def measure_kernel(name: str, rounds: int, bf16: bool = False) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Time one operation, and compare it with itself in float64.

    Args:
        name: Of `KERNELS`.
        rounds: Turns of each.
        bf16: Let PyTorch and us round factors of products to bf16.

    Returns:
        A row of ratios and rows of errors.
    """
    torch.manual_seed(0)
    shape, plain, ours = KERNELS[name]()
    x = torch.randn(shape)
    weight = torch.randn_like(ours(x))
    work = {"plain": lambda: both_ways(plain, x, weight), "ours": lambda: both_ways(ours, x, weight)}
    arithmetic, suffix = (BF16, f", {BF16}") if bf16 else ("fp32", "")
    with matmul_precision("medium" if bf16 else torch.get_float32_matmul_precision()):
        seconds = interleave(work, rounds, clock(1), AT_LEAST)
        found = both_ways(ours, x, weight)
    value, below = ratio(seconds["plain"], seconds["ours"]), float(np.median(seconds["ours"]))
    row = make_row("kernel", name, f"PyTorch's own / ours{suffix}", value, 1, rounds, seconds=below)
    exact = both_ways(copy.deepcopy(ours).double(), x.double(), weight.double())
    errors = [error(found[0], exact[0]), max(error(*pair) for pair in zip(found[1], exact[1], strict=True))]
    return row, [
        {
            "what": f"{what} of {name}",
            "arithmetic": arithmetic,
            "relative_error": f"{value:.1e}",
            "one_minus_cosine": "",
        }
        for what, value in zip(("value", "gradient"), errors, strict=True)
    ]
