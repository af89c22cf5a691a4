"""Network blocks: SimNorm, normalised layers and ensembles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = [
    "ACTIVATIONS",
    "EnsembleLayerNorm",
    "EnsembleLinear",
    "EnsembleMLP",
    "Mish",
    "NormedEnsemble",
    "NormedLinear",
    "SimNorm",
    "mlp",
]


class _MishFunction(torch.autograd.Function):
    """Mish from vectorised primitives, with its derivative computed on the way forward.

    With s = sigmoid(x) and p = s (2 - s):  tanh(softplus(x)) = p / (2 - p) =: t,  dt/dx = 4 s (1 - s)² / (2 - p)².
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        p = torch.addcmul(s, s, s, value=-0.5).mul_(2.0)
        rest = 2.0 - p
        t = p.div_(rest)
        if ctx.needs_input_grad[0]:
            slope = (1.0 - s).div_(rest)
            slope.square_().mul_(s).mul_(x)  # x s (1 - s)² / (2 - p)²
            ctx.save_for_backward(torch.add(t, slope, alpha=4.0))
        return t.mul_(x)

    @staticmethod
    @once_differentiable  # the saved slope is a constant: second derivatives would be wrong without a word
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


class Mish(nn.Module):
    """Mish, x tanh(softplus(x)) (Misra 2019), any shape.

    `torch.nn.Mish` runs about five times slower on CPUs, where it took a quarter of an update; elsewhere it is used.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply Mish element by element."""
        return _MishFunction.apply(x) if x.device.type == "cpu" else F.mish(x)


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


class NormedLinear(nn.Sequential):
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
) -> nn.Sequential:
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
    return nn.Sequential(*layers)


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

    def __init__(self, ensemble: int, features: int) -> None:
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(torch.ones(ensemble, 1, features))
        self.bias = nn.Parameter(torch.zeros(ensemble, 1, features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each member's features."""
        return torch.addcmul(self.bias, F.layer_norm(x, (self.features,)), self.weight)


class EnsembleMLP(nn.Sequential):
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


class NormedEnsemble(nn.Sequential):
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
            layers.append(nn.Sequential(linear, nn.Dropout(0.0 if i else dropout), norm, activation()))
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
