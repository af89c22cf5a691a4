"""The layers of fully connected networks, in and out of other people's state dictionaries and our modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pwm_gym.networks import EnsembleLayerNorm, EnsembleLinear

__all__ = ["Layer", "latent_order", "layers_of", "put_layers", "read_layers", "reorder"]

_LAST = 1 << 30  # sorts a block's LayerNorm, "ln", behind its numbered parts


class Layer(NamedTuple):
    """A linear map and the LayerNorm behind it, of one network or stacked for E of them."""

    name: str  # in the file
    weight: Tensor  # (out, in) or (E, out, in)
    bias: Tensor  # (out,) or (E, out)
    scale: Tensor | None = None  # of the LayerNorm, as `bias`; None where there is none
    shift: Tensor | None = None

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.weight.shape[-1]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.weight.shape[-2]


def read_layers(entries: Mapping[str, Tensor], prefix: str, ensemble: bool = False) -> list[Layer]:
    """Read a network's layers in whichever order and under whichever numbers a `state_dict` has them.

    What follows the prefix may be numbered blocks with their LayerNorm under "ln" ("0.weight", "0.ln.weight"),
    the numbered entries of nested or flat Sequentials ("0.0.weight", "0.1.weight"), or a flat list of parameters ("0"
    weight, "1" bias, and so on). A matrix begins a layer, a vector is the LayerNorm of the layer before it.

    Args:
        entries: Tensors by name.
        prefix: What the names of this network begin with.
        ensemble: Whether the tensors of E networks are stacked.

    Raises:
        ValueError: If a weight or bias is missing, or has the wrong number of axes.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Mish(), nn.Linear(4, 2))
        >>> [(layer.name, layer.out_features, layer.scale is not None) for layer in read_layers(net.state_dict(), "")]
        [('0', 4, True), ('3', 2, False)]
    """
    modules: dict[tuple[int, ...], dict[str, tuple[str, Tensor]]] = {}
    for key, value in entries.items():
        if not key.startswith(prefix):
            continue
        *path, kind = key[len(prefix) :].split(".")
        if kind.isdigit() and not path:
            path, kind = [str(int(kind) // 2)], ("weight", "bias")[int(kind) % 2]
        if kind not in ("weight", "bias") or not all(part.isdigit() or part == "ln" for part in path):
            raise ValueError(f"expected weights and biases of numbered layers in {prefix}*, got {key!r}.")
        place = tuple(int(part) if part.isdigit() else _LAST for part in path)
        modules.setdefault(place, {})[kind] = key, value

    layers: list[Layer] = []
    for place in sorted(modules):
        found = modules[place]
        for kind, other in (("weight", "bias"), ("bias", "weight")):
            if kind not in found:
                raise ValueError(f"expected {_partner(found[other][0], kind)!r}, got none.")
        (key, weight), (_, bias) = found["weight"], found["bias"]
        if weight.ndim == 2 + ensemble:
            layers.append(Layer(key.removesuffix(".weight"), weight, bias))
        elif weight.ndim == 1 + ensemble and layers and layers[-1].scale is None:
            layers[-1] = layers[-1]._replace(scale=weight, shift=bias)
        else:
            raise ValueError(f"expected a linear map or its LayerNorm in {key!r}, got shape {tuple(weight.shape)}.")
    return layers


def _partner(key: str, kind: str) -> str:
    """Name the weight that belongs to a bias, or the bias that belongs to a weight."""
    head, _, last = key.rpartition(".")
    return f"{head}.{int(last) ^ 1}" if last.isdigit() else f"{head}.{kind}"


def _blocks(net: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yield each linear map of a network with the LayerNorm behind it, or None."""
    linear: Any = None
    norm: Any = None
    for module in net.modules():
        if isinstance(module, nn.LayerNorm | EnsembleLayerNorm):
            norm = module
        elif isinstance(module, nn.Linear | EnsembleLinear):
            if linear is not None:
                yield linear, norm
            linear, norm = module, None
    yield linear, norm


def layers_of(net: nn.Module) -> list[Layer]:
    """Give the layers of one of our networks: of `mlp`, `NormedEnsemble`, `EnsembleMLP` and Sequentials of them."""
    layers = []
    for i, (linear, norm) in enumerate(_blocks(net)):
        tensors = [linear.weight, linear.bias, *((norm.weight, norm.bias) if norm is not None else ())]
        if isinstance(linear, EnsembleLinear):  # (E, in, out) and (E, 1, out)
            tensors = [tensors[0].transpose(1, 2), *(tensor.squeeze(1) for tensor in tensors[1:])]
        layers.append(Layer(str(i), *(tensor.detach() for tensor in tensors)))
    return layers


@torch.no_grad()
def put_layers(layers: Sequence[Layer], net: nn.Module) -> None:
    """Copy layers into one of our networks.

    Raises:
        ValueError: If they don't fit.
    """
    targets = layers_of(net)  # views of the parameters
    if len(layers) != len(targets):
        names = [layer.name for layer in layers]
        raise ValueError(f"expected {len(targets)} layers, got {len(layers)}: {names}.")
    for layer, target in zip(layers, targets, strict=True):
        for field in ("weight", "bias", "scale", "shift"):
            source, destination = getattr(layer, field), getattr(target, field)
            expected = None if destination is None else tuple(destination.shape)
            got = None if source is None else tuple(source.shape)
            if expected != got:
                kind = {"scale": "LayerNorm's weight", "shift": "LayerNorm's bias"}.get(field, field)
                raise ValueError(f"expected the {kind} of {layer.name!r} of shape {expected}, got {got}.")
            if destination is not None:
                destination.copy_(source)


def latent_order(latent_dim: int, group_size: int) -> Tensor:
    """Give the order of TD-MPC2's latent features in our latents: ours[j] = theirs[order[j]], (Z,).

    TD-MPC2's SimNorm groups neighbours, ours groups what is Z / group_size apart (see `pwm_gym.networks.SimNorm`).

    Example:
        >>> latent_order(6, 3)  # they group (0, 1, 2) and (3, 4, 5)
        tensor([0, 3, 1, 4, 2, 5])
    """
    return torch.arange(latent_dim).reshape(-1, group_size).T.flatten()


def reorder(layers: Sequence[Layer], inputs: Tensor | None, outputs: Tensor | None) -> list[Layer]:
    """Reorder a network's first inputs, its outputs, or both.

    Args:
        layers: The network.
        inputs: Which of the old inputs becomes the new one, (N,), for the first N of them; None to leave them.
        outputs: Which of the old outputs becomes the new one, (out,); None to leave them.
    """
    layers = list(layers)
    if inputs is not None:
        first = layers[0]
        columns = torch.cat([inputs, torch.arange(len(inputs), first.in_features)])
        layers[0] = first._replace(weight=first.weight[..., columns])
    if outputs is not None:
        last = layers[-1]
        layers[-1] = Layer(
            last.name,
            last.weight[..., outputs, :],
            *(None if t is None else t[..., outputs] for t in (last.bias, last.scale, last.shift)),  # type: ignore[arg-type]
        )
    return layers
