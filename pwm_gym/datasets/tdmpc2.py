"""TD-MPC2's multi-task shards: padded, shifted by one row, and too large for memory."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pwm_gym.datasets.storage import DatasetWriter, Layout
from pwm_gym.foreign import read_torch_file
from pwm_gym.progress import show_progress
from pwm_gym.serialization import atomic_write
from pwm_gym.task_sets import TASK_DIMS, tasks

if TYPE_CHECKING:
    from pwm_gym.datasets.offline import OfflineDataset

__all__ = ["TaskSet", "export_tdmpc2", "import_tdmpc2"]

# A published set, names of its tasks by id, or these with their (observation, action) dimensions.
TaskSet = str | Sequence[str] | Mapping[str, tuple[int, int]]
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_EPISODE_STEPS = {"MT30": 500, "MT80": 100}
_KEYS = ("obs", "action", "reward", "task")
_BLOCK_BYTES = 32 * 2**20  # read at once
_CHECKPOINT_BYTES = 256 * 2**20  # read between two notes of how far the import came
_ACTION_LIMIT = 1.0 + 1e-4


def _dimensions(task_set: TaskSet, width: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Name the tasks by id, with their dimensions; of unknown tasks those of the shards' rows, `width`."""
    if isinstance(task_set, Mapping):
        return {name: (int(o), int(a)) for name, (o, a) in task_set.items()}
    names = tasks(task_set) if isinstance(task_set, str) else task_set
    return {name: TASK_DIMS.get(name, width) for name in names}


def _shard_paths(paths: Paths) -> list[pathlib.Path]:
    """List the shards, in order; a folder must hold chunk 0 to the last one."""
    if isinstance(paths, str | os.PathLike) and not pathlib.Path(paths).is_dir():
        paths = [paths]
    in_folder = isinstance(paths, str | os.PathLike)
    shards = list(pathlib.Path(paths).glob("*.pt")) if in_folder else [pathlib.Path(p) for p in paths]  # type: ignore
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing or not shards:
        raise FileNotFoundError(f"expected shards (.pt files), got none at {', '.join(missing) or paths}.")
    digits = [re.findall(r"\d+", shard.stem) for shard in shards]
    numbers = [int(found[-1]) for found in digits if found]
    if len(numbers) < len(shards):
        return sorted(shards) if in_folder else shards
    if in_folder:
        shards = [shard for _, shard in sorted(zip(numbers, shards, strict=True))]
        if absent := sorted(set(range(max(numbers) + 1)) - set(numbers)):
            raise FileNotFoundError(
                f"expected shards 0 to {max(numbers)} in {os.fspath(paths)!r}, got none of number {absent}. "  # type: ignore
                f"Download them, or name the shards to import one by one."
            )
    elif numbers != sorted(set(numbers)):
        raise ValueError(f"expected shards in ascending order, each once, got numbers {numbers}.")
    return shards


