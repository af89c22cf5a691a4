"""The form on disk: a folder of flat arrays and a manifest, written under a temporary name and renamed when whole."""

from __future__ import annotations

import io
import json
import mmap
import os
import pathlib
import shutil
import weakref
from collections.abc import Mapping
from typing import IO, Any, NamedTuple

import numpy as np

from pwm_gym.serialization import atomic_write

__all__ = ["DatasetWriter", "Episode", "Layout", "Store"]

FORMAT = "pwm_gym.dataset/1"
MANIFEST, PROGRESS = "manifest.json", "progress.json"
# Each array's dtype, and what it has one row of: a step, an observation (T + 1 of each episode) or an episode.
ARRAYS = {
    "observations": ("<f4", "observation"),
    "actions": ("<f4", "step"),
    "rewards": ("<f4", "step"),
    "lengths": ("<i4", "episode"),
    "tasks": ("<i4", "episode"),
    "terminated": ("|b1", "episode"),
    "truncated": ("|b1", "episode"),
}
_MAPPED_BUDGET = 256 * 2**20  # of mapped pages, which are given back when more were read


class Episode(NamedTuple):
    """One episode: observations[t] --actions[t]--> observations[t + 1], earning rewards[t].

    Neither flag is set where the data ends in mid-episode.
    """

    observations: np.ndarray  # (T + 1, O), float32
    actions: np.ndarray  # (T, A), float32, in [-1, 1]
    rewards: np.ndarray  # (T,), float32, in task units
    terminated: bool = False  # its last step ended it for good
    truncated: bool = False  # a time limit cut it
    task: int = 0  # index into the dataset's tasks


