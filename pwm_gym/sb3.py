"""Stable-Baselines3 inside the model: a VectorEnv as SB3's `VecEnv`, a real env seen as latents.

SB3 takes its own `VecEnv` and refuses Gymnasium's `VectorEnv`. `as_sb3_vec_env` adapts the second
to the first, so that an unmodified `PPO` or `SAC` trains in a `LatentVectorEnv`. Such a policy
reads latents; `LatentObservation` shows it a real env through the same encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import (
    VecEnvIndices,
    VecEnvObs,
    VecEnvStepReturn,
)

from pwm_gym.world_model import WorldModel

__all__ = ["LatentObservation", "as_sb3_vec_env"]


def as_sb3_vec_env(env: VectorEnv) -> VecEnv:
    """Adapt a Gymnasium `VectorEnv` to Stable-Baselines3's `VecEnv`.

    Rewards become float32, `dones` is `terminated | truncated`, and infos become one dict per env
    with `terminal_observation` and `TimeLimit.truncated` where SB3 looks for them. Nothing that
    the adapter returns shares memory with the env. `VecMonitor` and `VecNormalize` go on top;
    SB3 logs `rollout/ep_rew_mean` only with `VecMonitor`.

    `get_attr`, `set_attr`, `env_method` and `env_is_wrapped` reach the sub-envs of a
    `SyncVectorEnv` or `AsyncVectorEnv`; in an env without sub-envs, such as `LatentVectorEnv`, they
    act on the vector env, once, and answer once per index.

    Args:
        env: Any `VectorEnv` on NumPy arrays in SAME_STEP mode. Where it has a method `numpy()`, as
            `LatentVectorEnv` does, the adapter runs the env which that returns.

    Returns:
        A `VecEnv` of `env.num_envs` envs; closing it closes `env`.

    Raises:
        TypeError: If `env` is no `VectorEnv`.
        ValueError: If `env` resets finished episodes in another mode than SAME_STEP. NEXT_STEP
            would add one step to every episode that never happened; DISABLED never resets.

    Example:
        >>> import gymnasium as gym
        >>> from gymnasium.vector import AutoresetMode
        >>> from stable_baselines3 import PPO
        >>> same_step = {"autoreset_mode": AutoresetMode.SAME_STEP}
        >>> envs = gym.make_vec("Pendulum-v1", num_envs=2, vector_kwargs=same_step)
        >>> model = PPO("MlpPolicy", as_sb3_vec_env(envs), n_steps=8, batch_size=16, device="cpu")
        >>> model.learn(total_timesteps=16).num_timesteps
        16
    """
    if not isinstance(env, VectorEnv):
        raise TypeError(
            f"`env` must be a gymnasium.vector.VectorEnv, got {type(env).__name__}. "
            "Stable-Baselines3 takes its own VecEnv and a single gymnasium.Env as they are."
        )
    face = env.numpy() if hasattr(env, "numpy") else env
    mode = face.metadata.get("autoreset_mode")
    if mode is not AutoresetMode.SAME_STEP:
        raise ValueError(
            f"`env.metadata['autoreset_mode']` must be AutoresetMode.SAME_STEP, got {mode}. Use "
            "LatentVectorEnv(..., autoreset_mode=AutoresetMode.SAME_STEP) or gym.make_vec(..., "
            "vector_kwargs={'autoreset_mode': AutoresetMode.SAME_STEP})."
        )
    return _VectorEnvAdapter(face, env)


class _VectorEnvAdapter(VecEnv):
    """See `as_sb3_vec_env`.

    Args:
        face: The env that is run: NumPy arrays, SAME_STEP.
        vector_env: The env that the caller gave; often the same.
    """

    def __init__(self, face: VectorEnv, vector_env: VectorEnv) -> None:
        self.vector_env = vector_env
        self._face = face
        # Outermost first: wrappers, the env that they wrap, and the env whose face this is.
        self._layers: list[VectorEnv] = [face]
        while isinstance(inner := getattr(self._layers[-1], "env", None), VectorEnv):
            self._layers.append(inner)
        if vector_env not in self._layers:
            self._layers.append(vector_env)
        base = face.unwrapped
        self._workers = base if isinstance(base, AsyncVectorEnv) else None
        self._envs: Sequence[gym.Env] | None = getattr(base, "envs", None)
        self._actions: npt.NDArray[Any] | None = None
        super().__init__(face.num_envs, face.single_observation_space, face.single_action_space)
        self.metadata = dict(face.metadata)

    # Stepping

    def reset(self) -> VecEnvObs:
        """Reset all envs with the seeds and options that were set since the last reset.

        Returns:
            Observations, (B, …), or a dict of such arrays.
        """
        # SB3 seeds env i with seed + i, and that is what Gymnasium makes of a single seed. A list
        # would say the same, but only Sync- and AsyncVectorEnv take one.
        seed = None if self._seeds[0] is None else int(self._seeds[0])
        observations, infos = self._face.reset(seed=seed, options=self._options[0] or None)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = _unbatched(infos, self.num_envs)
        return _copied(observations)

    def step_async(self, actions: npt.NDArray[Any]) -> None:
        """Keep the actions, (B, A) or (B,), for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Take the step.

        Returns:
            Observations (B, …), rewards (B,) float32, dones (B,) bool and B infos. Where an episode
            has ended, the observation is the first of the next one, the last of the old one is
            in `terminal_observation`, and `reset_infos` has what the reset said.

        Raises:
            ValueError: If an episode ended and `infos` has no `final_obs`.
        """
        observations, rewards, terminated, truncated, infos = self._face.step(self._actions)
        dones = np.logical_or(terminated, truncated)  # (B,)
        timeouts = np.logical_and(truncated, np.logical_not(terminated))  # (B,)
        final_obs, final_infos = infos.get("final_obs"), infos.get("final_info", {})
        if dones.any() and final_obs is None:
            raise ValueError(
                "`infos` must hold 'final_obs' at a step that ends an episode (SAME_STEP), got "
                f"{sorted(infos)} from {self._face}. Put the last observations there."
            )
        rows = _unbatched({k: v for k, v in infos.items() if k not in _FINAL_KEYS}, self.num_envs)
        final_rows = _unbatched(final_infos, self.num_envs)
        for i in np.flatnonzero(dones).tolist():
            self.reset_infos[i] = rows[i]
            if "final_info" in infos:
                # What is left outside `final_info` belongs to the reset, with one exception:
                # Gymnasium's RecordEpisodeStatistics reports the finished episode there.
                episode = {"episode": rows[i].pop("episode")} if "episode" in rows[i] else {}
                rows[i] = episode | final_rows[i]
            else:
                rows[i] = deepcopy(rows[i])
            rows[i]["terminal_observation"] = _row(final_obs, i)
        for i in range(self.num_envs):
            rows[i]["TimeLimit.truncated"] = bool(timeouts[i])
        return _copied(observations), np.array(rewards, dtype=np.float32), dones, rows

    def set_options(self, options: list[dict[str, Any]] | dict[str, Any] | None = None) -> None:
        """Set the options of the next `reset`.

        Args:
            options: One dict for all envs, or a list of B equal dicts.

        Raises:
            ValueError: If the list has another length than B or its dicts differ.
        """
        if isinstance(options, (list, tuple)) and (
            len(options) != self.num_envs or not all(data_equivalence(options[0], other) for other in options[1:])
        ):
            raise ValueError(
                f"`options` must be one dict or {self.num_envs} equal dicts, got {options}. A "
                "VectorEnv resets all its envs with the same options."
            )
        super().set_options(options)

    def close(self) -> None:
        """Close the vector env."""
        self._face.close()

    # Rendering

    def get_images(self) -> Sequence[npt.NDArray[np.uint8] | None]:
        """Render each env.

        Returns:
            B images, each (height, width, 3) uint8, or B times None without `rgb_array` mode.
        """
        if self.render_mode != "rgb_array":
            return [None] * self.num_envs
        images = self._face.render()
        assert images is not None, "rgb_array mode gives images"
        assert len(images) == self.num_envs, f"{len(images)} images of {self.num_envs} envs"
        return cast("Sequence[npt.NDArray[np.uint8]]", images)

    # Attributes: of the sub-envs first, then of the vector env

    def has_attr(self, attr_name: str) -> bool:
        """Say whether all sub-envs, or else the vector env, have the attribute."""
        return self._in_sub_envs(attr_name) or any(hasattr(layer, attr_name) for layer in self._layers)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Read an attribute: one value per index.

        Args:
            attr_name: Its name. `observation_space` and `action_space` are those of a single env.
            indices: The envs to ask; None for all.

        Raises:
            AttributeError: If neither the sub-envs nor the vector env have it.
        """
        chosen = list(self._get_indices(indices))
        if self._in_sub_envs(attr_name):
            return self._call("get_wrapper_attr", attr_name, indices=chosen, pure=True)
        if attr_name in ("observation_space", "action_space"):
            attr_name = f"single_{attr_name}"
        return [self._of_layers(attr_name)] * len(chosen)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute where it is defined, or else on the sub-envs or the vector env.

        Args:
            attr_name: Its name.
            value: The value that each of the envs gets.
            indices: The envs to change; None for all.

        Raises:
            ValueError: If only some of the envs are chosen and they can't be told apart.
        """
        chosen = list(self._get_indices(indices))
        if self._envs is not None and self._workers is None:
            for i in chosen:
                self._envs[i].set_wrapper_attr(attr_name, value)
            return
        self._check_all_chosen("set_attr", chosen)
        if self._workers is not None:
            self._workers.set_attr(attr_name, [value] * self.num_envs)
        else:
            # Innermost first: an outer layer may only pass on what an inner one has.
            owners = [layer for layer in self._layers if hasattr(layer, attr_name)]
            setattr((owners or self._layers)[-1], attr_name, value)

    def env_method(
        self,
        method_name: str,
        *method_args: Any,
        indices: VecEnvIndices = None,
        **method_kwargs: Any,
    ) -> list[Any]:
        """Call a method: of each chosen sub-env, or else once of the vector env.

        Args:
            method_name: Its name.
            *method_args: Its positional arguments.
            indices: The envs to call; None for all.
            **method_kwargs: Its keyword arguments.

        Returns:
            One answer per index.

        Raises:
            AttributeError: If neither the sub-envs nor the vector env have it.
            ValueError: If only some of the envs are chosen and they can't be called one by one.
        """
        chosen = list(self._get_indices(indices))
        if self._in_sub_envs(method_name):
            return self._call(method_name, *method_args, indices=chosen, **method_kwargs)
        return [self._of_layers(method_name)(*method_args, **method_kwargs)] * len(chosen)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Say for each chosen env whether a wrapper of this class is around it.

        An `AsyncVectorEnv` keeps its sub-envs in other processes: there, class names decide.
        """
        chosen = list(self._get_indices(indices))
        if any(isinstance(layer, wrapper_class) for layer in self._layers):
            return [True] * len(chosen)
        if self._workers is not None:
            names = self._workers.call("__str__")  # "<TimeLimit<OrderEnforcing<…>>>"
            return [f"<{wrapper_class.__name__}<" in names[i] for i in chosen]
        if self._envs is not None:
            return [is_wrapped(self._envs[i], wrapper_class) for i in chosen]
        return [False] * len(chosen)

    def _in_sub_envs(self, name: str) -> bool:
        # Ask before reading: an AttributeError inside a worker of AsyncVectorEnv would end it.
        if self._workers is None and self._envs is None:
            return False
        everyone = list(range(self.num_envs))
        return all(self._call("has_wrapper_attr", name, indices=everyone))

    def _call(self, name: str, *args: Any, indices: list[int], pure: bool = False, **kwargs: Any) -> list[Any]:
        if self._workers is not None:
            if not pure:
                self._check_all_chosen(name, indices)
            answers = self._workers.call(name, *args, **kwargs)
            return [answers[i] for i in indices]
        assert self._envs is not None
        return [self._envs[i].get_wrapper_attr(name)(*args, **kwargs) for i in indices]

    def _check_all_chosen(self, what: str, indices: list[int]) -> None:
        if sorted(i % self.num_envs for i in indices) != list(range(self.num_envs)):
            raise ValueError(
                f"`indices` must name all {self.num_envs} envs for `{what}` on {self._face}, got "
                f"{indices}. Use indices=None, or vectorization_mode='sync'."
            )

    def _of_layers(self, name: str) -> Any:
        for layer in self._layers:
            if hasattr(layer, name):
                return getattr(layer, name)
        raise AttributeError(f"neither {self._face} nor its sub-envs have {name!r}")