class _Shard:
    """One shard, checked, and read block by block."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        arrays = self._read()
        shape = tuple(arrays["obs"].shape)
        if len(shape) != 3 or shape[1] < 2:
            raise ValueError(f"expected 'obs' of shape (episodes, steps + 1, width) in {path.name}, got {shape}.")
        self.episodes, self.steps = shape[0], shape[1] - 1
        self.width = shape[2], int(arrays["action"].shape[-1])
        for key, expected in (("action", (*shape[:2], self.width[1])), ("reward", shape[:2]), ("task", shape[:2])):
            if tuple(arrays[key].shape) != expected:
                raise ValueError(
                    f"expected {key!r} of shape {expected} in {path.name}, got {tuple(arrays[key].shape)}."
                )
        if arrays["task"].dtype.is_floating_point:
            raise ValueError(f"expected 'task' in {path.name} to be whole numbers, got {arrays['task'].dtype}.")
        self.episode_bytes = sum(arrays[key][:1].nbytes for key in _KEYS)

    def _read(self) -> dict[str, Tensor]:
        content = read_torch_file(self.path, verify=False)  # the checksum of 10 GB is not worth a second pass
        if not isinstance(content, dict) or not all(isinstance(content.get(key), Tensor) for key in _KEYS):
            found = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"expected tensors {', '.join(_KEYS)} in {self.path.name}, got {found}.")
        arrays = {key: content[key] for key in _KEYS}
        for key in ("reward", "task"):
            if arrays[key].ndim == 3 and arrays[key].shape[-1] == 1:
                arrays[key] = arrays[key].squeeze(-1)
        return arrays

    def blocks(self, first: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yield (first episode, arrays) from episode `first` on.

        The file is mapped anew for each block, so that pages of earlier ones don't count as memory in use.
        """
        count = max(1, _BLOCK_BYTES // self.episode_bytes)
        for begin in range(first, self.episodes, count):
            arrays = {key: tensor[begin : begin + count] for key, tensor in self._read().items()}
            yield (
                begin,
                {
                    key: tensor.to(torch.int64 if key == "task" else torch.float32).numpy()
                    for key, tensor in arrays.items()
                },
            )

    def check(self, begin: int, block: dict[str, np.ndarray], dims: dict[str, tuple[int, int]]) -> np.ndarray:
        """Check the values of a block, whose row 0 holds no action or reward; return each episode's task, (E,)."""

        def refuse_if(wrong: Any, expected: str, remedy: str = "") -> None:  # wrong: (E,)
            if wrong.any():
                raise ValueError(
                    f"expected {expected} in {self.path.name}, episode {begin + int(wrong.argmax())}.{remedy}"
                )

        task = block["task"]
        other_set = " Import with the task set that the shards were made for."
        refuse_if(
            ((task < 0) | (task >= len(dims))).any(1), f"task ids from 0 to {len(dims) - 1}, got another", other_set
        )
        refuse_if((task != task[:, :1]).any(1), "one task in each episode, got several: rows are out of order")
        largest = {}
        for key, first in (("obs", 0), ("action", 1), ("reward", 1)):
            values = block[key][:, first:].reshape(len(task), task.shape[1] - first, -1)
            largest[key] = np.maximum(values.max(1), -values.min(1))  # (E, width); NaN where one is
            refuse_if(~np.isfinite(largest[key]).all(1), f"finite values, got NaN or infinite {key!r}")
        used = np.array(list(dims.values()))[task[:, 0]]  # (E, 2)
        for key, dim in (("obs", used[:, :1]), ("action", used[:, 1:])):
            beyond = np.arange(largest[key].shape[1]) >= dim  # (E, width)
            refuse_if(
                (largest[key] * beyond).any(1), f"zeros beyond the task's own dimensions, got other {key!r}", other_set
            )
        refuse_if(
            (largest["action"] > _ACTION_LIMIT).any(1),
            "actions in [-1, 1], got larger ones",
            " Were they stored before a squashing function? Apply it first.",
        )
        return task[:, 0]


def import_tdmpc2(
    paths: Paths,
    out: str | os.PathLike[str],
    task_set: TaskSet = "MT30",
    only: Sequence[str] | None = None,
    progress_bar: bool = True,
) -> None:
    """Turn TD-MPC2's shards into a dataset on disk; see `OfflineDataset.from_tdmpc2`."""
    shards = [_Shard(path) for path in _shard_paths(paths)]
    dims = _dimensions(task_set, shards[0].width)
    widest = tuple(max(d[i] for d in dims.values()) for i in range(2))
    steps = _EPISODE_STEPS.get(task_set, shards[0].steps) if isinstance(task_set, str) else shards[0].steps
    for shard in shards:
        if shard.width != widest or shard.steps != steps:
            raise ValueError(
                f"expected episodes of {steps} steps and rows of {widest} (observations, actions), got {shard.steps} "
                f"steps and rows of {shard.width} in {shard.path.name}. Is it of another task set?"
            )
    kept = tuple(dims) if only is None else tuple(only)
    if not set(kept) <= set(dims) or not kept:
        raise ValueError(f"expected `only` to name tasks of {', '.join(dims)}; got {only}.")
    layout = Layout(kept, *(tuple(dims[name][i] for name in kept) for i in range(2)))
    new_id = np.array([kept.index(name) if name in kept else -1 for name in dims])
    files = [[shard.path.name, shard.path.stat().st_size] for shard in shards]
    total = sum(shard.episodes * shard.episode_bytes for shard in shards)
    with DatasetWriter(out, layout, {"tdmpc2": files, "tasks": list(dims.items())}) as writer:
        first_shard, first_episode = writer.note or (0, 0)
        done = sum(shard.episodes * shard.episode_bytes for shard in shards[:first_shard])
        done += first_episode * shards[0].episode_bytes
        with show_progress(total, "import", "B", progress_bar, done) as bar:
            for number in range(first_shard, len(shards)):
                _import_shard(writer, shards[number], number, first_episode, dims, new_id, bar)
                first_episode = 0
        writer.finish()


def _import_shard(
    writer: DatasetWriter,
    shard: _Shard,
    number: int,
    first_episode: int,
    dims: dict[str, tuple[int, int]],
    new_id: np.ndarray,
    bar: Any,
) -> None:
    """Append a shard from one of its episodes on, noting from time to time how far it came."""
    unnoted = 0
    for begin, block in shard.blocks(first_episode):
        _append(writer, block, new_id[shard.check(begin, block, dims)])
        size = len(block["obs"]) * shard.episode_bytes
        bar.update(size)
        unnoted += size
        if unnoted >= _CHECKPOINT_BYTES:
            writer.checkpoint([number, begin + len(block["obs"])])
            unnoted = 0


def _append(writer: DatasetWriter, block: dict[str, np.ndarray], task: np.ndarray) -> None:
    """Append the episodes whose new task id is not -1: observations of all rows, actions and rewards from row 1 on."""
    keep = task >= 0
    if not keep.all():
        block, task = {key: array[keep] for key, array in block.items()}, task[keep]
    episodes, rows = block["reward"].shape
    widths = [width for (width,) in writer.layout.shapes().values()]
    writer.append(
        block["obs"][..., : widths[0]].reshape(-1, widths[0]),
        block["action"][:, 1:, : widths[1]].reshape(-1, widths[1]),
        block["reward"][:, 1:].reshape(-1),
        np.full(episodes, rows - 1),
        task,
        np.zeros(episodes, bool),  # the data has no terminations: every episode ends at its time limit
        np.ones(episodes, bool),
    )


def export_tdmpc2(dataset: OfflineDataset, path: str | os.PathLike[str]) -> None:
    """Write one shard in TD-MPC2's layout; see `OfflineDataset.to_tdmpc2`."""
    lengths = set(dataset.lengths.tolist())
    if len(lengths) != 1:
        raise ValueError(f"expected episodes of one length, as TD-MPC2's layout has, got {sorted(lengths)}.")
    if dataset.terminated.any() or not dataset.truncated.all():
        raise ValueError("expected episodes that a time limit ended: TD-MPC2's layout cannot tell terminations.")
    rows, episodes = lengths.pop() + 1, len(dataset)
    shard: dict[str, Any] = {
        "obs": torch.zeros(episodes, rows, dataset.observation_dim),
        "action": torch.full((episodes, rows, dataset.action_dim), torch.nan),
        "reward": torch.full((episodes, rows), torch.nan),
        "task": torch.from_numpy(dataset.task_ids.astype(np.int32))[:, None].repeat(1, rows),
    }
    for i, episode in enumerate(dataset):
        shard["obs"][i] = torch.from_numpy(np.array(episode.observations))
        shard["action"][i, 1:] = torch.from_numpy(np.array(episode.actions))
        shard["reward"][i, 1:] = torch.from_numpy(np.array(episode.rewards))
    with atomic_write(path) as file:
        torch.save(shard, file)
