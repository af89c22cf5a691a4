"""Taking one task out of a multi-task world model's weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pwm_gym.world_model.config import WorldModelConfig

__all__ = ["fold_task"]

_LATENT_INPUTS = ("dynamics", "reward_head", "termination_head", "value.online", "value.target", "policy_prior.net")


def fold_task(
    weights: Mapping[str, Tensor], embedding: Tensor, several: WorldModelConfig, single: WorldModelConfig
) -> dict[str, Tensor]:
    """Make a single-task world model's weights from a multi-task one's.

    Every part reads [x, e, a]: an observation or latent, the task's embedding, and, some of them, an action. For one
    task e is a constant, so W_e e joins the first layer's bias, and what multiplies the padding of x and a is dropped.

    Args:
        weights: The multi-task model's `state_dict`.
        embedding: The task's e, scaled to norm 1 at most, (E,).
        several: The multi-task model's config.
        single: The same for the one task, as `WorldModelConfig.for_task` makes it.
    """
    folded = {name: value for name, value in weights.items() if not name.startswith("task_embedding.")}
    inputs = dict.fromkeys(_LATENT_INPUTS, (several.latent_dim, several.latent_dim))
    inputs["encoder"] = several.observation_dim, single.observation_dim
    for part, (padded, kept) in inputs.items():
        name = f"{part}.0.0"
        if f"{name}.weight" not in folded:
            continue
        weight, bias = folded[f"{name}.weight"], folded[f"{name}.bias"]
        is_ensemble = weight.ndim == 3  # (members, in, out) and (members, 1, out)
        if not is_ensemble:
            weight, bias = weight.T[None], bias[None, None]
        x, e, a = weight.split([padded, len(embedding), weight.shape[1] - padded - len(embedding)], 1)
        bias = bias + torch.einsum("e,meo->mo", embedding, e).unsqueeze(1)
        weight = torch.cat([x[:, :kept], a[:, : single.action_dim]], 1)
        if not is_ensemble:
            weight, bias = weight[0].T, bias[0, 0]
        folded[f"{name}.weight"], folded[f"{name}.bias"] = weight.contiguous(), bias
    for name in ("policy_prior.net.2.weight", "policy_prior.net.2.bias"):
        if name in folded:  # means, then log standard deviations
            folded[name] = torch.cat([half[: single.action_dim] for half in folded[name].chunk(2)])
    return folded