class Layout(NamedTuple):
    """What a dataset's rows mean."""

    tasks: tuple[str, ...]  # names, in the order of their ids
    observation_dims: tuple[int, ...]  # of each task, without padding
    action_dims: tuple[int, ...]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one row of each array."""
        return {"observations": (max(self.observation_dims),), "actions": (max(self.action_dims),)}

    def check(self) -> None:
        """Raise ValueError unless names and dimensions fit each other."""
        counts = {len(self.tasks), len(self.observation_dims), len(self.action_dims)}
        if counts != {len(self.tasks)} or not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"expected distinct tasks, each with its dimensions, got {self}.")
        if min(self.observation_dims + self.action_dims) < 1:
            raise ValueError(f"expected dimensions >= 1, got {self}.")


def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The .npy header; NumPy pads it so that its size stays the same however many rows there are."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


class _MappedFile:
    """An open file and its map; the file is closed with the last reference."""

    def __init__(self, descriptor: int, start: int) -> None:
        self.descriptor, self.start = os.dup(descriptor), start
        weakref.finalize(self, os.close, self.descriptor)
        self.mapping = mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ)


class Store:
    """A dataset's flat arrays, in memory or mapped from a folder.

    Args:
        layout: What the rows mean.
        arrays: Every array of `ARRAYS`.
        files: Open files that the arrays are mapped from, with what stands before the first row.
    """

    def __init__(
        self, layout: Layout, arrays: Mapping[str, np.ndarray], files: Mapping[str, _MappedFile] | None = None
    ) -> None:
        layout.check()
        self.layout = layout
        self.observations, self.actions, self.rewards = (arrays[k] for k in ("observations", "actions", "rewards"))
        self.lengths, self.tasks = arrays["lengths"].astype(np.int64), arrays["tasks"].astype(np.int64)
        self.terminated, self.truncated = np.array(arrays["terminated"]), np.array(arrays["truncated"])
        self.first_step = np.cumsum(self.lengths) - self.lengths  # (E,); observations of episode e start e rows later
        self._files, self._touched = files or {}, 0
        self._folder: pathlib.Path | None = None  # that the files are in
        steps, episodes = int(self.lengths.sum()), len(self.lengths)
        for name, rows in {"observations": steps + episodes, "actions": steps, "rewards": steps}.items():
            expected = (rows, *layout.shapes().get(name, ()))
            if arrays[name].shape != expected:
                raise ValueError(f"expected {name!r} of shape {expected}, got {arrays[name].shape}.")
        if episodes and (self.lengths.min() < 1 or not 0 <= self.tasks.min() <= self.tasks.max() < len(layout.tasks)):
            raise ValueError(f"expected episodes of at least one step and task ids below {len(layout.tasks)}.")

    @classmethod
    def of_episodes(cls, episodes: list[Episode], tasks: tuple[str, ...]) -> Store:
        """Put episodes in memory, side by side."""
        if not episodes:
            raise ValueError("expected at least one episode, got none.")
        arrays: dict[str, Any] = {name: [] for name in ARRAYS}
        dims: dict[int, tuple[int, int]] = {}
        for number, episode in enumerate(episodes):
            o, a, r = (np.asarray(x, np.float32) for x in episode[:3])
            if o.ndim != 2 or a.ndim != 2 or r.ndim != 1 or not len(o) - 1 == len(a) == len(r) >= 1:
                raise ValueError(
                    f"expected observations (T + 1, O), actions (T, A) and rewards (T,) with T >= 1, got {o.shape}, "
                    f"{a.shape} and {r.shape} in episode {number}."
                )
            if not 0 <= episode.task < len(tasks):
                raise ValueError(f"expected a task below {len(tasks)} ({', '.join(tasks)}), got {episode.task}.")
            if dims.setdefault(episode.task, (o.shape[1], a.shape[1])) != (o.shape[1], a.shape[1]):
                raise ValueError(
                    f"expected observations and actions of {dims[episode.task]} entries for {tasks[episode.task]!r}, "
                    f"got ({o.shape[1]}, {a.shape[1]}) in episode {number}."
                )
            row = (o, a, r, len(r), episode.task, episode.terminated, episode.truncated)
            for name, value in zip(ARRAYS, row, strict=True):
                arrays[name].append(value)
        missing = [name for i, name in enumerate(tasks) if i not in dims]
        if missing:
            raise ValueError(f"expected an episode of every task, got none of {', '.join(missing)}.")
        layout = Layout(tasks, *(tuple(dims[i][k] for i in range(len(tasks))) for k in range(2)))
        stored = {name: np.asarray(arrays[name], dtype) for name, (dtype, per) in ARRAYS.items() if per == "episode"}
        stored["rewards"] = np.concatenate(arrays["rewards"])
        for name, (width,) in layout.shapes().items():
            stored[name] = np.concatenate([np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in arrays[name]])
        return cls(layout, stored)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle what is mapped from files as the place of its files, which another process maps for itself."""
        if self._folder is not None and self.is_mapped:
            return type(self).load, (os.fspath(self._folder), False)
        return super().__reduce_ex__(protocol)

    @property
    def is_mapped(self) -> bool:
        """Whether the arrays are mapped from files."""
        return bool(self._files)

    def windows(self, name: str, first: np.ndarray, count: int, own: np.ndarray) -> np.ndarray:
        """Gather rows first[b] to first[b] + count of "observations", "actions" or "rewards", (count, B, *row).

        Of these only the first own[b] are read, (B,) in [1, count]; the last of them is repeated in the others' place.

        Files are read rather than touched through their maps: that takes what is asked for and no pages around it, and
        leaves no memory in use. All reads are announced first, so that the disk can serve them side by side.
        """
        array = getattr(self, name)
        if name not in self._files:
            return array[first + np.minimum(np.arange(count)[:, None], own - 1)]
        file = self._files[name]
        rows = np.empty((len(first), count, *array.shape[1:]), array.dtype)
        width = array[:1].nbytes
        reads = list(zip(rows, own.tolist(), (file.start + first * width).tolist(), strict=True))
        if hasattr(os, "posix_fadvise"):  # not on macOS
            for _, length, offset in reads:
                os.posix_fadvise(file.descriptor, offset, length * width, os.POSIX_FADV_WILLNEED)
        read = sum(os.preadv(file.descriptor, [row[:length]], offset) for row, length, offset in reads)
        if read != own.sum() * width:
            raise ValueError(f"expected {own.sum() * width} bytes of {name!r}, got {read}. Was the file changed?")
        for row, length, _ in reads:
            row[length:] = row[length - 1]
        return np.ascontiguousarray(rows.swapaxes(0, 1))

    def count_read(self, size: int) -> None:
        """Give mapped pages back when `size` more bytes make too many, so that they don't add up to the whole file."""
        self._touched += size
        if self._touched > _MAPPED_BUDGET:
            for file in self._files.values():
                file.mapping.madvise(mmap.MADV_DONTNEED)  # they stay in the page cache as long as there is room
            self._touched = 0

    @classmethod
    def load(cls, path: str | os.PathLike[str], in_memory: bool) -> Store:
        """Open a folder that `DatasetWriter` finished.

        Raises:
            FileNotFoundError: If there is no such dataset, or it was never finished.
            ValueError: If a file is missing, truncated or does not fit the manifest.
        """
        folder = pathlib.Path(path)
        if not (folder / MANIFEST).is_file():
            unfinished = DatasetWriter.unfinished(folder)
            hint = f" An unfinished one stands in {unfinished.name!r}: run its import again." if unfinished else ""
            raise FileNotFoundError(f"expected a dataset (a folder with {MANIFEST}) at {os.fspath(path)!r}.{hint}")
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT:
                raise ValueError(f"format {manifest['format']!r} instead of {FORMAT!r}")
            layout = Layout(*(tuple(manifest[field]) for field in Layout._fields))
            arrays, files = {}, {}
            for name, (dtype, _) in ARRAYS.items():
                shape = tuple(manifest["arrays"][name])
                with open(folder / f"{name}.npy", "rb") as file:
                    header, size = _header(dtype, shape), int(np.prod(shape)) * np.dtype(dtype).itemsize
                    if file.read(len(header)) != header or os.fstat(file.fileno()).st_size != len(header) + size:
                        raise ValueError(f"{name}.npy does not hold {shape} values of type {dtype}: it is truncated")
                    if in_memory or not size:
                        arrays[name] = np.fromfile(file, dtype).reshape(shape)
                    else:
                        files[name] = _MappedFile(file.fileno(), len(header))
                        arrays[name] = np.frombuffer(files[name].mapping, dtype, offset=len(header)).reshape(shape)
            store = cls(layout, arrays, files)
            store._folder = folder.resolve()
            return store
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            raise ValueError(
                f"expected a whole dataset at {os.fspath(path)!r}, got a damaged one ({error}). Copy it again."
            ) from error


