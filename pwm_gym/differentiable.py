"""The contract of a differentiable VectorEnv, and the NumPy face that every one of them has."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

__all__ = ["DifferentiableVectorEnv", "NumpyVectorEnv", "check_reset_mask"]


def check_reset_mask(mask: Any, num_envs: int) -> np.ndarray:
    """Check `options["reset_mask"]` and return it as an array, without touching the caller's dict.

    Args:
        mask: Which envs to reset, (num_envs,), bool, array or tensor.
        num_envs: Number of envs.

    Raises:
        TypeError: If it is not a bool array.
        ValueError: If its shape is wrong or no env is selected.
    """
    if isinstance(mask, Tensor):
        mask = mask.detach().cpu().numpy()
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        kind = f"{type(mask).__name__} of {mask.dtype}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise TypeError(f"`options['reset_mask']` must be a bool array, got {kind}.")
    if mask.shape != (num_envs,):
        raise ValueError(f"`options['reset_mask']` must have shape ({num_envs},), got {mask.shape}.")
    if not mask.any():
        raise ValueError("`options['reset_mask']` must select at least one env, got all False.")
    return mask


class DifferentiableVectorEnv(VectorEnv[Tensor, Tensor, Tensor]):
    """A `VectorEnv` on torch tensors whose rewards and observations carry gradients back to the actions.

    First-order agents train on anything that keeps this contract, whether its dynamics are learned or true:

    - `reset` and `step` have Gymnasium's signatures on tensors of `device`: observations (B, *shape), rewards (B,),
      terminated and truncated (B,) bool. Rewards and observations are differentiable in all actions since the last
      reset or `detach`; no gradient crosses a reset.
    - `infos["continue_prob"]`, (B,), is the probability that the episode goes on after the step, differentiable where
      the dynamics are; where they aren't, it is 1 - terminated.
    - With SAME_STEP autoreset, `infos["final_obs"]`, (B, *shape), holds with gradient the observation that the step
      led to before any reset, valid where `infos["_final_obs"]`, (B,) bool, is set; the keys are there when a row is.
    - Random numbers come from the env's own generators, so equal seeds give equal trajectories.
    """

    device: torch.device

    @abstractmethod
    def detach(self) -> Tensor:
        """Cut the graph at the current state, so that later steps send no gradient to earlier actions.

        Returns:
            The current observations, (B, *shape), without gradient.
        """

    def numpy(self) -> NumpyVectorEnv:
        """Give this env's conformant NumPy face, for Gymnasium's wrappers and, through `as_sb3_vec_env`, for SB3."""
        return NumpyVectorEnv(self)


class NumpyVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """NumPy in, NumPy out, without gradients: a differentiable env as an ordinary `gymnasium.vector.VectorEnv`.

    Made by `DifferentiableVectorEnv.numpy`. It shares its state with the torch face: use one of the two at a time.

    Args:
        env: The env to show.
    """

    def __init__(self, env: DifferentiableVectorEnv) -> None:
        self.env = env
        self.num_envs = env.num_envs
        self.single_observation_space, self.single_action_space = env.single_observation_space, env.single_action_space
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.metadata, self.render_mode, self.spec = env.metadata, env.render_mode, env.spec
        self._np_random = env.np_random

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset all envs, or with options={"reset_mask": ...} some, as `gymnasium.vector.VectorEnv.reset`."""
        with torch.no_grad():
            observations, infos = self.env.reset(seed=seed, options=options)
        self._np_random = self.env.np_random
        return self._array(observations), self._infos(infos)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step all envs.

        Args:
            actions: (B, A).

        Returns:
            Observations (B, *shape), rewards (B,) float32, terminated (B,), truncated (B,) and Gymnasium's infos.

        Raises:
            TypeError: If `actions` is a scalar or no array.
            ValueError: If it holds too few or too many actions, or wrong ones.
        """
        if np.ndim(actions) == 0:
            raise TypeError(f"expected actions of shape {self.action_space.shape}, got the scalar {actions!r}.")
        array = np.asarray(actions, dtype=np.float32)
        if array.shape != self.action_space.shape:
            raise ValueError(f"expected actions of shape {self.action_space.shape}, got {array.shape}.")
        with torch.no_grad():
            tensor = torch.tensor(array, device=self.env.device)
            observations, rewards, terminated, truncated, infos = self.env.step(tensor)
        return (
            self._array(observations),
            self._array(rewards),
            self._array(terminated),
            self._array(truncated),
            self._infos(infos),
        )

    @staticmethod
    def _array(tensor: Tensor) -> np.ndarray:
        """Copy out of the graph, so that nothing returned aliases the env's state."""
        array = tensor.detach().cpu().numpy()
        return array.astype(np.float32) if array.dtype.kind == "f" else array.copy()

    def _infos(self, infos: dict[str, Any]) -> dict[str, Any]:
        """Lay tensors out as Gymnasium does: an array and a `_key` mask for each key, final entries by row."""
        final_obs, ended = infos.get("final_obs"), infos.get("_final_obs")
        result: dict[str, Any] = {}
        for key, value in infos.items():
            if key not in ("final_obs", "_final_obs"):
                result[key] = self._array(value) if isinstance(value, Tensor) else np.array(value)
                result[f"_{key}"] = np.ones(self.num_envs, dtype=np.bool_)
        if final_obs is not None and ended is not None:
            rows, observations = self._array(ended), self._array(final_obs)
            of_step = {key: value for key, value in result.items() if not key.startswith("_")}
            for i in np.flatnonzero(rows):
                final = {"final_obs": observations[i], "final_info": {key: v[i] for key, v in of_step.items()}}
                result = self._add_info(result, final, int(i))
        return result

    def render(self) -> tuple[Any, ...] | None:
        """Render as the torch face does."""
        return self.env.render()

    def close_extras(self, **kwargs: Any) -> None:
        """Close the env."""
        self.env.close(**kwargs)

    def __getattr__(self, name: str) -> Any:
        """Reach what only the torch face has, such as `world_model` or `horizon`."""
        if name.startswith("_") or name == "env":
            raise AttributeError(name)
        return getattr(self.env, name)