_FINAL_KEYS = frozenset({"final_obs", "_final_obs", "final_info", "_final_info"})


def _unbatched(infos: dict[str, Any], num_envs: int) -> list[dict[str, Any]]:
    """Turn Gymnasium's dict of arrays into one dict per env.

        {"k": [0.5, 0], "_k": [True, False], "all": [1, 2]}  ->  [{"k": 0.5, "all": 1}, {"all": 2}]

    Args:
        infos: Arrays (B, …) or dicts of such; `_key`, (B,) bool, says which rows of `key` count,
            and all do where it is missing. Anything else holds for every env.
        num_envs: B.

    Returns:
        B dicts that share no memory with `infos`.
    """
    rows: list[dict[str, Any]] = [{} for _ in range(num_envs)]
    masks = {f"_{key}" for key in infos}
    for key, value in infos.items():
        if key in masks:
            continue
        values: list[Any]
        if isinstance(value, dict):
            values = _unbatched(value, num_envs)
        elif isinstance(value, np.ndarray) and value.shape[:1] == (num_envs,):
            scalars = value.ndim == 1 and value.dtype != object
            values = value.tolist() if scalars else [deepcopy(row) for row in value]
        else:
            values = [deepcopy(value) for _ in range(num_envs)]
        mask = infos.get(f"_{key}", np.ones(num_envs, dtype=bool))
        for i in np.flatnonzero(mask).tolist():
            rows[i][key] = values[i]
    return rows


