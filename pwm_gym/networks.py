"""Network blocks: SimNorm, normalised layers and ensembles."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, vmap

from pwm_gym import bf16, kernels
from pwm_gym.kernels import Block, Kind

__all__ = [
    "ACTIVATIONS",
    "EnsembleLayerNorm",
    "EnsembleLinear",
    "EnsembleMLP",
    "Layers",
    "Mish",
    "NormedEnsemble",
    "NormedLinear",
    "PartDropout",
    "SimNorm",
    "Stacked",
    "block",
    "mlp",
]


def _mish_gate(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With s = sigmoid(x) and p = s (2 - s), compute tanh(softplus(x)) = p / (2 - p), s, and 2 - p."""
    s = torch.sigmoid(x)
    p = torch.addcmul(s, s, s, value=-0.5).mul_(2.0)
    rest = 2.0 - p
    return p.div_(rest), s, rest


class _MishFunction(torch.autograd.Function):
    """Mish from vectorised primitives, with its derivative computed on the way forward.

    With t, s and 2 - p of `_mish_gate`:  dt/dx = 4 s (1 - s)² / (2 - p)².
    """

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        t, s, rest = _mish_gate(x)
        slope = (1.0 - s).div_(rest)
        slope.square_().mul_(s).mul_(x)  # x s (1 - s)² / (2 - p)²
        derivative = torch.add(t, slope, alpha=4.0)
        return t.mul_(x), derivative

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    @once_differentiable  # the saved slope is a constant: second derivatives would be wrong without a word
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return _MishFunction.apply(x), (in_dims[0], in_dims[0])


class Mish(nn.Module):
    """Mish, x tanh(softplus(x)) (Misra 2019), any shape.

    `torch.nn.Mish` runs about five times slower on CPUs, where it took a quarter of an update; elsewhere it is used.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply Mish element by element."""
        if x.device.type != "cpu":
            return F.mish(x)
        return _MishFunction.apply(x)[0] if torch.is_grad_enabled() else _mish_gate(x)[0].mul_(x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"mish": Mish, "relu": nn.ReLU}


class SimNorm(nn.Module):
    """Simplicial normalisation: split the features into groups and apply a softmax within each.

    Every group of `group_size` features becomes a point of a simplex, so the output lies in [0, 1] and its groups sum
    to 1 (Lavoie et al. 2022; the latent regulariser of TD-MPC2, arXiv:2310.16828, eq. 5).

    Feature i belongs to group i mod G, where G = features / group_size: groups are interleaved, not contiguous as in
    TD-MPC2's files. The function is the same up to a fixed permutation of features, and on CPUs a softmax whose axis
    is not the last one runs 15 to 20 times faster. Whoever imports foreign weights permutes them once.

    Args:
        group_size: Features in a group; must divide the number of features.

    Example:
        >>> SimNorm(4)(torch.zeros(1, 8))
        tensor([[0.2500, 0.2500, 0.2500, 0.2500, 0.2500, 0.2500, 0.2500, 0.2500]])
    """

    def __init__(self, group_size: int) -> None:
        super().__init__()
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., Z) to (..., Z)."""
        groups = x.unflatten(-1, (self.group_size, -1))  # (..., V, G)
        return groups.softmax(-2).flatten(-2)  # (..., Z)

    def extra_repr(self) -> str:
        """Show the group size in the module's repr."""
        return f"group_size={self.group_size}"


