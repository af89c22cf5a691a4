"""The contract of a differentiable VectorEnv, and the NumPy face that every one of them has."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

__all__ = ["DifferentiableVectorEnv", "NumpyVectorEnv", "check_reset_mask"]


def check_reset_mask(mask: Any, num_envs: int) -> np.ndarray:
    """Check `options["reset_mask"]` and return a copy of it as an array, without touching the caller's dict.

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
    return mask.copy()


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
    - Other infos of a step hold one row for each env. Rows that NEXT_STEP autoreset spent on a reset mean nothing.
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
        self.metadata, self.render_mode, self.spec = dict(env.metadata), env.render_mode, env.spec
        self._waiting = np.zeros(env.num_envs, dtype=np.bool_)  # (B,), envs that NEXT_STEP resets in the next step

    # The two faces share their random numbers, so the generator is the torch face's alone.

    @property
    def np_random(self) -> np.random.Generator:
        """The env's generator."""
        return self.env.np_random

    @np_random.setter
    def np_random(self, value: np.random.Generator) -> None:
        self.env.np_random = value

    @property
    def np_random_seed(self) -> int | None:
        """The seed of the env's generator, -1 if it is unknown."""
        return self.env.np_random_seed

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset all envs, or with options={"reset_mask": ...} some, as `gymnasium.vector.VectorEnv.reset`."""
        with torch.no_grad():
            observations, infos = self.env.reset(seed=seed, options=options)
        mask = np.ones(self.num_envs, dtype=np.bool_)
        if options is not None and "reset_mask" in options:
            mask = check_reset_mask(options["reset_mask"], self.num_envs)
        self._waiting &= ~mask
        return self._array(observations), self._infos(infos, mask)

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
        dtype = self.action_space.dtype
        array = np.asarray(actions, dtype if np.issubdtype(dtype, np.floating) else np.float32)
        if array.shape != self.action_space.shape:
            raise ValueError(f"expected actions of shape {self.action_space.shape}, got {array.shape}.")
        with torch.no_grad():
            tensor = torch.tensor(array, device=self.env.device)
            observations, rewards, terminated, truncated, infos = self.env.step(tensor)
        flags = self._array(terminated), self._array(truncated)
        result = self._infos(infos, ~self._waiting)
        if self.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP:
            self._waiting = flags[0] | flags[1]
        return self._array(observations), self._array(rewards), *flags, result

    @staticmethod
    def _array(tensor: Tensor) -> np.ndarray:
        """Copy out of the graph, so that nothing returned aliases the env's state."""
        array = tensor.detach().cpu().numpy()
        return array.astype(np.float32) if array.dtype.kind == "f" else array.copy()

    def _infos(self, infos: dict[str, Any], known: np.ndarray) -> dict[str, Any]:
        """Lay tensors out as Gymnasium's `SyncVectorEnv` does.

        Args:
            infos: Of the torch face.
            known: Envs that the infos are about, (B,), bool.

        Returns:
            An array and a mask `_key` for each key. What belongs to an episode that ended in this step, and was
            followed by a reset, stands in "final_obs" and "final_info" instead.
        """
        of_step = {
            key: self._array(value) if isinstance(value, Tensor) else np.asarray(value)
            for key, value in infos.items()
            if key not in ("final_obs", "_final_obs")
        }
        if "final_obs" not in infos:
            return self._rows(of_step, known)
        ended, observations = self._array(infos["_final_obs"]), self._array(infos["final_obs"])
        final_obs = np.full(self.num_envs, None, dtype=object)
        for i in np.flatnonzero(ended):
            final_obs[i] = observations[i].copy()
        result = self._rows(of_step, known & ~ended)
        result |= {"final_obs": final_obs, "_final_obs": ended}
        result |= {"final_info": self._rows(of_step, known & ended), "_final_info": ended.copy()}
        return result

    @staticmethod
    def _rows(arrays: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, Any]:
        """Keep the rows in `mask`, (B,), of each array, (B, ...); the others become 0. No row, no key."""
        result: dict[str, Any] = {}
        for key, array in arrays.items() if mask.any() else ():
            result[key] = np.where(mask.reshape(-1, *[1] * (array.ndim - 1)), array, np.zeros_like(array))
            result[f"_{key}"] = mask.copy()
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
