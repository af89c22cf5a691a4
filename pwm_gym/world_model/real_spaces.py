"""Real observation and action spaces in front of a world model: which ones it takes, and how they become vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor

from pwm_gym.world_model.config import WorldModelConfig

__all__ = ["check_spaces", "flatten_observations", "leading", "unbounded"]


def unbounded(shape: tuple[int, ...]) -> spaces.Box:
    """Make a Box of the finite float32 range."""
    limit = float(np.finfo(np.float32).max)
    return spaces.Box(-limit, limit, shape, np.float32)


def leading(space: Any, width: int) -> spaces.Box:
    """Keep the first `width` numbers of a flat Box."""
    return spaces.Box(space.low[:width], space.high[:width], dtype=space.dtype.type)


def check_spaces(
    config: WorldModelConfig,
    observation_space: spaces.Space,
    action_space: spaces.Space,
    features_extractor: BaseFeaturesExtractor | None,
) -> None:
    """Check that a world model can take the spaces and that they fit its config.

    Raises:
        TypeError: If a space is of a kind that a world model can't take.
        ValueError: If a space doesn't fit the config.
    """
    is_dict = isinstance(observation_space, spaces.Dict)
    for space in observation_space.spaces.values() if is_dict else [observation_space]:  # type: ignore[attr-defined]
        if is_image_space(space, check_channels=False):
            raise TypeError(
                f"expected vector observations, got an image space {space}. World models of pixels are not "
                f"supported: give proprioceptive observations or a vector of features."
            )
        vector = not isinstance(space, spaces.MultiDiscrete) or space.nvec.ndim == 1
        if not vector or not isinstance(
            space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary
        ):
            raise TypeError(f"expected Box, Discrete, MultiDiscrete, MultiBinary or a flat Dict of them, got {space}.")
    if not isinstance(action_space, spaces.Box):
        raise TypeError(
            f"expected a Box action space, got {action_space}. First-order gradients need continuous actions."
        )
    if not np.all(np.isfinite([action_space.low, action_space.high])):
        raise ValueError(
            f"expected finite action bounds, got {action_space}. Wrap the env in RescaleAction(env, -1, 1)."
        )
    width = features_extractor.features_dim if features_extractor else spaces.flatdim(observation_space)
    if config.observation_dim != width:
        raise ValueError(
            f"expected a space, or a features_extractor, of observation_dim {config.observation_dim} as in the "
            f"config, got one of {width}."
        )
    if config.action_dim != spaces.flatdim(action_space):
        raise ValueError(
            f"expected a space of action_dim {config.action_dim} as in the config, got one of "
            f"{spaces.flatdim(action_space)}."
        )
    padded = [observation_space] * bool(config.observation_dims) + [action_space] * bool(config.action_dims)
    if any(not isinstance(space, spaces.Box) or len(space.shape) != 1 for space in padded):
        raise TypeError(f"expected flat Boxes where tasks are padded, got {observation_space} and {action_space}.")


def flatten_observations(
    observations: Any, space: spaces.Space, device: torch.device, dtype: torch.dtype, keep_shape: bool = False
) -> Any:
    """Turn a batch of real observations into vectors of numbers; discrete ones become one-hot, as in SB3.

    Args:
        observations: Arrays or tensors, (B, *shape), or a dict of such.
        space: Of one observation.
        device: Where the result goes.
        dtype: Of the result.
        keep_shape: Leave the shape of continuous observations as it is, as features extractors want it.

    Returns:
        (B, O), or a dict of such in the space's own order.

    Raises:
        ValueError: If the observations don't have the space's shape.
    """
    if isinstance(observations, dict) != isinstance(space, spaces.Dict):
        raise ValueError(f"expected observations of {space}, got {type(observations).__name__}.")
    if not isinstance(space, spaces.Dict):
        return _flatten(observations, space, device, dtype, keep_shape)
    missing = [key for key in space.spaces if key not in observations]
    if missing:
        raise ValueError(f"expected observations with the keys of {space}, got none for {missing}.")
    return {key: _flatten(observations[key], part, device, dtype, keep_shape) for key, part in space.spaces.items()}


def _flatten(
    observations: Any, space: spaces.Space, device: torch.device, dtype: torch.dtype, keep_shape: bool
) -> Tensor:
    if isinstance(observations, np.ndarray) and not observations.flags.writeable:
        observations = observations.copy()  # torch warns of read-only arrays
    tensor = torch.as_tensor(observations, device=device)
    column = isinstance(space, spaces.Discrete) and tensor.shape[1:] == (1,)  # as SB3 stores them
    if tensor.ndim == 0 or not (column or tuple(tensor.shape[1:]) == space.shape):
        shape = ", ".join(["B", *map(str, space.shape or ())])
        raise ValueError(
            f"expected observations of shape ({shape}), got {tuple(tensor.shape)}. The model was fitted on {space}."
        )
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        first = torch.as_tensor(space.start, device=device)
        tensor = preprocess_obs(tensor - first, space, normalize_images=False)  # type: ignore[assignment]
    has_shape = keep_shape and isinstance(space, spaces.Box | spaces.MultiBinary)
    shape_out = tensor.shape[1:] if has_shape else (spaces.flatdim(space),)
    return tensor.reshape(len(tensor), *shape_out).to(dtype)
