"""Networks with bf16 products on processors with AMX: one call of the library forward, one backward.

Factors are rounded to bf16 and products summed in fp32; norms, activations, gradients of parameters and all that
leaves a network stay fp32. That is what PyTorch's own setting allows, and it alone switches this on:

    torch.set_float32_matmul_precision("medium")

PyTorch then lets oneDNN round likewise, but oneDNN converts and reorders both factors of each product anew, which for
networks of some hundred units takes longer than the product. Here weights are packed once for a pass, or once for all
passes within `fixed_weights`, and activations are written in bf16 to begin with (`_products.c`).
"""

from __future__ import annotations

import ctypes
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pwm_gym import kernels
from pwm_gym.kernels import Block, Kind

__all__ = ["available", "fixed_weights", "run", "usable"]

MAX_ERROR = 8e-3  # relative, of a network's values and gradients: what rounding to bf16 leaves
_FEWEST_ROWS = 16  # below, packing the weights costs more than the product
_MOST_LAYERS = 12  # of `struct network`
_INTERFACE = 2  # that of `_products.c`
_PARALLEL = 1 << 22  # multiplications from which on several threads pay


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "in_", "out", "groups")),
        *((name, ctypes.c_double) for name in ("eps", "scale")),
    ]


class _Description(ctypes.Structure):
    """`struct network` of `_products.c`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("count", "members", "plain", "shared", "learned", "rows", "threads")),
        ("layers", _Layer * _MOST_LAYERS),
    ]


class _Plan(NamedTuple):
    """A network for so many rows, and the bytes of its buffers."""

    network: Any  # a pointer to its `_Description`
    width: int  # of the output
    forward: int  # packed weights
    backward: int  # those for the way back
    saved: int  # what backward needs of forward
    work: int  # what it needs beside


class _Packed:
    """A network's weights as the processor wants them, for both directions, each packed when first asked for."""

    def __init__(self, parameters: Sequence[Tensor | None]) -> None:
        self.parameters = parameters  # also keeps them alive, so that no other tensor gets their id
        self._buffers: dict[bool, Tensor] = {}

    def pointer(self, plan: _Plan, backward: bool) -> int:
        """Give the address of the packed weights."""
        if backward not in self._buffers:
            buffer = torch.empty(plan.backward if backward else plan.forward, dtype=torch.uint8)
            _library.network_pack(plan.network, _pointers(self.parameters), backward, buffer.data_ptr())  # type: ignore[union-attr]
            self._buffers[backward] = buffer
        return self._buffers[backward].data_ptr()


def _load() -> ctypes.CDLL | None:
    library = kernels.library()
    if library is None or not hasattr(library, "products_available") or library.products_available() != _INTERFACE:
        return None  # an older build has none, or others
    pointer = ctypes.c_void_p
    library.network_sizes.argtypes = [pointer, pointer]
    library.network_pack.argtypes = [pointer, pointer, ctypes.c_int, pointer]
    library.network_forward.argtypes = [pointer] * 7
    library.network_backward.argtypes = [pointer] * 10
    for function in (library.network_sizes, library.network_pack, library.network_forward, library.network_backward):
        function.restype = None
    return library


_library = _load()
_scope = threading.local()


def available() -> bool:
    """Tell whether library, processor and operating system have these products."""
    return _library is not None


@contextmanager
def fixed_weights() -> Iterator[None]:
    """Promise that no parameter changes within: a network that runs several times then packs its weights once.

    For a rollout, say. The promise includes changes through `.data`, of which PyTorch keeps no count.

    Example:
        >>> network = torch.nn.Linear(2, 2)
        >>> with fixed_weights():
        ...     outputs = [network(torch.zeros(64, 2)) for _ in range(16)]
    """
    before = getattr(_scope, "packed", None)
    _scope.packed = {} if before is None else before
    try:
        yield
    finally:
        _scope.packed = before


def usable(x: Tensor, blocks: Sequence[Block]) -> bool:
    """Tell whether `run` should do what `kernels.run` can: bf16 is allowed, the network known, and it pays here."""
    return (
        _library is not None
        and torch.get_float32_matmul_precision() == "medium"
        and _rows(x, blocks) >= _FEWEST_ROWS
        and len(blocks) <= _MOST_LAYERS
        and all(block.kind != Kind.NORM_SIMNORM for block in blocks[:-1])  # its backward needs its own output
        and not torch._C._are_functorch_transforms_active()
        and _pays()
    )


def _rows(x: Tensor, blocks: Sequence[Block]) -> int:
    return x.shape[1] if blocks[0].weight.ndim == 3 else x.numel() // x.shape[-1]