class EnsembleLinear(nn.Module):
    """E independent linear maps in one batched product: (E, N, in) -> (E, N, out)."""

    def __init__(self, ensemble: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(ensemble, in_features, out_features))  # its owner initialises it
        self.bias = nn.Parameter(torch.zeros(ensemble, 1, out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Apply each member's map to its own input."""
        return torch.baddbmm(self.bias, x, self.weight)


class EnsembleLayerNorm(nn.Module):
    """LayerNorm over the last axis with scale and shift of its own for each member: (E, N, F) -> (E, N, F)."""

    eps = 1e-5

    def __init__(self, ensemble: int, features: int) -> None:
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(torch.ones(ensemble, 1, features))
        self.bias = nn.Parameter(torch.zeros(ensemble, 1, features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each member's features."""
        return torch.addcmul(self.bias, F.layer_norm(x, (self.features,), eps=self.eps), self.weight)


_LINEAR, _NORM, _MISH = (nn.Linear, EnsembleLinear), (nn.LayerNorm, EnsembleLayerNorm), (Mish, nn.Mish)


def _watched(layer: nn.Module) -> bool:
    """Tell whether someone looks at this layer's own input, output or gradient."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _parameters(layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Look up weight and bias, in a third of the time that attributes of a module take."""
    return layer._parameters.get("weight"), layer._parameters.get("bias")


def _flatten(layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
    for layer in layers:
        if type(layer).forward is Layers.forward and not _watched(layer):
            yield from _flatten(layer)  # type: ignore[arg-type]
        elif not (isinstance(layer, nn.Dropout) and not (layer.training and layer.p)):  # which does nothing
            yield layer


def _blocks(layers: Iterable[nn.Module]) -> list[Block] | None:
    """Group layers into linear maps and what follows each; None where a layer is of another kind, or is watched.

    Sizes that don't fit give None, too: PyTorch's modules then say what is wrong, where a kernel would read elsewhere.
    """
    remaining: list[Any] = list(_flatten(layers))[::-1]
    blocks: list[Block] = []
    if any(map(_watched, remaining)):
        return None
    while remaining:
        linear = remaining.pop()
        weight, bias = _parameters(linear)
        if type(linear) not in _LINEAR or weight is None or bias is None:
            return None
        if not remaining or type(remaining[-1]) in _LINEAR:
            blocks.append(Block(Kind.NOTHING, weight, bias))
            continue
        dropout = remaining.pop() if type(remaining[-1]) is PartDropout else None
        if len(remaining) < 2:
            return None
        first, second = remaining.pop(), remaining.pop()
        norm, other = (first, second) if isinstance(first, _NORM) else (second, first)
        scale, shift = _parameters(norm)
        if not isinstance(norm, _NORM) or scale is None or shift is None:
            return None
        if scale.shape != bias.shape or scale.dtype is not weight.dtype:
            return None
        if isinstance(other, _MISH):
            kind, groups = Kind.NORM_MISH if norm is first else Kind.MISH_NORM, 1
        elif isinstance(other, SimNorm) and norm is first and scale.shape[-1] % other.group_size == 0:
            kind, groups = Kind.NORM_SIMNORM, scale.shape[-1] // other.group_size
        else:
            return None
        drop = (None, 1.0) if dropout is None else (dropout.draw, dropout.scale)
        blocks.append(Block(kind, weight, bias, scale, shift, norm.eps, groups, *drop))
    return blocks or None


class Layers(nn.Sequential):
    """Layers one after another, computed by `pwm_gym.kernels` where it can.

    The parameters, their names and, but for rounding, the results are those of `nn.Sequential`.

    Example:
        >>> layers = Layers(nn.Linear(3, 8), nn.LayerNorm(8), Mish())
        >>> x = torch.randn(4, 3)
        >>> torch.allclose(layers(x), nn.Sequential(*layers)(x), atol=1e-6)
        True
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply all layers in turn."""
        blocks = _blocks(self)
        if blocks is not None and kernels.usable(x, blocks):
            return bf16.run(blocks, x) if bf16.usable(x, blocks) else kernels.run(blocks, x)
        return super().forward(x)


class NormedLinear(Layers):
    """Linear, LayerNorm, activation: TD-MPC2's block (arXiv:2310.16828, sec. 3.1).

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        activation: Module applied after the LayerNorm.
        spectral_norm: Bound the linear map's largest singular value by 1 and leave the LayerNorm out, which
            would undo the bound.
    """

    def __init__(self, in_features: int, out_features: int, activation: nn.Module, spectral_norm: bool = False) -> None:
        linear: nn.Module = nn.Linear(in_features, out_features)
        if spectral_norm:
            super().__init__(nn.utils.parametrizations.spectral_norm(linear), activation)
        else:
            super().__init__(linear, nn.LayerNorm(out_features), activation)


def mlp(
    in_features: int,
    hidden: Sequence[int],
    out_features: int,
    activation: Callable[[], nn.Module],
    out_activation: nn.Module | None = None,
    spectral_norm: bool = False,
) -> Layers:
    """Build NormedLinear layers and an output layer: NormedLinear with `out_activation`, or plain Linear without.

    Args:
        in_features: Width of the input.
        hidden: Widths of the hidden layers.
        out_features: Width of the output.
        activation: Makes the hidden activations.
        out_activation: Activation of the output block; None for a plain linear output.
        spectral_norm: As in `NormedLinear`.
    """
    widths = [in_features, *hidden]
    layers: list[nn.Module] = [
        NormedLinear(i, o, activation(), spectral_norm) for i, o in zip(widths, widths[1:], strict=False)
    ]
    if out_activation is None:
        layers.append(nn.Linear(widths[-1], out_features))
    else:
        layers.append(NormedLinear(widths[-1], out_features, out_activation, spectral_norm))
    return Layers(*layers)


class EnsembleMLP(Layers):
    """E independent MLPs on one input: Linear, activation, LayerNorm per hidden layer, linear scalar output.

    The order of activation and LayerNorm and the orthogonal initialisation are those of PWM's critics.

    Args:
        ensemble: Number of members E.
        in_features: Width of the input.
        hidden: Widths of the hidden layers.
        activation: Makes the hidden activations.

    Example:
        >>> EnsembleMLP(3, 8, [16], nn.Mish)(torch.zeros(5, 8)).shape
        torch.Size([3, 5])
    """

    def __init__(
        self, ensemble: int, in_features: int, hidden: Sequence[int], activation: Callable[[], nn.Module]
    ) -> None:
        layers: list[nn.Module] = []
        width = in_features
        for features in hidden:
            layers += [EnsembleLinear(ensemble, width, features), activation(), EnsembleLayerNorm(ensemble, features)]
            width = features
        super().__init__(*layers, EnsembleLinear(ensemble, width, 1))
        self.ensemble = ensemble
        for layer in self:
            for weight in layer.weight.data if isinstance(layer, EnsembleLinear) else ():
                nn.init.orthogonal_(weight, gain=math.sqrt(2))

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate all members on (..., in) and return (E, ...)."""
        flat = x.reshape(-1, x.shape[-1]).expand(self.ensemble, -1, -1)  # (E, N, in)
        return super().forward(flat).reshape(self.ensemble, *x.shape[:-1])


class PartDropout(nn.Dropout):
    """Dropout that is cheap on CPUs, and that several processes can share which have a part of one batch each.

    All of them draw the whole batch's mask and take their part of it.

    Attributes:
        part: This process's rows of the batch B.
        count: Rows of the whole batch; None where this process has all of them.
    """

    part, count = slice(None), None

    @property
    def scale(self) -> float:
        """What the entries that are kept are multiplied by, 1 / (1 - p)."""
        return 1.0 / (1.0 - self.p)

    def draw(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Draw which entries of (E, T B, F), where B counts the part's rows, to keep: 1 or 0, uint8."""
        if self.count is None:
            return self._draw(shape, device)
        members, rows, features = shape
        times = rows // (self.part.stop - self.part.start)
        whole = self._draw((members, times, self.count, features), device)
        return whole[:, :, self.part].reshape(*shape).contiguous()

    def _draw(self, shape: Sequence[int], device: torch.device | str) -> Tensor:
        kept = torch.ones(*shape, dtype=torch.uint8, device=device)
        if kept.device.type != "cpu":
            return kept.bernoulli_(1.0 - self.p)
        # From one dropped entry to the next the distance is geometric: for p = 0.01 a hundredth of the random numbers.
        size, reached = kept.numel(), 0
        while reached < size:
            gaps = torch.empty(int((size - reached) * self.p) + 64, dtype=torch.float64).geometric_(self.p)
            dropped = gaps.clamp_(max=size + 1).long().cumsum(0).add_(reached - 1)
            kept.view(-1)[dropped[dropped < size]] = 0
            reached = int(dropped[-1]) + 1
        return kept

    def forward(self, x: Tensor) -> Tensor:
        """Drop entries of (E, T B, F)."""
        if not self.training or self.p == 0.0:
            return x
        return super().forward(x) if self.count is None and x.device.type != "cpu" else x * self._factor(x)

    def _factor(self, x: Tensor) -> Tensor:
        return self.draw(x.shape, x.device).to(x.dtype).mul_(self.scale)


class NormedEnsemble(Layers):
    """E independent MLPs of `NormedLinear` blocks on one input, with dropout in the first block: TD-MPC2's values.

    Args:
        ensemble: Number of members E.
        in_features: Width of the input.
        hidden: Widths of the hidden layers.
        out_features: Width of the plain linear output.
        activation: Makes the hidden activations.
        dropout: Probability of dropping an output of the first linear map, in training mode.

    Example:
        >>> NormedEnsemble(5, 8, [16], 101, nn.Mish)(torch.zeros(3, 8)).shape
        torch.Size([5, 3, 101])
    """

    def __init__(
        self,
        ensemble: int,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        activation: Callable[[], nn.Module],
        dropout: float = 0.0,
    ) -> None:
        layers: list[nn.Module] = []
        width = in_features
        for i, features in enumerate(hidden):
            linear, norm = EnsembleLinear(ensemble, width, features), EnsembleLayerNorm(ensemble, features)
            layers.append(Layers(linear, PartDropout(0.0 if i else dropout), norm, activation()))
            width = features
        super().__init__(*layers, EnsembleLinear(ensemble, width, out_features))
        self.ensemble = ensemble
        for weight in self.linear_weights():
            nn.init.trunc_normal_(weight, std=0.02)

    def linear_weights(self) -> list[nn.Parameter]:
        """List the weights of the linear maps, (E, in, out) each, from the input to the output."""
        return [module.weight for module in self.modules() if isinstance(module, EnsembleLinear)]

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate all members on (..., in) and return (E, ..., out)."""
        flat = x.reshape(-1, x.shape[-1]).expand(self.ensemble, -1, -1)  # (E, N, in)
        return super().forward(flat).reshape(self.ensemble, *x.shape[:-1], -1)


class Stacked(nn.Module):
    """K modules of one architecture as one program: parameters gain a leading axis K; inputs and outputs have one, too.

    A parameter that is wider in some of the modules, such as a layer for several actions, is padded with zeros on the
    right. What a module computes must then not depend on its padding.

    The modules keep their own parameters; `read` copies them here, which the constructor does, and `write` copies back.

    Args:
        modules: The modules, without buffers.
        in_dim: Axis of the inputs along which the members stand.
        out_dim: The same of the outputs.

    Example:
        >>> stacked = Stacked([nn.Linear(3, 1), nn.Linear(3, 2)])
        >>> stacked(torch.zeros(2, 5, 3)).shape, stacked.leading("weight").shape
        (torch.Size([2, 5, 2]), torch.Size([2, 2, 3]))
    """

    def __init__(self, modules: Sequence[nn.Module], in_dim: int = 0, out_dim: int = 0) -> None:
        super().__init__()
        self.members = (*modules,)  # in a tuple, so that their parameters aren't this module's too
        self._template = (copy.deepcopy(modules[0]),)
        self._parameter_names = [name for name, _ in modules[0].named_parameters()]
        for name in self._parameter_names:
            own = [member.get_parameter(name) for member in modules]
            shape = torch.Size(max(sizes) for sizes in zip(*(p.shape for p in own), strict=True))
            stacked = nn.Parameter(own[0].new_zeros((len(own), *shape)), own[0].requires_grad)
            self.register_parameter(name.replace(".", "_"), stacked)
        self.read()
        self._in_dim, self._out_dim = in_dim, out_dim

    def leading(self, name: str) -> nn.Parameter:
        """Give the stacked form, (K, ...), of the members' parameter of that name."""
        return self.get_parameter(name.replace(".", "_"))

    def pairs(self) -> list[tuple[nn.Parameter, list[nn.Parameter]]]:
        """List each stacked parameter with the members' own, (K, ...) and K times (...)."""
        return [(self.leading(n), [member.get_parameter(n) for member in self.members]) for n in self._parameter_names]

    @torch.no_grad()
    def read(self) -> None:
        """Copy the members' parameters here."""
        for stacked, own in self.pairs():
            for k, parameter in enumerate(own):
                block(stacked[k], parameter.shape).copy_(parameter)

    @torch.no_grad()
    def write(self) -> None:
        """Copy the parameters back into the members."""
        for stacked, own in self.pairs():
            for k, parameter in enumerate(own):
                parameter.copy_(block(stacked[k], parameter.shape))

    def forward(self, *inputs: Tensor) -> Any:
        """Apply each member to its own part of the inputs."""

        def call_one(parameters: dict[str, Tensor], *own: Tensor) -> Any:
            return functional_call(self._template[0], parameters, own)

        parameters: dict[str, Tensor] = {name: self.leading(name) for name in self._parameter_names}
        return vmap(call_one, (0, *[self._in_dim] * len(inputs)), self._out_dim)(parameters, *inputs)


def block(padded: Tensor, shape: Sequence[int]) -> Tensor:
    """View the first entries along each axis of a padded tensor, (*shape)."""
    return padded[tuple(slice(0, size) for size in shape)]
