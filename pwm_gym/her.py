"""Hindsight experience replay: windows of real steps, relabelled with goals that were reached."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from stable_baselines3.her.goal_selection_strategy import KEY_TO_GOAL_STRATEGY, GoalSelectionStrategy
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from pwm_gym.replay import _Windows, draw
from pwm_gym.serialization import from_json, to_json
from pwm_gym.starts import Starts

__all__ = ["HerSequenceReplayBuffer"]

_GOAL_KEYS = {"observation", "achieved_goal", "desired_goal"}


class HerSequenceReplayBuffer(_Windows, HerReplayBuffer):
    """SB3's `HerReplayBuffer` that also samples windows of consecutive steps, each relabelled with one goal.

    Hindsight experience replay (Andrychowicz et al. 2017, arXiv:1707.01495) for agents that learn from windows. As
    in SB3, a share of n_sampled_goal / (n_sampled_goal + 1) of what is sampled, rounded down, gets another desired
    goal, one that was achieved in the same episode, and the rewards that the env's `compute_reward` gives for it. A
    window has one goal throughout. "future" takes what was achieved by a step at or after the window's first one, so
    that it is often reached within the window; "final" by the episode's last step; "episode" by any of its steps.
    Only finished episodes that are stored whole are sampled from. Terminations stay as they were stored.

    Args:
        buffer_size: Capacity in steps, summed over the envs.
        observation_space: Dict with "observation", "achieved_goal" and "desired_goal"; the goals of one shape.
        action_space: Real action space; actions are stored scaled to [-1, 1].
        env: Env whose `compute_reward(achieved_goals, desired_goals, infos)` takes batches and returns rewards (N,);
            it has to be given, here or with `set_env`, before anything is relabelled. Any but an `AsyncVectorEnv`,
            whose envs can't be called one by one; `SubprocVecEnv` can.
        device: Where sampled tensors go.
        n_envs: Envs that are stored side by side.
        optimize_memory_usage: Must be False, as in SB3.
        handle_timeout_termination: Tell time limits (`TimeLimit.truncated` in the infos) from terminations.
        n_sampled_goal: Relabelled windows for each one with its own goal; 0 for none.
        goal_selection_strategy: "future", "final" or "episode", or SB3's `GoalSelectionStrategy`.
        copy_info_dict: Keep the infos and hand them to `compute_reward`, which otherwise gets empty ones.
        store_physics_state: As in `SequenceReplayBuffer`.

    Raises:
        AssertionError: If `optimize_memory_usage` is set.
        TypeError: If the observations have no goals, or the env no `compute_reward`.
        ValueError: If the strategy is unknown, or `n_sampled_goal` < 0.

    Example:
        >>> from stable_baselines3 import HerReplayBuffer
        >>> from stable_baselines3.common.envs import BitFlippingEnv
        >>> from pwm_gym import PWM
        >>> agent = PWM("MultiInputPolicy", BitFlippingEnv(continuous=True), replay_buffer_class=HerReplayBuffer)
        >>> agent.learn(total_timesteps=32).replay_buffer.sample_windows(batch_size=8, horizon=5).rewards.shape
        torch.Size([5, 8])
    """

    env: VecEnv | None

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Dict,
        action_space: spaces.Space,
        env: VecEnv | None = None,
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        n_sampled_goal: int = 4,
        goal_selection_strategy: GoalSelectionStrategy | str = "future",
        copy_info_dict: bool = False,
        store_physics_state: bool = False,
    ) -> None:
        if not isinstance(observation_space, spaces.Dict) or not observation_space.spaces.keys() >= _GOAL_KEYS:
            raise TypeError(f"expected a Dict space with the keys {sorted(_GOAL_KEYS)}, got {observation_space}.")
        if n_sampled_goal < 0:
            raise ValueError(f"`n_sampled_goal` must be >= 0, got {n_sampled_goal}.")
        strategy: Any = goal_selection_strategy
        if isinstance(strategy, str):
            strategy = KEY_TO_GOAL_STRATEGY.get(strategy.lower())
        if not isinstance(strategy, GoalSelectionStrategy):
            raise ValueError(
                f"`goal_selection_strategy` must be one of {sorted(KEY_TO_GOAL_STRATEGY)}, got "
                f"{goal_selection_strategy!r}."
            )
        super().__init__(
            buffer_size,
            observation_space,
            action_space,
            device,
            n_envs,
            optimize_memory_usage,
            handle_timeout_termination,
            store_physics_state,
            env=None,
            n_sampled_goal=n_sampled_goal,
            goal_selection_strategy=strategy,
            copy_info_dict=copy_info_dict,
        )
        if env is not None:
            self.set_env(env)

    def set_env(self, env: VecEnv) -> None:
        """Compute rewards with this env from now on; unlike in SB3, another one may have done so before.

        Raises:
            TypeError: If it has no `compute_reward`.
        """
        if not env.has_attr("compute_reward"):
            raise TypeError(
                "expected a goal-conditioned env with compute_reward(achieved_goals, desired_goals, infos), which "
                "hindsight needs, got one without. Add that method, or leave replay_buffer_class out."
            )
        self.env = env

    # Storing. SB3 keeps, for each step, where its episode starts and, once that has ended, how long it is; the length
    # is 0 for what must not be sampled.

    def _begin_episode(self, env: int) -> None:
        super()._begin_episode(env)
        self._compute_episode_length(env)  # of one that a reset cut short; nothing is left to do after a `done`

    def truncate_last_trajectory(self) -> None:
        """Take each env's unfinished episode for one that was cut short at its newest step, as SB3 does."""
        unfinished = np.flatnonzero(self._current_ep_start != self.pos)
        super().truncate_last_trajectory()
        for i in unfinished:
            self._begin_episode(int(i))

    # Sampling

    def _is_window(self, offset: np.ndarray, env: np.ndarray, horizon: int | np.ndarray) -> np.ndarray:
        finished = self.ep_length[(self._oldest + offset) % self.buffer_size, env] > 0
        return finished & super()._is_window(offset, env, horizon)

    def _window_starts(
        self, batch_size: int, horizon: int, rng: np.random.Generator | None, newest: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        if not self.ep_length.any():
            raise ValueError(
                f"expected a finished episode in the replay buffer, got none in {self.size()} steps: goals are taken "
                f"from finished episodes. Use a learning_starts above the longest episode times the number of envs, "
                f"and a buffer_size that holds several."
            )
        return super()._window_starts(batch_size, horizon, rng, newest)

    def longest_window(self, limit: int) -> int:
        """Find the largest horizon up to `limit` of which a window can be sampled; 0 before an episode has ended."""
        return min(limit, int(self.ep_length.max()))

    def _goals(self, times: np.ndarray, envs: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """Draw a goal for each of the steps (times[i], envs[i]) by the strategy, (N, *goal shape)."""
        start, length = self.ep_start[times, envs], self.ep_length[times, envs]
        if self.goal_selection_strategy == GoalSelectionStrategy.FINAL:
            chosen = length - 1
        elif self.goal_selection_strategy == GoalSelectionStrategy.FUTURE:
            now = (times - start) % self.buffer_size
            chosen = now + draw(rng, length - now, len(times))
        else:
            chosen = draw(rng, length, len(times))
        return self.next_observations["achieved_goal"][(start + chosen) % self.buffer_size, envs]

    def _relabel(self, observations: Any, rewards: np.ndarray, times: np.ndarray, envs: np.ndarray, rng: Any) -> None:
        """Relabel the first windows of a batch: observations (H + 1, B, *shape), rewards and times (H, B)."""
        count = int(self.her_ratio * len(envs))
        if count == 0:
            return
        if self.env is None:
            raise ValueError("expected an env to compute rewards with, got none. Give one with set_env.")
        goals = self._goals(times[0, :count], envs[:count], rng)
        observations["desired_goal"][:, :count] = goals
        steps = len(times) * count
        infos: Any = [{} for _ in range(steps)]
        if self.copy_info_dict:
            infos = copy.deepcopy(self.infos[times[:, :count], envs[:count]].reshape(steps))
        achieved, desired = (
            observations[key][1:, :count].reshape(steps, *goals.shape[1:]) for key in ("achieved_goal", "desired_goal")
        )
        (computed,) = self.env.env_method("compute_reward", achieved, desired, infos, indices=[0])
        if np.shape(computed) != (steps,):
            raise ValueError(
                f"expected rewards of shape {(steps,)} from compute_reward for goals of shape {achieved.shape}, got "
                f"{np.shape(computed)}. It must take batches of goals."
            )
        rewards[:, :count] = np.reshape(computed, (len(times), count))

    def sample_starts(
        self,
        batch_size: int,
        rng: np.random.Generator | None = None,
        physics: bool = False,
        env: VecNormalize | None = None,
    ) -> Starts:
        """Sample real observations of finished episodes, relabelled in the same share as windows.

        Args:
            batch_size: Number of observations B.
            rng: Generator to draw with; None for NumPy's global one.
            physics: Sample steps whose physics state is known, with the goals that they had, and return it.
            env: Normalises observations where the agent's env is a `VecNormalize`.

        Raises:
            ValueError: If no episode has ended yet, or physics states are asked for and none is stored.
        """
        if physics:
            return super().sample_starts(batch_size, rng, physics, env)
        times, envs = self._window_starts(batch_size, 1, rng)
        observations = self._at(self.observations, (times, envs))
        count = int(self.her_ratio * batch_size)
        observations["desired_goal"][:count] = self._goals(times[:count], envs[:count], rng)
        return Starts(self._normalize_obs(observations, env))

    # Files

    def _arrays(self) -> dict[str, np.ndarray]:
        return {**super()._arrays(), "ep_start": self.ep_start, "ep_length": self.ep_length}

    def _meta(self) -> dict[str, Any]:
        strategies = {strategy: name for name, strategy in KEY_TO_GOAL_STRATEGY.items()}
        arguments = {
            "n_sampled_goal": self.n_sampled_goal,
            "goal_selection_strategy": strategies[self.goal_selection_strategy],
            "copy_info_dict": self.copy_info_dict,
        }
        return {
            **super()._meta(),
            "class": to_json(HerSequenceReplayBuffer),
            "arguments": arguments,
            "current_ep_start": self._current_ep_start.tolist(),
            "infos": to_json(self.infos[: self._rows].tolist()) if self.copy_info_dict else None,
        }

    def _restore(self, meta: dict[str, Any]) -> None:
        super()._restore(meta)
        self._current_ep_start = np.asarray(meta["current_ep_start"], np.int64)
        if self.copy_info_dict:
            self.infos[: self._rows] = from_json(meta["infos"])
