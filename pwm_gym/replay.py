"""Replay of real transitions, sampled as windows of consecutive steps."""

from __future__ import annotations

import io
import os
from contextlib import nullcontext
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize

from pwm_gym.serialization import atomic_write, from_json, load_tensors, to_json
from pwm_gym.starts import Starts

__all__ = [
    "DictSequenceReplayBuffer",
    "NStepSequenceReplayBuffer",
    "SequenceReplayBuffer",
    "SequenceSamples",
    "WindowSource",
]

_FORMAT = "pwm_gym.replay/1"
_REJECTION_ROUNDS = 4  # cheap tries before every valid window is listed


def draw(rng: np.random.Generator | None, high: int | np.ndarray, size: int) -> np.ndarray:
    """Draw whole numbers in [0, high), (size,); from NumPy's global generator where `rng` is None."""
    if rng is None:
        return np.random.randint(high, size=size)  # noqa: NPY002  SB3 seeds and samples from the global generator
    return rng.integers(high, size=size)


def _join(first: np.ndarray, last: np.ndarray, beyond: np.ndarray) -> np.ndarray:
    """Put observations (H, B, ...) and the last (1, B, ...) together; the last also stands where `beyond`, (H, B)."""
    first[beyond] = np.broadcast_to(last, first.shape)[beyond]
    return np.concatenate([first, last])  # (H + 1, B, ...)


class SequenceSamples(NamedTuple):
    """Windows of H consecutive steps, time first: observations[t] --actions[t]--> observations[t + 1].

    A window that its episode's end cut short repeats what comes last; only its first `lengths` steps count.
    """

    observations: Any  # (H + 1, B, *shape), as stored; a dict of such arrays for Dict spaces
    actions: torch.Tensor  # (H, B, A), in [-1, 1]
    rewards: torch.Tensor  # (H, B), in task units
    terminated: torch.Tensor  # (H, B), bool: step t ended the episode for good, not by a time limit
    task: torch.Tensor | None = None  # (B,), int64, of data that holds several tasks
    lengths: torch.Tensor | None = None  # (B,), int64, steps of each window, in [1, H]; None where all have H


class WindowSource(Protocol):
    """What a world model is fitted to: a `SequenceReplayBuffer`, an `OfflineDataset`, or anything else of this kind."""

    def longest_window(self, limit: int) -> int:
        """Find the largest horizon up to `limit` of which a window can be sampled; 0 if there is none."""
        ...

    def sample_windows(
        self,
        batch_size: int,
        horizon: int,
        rng: np.random.Generator | None = None,
        normalizer: VecNormalize | None = None,
        /,
        *,
        partial: bool = False,
    ) -> SequenceSamples:
        """Sample windows of `horizon` steps, each inside one episode, or with `partial` of as many as it has left."""
        ...