class DatasetWriter:
    """Appends episodes to a folder that only takes its name when it is whole; goes on after a kill at any moment.

    The files grow in `.NAME.partial` beside the target. `checkpoint` notes how many rows are safely on disk, with the
    caller's own note of what they came from; a new writer with the same `source` cuts whatever was written after
    that and goes on from there, so that the result is the same to the byte. A context closes the files.

    Args:
        path: The folder; it must not exist.
        layout: What the rows mean.
        source: Plain JSON data that says what the dataset is made from; an unfinished folder of another source is an
            error. None to begin anew always.

    Attributes:
        note: What was given to the last `checkpoint`, None at the beginning.
    """

    def __init__(self, path: str | os.PathLike[str], layout: Layout, source: Any = None) -> None:
        layout.check()
        self.path, self.layout = pathlib.Path(path), layout
        self._partial = self._partial_folder(self.path)
        if self.path.exists():
            raise FileExistsError(f"{os.fspath(path)!r} exists. Remove it or write to another folder.")
        self._source = json.loads(json.dumps({"layout": layout, "source": source}))
        self._rows = dict.fromkeys(ARRAYS, 0)
        self.note: Any = None
        if source is not None and (self._partial / PROGRESS).is_file():
            progress = json.loads((self._partial / PROGRESS).read_text(encoding="utf-8"))
            if progress["made_from"] != self._source:
                raise ValueError(
                    f"expected to go on with the unfinished dataset in {os.fspath(self._partial)!r}, but it is made "
                    f"from other files or settings. Give the same again, or remove that folder to start anew."
                )
            self._rows, self.note = progress["rows"], progress["note"]
        elif self._partial.exists():  # killed before its first checkpoint, or not to be gone on with
            shutil.rmtree(self._partial)
        self._partial.mkdir(parents=True, exist_ok=True)
        self._files = {name: self._open(name) for name in ARRAYS}
        if self.note is None:
            self.checkpoint(None)

    @staticmethod
    def _partial_folder(path: pathlib.Path) -> pathlib.Path:
        return path.with_name(f".{path.name}.partial")

    @classmethod
    def unfinished(cls, path: pathlib.Path) -> pathlib.Path | None:
        """Where an unfinished dataset of this name stands, if there is one."""
        partial = cls._partial_folder(path)
        return partial if partial.exists() else None

    def _row_shape(self, name: str) -> tuple[int, ...]:
        return self.layout.shapes().get(name, ())

    def _open(self, name: str) -> IO[bytes]:
        dtype, shape = ARRAYS[name][0], self._row_shape(name)
        header = _header(dtype, (0, *shape))
        path = self._partial / f"{name}.npy"
        path.touch()
        file = open(path, "r+b")  # noqa: SIM115  closed by finish or close
        file.write(header)
        end = len(header) + self._rows[name] * int(np.prod(shape)) * np.dtype(dtype).itemsize
        if file.seek(0, io.SEEK_END) < end:
            raise ValueError(
                f"expected {end} bytes in {os.fspath(path)!r}, got fewer. Remove its folder to start anew."
            )
        file.seek(end)
        file.truncate()
        return file

    @property
    def num_episodes(self) -> int:
        """Episodes appended so far."""
        return self._rows["lengths"]

    def append(
        self,
        observations: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        lengths: np.ndarray,
        tasks: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
    ) -> None:
        """Append whole episodes, flat, with rows zero-padded to the stored width.

        Args:
            observations: (sum of T + 1, O).
            actions: (sum of T, A), in [-1, 1].
            rewards: (sum of T,).
            lengths: T of each episode, (E,).
            tasks: Task id of each episode, (E,).
            terminated: Whether it ended for good, (E,), bool.
            truncated: Whether a time limit cut it, (E,), bool.
        """
        given = (observations, actions, rewards, lengths, tasks, terminated, truncated)
        for name, array in zip(ARRAYS, given, strict=True):
            assert array.shape[1:] == self._row_shape(name), (name, array.shape)
            self._files[name].write(np.ascontiguousarray(array, ARRAYS[name][0]).data.cast("B") if array.size else b"")
            self._rows[name] += len(array)

    def append_episode(
        self,
        observations: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        terminated: bool,
        truncated: bool,
        task: int,
    ) -> None:
        """Append one episode, zero-padding its rows: observations (T + 1, O), actions (T, A), rewards (T,)."""
        o, a = (
            np.pad(x, ((0, 0), (0, width - x.shape[1])))
            for x, (width,) in zip((observations, actions), self.layout.shapes().values(), strict=True)
        )
        flags = (np.array([x]) for x in (len(rewards), task, terminated, truncated))
        self.append(o, a, rewards, *flags)

    def checkpoint(self, note: Any) -> None:
        """Make sure that everything so far is on disk, and note what it came from.

        Args:
            note: Plain JSON data from which the caller can go on.
        """
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.note = note
        progress = {"made_from": self._source, "rows": self._rows, "note": note}
        with atomic_write(self._partial / PROGRESS) as out:
            out.write(json.dumps(progress).encode())

    def finish(self) -> pathlib.Path:
        """Complete the headers and the manifest, and rename the folder.

        Raises:
            ValueError: If there is no episode.
        """
        if not self.num_episodes:
            raise ValueError("expected at least one episode to write, got none.")
        arrays = {name: (rows, *self._row_shape(name)) for name, rows in self._rows.items()}
        for name, file in self._files.items():
            file.seek(0)
            file.write(_header(ARRAYS[name][0], arrays[name]))
            file.flush()
            os.fsync(file.fileno())
        self.close()
        manifest = {"format": FORMAT, **self.layout._asdict(), "arrays": arrays}
        manifest |= {"num_episodes": self.num_episodes, "num_steps": self._rows["rewards"]}
        with atomic_write(self._partial / MANIFEST) as out:
            out.write(json.dumps(manifest, indent=1).encode())
        (self._partial / PROGRESS).unlink()
        os.replace(self._partial, self.path)
        return self.path

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Unless `finish` was called, the folder stays as it is, to go on later."""
        for file in self._files.values():
            file.close()
