"""Offline data in one form, in memory or mapped from disk, sampled as a replay buffer is."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from rich.table import Table
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize

from pwm_gym.datasets.report import plot_returns, summary_table
from pwm_gym.datasets.storage import DatasetWriter, Episode, Layout, Store
from pwm_gym.replay import SequenceSamples
from pwm_gym.starts import Starts

__all__ = ["OfflineDataset"]

_CHUNK_STEPS = 1_000_000  # rows that are read at once where all data is passed over


class OfflineDataset:
    """Episodes of one task or several, for `fit_world_model`, as start states of a `LatentVectorEnv`, or to export.

    Rows of all tasks have the same width: a task with fewer observations or actions is zero-padded on the right, as in
    TD-MPC2's data. A dataset of one task, such as `of_tasks` gives, has no padding.

    Args:
        episodes: Episodes of vector observations, without padding. For padded or large data see `load` and
            `pwm_gym.datasets`.
        tasks: Names of the tasks, in the order of the episodes' `task`.
        device: Where sampled tensors go.

    Attributes:
        tasks: Names, in the order of their ids.
        observation_dims: Observation entries of each task, without padding.
        action_dims: Actions of each task, without padding.
        observation_dim: Width of this dataset's observations, the largest of its tasks.
        action_dim: Width of its actions.
        num_episodes: Episodes in it.
        num_steps: Steps in it, over all episodes.
        device: Where sampled tensors go.

    Raises:
        ValueError: If the episodes don't fit each other.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> def episode(length, task=0):
        ...     return Episode(rng.normal(size=(length + 1, 3)), rng.uniform(-1, 1, (length, 2)), np.ones(length), True)
        >>> dataset = OfflineDataset([episode(10), episode(20)], tasks=["hop"])
        >>> dataset.num_episodes, dataset.num_steps, dataset.longest_window(50)
        (2, 30, 20)
        >>> dataset.sample_windows(batch_size=4, horizon=5, rng=rng).observations.shape
        torch.Size([6, 4, 3])
    """

    def __init__(
        self, episodes: Iterable[Episode], tasks: Sequence[str] = ("task",), device: torch.device | str = "cpu"
    ) -> None:
        self._view(Store.of_episodes(list(episodes), tuple(tasks)), None, None, device)

    @classmethod
    def _of(cls, store: Store, device: torch.device | str = "cpu") -> OfflineDataset:
        dataset = cls.__new__(cls)
        dataset._view(store, None, None, device)
        return dataset

    def _view(
        self, store: Store, episodes: np.ndarray | None, ids: tuple[int, ...] | None, device: torch.device | str
    ) -> None:
        """Look at some episodes of a store; `ids` are the stored ids of the view's tasks."""
        self._store = store
        self._episodes = np.arange(len(store.lengths)) if episodes is None else episodes  # (E,), in the store
        self._ids = tuple(range(len(store.layout.tasks))) if ids is None else ids
        self.tasks = tuple(store.layout.tasks[i] for i in self._ids)
        self.observation_dims = tuple(store.layout.observation_dims[i] for i in self._ids)
        self.action_dims = tuple(store.layout.action_dims[i] for i in self._ids)
        self.observation_dim, self.action_dim = max(self.observation_dims), max(self.action_dims)
        self.device = torch.device(device)
        self._lengths = store.lengths[self._episodes]  # (E,)
        task_of = np.full(len(store.layout.tasks), -1)
        task_of[list(self._ids)] = np.arange(len(self._ids))
        self._tasks = task_of[store.tasks[self._episodes]]  # (E,)
        self._windows: tuple[int, np.ndarray] = (0, np.zeros(0, np.int64))

    def _subset(self, mask_or_index: np.ndarray, ids: tuple[int, ...] | None = None) -> OfflineDataset:
        view = type(self).__new__(type(self))
        view._view(self._store, self._episodes[mask_or_index], self._ids if ids is None else ids, self.device)
        return view

    def to(self, device: torch.device | str) -> OfflineDataset:
        """A view whose sampled tensors go to another device."""
        view = self._subset(np.arange(len(self)))
        view.device = torch.device(device)
        return view

    # Contents

    @property
    def num_episodes(self) -> int:
        """Episodes in the dataset."""
        return len(self._episodes)

    @property
    def num_steps(self) -> int:
        """Steps in the dataset, over all episodes."""
        return int(self._lengths.sum())

    @property
    def observation_space(self) -> spaces.Box:
        """Of the rows, unbounded, float32."""
        return spaces.Box(-np.inf, np.inf, (self.observation_dim,))

    @property
    def action_space(self) -> spaces.Box:
        """Of the rows, [-1, 1], float32."""
        return spaces.Box(-1.0, 1.0, (self.action_dim,))

    @property
    def lengths(self) -> np.ndarray:
        """Steps of each episode, (E,), int64."""
        return self._lengths

    @property
    def task_ids(self) -> np.ndarray:
        """Task of each episode, (E,), int64, an index into `tasks`."""
        return self._tasks

    @property
    def terminated(self) -> np.ndarray:
        """Whether each episode ended for good, (E,), bool."""
        return self._store.terminated[self._episodes]

    @property
    def truncated(self) -> np.ndarray:
        """Whether a time limit cut each episode, (E,), bool."""
        return self._store.truncated[self._episodes]

    def __len__(self) -> int:
        return self.num_episodes

    def __repr__(self) -> str:
        where = "mapped from disk" if self._store.is_mapped else "in memory"
        return f"<OfflineDataset of {len(self):,} episodes, {self.num_steps:,} steps, {len(self.tasks)} tasks, {where}>"

    def __getitem__(self, index: int) -> Episode:
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected an episode below {len(self)}, got {index}.")
        store, episode = self._store, self._episodes[index]
        first, length = int(store.first_step[episode]), int(store.lengths[episode])
        steps, rows = slice(first, first + length), slice(first + episode, first + episode + length + 1)
        store.count_read(4 * length * (store.observations.shape[1] + store.actions.shape[1] + 1))
        return Episode(
            store.observations[rows, : self.observation_dim],
            store.actions[steps, : self.action_dim],
            store.rewards[steps],
            bool(store.terminated[episode]),
            bool(store.truncated[episode]),
            int(self._tasks[index]),
        )

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(len(self)))

    def returns(self) -> np.ndarray:
        """Sum of the rewards of each episode, (E,), float64, in task units."""
        totals = np.zeros(len(self._store.lengths))
        ends = np.cumsum(self._store.lengths)
        begin = 0
        while begin < len(totals):
            first = int(self._store.first_step[begin])
            end = max(begin + 1, int(np.searchsorted(ends, first + _CHUNK_STEPS, "right")))
            rewards = self._store.rewards[first : int(ends[end - 1])].astype(np.float64)
            totals[begin:end] = np.add.reduceat(rewards, self._store.first_step[begin:end] - first)
            self._store.count_read(rewards.nbytes // 2)
            begin = end
        return totals[self._episodes]

    def checksum(self) -> int:
        """Checksum of the tasks and of each episode's task and length, by which copies of a dataset can be told."""
        checksum = zlib.crc32(repr(self.tasks).encode())
        for array in (self._tasks, self._lengths, self.terminated):
            checksum = zlib.crc32(np.ascontiguousarray(array).tobytes(), checksum)
        return checksum

    # Views

    def of_tasks(self, *names: str) -> OfflineDataset:
        """A view of some tasks, in the order given; of one task it has no padding and no task ids.

        Args:
            *names: Task names.

        Raises:
            ValueError: If a name is unknown or repeated, or there is none.
        """
        unknown = [name for name in names if name not in self.tasks]
        if unknown or not names or len(set(names)) != len(names):
            raise ValueError(f"expected distinct tasks of {', '.join(self.tasks)}; got {names}.")
        wanted = [self.tasks.index(name) for name in names]
        return self._subset(np.isin(self._tasks, wanted), tuple(self._ids[i] for i in wanted))

    def split(self, held_out: float = 0.1, seed: int = 0) -> tuple[OfflineDataset, OfflineDataset]:
        """Views of the episodes to train on and of those held out, drawn at random within each task.

        Args:
            held_out: Share of the episodes to hold out, in (0, 1); at least one of each task that has two.
            seed: Of the draw.

        Raises:
            ValueError: If `held_out` is out of range, or nothing remains on one side.
        """
        if not 0 < held_out < 1:
            raise ValueError(f"`held_out` must be in (0, 1), got {held_out}.")
        rng = np.random.default_rng(seed)
        held = np.zeros(len(self), bool)
        for task in range(len(self.tasks)):
            mine = np.flatnonzero(self._tasks == task)
            count = min(max(1, round(held_out * len(mine))), len(mine) - 1) if len(mine) > 1 else 0
            held[rng.permutation(mine)[:count]] = True
        if held.all() or not held.any():
            raise ValueError(f"expected two episodes of a task at least to split, got {len(self)} in all.")
        return self._subset(~held), self._subset(held)

    # Sampling

    def longest_window(self, limit: int) -> int:
        """Find the largest horizon up to `limit` of which a window can be sampled; 0 for an empty dataset."""
        return min(limit, int(self._lengths.max(initial=0)))

    def _draw(self, batch_size: int, horizon: int, rng: np.random.Generator | None) -> tuple[np.ndarray, np.ndarray]:
        """Draw (episode, step), each (B,), uniformly from the steps that begin a whole window of `horizon` steps."""
        if horizon < 1 or batch_size < 1:
            raise ValueError(f"`horizon` and `batch_size` must be >= 1, got {horizon} and {batch_size}.")
        if self._windows[0] != horizon:
            self._windows = horizon, np.cumsum(np.maximum(self._lengths - horizon + 1, 0))
        ends = self._windows[1]  # (E,), windows in all episodes up to this one
        if not len(ends) or not ends[-1]:
            raise ValueError(
                f"expected an episode of at least {horizon} steps in the dataset, got {len(self)} shorter ones. "
                f"Use a shorter horizon."
            )
        draw: Any = np.random.randint if rng is None else rng.integers  # SB3 uses the global one
        pick = draw(ends[-1], size=batch_size, dtype=np.int64)
        index = np.searchsorted(ends, pick, "right")
        return index, pick - ends[index] + np.maximum(self._lengths[index] - horizon + 1, 0)

    def sample_windows(
        self,
        batch_size: int,
        horizon: int,
        rng: np.random.Generator | None = None,
        normalizer: VecNormalize | None = None,
        part: slice | None = None,
        partial: bool = False,
    ) -> SequenceSamples:
        """Sample windows of `horizon` steps and `horizon` + 1 observations, uniformly from all inside one episode.

        Args:
            batch_size: Number of windows B.
            horizon: Steps in a window H.
            rng: Generator to draw with; None for NumPy's global one.
            normalizer: Normalises observations and rewards where the agent's env is a `VecNormalize`.
            part: Of the B windows drawn, those to read, for processes that share a batch; None for all.
            partial: Windows may begin at any step, so that an episode's last one is seen at each place in a window.

        Returns:
            The windows, on the dataset's device; `task` is None for a dataset of one task.

        Raises:
            ValueError: If no episode is that long.
        """
        index, step = self._draw(batch_size, 1 if partial else horizon, rng)
        if part is not None:
            index, step = index[part], step[part]
        store, episodes = self._store, self._episodes[index]
        first = store.first_step[episodes] + step  # (B,)
        own = np.minimum(self._lengths[index] - step, horizon)  # (B,)
        observations: Any = store.windows("observations", first + episodes, horizon + 1, own + 1)
        observations = observations[..., : self.observation_dim]  # (H + 1, B, O)
        actions = store.windows("actions", first, horizon, own)[..., : self.action_dim]  # (H, B, A)
        rewards = store.windows("rewards", first, horizon, own)  # (H, B)
        last = store.terminated[episodes] & (step + own == self._lengths[index])
        terminated = last & (np.arange(1, horizon + 1)[:, None] == own)  # (H, B)
        if normalizer is not None:
            observations = np.asarray(normalizer.normalize_obs(observations), np.float32)
            rewards = np.asarray(normalizer.normalize_reward(rewards), np.float32)
        return SequenceSamples(
            torch.as_tensor(observations, device=self.device),
            torch.as_tensor(actions, device=self.device),
            torch.as_tensor(rewards, device=self.device),
            torch.as_tensor(terminated, device=self.device),
            torch.as_tensor(self._tasks[index], device=self.device) if len(self.tasks) > 1 else None,
            torch.as_tensor(own, device=self.device) if partial else None,
        )

    def sample_starts(self, batch_size: int, rng: np.random.Generator | None = None, physics: bool = False) -> Starts:
        """Sample real observations uniformly over all steps.

        Args:
            batch_size: Number of observations B.
            rng: Generator to draw with; None for NumPy's global one.
            physics: Not available: datasets hold no physics states.

        Raises:
            ValueError: If the dataset is empty or of several tasks, or physics states are asked for.
        """
        if physics:
            raise ValueError("datasets hold no physics states. Start from a pwm_gym/<task>-v0 env or a replay buffer.")
        if len(self.tasks) > 1:
            raise ValueError(
                f"expected a dataset of one task, got {len(self.tasks)}. Choose one: dataset.of_tasks(name)."
            )
        index, step = self._draw(batch_size, 1, rng)
        episodes = self._episodes[index]
        rows = self._store.first_step[episodes] + episodes + step
        observations = self._store.windows("observations", rows, 1, np.ones(batch_size, np.int64))[0]
        return Starts(observations[:, : self.observation_dim])

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the dataset to a folder, under a temporary name until it is whole.

        Args:
            path: The folder; it must not exist.

        Raises:
            FileExistsError: If it exists.
            ValueError: If the dataset is empty.
        """
        with DatasetWriter(path, Layout(self.tasks, self.observation_dims, self.action_dims)) as writer:
            for episode in self:
                writer.append_episode(*episode)
            writer.finish()

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], in_memory: bool = False, device: torch.device | str = "cpu"
    ) -> OfflineDataset:
        """Open a folder that `save`, an importer or the collector wrote.

        Args:
            path: The folder.
            in_memory: Read it all instead of mapping the files.
            device: Where sampled tensors go.

        Raises:
            FileNotFoundError: If there is no dataset, or an unfinished one.
            ValueError: If it is damaged.
        """
        return cls._of(Store.load(path, in_memory), device)

    # Other forms

    @classmethod
    def from_replay_buffer(cls, buffer: ReplayBuffer, task: str = "task") -> OfflineDataset:
        """Cut an SB3 replay buffer, ours or any other of vectors, into the episodes that it holds.

        Episodes come env by env, the oldest first; of one that a full buffer began to overwrite, its rest. One that was
        still running is neither terminated nor truncated. SB3's memory-efficient layout does not keep where an
        episode's last step led, so that there each lacks its last step.

        Args:
            buffer: The buffer.
            task: Name of its task.

        Raises:
            ValueError: If the buffer is empty or its spaces are not vectors.
        """
        from pwm_gym.datasets.replay_buffers import episodes_of_buffer

        return cls(episodes_of_buffer(buffer), [task])

    def add_to(self, buffer: ReplayBuffer) -> None:
        """Add all episodes to an SB3 replay buffer of one env, so that an agent goes on from them.

        Args:
            buffer: The buffer, of this dataset's widths.

        Raises:
            ValueError: If the buffer is of several envs or other widths.
        """
        from pwm_gym.datasets.replay_buffers import add_to_buffer

        add_to_buffer(self, buffer)

    @classmethod
    def from_minari(cls, source: Any, task: str | None = None) -> OfflineDataset:
        """Read a Minari dataset into memory.

        Actions are scaled from the bounds of its action space to [-1, 1], Dict observations flattened in their space's
        order. Tasks come back from what `to_minari` wrote.

        Args:
            source: A `minari.MinariDataset`, or the id of a local one.
            task: Name of the task; None for the dataset's id.

        Raises:
            ImportError: If minari is missing.
            ValueError: If actions have no bounds or observations are no vectors.
        """
        from pwm_gym.datasets.minari_files import import_minari

        return import_minari(source, task)

    def to_minari(self, dataset_id: str, **metadata: Any) -> Any:
        """Write a local Minari dataset: rows as they are here, with padding; task ids in the infos' "task".

        Args:
            dataset_id: Its id, such as "walker/mixed-v0".
            **metadata: For `minari.create_dataset_from_buffers`: author, description, algorithm_name, and so on.

        Returns:
            The `minari.MinariDataset`.
        """
        from pwm_gym.datasets.minari_files import export_minari

        return export_minari(self, dataset_id, **metadata)

    @classmethod
    def from_tdmpc2(
        cls,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        out: str | os.PathLike[str],
        task_set: str | Sequence[str] | Mapping[str, tuple[int, int]] = "MT30",
        only: Sequence[str] | None = None,
        progress_bar: bool = True,
    ) -> OfflineDataset:
        """Turn shards in TD-MPC2's layout into a dataset on disk, block by block, and open it.

        Nothing in a shard is executed, and no shard is loaded whole. Row 0 of an episode holds no action and no reward
        whatever stands there; every episode is truncated, as the data knows no terminations. Killed at any moment, the
        same call goes on where it was.

        Args:
            paths: A folder of shards `chunk_0.pt`, `chunk_1.pt`, ..., or the shards in order.
            out: The folder to write.
            task_set: What task ids mean: "MT30" or "MT80", or names, or {name: (observation, action) dimensions}.
            only: Names of the tasks to keep; None for all.
            progress_bar: Show rate and remaining time.

        Raises:
            FileExistsError: If `out` exists.
            FileNotFoundError: If a shard is missing.
            UnsafeFileError: If a shard's pickle names anything but tensors and containers.
            ValueError: If a shard is truncated, out of order, of another episode length or width, or holds NaN, actions
                beyond [-1, 1], unknown task ids, or episodes of several tasks.
        """
        from pwm_gym.datasets.tdmpc2 import import_tdmpc2

        import_tdmpc2(paths, out, task_set, only, progress_bar)
        return cls.load(out)

    def to_tdmpc2(self, path: str | os.PathLike[str]) -> None:
        """Write one shard in TD-MPC2's layout: a dictionary of obs, action, reward and task, (episodes, T + 1, ...).

        Row 0's action and reward are NaN. Task ids count this dataset's tasks. The shard is made in memory.

        Args:
            path: The file, .pt.

        Raises:
            ValueError: If episodes differ in length, or did not end at a time limit: the layout cannot tell.
        """
        from pwm_gym.datasets.tdmpc2 import export_tdmpc2

        export_tdmpc2(self, path)

    # Reports

    def summary(self) -> Table:
        """Tabulate episodes, steps, dimensions and quantiles of the return by task; `rich.print` shows it."""
        return summary_table(self)

    def plot_returns(self, path: str | os.PathLike[str]) -> None:
        """Draw a histogram of returns for each task.

        Args:
            path: The picture, .png.

        Raises:
            ImportError: If matplotlib is missing.
        """
        plot_returns(self, path)
