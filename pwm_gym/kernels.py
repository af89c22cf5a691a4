"""Networks of linear maps, LayerNorm, Mish and SimNorm on CPUs: one autograd node, and a library in C for the rest.

In PyTorch's own operations a block's normalisation and activation took three times as long as its matrix product, and
the dispatch of some twenty operations as long again. Here the products remain PyTorch's, what lies between them is one
pass over memory, and a whole network is one node of the graph.

The library is compiled when pwm_gym is installed (`_kernels.c`). Without a C compiler, on other devices, in other
dtypes and under `torch.compile`, `usable` says no and the caller computes the same with PyTorch's modules.
PWM_GYM_EAGER=1 in the environment leaves the library alone.
"""

from __future__ import annotations

import ctypes
import enum
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Block", "Kind", "available", "draw_kept", "library", "run", "usable"]

_PARALLEL = 1 << 16  # elements from which on several threads pay


class Kind(enum.IntEnum):
    """What follows a linear map; the numbers are those of `_kernels.c`."""

    NORM_MISH = 0  # Mish(LayerNorm(x))
    MISH_NORM = 1  # LayerNorm(Mish(x))
    NORM_SIMNORM = 2  # SimNorm(LayerNorm(x))
    NOTHING = 3


class Block(NamedTuple):
    """A linear map and what follows it: x (..., in) -> (..., out)."""

    kind: Kind
    weight: Tensor  # (out, in); of each of E members its own, for x (E, N, in): (E, in, out)
    bias: Tensor  # (out,) or (E, 1, out)
    norm_weight: Tensor | None = None  # LayerNorm's scale, (out,) or (E, 1, out)
    norm_bias: Tensor | None = None  # its shift
    eps: float = 0.0  # added to the variance
    groups: int = 1  # of SimNorm: feature i belongs to group i mod groups
    draw: Callable[[Sequence[int]], Tensor] | None = None  # dropout: which outputs of the linear map to keep, uint8
    scale: float = 1.0  # what those are multiplied by


def _load() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("pwm_gym._kernels")
    if spec is None or spec.origin is None or os.environ.get("PWM_GYM_EAGER", "0") != "0":
        return None
    library = ctypes.CDLL(spec.origin)
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.fused_forward.argtypes = [number, *[pointer] * 5, *[size] * 4, ctypes.c_float, number]
    library.fused_backward.argtypes = [number, *[pointer] * 9, *[size] * 4, number]
    library.fused_forward.restype = library.fused_backward.restype = None
    return library


_library = _load()


def library() -> ctypes.CDLL | None:
    """Give the library; None where it wasn't built or is left alone."""
    return _library


def available() -> bool:
    """Tell whether the library was built and is in use."""
    return _library is not None


def usable(x: Tensor, blocks: Sequence[Block]) -> bool:
    """Tell whether `run` takes these: float32 on the CPU, and neither compiler nor autocast at work."""
    return (
        _library is not None
        and x.dtype is torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
        and blocks[0].weight.dtype is torch.float32
        and blocks[0].weight.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not (torch._C._are_functorch_transforms_active() and any(block.draw for block in blocks))
    )


def draw_kept(blocks: Sequence[Block], x: Tensor) -> list[Tensor | None]:
    """Draw what dropout keeps of each block's linear map, (..., out), 1 or 0; None where there is no dropout."""
    return [None if block.draw is None else block.draw((*x.shape[:-1], block.bias.shape[-1])) for block in blocks]


def _drop(x: Tensor, kept: Tensor | None, scale: float) -> Tensor:
    """Apply dropout, in place."""
    return x if kept is None else x.mul_(kept).mul_(scale)


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= _PARALLEL else 1