@functools.cache
def _pays() -> bool:
    """Measure, once, whether a typical network is faster here than with PyTorch's products, and accurate."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(128, 384, generator=generator), torch.randn(384, 384, generator=generator))
    blocks = [Block(Kind.NOTHING, weight, torch.zeros(384))] * 2
    exact = x.double() @ weight.double().t() @ weight.double().t()

    def seconds(function: Callable[[Sequence[Block], Tensor], Tensor]) -> float:
        turns = []
        for _ in range(8):
            began = time.perf_counter()
            function(blocks, x)
            turns.append(time.perf_counter() - began)
        return min(turns)

    with torch.no_grad():
        error = (run(blocks, x).double() - exact).norm() / exact.norm()
        return bool(error < MAX_ERROR) and seconds(run) < seconds(kernels.run)


_Spec = tuple[tuple[int, float, int, float, torch.Size, torch.Size, bool], ...]


def _specify(blocks: Sequence[Block]) -> _Spec:
    """List what decides a plan: kind, eps, groups, scale, shapes of weight and bias, and whether the type is known."""
    return tuple(
        (
            int(block.kind),
            block.eps,
            block.groups,
            block.scale,
            block.weight.shape,
            block.bias.shape,
            block.weight.is_cpu and block.weight.dtype is block.bias.dtype is torch.float32,
        )
        for block in blocks
    )


@functools.lru_cache(maxsize=256)
def _plan(spec: _Spec, shape: torch.Size, shared: bool, learned: bool, rows: int, threads: int) -> _Plan | None:
    """Describe a network for x of a shape; None where sizes don't fit: PyTorch's products then say what is wrong."""
    plain = len(spec[0][4]) == 2
    members, width = 1 if plain else spec[0][4][0], shape[-1]
    network = _Description(len(spec), members, plain, shared, learned, rows, threads)
    for layer, (kind, eps, groups, scale, of_weight, of_bias, known) in zip(network.layers, spec, strict=False):
        out = of_bias[-1]
        fits = (out, width) if plain else (members, width, out)
        if not known or tuple(of_weight) != fits or of_bias.numel() != members * out:
            return None
        if not plain and (len(shape) != 3 or shape[0] != members):
            return None
        layer.kind, layer.in_, layer.out, layer.groups = kind, width, out, groups
        layer.eps, layer.scale = eps, scale
        width = out
    sizes = (ctypes.c_int64 * 4)()
    _library.network_sizes(ctypes.byref(network), sizes)  # type: ignore[union-attr]
    return _Plan(ctypes.pointer(network), width, *sizes)


def _pointers(tensors: Sequence[Tensor | None]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[None if t is None else t.data_ptr() for t in tensors])


def _pack(parameters: Sequence[Tensor | None]) -> _Packed | None:
    """Give the packed weights of this scope; None without one: the library then packs them on the way."""
    packed: dict[tuple[int, ...], _Packed] | None = getattr(_scope, "packed", None)
    if packed is None:
        return None
    key = tuple(map(id, parameters))
    return packed.get(key) or packed.setdefault(key, _Packed(parameters))


def _take(size: int) -> Tensor:
    """Give a buffer of so many bytes, if possible a spare one: new pages cost as much as what is written on them."""
    spares: list[Tensor] = getattr(_scope, "spares", [])
    for i, spare in enumerate(spares):
        if size <= spare.numel() <= 2 * size:
            return spares.pop(i)
    return torch.empty(size, dtype=torch.uint8)


def _give_back(*buffers: Tensor) -> None:
    """Keep the last two buffers, which nobody needs any more, for `_take` in this thread."""
    _scope.spares = [*getattr(_scope, "spares", []), *buffers][-2:]


def _forward(
    x: Tensor,
    plan: _Plan,
    packed: _Packed | None,
    parameters: Sequence[Tensor | None],
    kept: Sequence[Tensor | None],
    y: Tensor,
    saved: Tensor | None,
) -> None:
    _library.network_forward(  # type: ignore[union-attr]
        plan.network,
        None if packed is None else packed.pointer(plan, backward=False),
        _pointers(parameters),
        _pointers(kept),
        x.data_ptr(),
        y.data_ptr(),
        None if saved is None else saved.data_ptr(),
    )


class _Network(torch.autograd.Function):
    """Blocks one after another."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        plan: _Plan,
        packed: _Packed | None,
        kept: Sequence[Tensor | None],
        *parameters: Tensor | None,
    ) -> Tensor:
        y, saved = x.new_empty(*x.shape[:-1], plan.width), _take(plan.saved)
        _forward(x, plan, packed, parameters, kept, y, saved)
        ctx.save_for_backward(y, saved, *parameters)
        ctx.plan, ctx.packed, ctx.kept, ctx.shape = plan, packed, kept, x.shape
        return y

    @staticmethod
    @once_differentiable  # as in `kernels`
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, saved, *parameters = ctx.saved_tensors
        plan, wanted, grad = ctx.plan, ctx.needs_input_grad, grad.contiguous()
        grads = [torch.empty_like(p) if want else None for p, want in zip(parameters, wanted[4:], strict=True)]
        grad_x = grad.new_empty(ctx.shape) if wanted[0] else None
        work = _take(plan.work)
        _library.network_backward(  # type: ignore[union-attr]
            plan.network,
            None if ctx.packed is None else ctx.packed.pointer(plan, backward=True),
            _pointers(parameters),
            _pointers(ctx.kept),
            saved.data_ptr(),
            y.data_ptr(),
            grad.data_ptr(),
            _pointers(grads),
            None if grad_x is None else grad_x.data_ptr(),
            work.data_ptr(),
        )
        _give_back(work, *[] if torch._C._autograd._get_current_graph_task_keep_graph() else [saved])
        return grad_x, None, None, None, *grads


def run(blocks: Sequence[Block], x: Tensor) -> Tensor:
    """Apply blocks one after another, as `kernels.run`, with bf16 products."""
    weight, rows = blocks[0].weight, _rows(x, blocks)
    shared = weight.ndim == 3 and x.stride(0) == 0
    learned = any(block.weight.requires_grad for block in blocks)
    work = rows * sum(block.weight.numel() for block in blocks)
    threads = min(torch.get_num_threads(), -(-rows // 32)) if work >= _PARALLEL else 1
    plan = _plan(_specify(blocks), x.shape, shared, learned, rows, threads)
    if plan is None:
        return kernels.run(blocks, x)
    parameters = [None if p is None else p.contiguous() for block in blocks for p in block[1:5]]
    packed, kept = _pack(parameters), kernels.draw_kept(blocks, x)
    x = x if shared and x[0].is_contiguous() else x.contiguous()
    if torch.is_grad_enabled():
        return _Network.apply(x, plan, packed, kept, *parameters)
    y = x.new_empty(*x.shape[:-1], plan.width)
    _forward(x, plan, packed, parameters, kept, y, None)
    return y