class _Windows(ReplayBuffer):
    """What sequence sampling adds to SB3's replay buffers; their storage is (time, env, ...), a ring in time."""

    episode: np.ndarray  # (T, n_envs), int64, the number of the episode that a step belongs to
    physics_state: np.ndarray | None  # (T, n_envs, P), of observations[t]; NaN where unknown

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        store_physics_state: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            buffer_size,
            observation_space,
            action_space,
            device=device,
            n_envs=n_envs,
            optimize_memory_usage=optimize_memory_usage,
            handle_timeout_termination=handle_timeout_termination,
            **kwargs,
        )
        self.store_physics_state = store_physics_state
        self.episode = np.zeros((self.buffer_size, n_envs), np.int64)
        self.physics_state = None
        self._episode_now = np.arange(n_envs, dtype=np.int64)
        self._episodes_begun = n_envs
        self._physics_now: list[np.ndarray | None] = [None] * n_envs
        self._holds_window_of = 0  # a horizon known to fit,
        self._window_lasts = 0  # and after how many more steps that window begins to be overwritten

    # Storing

    def add(
        self,
        obs: Any,
        next_obs: Any,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Store one step of every env, as SB3's `ReplayBuffer.add`.

        An env whose observation is not where its last step led (it was reset in mid-episode) begins a new episode.
        """
        position = self.pos
        if self.full or position > 0:
            before = (position - 1) % self.buffer_size
            led_to = (
                self._at(self.observations, position)
                if self.optimize_memory_usage
                else self._at(self.next_observations, before)
            )
            same_episode = self.episode[before] == self._episode_now
            for i in np.flatnonzero(same_episode & ~self._equal_rows(obs, led_to)):
                self._begin_episode(int(i))
        super().add(obs, next_obs, action, reward, done, infos)
        self.episode[position] = self._episode_now
        self._window_lasts -= 1
        if self._window_lasts < 0:
            self._holds_window_of = 0
        if self.store_physics_state:
            self._store_physics(position, infos)
        for i in np.flatnonzero(np.asarray(done, dtype=bool).reshape(self.n_envs)):
            self._begin_episode(int(i))

    def _begin_episode(self, env: int) -> None:
        self._episode_now[env] = self._episodes_begun
        self._episodes_begun += 1
        self._physics_now[env] = None

    def _store_physics(self, position: int, infos: list[dict[str, Any]]) -> None:
        for i, info in enumerate(infos):
            state = info.get("physics_state")
            if state is None:
                raise ValueError(
                    "store_physics_state=True, but the env's infos have no 'physics_state'. Use a pwm_gym/<task>-v0 "
                    "env or leave store_physics_state out."
                )
            if self.physics_state is None:
                self.physics_state = np.full((self.buffer_size, self.n_envs, len(state)), np.nan)
            known = self._physics_now[i]
            self.physics_state[position, i] = np.nan if known is None else known
            self._physics_now[i] = np.array(state, dtype=np.float64)
            if self.optimize_memory_usage:  # the next row holds the observation that the step led to
                self.physics_state[(position + 1) % self.buffer_size, i] = state

    @staticmethod
    def _at(store: Any, index: Any) -> Any:
        return {k: v[index] for k, v in store.items()} if isinstance(store, dict) else store[index]

    def _equal_rows(self, given: Any, stored: Any) -> np.ndarray:
        pairs = [(given[k], stored[k]) for k in stored] if isinstance(stored, dict) else [(given, stored)]
        rows = [np.asarray(x, y.dtype).reshape(self.n_envs, -1) == y.reshape(self.n_envs, -1) for x, y in pairs]
        return np.all([row.all(1) for row in rows], 0)

    # Sampling

    # Steps are counted in chronological order from the oldest usable one, so that no window crosses the write position.
    # In the memory-efficient layout the newest step's next observation stands in the oldest row, and a window's last
    # observation is the next row's, which has to be of the same episode.

    @property
    def _oldest(self) -> int:
        return (self.pos + self.optimize_memory_usage) % self.buffer_size if self.full else 0

    def _offsets(self, horizon: Any) -> Any:
        usable = self.size() - (self.optimize_memory_usage and self.full)
        return usable - horizon - self.optimize_memory_usage + 1

    def _is_window(self, offset: np.ndarray, env: np.ndarray, horizon: int | np.ndarray) -> np.ndarray:
        first = (self._oldest + offset) % self.buffer_size
        last = (first + horizon - 1 + self.optimize_memory_usage) % self.buffer_size
        return self.episode[first, env] == self.episode[last, env]

    def _window_starts(
        self, batch_size: int, horizon: int, rng: np.random.Generator | None, newest: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw (time, env), each (B,), uniformly from the steps that begin a whole window of `horizon` steps.

        With `newest`, only from the last so many steps, unless no window begins there.
        """
        offsets = self._offsets(horizon)
        if horizon < 1 or batch_size < 1:
            raise ValueError(f"`horizon` and `batch_size` must be >= 1, got {horizon} and {batch_size}.")
        if offsets < 1:
            raise ValueError(
                f"expected at least {horizon} steps in the replay buffer for windows of horizon {horizon}, got "
                f"{self.size()}. Collect more steps first (learning_starts) or use a shorter horizon."
            )
        first = 0 if newest is None else max(0, offsets - max(1, newest // self.n_envs))
        offset, env = first + draw(rng, offsets - first, batch_size), draw(rng, self.n_envs, batch_size)
        for _ in range(_REJECTION_ROUNDS):
            wrong = np.flatnonzero(~self._is_window(offset, env, horizon))
            if not len(wrong):
                break
            offset[wrong] = first + draw(rng, offsets - first, len(wrong))
            env[wrong] = draw(rng, self.n_envs, len(wrong))
        wrong = np.flatnonzero(~self._is_window(offset, env, horizon))
        if len(wrong):  # few windows fit: list them all
            valid = self._is_window(np.arange(offsets)[:, None], np.arange(self.n_envs)[None], horizon)
            all_offsets, all_envs = np.nonzero(valid)
            if not len(all_offsets):
                raise ValueError(
                    f"expected an episode of at least {horizon} steps in the replay buffer, got {self.size()} steps of "
                    f"shorter ones. Use a shorter horizon."
                )
            older = int((all_offsets < first).sum()) % len(all_offsets)  # all of them where none is newer
            pick = older + draw(rng, len(all_offsets) - older, len(wrong))
            offset[wrong], env[wrong] = all_offsets[pick], all_envs[pick]
        return (self._oldest + offset) % self.buffer_size, env

    def longest_window(self, limit: int) -> int:
        """Find the largest horizon up to `limit` of which a window can be sampled; 0 for an empty buffer."""
        if self._holds_window_of >= limit:
            return limit
        for horizon in range(min(limit, self.size()), 0, -1):
            offsets = np.arange(self._offsets(horizon))[:, None]
            fits = self._is_window(offsets, np.arange(self.n_envs)[None], horizon).any(1)
            if fits.any():
                newest = int(np.flatnonzero(fits)[-1])
                self._holds_window_of = horizon
                self._window_lasts = self.buffer_size - self.size() + newest
                self._window_lasts -= self.optimize_memory_usage and not self.full  # its ring is overwritten one ahead
                return horizon
        return 0

    def sample_windows(
        self,
        batch_size: int,
        horizon: int,
        rng: np.random.Generator | None = None,
        env: VecNormalize | None = None,
        newest: int | None = None,
        partial: bool = False,
    ) -> SequenceSamples:
        """Sample windows of `horizon` steps and `horizon` + 1 observations, each inside one episode.

        Args:
            batch_size: Number of windows B.
            horizon: Steps in a window H.
            rng: Generator to draw with; None for NumPy's global one, which SB3 uses everywhere.
            env: Normalises observations and rewards where the agent's env is a `VecNormalize`.
            newest: Only windows that begin in the last so many steps, over all envs; None for all.
            partial: Windows may begin at any step, so that an episode's last one is seen at each place in a window.

        Returns:
            The windows, on the buffer's device.

        Raises:
            ValueError: If the buffer holds no such window.
        """
        start, envs = self._window_starts(batch_size, 1 if partial else horizon, rng, newest)
        lengths = self._steps_left(start, envs, horizon) if partial else np.full(batch_size, horizon)
        times = (start + np.minimum(np.arange(horizon)[:, None], lengths - 1)) % self.buffer_size  # (H, B)
        if self.optimize_memory_usage:
            last = self._at(self.observations, ((times[-1:] + 1) % self.buffer_size, envs))  # (1, B, *shape)
        else:
            last = self._at(self.next_observations, (times[-1:], envs))  # (1, B, *shape)
        first = self._at(self.observations, (times, envs))  # (H, B, *shape)
        beyond = np.arange(horizon)[:, None] >= lengths  # (H, B)
        if isinstance(first, dict):
            observations: Any = {k: _join(first[k], last[k], beyond) for k in first}
        else:
            observations = _join(first, last, beyond)  # (H + 1, B, *shape)
        rewards = self.rewards[times, envs]
        self._relabel(observations, rewards, times, envs, rng)
        ended = self.dones[times, envs] * (1 - self.timeouts[times, envs]) * ~beyond
        return SequenceSamples(
            self._to_torch(self._normalize_obs(observations, env)),
            self.to_torch(self.actions[times, envs]),
            self.to_torch(self._normalize_reward(rewards, env)),
            self.to_torch(ended) > 0.5,
            lengths=self.to_torch(lengths) if partial else None,
        )

    def _steps_left(self, start: np.ndarray, env: np.ndarray, most: int) -> np.ndarray:
        """Count the steps from (start, env) to the end of the episode or of what is stored, (B,), up to `most`."""
        offset = (start - self._oldest) % self.buffer_size
        counts = np.arange(1, most + 1)[:, None]
        fits = (offset < self._offsets(counts)) & self._is_window(offset, env, counts)  # (most, B)
        return fits.sum(0)

    def _relabel(self, observations: Any, rewards: np.ndarray, times: np.ndarray, envs: np.ndarray, rng: Any) -> None:
        """Change windows in place before they are normalised; only hindsight replay does."""

    def _to_torch(self, observations: Any) -> Any:
        if isinstance(observations, dict):
            return {k: self.to_torch(v) for k, v in observations.items()}
        return self.to_torch(observations)

    def sample_starts(
        self,
        batch_size: int,
        rng: np.random.Generator | None = None,
        physics: bool = False,
        env: VecNormalize | None = None,
    ) -> Starts:
        """Sample real observations uniformly over all stored steps.

        Args:
            batch_size: Number of observations B.
            rng: Generator to draw with; None for NumPy's global one.
            physics: Only sample steps whose physics state is known, and return it.
            env: Normalises observations where the agent's env is a `VecNormalize`.

        Raises:
            ValueError: If the buffer is empty, or physics states are asked for and none is stored.
        """
        if self.size() == 0:
            raise ValueError("expected transitions in the replay buffer, got an empty one. Collect data first.")
        if physics:
            if self.physics_state is None:
                raise ValueError(
                    "the replay buffer holds no physics states. Make the agent with "
                    "replay_buffer_kwargs={'store_physics_state': True}."
                )
            times, envs = np.nonzero(~np.isnan(self.physics_state[: self.size()]).any(-1))
            if not len(times):
                raise ValueError("expected a stored step with a known physics state, got none yet. Collect more steps.")
            pick = draw(rng, len(times), batch_size)
            time, env_index = times[pick], envs[pick]
        else:
            time = draw(rng, self.size(), batch_size)
            env_index = draw(rng, self.n_envs, batch_size)
        observations = self._normalize_obs(self._at(self.observations, (time, env_index)), env)
        return Starts(observations, self.physics_state[time, env_index] if physics else None)  # type: ignore[index]

    # Files

    def _arrays(self) -> dict[str, np.ndarray]:
        stores = {"observations": self.observations}
        if not self.optimize_memory_usage:
            stores["next_observations"] = self.next_observations
        arrays: dict[str, np.ndarray] = {
            "actions": self.actions,
            "rewards": self.rewards,
            "dones": self.dones,
            "timeouts": self.timeouts,
        }
        for name, store in stores.items():
            arrays |= {f"{name}/{k}": v for k, v in store.items()} if isinstance(store, dict) else {name: store}
        arrays["episode"] = self.episode
        if self.physics_state is not None:
            arrays["physics_state"] = self.physics_state
        return arrays

    @property
    def _rows(self) -> int:
        """Rows of the storage that are in use; the memory-efficient layout's newest observation stands in the next."""
        return min(self.size() + self.optimize_memory_usage, self.buffer_size)

    def _meta(self) -> dict[str, Any]:
        """Give all but the arrays, in plain forms; a class that the spaces don't tell adds "class" and "arguments"."""
        return {
            "format": _FORMAT,
            "buffer_size": self.buffer_size,
            "n_envs": self.n_envs,
            "observation_space": to_json(self.observation_space),
            "action_space": to_json(self.action_space),
            "optimize_memory_usage": self.optimize_memory_usage,
            "handle_timeout_termination": self.handle_timeout_termination,
            "store_physics_state": self.store_physics_state,
            "pos": self.pos,
            "full": self.full,
            "episode_now": self._episode_now.tolist(),
            "episodes_begun": self._episodes_begun,
            "physics_now": [None if s is None else s.tolist() for s in self._physics_now],
        }

    def _restore(self, meta: dict[str, Any]) -> None:
        self.pos, self.full = meta["pos"], meta["full"]
        if not 0 <= self.pos < self.buffer_size:
            raise ValueError(f"position {self.pos} in a ring of {self.buffer_size} rows")
        self._episode_now = np.asarray(meta["episode_now"], np.int64)
        self._episodes_begun = meta["episodes_begun"]
        self._physics_now = [None if s is None else np.asarray(s) for s in meta["physics_now"]]

    def save(self, path: str | os.PathLike[str] | IO[bytes]) -> None:
        """Write the buffer to one file of plain arrays, atomically; `load` gives an equal buffer back.

        Args:
            path: The file, or one that is open. Only the filled part of the storage is written.
        """
        arrays = {k: torch.from_numpy(v[: self._rows]) for k, v in self._arrays().items()}
        with nullcontext(path) if isinstance(path, io.IOBase) else atomic_write(path) as file:  # type: ignore[arg-type]
            torch.save({"meta": self._meta(), "arrays": arrays}, file)

    @staticmethod
    def load(path: str | os.PathLike[str] | IO[bytes], device: torch.device | str = "auto") -> SequenceReplayBuffer:
        """Read a buffer that `save` wrote.

        Args:
            path: The file, or one that is open.
            device: Where sampled tensors go.

        Raises:
            FileNotFoundError: If there is no such file.
            UnsafeFileError: If the file holds pickled code; it is not executed.
            ValueError: If the file is truncated, damaged, or no replay buffer of ours.
        """
        content = load_tensors(path)
        meta = content.get("meta") if isinstance(content, dict) else None
        if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
            raise ValueError(f"expected a replay buffer of format {_FORMAT!r}, got something else.")
        try:
            observation_space = from_json(meta["observation_space"])
            kind = DictSequenceReplayBuffer if isinstance(observation_space, spaces.Dict) else SequenceReplayBuffer
            kind = from_json(meta.get("class")) or kind
            if not issubclass(kind, _Windows):
                raise ValueError(f"a buffer of class {kind.__name__}")
            buffer: Any = kind(
                meta["buffer_size"] * meta["n_envs"],
                observation_space,
                from_json(meta["action_space"]),
                device=device,
                n_envs=meta["n_envs"],
                optimize_memory_usage=meta["optimize_memory_usage"],
                handle_timeout_termination=meta["handle_timeout_termination"],
                store_physics_state=meta["store_physics_state"],
                **meta.get("arguments", {}),
            )
            buffer._restore(meta)
            stored = {k: v.numpy() for k, v in content["arrays"].items()}
            if "physics_state" in stored:
                width = stored["physics_state"].shape[-1]
                buffer.physics_state = np.full((buffer.buffer_size, buffer.n_envs, width), np.nan)
            for name, array in buffer._arrays().items():
                if stored[name].shape != array[: buffer._rows].shape:
                    raise ValueError(f"{name!r} of shape {stored[name].shape}")
                array[: buffer._rows] = stored[name]
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"expected a complete replay buffer, got a damaged one: {error}") from error
        return buffer


class SequenceReplayBuffer(_Windows):
    """SB3's `ReplayBuffer` that also samples windows of consecutive steps, for every space but Dict.

    Storage, arguments and `sample` are SB3's. `sample_windows` adds windows of H + 1 observations that cross neither
    the end of an episode nor the write position, `sample_starts` single observations.

    Args:
        buffer_size: Capacity in steps, summed over the envs.
        observation_space: Real observation space.
        action_space: Real action space; actions are stored scaled to [-1, 1].
        device: Where sampled tensors go.
        n_envs: Envs that are stored side by side.
        optimize_memory_usage: Keep each observation once, as in SB3. The last step of an episode is then in no window.
        handle_timeout_termination: Tell time limits (`TimeLimit.truncated` in the infos) from terminations.
        store_physics_state: Keep the infos' "physics_state", so that `LatentVectorEnv.render` can draw rollouts.

    Example:
        >>> space = spaces.Box(-1, 1, (3,))
        >>> buffer = SequenceReplayBuffer(100, space, spaces.Box(-1, 1, (1,)), "cpu")
        >>> for t in range(20):
        ...     o = np.full((1, 3), t), np.full((1, 3), t + 1)
        ...     buffer.add(*o, np.zeros((1, 1)), np.ones(1), np.array([t % 10 == 9]), [{}])
        >>> buffer.sample_windows(batch_size=4, horizon=5).observations.shape
        torch.Size([6, 4, 3])
    """


class DictSequenceReplayBuffer(_Windows, DictReplayBuffer):
    """`SequenceReplayBuffer` for Dict observation spaces, on SB3's `DictReplayBuffer`."""


class NStepSequenceReplayBuffer(_Windows, NStepReplayBuffer):
    """`SequenceReplayBuffer` whose `sample` gives n-step returns, on SB3's `NStepReplayBuffer`."""
