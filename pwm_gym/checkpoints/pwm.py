"""The files of PWM's agents, read without executing their pickles, and the world models in them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor

from pwm_gym.checkpoints.hub import local_file
from pwm_gym.checkpoints.layers import layers_of
from pwm_gym.checkpoints.tdmpc2 import make_model, pick_tensors
from pwm_gym.foreign import read_torch_file
from pwm_gym.world_model import WorldModel

__all__ = ["load_pwm", "moments", "pwm_world_model", "read_pwm"]

_STATISTICS = "pwm.utils.running_mean_std.RunningMeanStd"  # pickled in the files


def read_pwm(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what PWM's code saved: state dictionaries by name, and running statistics as `ForeignObject`s."""
    path = local_file(source)
    content = read_torch_file(path, objects=[_STATISTICS])
    missing = {"actor", "critic", "world_model"}.difference(content if isinstance(content, dict) else ())
    if missing:
        raise ValueError(
            f"expected an agent that PWM's code saved in {os.fspath(path)!r}, got no {sorted(missing)}. A world model "
            f"of TD-MPC2 is read by load_tdmpc2."
        )
    return content


def moments(statistics: Any) -> tuple[Tensor, Tensor, float] | None:
    """Read mean, standard deviation, as PWM divides by it, and count; None where there are none."""
    if statistics is None:
        return None
    try:
        mean, var, count = (statistics.state[name] for name in ("mean", "var", "count"))
        return mean.float(), (var.float() + 1e-5).sqrt(), float(count)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected running statistics with mean, var and count, got {statistics!r}.") from error


@torch.no_grad()
def pwm_world_model(content: Mapping[str, Any], tasks: str | Sequence[str] | None, **fields: Any) -> WorldModel:
    """Make the world model of an agent's file, with the file's normalisation as a part of its weights."""
    entries = pick_tensors(content["world_model"], "under 'world_model'")
    model = make_model(entries, tasks, fields.pop("observation_space"), fields.pop("action_space"), **fields)
    observations, rewards = moments(content.get("obs_rms")), moments(content.get("rew_rms"))
    if observations is not None:
        first, (mean, std, _) = layers_of(model.encoder)[0], observations
        columns = first.weight[:, : model.config.observation_dim].div_(std)
        first.bias.sub_(columns @ mean)
    if rewards is not None and model.config.num_bins == 1:
        last, (mean, std, _) = layers_of(model.reward_head)[-1], rewards
        last.weight.mul_(std)
        last.bias.mul_(std).add_(mean)
    elif rewards is not None and rewards[2] > 1.0:
        raise ValueError(
            "expected rewards that were not normalised ('rew_rms' None or unused) from a model that predicts a "
            "categorical, got normalised ones, which can't be turned back."
        )
    return model


def load_pwm(
    source: str | os.PathLike[str],
    tasks: str | Sequence[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    observation_space: spaces.Space | None = None,
    action_space: spaces.Space | None = None,
    simnorm_dim: int = 8,
    vmin: float = -10.0,
    vmax: float = 10.0,
    reward_in_task_units: bool = False,
) -> WorldModel:
    """Read the world model out of an agent that PWM's code saved (github.com/imgeorgiev/PWM).

    The file's normalisation of observations and rewards becomes a part of the weights, so that the model takes raw
    observations and a scalar reward is in task units. (PWM also clips normalised observations at 5; that is left out.)

    Args:
        source: As in `load_tdmpc2`.
        tasks: As in `load_tdmpc2`.
        device: As in `load_tdmpc2`.
        observation_space: As in `load_tdmpc2`.
        action_space: As in `load_tdmpc2`.
        simnorm_dim: As in `load_tdmpc2`.
        vmin: As in `load_tdmpc2`.
        vmax: As in `load_tdmpc2`.
        reward_in_task_units: Decode a categorical reward with symexp. PWM's code, and so its critics, leave it out.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: As in `load_tdmpc2`.
        ImportError: As in `load_tdmpc2`.
        UnsafeFileError: If the file holds other pickled objects than PWM's statistics; nothing is executed.
        ValueError: As in `load_tdmpc2`.
    """
    return pwm_world_model(
        read_pwm(source),
        tasks,
        observation_space=observation_space,
        action_space=action_space,
        simnorm_dim=simnorm_dim,
        vmin=vmin,
        vmax=vmax,
        reward_in_task_units=reward_in_task_units,
    ).to(device)