def _copied(batch: Any) -> Any:
    """Copy a batch of observations: an array (B, …), or a dict or tuple of batches."""
    if isinstance(batch, dict):
        return {key: _copied(value) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(_copied(value) for value in batch)
    return np.array(batch)


def _row(batch: Any, i: int) -> Any:
    """Copy observation i out of an array (B, …), an object array (B,) or a dict of batches."""
    if isinstance(batch, dict):
        return {key: _row(value, i) for key, value in batch.items()}
    return deepcopy(batch[i])


class LatentObservation(gym.ObservationWrapper):
    """Show a real env through the encoder of a world model: its observations become latents.

    A policy that was trained in the model's `LatentVectorEnv` reads latents and answers with
    actions of the real env. Around a real env, this wrapper lets it act there. For several envs,
    wrap each: `make_vec_env(lambda: LatentObservation(gym.make(...), world_model), n_envs=4)`.

    Args:
        env: The real env. Its actions stay as they are.
        world_model: The model whose `encode` the policy was trained on. Read, never changed.
        task: Name or index of the env's task for a multi-task model, whose single-task form the wrapper then holds
            (`WorldModel.for_task`); None for a single-task one.

    Raises:
        ValueError: If the observation or action space of `env` is not the one that the model
            was made for: other keys, shapes or action bounds.

    Example:
        >>> import gymnasium as gym
        >>> from pwm_gym.world_model import WorldModel, WorldModelConfig
        >>> env = gym.make("MountainCarContinuous-v0")
        >>> config = WorldModelConfig.preset("1M", observation_dim=2, action_dim=1)
        >>> latent, info = LatentObservation(env, WorldModel(config)).reset(seed=0)
        >>> latent.shape == (config.latent_dim,)
        True
    """

    def __init__(self, env: gym.Env, world_model: WorldModel, task: int | str | None = None) -> None:
        super().__init__(env)
        world_model = world_model.for_task(task)
        expected, got = world_model.observation_space, env.observation_space
        if _shapes(got) != _shapes(expected):
            raise ValueError(
                f"`env.observation_space` must be the world model's, {expected}, got {got}. Use an "
                "env of the task that the model was fitted on."
            )
        if not _same_actions(env.action_space, world_model.action_space):
            raise ValueError(
                f"`env.action_space` must be the world model's, {world_model.action_space}, got "
                f"{env.action_space}. Use an env of the task that the model was fitted on, or "
                "gymnasium.wrappers.RescaleAction(env, low, high) if only the bounds differ."
            )
        self.world_model = world_model
        self.observation_space = world_model.latent_space

    def observation(self, observation: Any) -> npt.NDArray[np.float32]:
        """Encode one observation.

        Args:
            observation: Of the real env, (O,) or a dict of arrays.

        Returns:
            The latent, (Z,).
        """
        if isinstance(observation, dict):
            batch: Any = {key: np.asarray(value)[None] for key, value in observation.items()}
        else:
            batch = np.asarray(observation)[None]  # (1, O)
        with torch.no_grad():
            latents = self.world_model.encode(self.world_model.preprocess(batch))  # (1, Z)
        return latents[0].cpu().numpy().astype(np.float32)


def _shapes(space: gym.Space) -> Any:
    """Return the shape and flat width of a space, by key for a Dict."""
    if isinstance(space, spaces.Dict):
        return {key: _shapes(subspace) for key, subspace in space.items()}
    return space.shape, spaces.flatdim(space)


def _same_actions(a: gym.Space, b: gym.Space) -> bool:
    """Compare two action spaces: shape and bounds, whatever the float type."""
    if not (isinstance(a, spaces.Box) and isinstance(b, spaces.Box)):
        return a == b
    return a.shape == b.shape and np.allclose(a.low, b.low) and np.allclose(a.high, b.high)
