"""Taking a multi-task world model's weights for one task: one that it knows, or a new one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from pwm_gym.world_model.config import WorldModelConfig

__all__ = ["fold_embedding", "resize_spaces"]

_LATENT_INPUTS = ("dynamics", "reward_head", "termination_head", "value.online", "value.target", "policy_prior.net")

# Every part reads [x, e, a]: an observation or latent, the task's embedding, and, some of them, an action. The first
# layer's weights are (out, in), or of an ensemble (members, in, out).


def _first_layers(weights: Mapping[str, Tensor], config: WorldModelConfig) -> dict[str, tuple[str, int]]:
    """Give the first layer of each part that there is, and the width of its x."""
    inputs = {"encoder": config.observation_dim, **dict.fromkeys(_LATENT_INPUTS, config.latent_dim)}
    return {part: (f"{part}.0.0", width) for part, width in inputs.items() if f"{part}.0.0.weight" in weights}


def _to_width(x: Tensor, width: int, axis: int) -> Tensor:
    """Keep the first entries along an axis, or append zeros."""
    x = x.transpose(axis, -1)
    return F.pad(x, (0, width - x.shape[-1])).transpose(axis, -1)  # a negative padding takes away


def resize_spaces(
    weights: Mapping[str, Tensor], several: WorldModelConfig, observation_dim: int, action_dim: int
) -> dict[str, Tensor]:
    """Let a multi-task world model read and choose vectors of other widths.

    Observations and actions are padded on the right, so their first numbers keep their weights; weights of what is cut
    off are dropped, those of what is new are 0.

    Args:
        weights: The model's `state_dict`.
        several: Its config.
        observation_dim: New width of an observation.
        action_dim: New width of an action.
    """
    resized = dict(weights)
    for part, (layer, width) in _first_layers(weights, several).items():
        weight = weights[f"{layer}.weight"]
        axis = 1  # of the inputs, whether (out, in) or (members, in, out)
        x, e, a = weight.split([width, several.task_dim, weight.shape[axis] - width - several.task_dim], axis)
        if part == "encoder":
            x = _to_width(x, observation_dim, axis)
        if a.shape[axis]:
            a = _to_width(a, action_dim, axis)
        resized[f"{layer}.weight"] = torch.cat([x, e, a], axis)
    for name in ("policy_prior.net.2.weight", "policy_prior.net.2.bias"):
        if name in weights:  # means, then log standard deviations
            resized[name] = torch.cat([_to_width(half, action_dim, 0) for half in weights[name].chunk(2)])
    return resized


def fold_embedding(
    weights: Mapping[str, Tensor], embedding: Tensor, several: WorldModelConfig, observation_dim: int
) -> dict[str, Tensor]:
    """Make a single-task world model's weights from a multi-task one's.

    For one task e is a constant, so W_e e joins the first layer's bias.

    Args:
        weights: The multi-task model's, for the task's own widths (`resize_spaces`).
        embedding: The task's e, scaled to norm 1 at most, (E,).
        several: The multi-task model's config.
        observation_dim: The task's own width of an observation.
    """
    folded = {name: value for name, value in weights.items() if not name.startswith("task_embedding.")}
    for part, (layer, width) in _first_layers(weights, several).items():
        weight, bias = weights[f"{layer}.weight"], weights[f"{layer}.bias"]
        width = observation_dim if part == "encoder" else width
        x, e, a = weight.split([width, len(embedding), weight.shape[1] - width - len(embedding)], 1)
        if weight.ndim == 2:
            shift = e @ embedding  # (out,)
        else:
            shift = torch.einsum("e,meo->mo", embedding, e).unsqueeze(1)  # (members, 1, out)
        folded[f"{layer}.weight"], folded[f"{layer}.bias"] = torch.cat([x, a], 1), bias + shift
    return folded
