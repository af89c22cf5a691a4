"""The matrix products of a piece of work: record them, and compute them again with nothing in between.

What a replay takes is the least that the work could take with the same products from the same library: everything else
(activations, norms, optimizers, autograd, Python) costs nothing in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
PRODUCTS: dict[Any, tuple[int, int]] = {  # operator -> where its two factors stand
    _aten.mm.default: (0, 1),
    _aten.bmm.default: (0, 1),
    _aten.mv.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.baddbmm.default: (1, 2),
    _aten.addmv.default: (1, 2),
    _aten.mkldnn_linear.default: (0, 1),
}
_INTO_A_TENSOR = {_aten.mm.out: _aten.mm.default, _aten.addmm.out: _aten.addmm.default}  # replayed into a new one


class Layout(NamedTuple):
    """How a tensor lies in memory, and which one it is, if it is one of the tensors that were named as lasting."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    storage: int  # address of the lasting storage; 0 for others
    offset: int  # in that storage


class Product(NamedTuple):
    """One call of an operator for matrix products."""

    operator: Any
    arguments: tuple[Any, ...]  # a Layout in place of each tensor
    kwargs: dict[str, Any]

    @property
    def flops(self) -> int:
        """Multiplications and additions of it, two for each pair of factors."""
        first, second = (self.arguments[i] for i in PRODUCTS[self.operator])
        if self.operator == _aten.mkldnn_linear.default:
            return 2 * _size(first.shape) * second.shape[0]
        columns = second.shape[-1] if len(second.shape) > 1 else 1
        return 2 * _size(first.shape) * columns


def _size(shape: Iterable[int]) -> int:
    return int(torch.Size(shape).numel())


class _Recorder(TorchDispatchMode):
    """Sees every operator below autograd, forward and backward."""

    def __init__(self, lasting: Iterable[Tensor]) -> None:
        super().__init__()
        self.lasting = {tensor.untyped_storage().data_ptr() for tensor in lasting}
        self.products: list[Product] = []
        self.other: dict[str, int] = {}  # calls of the other operators, by name

    def _layout(self, argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        address = argument.untyped_storage().data_ptr()
        kept = address in self.lasting
        return Layout(
            tuple(argument.shape),
            argument.stride(),
            argument.dtype,
            address if kept else 0,
            int(argument.storage_offset()) if kept else 0,
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = _INTO_A_TENSOR.get(func, func)
        if product in PRODUCTS:
            options = {name: value for name, value in (kwargs or {}).items() if name != "out"}
            self.products.append(Product(product, tuple(map(self._layout, args)), options))
        else:
            self.other[func._schema.name] = self.other.get(func._schema.name, 0) + 1
        return func(*args, **(kwargs or {}))


class Recording(NamedTuple):
    """What a piece of work called."""

    products: list[Product]
    other: dict[str, int]  # calls of the other operators, by name

    @property
    def flops(self) -> int:
        """Multiplications and additions of all products."""
        return sum(product.flops for product in self.products)


def record(work: Callable[[], Any], lasting: Iterable[Tensor] = ()) -> Recording:
    """Record every matrix product of a piece of work, forward and backward.

    Args:
        work: The work, which is done once.
        lasting: Tensors that outlast it, such as parameters. In a replay each of them is a tensor of its own, so that
            weights come out of the same memory as often; what is computed in between is one tensor for each layout,
            and so as near to the processor as it can be.

    Example:
        >>> weight = torch.ones(3, 4, requires_grad=True)
        >>> recording = record(lambda: (torch.ones(2, 3) @ weight).sum().backward(), [weight])
        >>> [product.operator.__name__ for product in recording.products], recording.flops
        (['mm.default', 'mm.default'], 96)
    """
    with _Recorder(lasting) as recorder:
        work()
    return Recording(recorder.products, recorder.other)


def replay(products: list[Product]) -> Callable[[], None]:
    """Make fresh tensors of the recorded layouts, and give a function that computes all products once more.

    Precision and threads are those of the time when it is called.
    """
    generator = torch.Generator().manual_seed(0)
    tensors: dict[Any, Tensor] = {}
    lasting: dict[tuple[int, torch.dtype], int] = {}  # elements that are needed of each lasting storage
    for product in products:
        for argument in product.arguments:
            if isinstance(argument, Layout) and argument.storage:
                key = argument.storage, argument.dtype
                lasting[key] = max(lasting.get(key, 0), argument.offset + _extent(argument))
    flat = {key: torch.randn(size, generator=generator).to(key[1]) for key, size in lasting.items()}

    def fresh(argument: Any, position: int) -> Any:
        if not isinstance(argument, Layout):
            return argument
        if argument.storage:
            memory = flat[argument.storage, argument.dtype]
            return memory.as_strided(argument.shape, argument.strides, argument.offset)
        if (argument, position) not in tensors:
            memory = torch.randn(_extent(argument), generator=generator).to(argument.dtype)
            tensors[argument, position] = memory.as_strided(argument.shape, argument.strides)
        return tensors[argument, position]

    calls = [
        (p.operator, tuple(fresh(argument, i) for i, argument in enumerate(p.arguments)), p.kwargs) for p in products
    ]

    @torch.no_grad()
    def run() -> None:
        for operator, arguments, kwargs in calls:
            operator(*arguments, **kwargs)

    return run


def _extent(layout: Layout) -> int:
    """Count the elements from a tensor's first to its last in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(layout.shape, layout.strides, strict=True))