def _activate(kind: int, x: Tensor, weight: Tensor, bias: Tensor, eps: float, groups: int) -> tuple[Tensor, Tensor]:
    """Normalise and activate x, (..., F), contiguous; gives the result and each row's mean and inverse deviation."""
    weight, bias = weight.contiguous(), bias.contiguous()
    features = x.shape[-1]
    rows = x.numel() // features
    y, stats = torch.empty_like(x), x.new_empty(rows, 2)
    _library.fused_forward(  # type: ignore[union-attr]
        kind,
        x.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        y.data_ptr(),
        stats.data_ptr(),
        rows,
        features,
        rows * features // weight.numel(),
        groups,
        eps,
        _threads(x),
    )
    return y, stats


def _activate_backward(
    kind: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor | None,
    stats: Tensor,
    grad: Tensor,
    groups: int,
    wants_parameters: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From the gradient of `_activate`'s result y, which SimNorm alone reads, to those of x, weight and bias."""
    grad, weight, bias = grad.contiguous(), weight.contiguous(), bias.contiguous()
    features, threads = x.shape[-1], _threads(x)
    rows = x.numel() // features
    grad_x = torch.empty_like(x)
    partial = x.new_zeros(2, threads, *weight.shape) if wants_parameters else None
    _library.fused_backward(  # type: ignore[union-attr]
        kind,
        x.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        None if y is None else y.data_ptr(),
        stats.data_ptr(),
        grad.data_ptr(),
        grad_x.data_ptr(),
        None if partial is None else partial[0].data_ptr(),
        None if partial is None else partial[1].data_ptr(),
        rows,
        features,
        rows * features // weight.numel(),
        groups,
        threads,
    )
    if partial is None:
        return grad_x, None, None
    grad_weight, grad_bias = partial[:, 0] if threads == 1 else partial.sum(1)
    return grad_x, grad_weight, grad_bias


def _shared(x: Tensor, weight: Tensor) -> bool:
    """Tell whether members read one input, expanded to (E, N, in): oneDNN multiplies that 2 to 4 times slower."""
    return weight.ndim == 3 and x.stride(0) == 0


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    if not _shared(x, weight):
        return torch.baddbmm(bias, x, weight)
    y = x.new_empty(len(weight), x.shape[1], weight.shape[2])
    for member, own in enumerate(y):
        torch.addmm(bias[member], x[0], weight[member], out=own)
    return y


def _weight_gradient(x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    """Give ∂L/∂weight from the gradient of `_linear`'s result."""
    if weight.ndim == 2:
        return grad.flatten(0, -2).t() @ x.flatten(0, -2)
    if not _shared(x, weight):
        return torch.bmm(x.mT, grad)
    result = torch.empty_like(weight)
    for member, own in enumerate(result):
        torch.mm(x[0].t(), grad[member], out=own)
    return result


class _Network(torch.autograd.Function):
    """Blocks one after another."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        spec: tuple[tuple[int, float, int, float], ...],
        masks: Sequence[Tensor | None],
        *parameters: Tensor,
    ) -> Tensor:
        """`spec` has kind, eps, groups and scale of each block; `parameters` its four, the last two perhaps None."""
        kept: list[Tensor | None] = []
        for i, (kind, eps, groups, scale) in enumerate(spec):
            weight, bias, norm_weight, norm_bias = parameters[4 * i : 4 * i + 4]
            y, inner, stats = _drop(_linear(x, weight, bias), masks[i], scale), None, None
            if kind != Kind.NOTHING:
                inner = y
                y, stats = _activate(kind, inner, norm_weight, norm_bias, eps, groups)
            learned = ctx.needs_input_grad[3 + 4 * i]  # a frozen weight's input is of no use later
            kept += [x if learned else None, inner, stats, y if kind == Kind.NORM_SIMNORM else None]
            x = y
        ctx.save_for_backward(*kept, *parameters)
        ctx.spec, ctx.masks = spec, masks
        return x

    @staticmethod
    @once_differentiable  # for second derivatives there would have to be more kernels
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.spec)
        kept, parameters = ctx.saved_tensors[: 4 * count], ctx.saved_tensors[4 * count :]
        wanted = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * (3 + 4 * count)
        for i in reversed(range(count)):
            kind, _, groups, scale = ctx.spec[i]
            x, inner, stats, y = kept[4 * i : 4 * i + 4]
            weight, _, norm_weight, norm_bias = parameters[4 * i : 4 * i + 4]
            at = 3 + 4 * i  # of its parameters among the arguments
            if kind != Kind.NOTHING:
                grad, grads[at + 2], grads[at + 3] = _activate_backward(
                    kind, inner, norm_weight, norm_bias, y, stats, grad, groups, wanted[at + 2] or wanted[at + 3]
                )
                grad = _drop(grad, ctx.masks[i], scale)
            if wanted[at]:
                grads[at] = _weight_gradient(x, weight, grad)
            if wanted[at + 1]:
                grads[at + 1] = grad.flatten(0, -2).sum(0) if weight.ndim == 2 else grad.sum(1, keepdim=True)
            if wanted[0] or any(wanted[3:at]):
                grad = grad @ weight if weight.ndim == 2 else torch.bmm(grad, weight.mT)
        grads[0] = grad if wanted[0] else None
        return tuple(grads)


class _ActivateInTransform(torch.autograd.Function):
    """`_activate` under `torch.func`'s transforms."""

    @staticmethod
    def forward(kind: int, x: Tensor, weight: Tensor, bias: Tensor, eps: float, groups: int) -> tuple[Tensor, Tensor]:
        return _activate(kind, x.contiguous(), weight, bias, eps, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.kind, x, weight, bias, _, ctx.groups = inputs
        y, stats = output
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(x, weight, bias, y, stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, y, stats = ctx.saved_tensors
        wants_parameters = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        grads = _activate_backward(ctx.kind, x.contiguous(), weight, bias, y, stats, grad, ctx.groups, wants_parameters)
        return None, *grads, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        kind, x, weight, bias, eps, groups = inputs
        _, at_x, at_weight, at_bias, *_ = in_dims

        def batched(tensor: Tensor, at: int | None) -> Tensor:
            return tensor.expand(info.batch_size, *tensor.shape) if at is None else tensor.movedim(at, 0)

        x = batched(x, at_x)
        if at_weight is not None or at_bias is not None or weight.numel() > x.shape[-1]:  # rows differ in theirs
            weight, bias = batched(weight, at_weight), batched(bias, at_bias)
        y, stats = _ActivateInTransform.apply(kind, x, weight, bias, eps, groups)
        return (y, stats.unflatten(0, (info.batch_size, -1))), (0, 0)


def run(blocks: Sequence[Block], x: Tensor) -> Tensor:
    """Apply blocks one after another; once differentiable with respect to x and to those parameters that ask for it.

    Args:
        blocks: At least one.
        x: (..., in), or (E, N, in) for members with weights of their own; `usable` must say yes.

    Returns:
        (..., out), equal to PyTorch's own to a few units in the last place.

    Example:
        >>> block = Block(Kind.NOTHING, weight=torch.tensor([[2.0, 1.0]]), bias=torch.tensor([0.5]))
        >>> run([block], torch.tensor([[3.0, 4.0]]))
        tensor([[10.5000]])
    """
    if torch._C._are_functorch_transforms_active():
        for kind, weight, bias, norm_weight, norm_bias, eps, groups, *_ in blocks:
            x = F.linear(x, weight, bias) if weight.ndim == 2 else torch.baddbmm(bias, x, weight)
            if kind != Kind.NOTHING:
                x = _ActivateInTransform.apply(int(kind), x, norm_weight, norm_bias, eps, groups)[0]
        return x
    masks = draw_kept(blocks, x)
    if torch.is_grad_enabled():
        spec = tuple((int(block.kind), block.eps, block.groups, block.scale) for block in blocks)
        return _Network.apply(x, spec, masks, *(tensor for block in blocks for tensor in block[1:5]))
    for (kind, weight, bias, norm_weight, norm_bias, eps, groups, _, scale), mask in zip(blocks, masks, strict=True):
        x = _drop(_linear(x, weight, bias), mask, scale)
        if kind != Kind.NOTHING:
            x, _ = _activate(kind, x, norm_weight, norm_bias, eps, groups)  # type: ignore[arg-type]
    return x
