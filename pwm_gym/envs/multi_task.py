"""Several tasks as one Gymnasium `VectorEnv`, padded to common spaces."""

import functools
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from pwm_gym.envs.tasks import TASK_DIMS, require_task

__all__ = ["PaddedTask", "multi_task_vector_env"]


class PaddedTask(gym.Wrapper[np.ndarray, np.ndarray, np.ndarray, np.ndarray]):
    """Give a task the spaces of a multi-task model: zeros after its observation, actions cut to its own length.

    The infos say which task it is: `task`, its index, int, and `action_mask`, (A,), bool, True where the task has an
    actuator. They come without `physics_state`, whose length differs by task and which a `VectorEnv` couldn't batch.

    Args:
        env: The task's env, with Boxes of shapes (o,) and (a,).
        task: Index of the task.
        observation_dim: O, at least o.
        action_dim: A, at least a.

    Raises:
        ValueError: If the task's own spaces are larger than that.

    Example:
        >>> import gymnasium as gym
        >>> import pwm_gym
        >>> env = PaddedTask(gym.make("pwm_gym/pendulum-spin-v0"), task=29, observation_dim=5, action_dim=2)
        >>> observation, info = env.reset(seed=0)
        >>> observation[3:], info["task"], info["action_mask"]
        (array([0., 0.], dtype=float32), 29, array([ True, False]))
    """

    def __init__(self, env: gym.Env, task: int, observation_dim: int, action_dim: int) -> None:
        super().__init__(env)
        own_observations, own_actions = env.observation_space, env.action_space
        if not (isinstance(own_observations, spaces.Box) and isinstance(own_actions, spaces.Box)):
            raise ValueError(f"`env` must have two Box spaces, got {own_observations} and {own_actions}.")
        self._own = own_observations.shape[0], own_actions.shape[0]
        if self._own[0] > observation_dim or self._own[1] > action_dim:
            raise ValueError(
                f"`observation_dim` and `action_dim` must be at least the task's own {self._own}, got "
                f"{(observation_dim, action_dim)}. Take the largest of all tasks."
            )
        self.task_index = task
        self._action_mask = np.arange(action_dim) < self._own[1]  # (A,)
        limit = np.finfo(np.float32).max
        self.observation_space = spaces.Box(-limit, limit, (observation_dim,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (action_dim,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset the task.

        Returns:
            The padded observation, (O,), and the infos.
        """
        observation, infos = self.env.reset(seed=seed, options=options)
        return self._padded(observation), self._marked(infos)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take a step with the task's own part of the action.

        Args:
            action: (A,); what lies beyond the task's own actuators is ignored.

        Returns:
            The padded observation, (O,); the reward; terminated; truncated; the infos.

        Raises:
            ValueError: If the action hasn't the shape (A,).
        """
        if np.shape(action) != self.action_space.shape:
            raise ValueError(
                f"`action` must have the shape {self.action_space.shape}, got {np.shape(action)}. Pad it with zeros."
            )
        observation, reward, terminated, truncated, infos = self.env.step(action[: self._own[1]])
        return self._padded(observation), float(reward), terminated, truncated, self._marked(infos)

    def _padded(self, observation: np.ndarray) -> np.ndarray:
        return np.pad(observation, (0, self.observation_space.shape[0] - self._own[0]))  # type: ignore[index]

    def _marked(self, infos: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in infos.items() if key != "physics_state"}
        return {**kept, "task": self.task_index, "action_mask": self._action_mask.copy()}


def multi_task_vector_env(
    tasks: Sequence[str],
    task_set: Sequence[str] | None = None,
    envs_per_task: int = 1,
    vectorization_mode: str = "sync",
    autoreset_mode: AutoresetMode = AutoresetMode.NEXT_STEP,
    **env_kwargs: Any,
) -> VectorEnv:
    """Make one `VectorEnv` over several tasks.

    Observations are padded with zeros on the right to the largest O of the task set, as in TD-MPC2; actions have the
    largest A, and each env takes its own first part. Infos hold `task`, (B,), int, the index in the task set, and
    `action_mask`, (B, A), bool; with SAME_STEP `final_info` holds them as well. Nothing else changes: seeds,
    autoreset and time limits are Gymnasium's and the tasks' own.

    Args:
        tasks: Names of registered tasks; the envs are in this order.
        task_set: The tasks that indices count and paddings fit, for example `pwm_gym.tasks("MT30")` for a model that
            was trained on all of these. None takes `tasks`.
        envs_per_task: Envs of each task, next to each other: B = `len(tasks) * envs_per_task`.
        vectorization_mode: "sync" for one process, "async" for one process per env.
        autoreset_mode: When finished episodes begin anew; `as_sb3_vec_env` needs SAME_STEP.
        **env_kwargs: For each task's env: `action_repeat`, `render_mode`, …

    Returns:
        A `SyncVectorEnv` or `AsyncVectorEnv` of `PaddedTask`s.

    Raises:
        ValueError: If there are no tasks, one is unknown or outside the task set, `envs_per_task` is below 1 or the
            mode is unknown.

    Example:
        >>> import pwm_gym
        >>> tasks = pwm_gym.tasks("MT30")
        >>> envs = multi_task_vector_env(["cup-spin", "walker-walk"], task_set=tasks)
        >>> observations, infos = envs.reset(seed=0)
        >>> observations.shape, infos["task"], infos["action_mask"].sum(-1)
        ((2, 24), array([28,  1]), array([2, 6]))
        >>> envs.close()
    """
    task_set = tuple(tasks if task_set is None else task_set)
    for task in task_set:
        require_task(task, tuple(TASK_DIMS))
    for task in tasks:
        require_task(task, task_set)
    if not tasks or envs_per_task < 1:
        raise ValueError(
            f"`tasks` must name a task and `envs_per_task` must be >= 1, got {list(tasks)} and {envs_per_task}. "
            'Give pwm_gym.tasks("MT30") or a list of names.'
        )
    if vectorization_mode not in ("sync", "async"):
        raise ValueError(f'`vectorization_mode` must be "sync" or "async", got {vectorization_mode!r}. Leave it out.')
    observation_dim = max(TASK_DIMS[task].observation for task in task_set)
    action_dim = max(TASK_DIMS[task].action for task in task_set)
    makers = [
        functools.partial(_make, task, task_set.index(task), observation_dim, action_dim, env_kwargs)
        for task in tasks
        for _ in range(envs_per_task)
    ]
    if vectorization_mode == "sync":
        return SyncVectorEnv(makers, autoreset_mode=autoreset_mode)
    # Forked workers would share the parent's OpenGL state and threads.
    return AsyncVectorEnv(makers, autoreset_mode=autoreset_mode, context="spawn")


def _make(task: str, index: int, observation_dim: int, action_dim: int, env_kwargs: dict[str, Any]) -> gym.Env:
    """Make one padded task; at the top level, so that a worker process can be told to."""
    env = gym.make(f"pwm_gym:pwm_gym/{task}-v0", **env_kwargs)
    return PaddedTask(env, index, observation_dim, action_dim)
