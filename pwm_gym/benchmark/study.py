"""A benchmark's folder: what is compared and how, the runs' CSVs, and where the state of unfinished runs is kept."""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from pwm_gym import __version__
from pwm_gym.benchmark.algorithms import algorithm_of, check_arguments, env_id_of, label_of, nearest
from pwm_gym.serialization import atomic_write

__all__ = ["EVALUATION_SEED", "PRECISIONS", "Cell", "Study"]

_FORMAT = "pwm_gym.benchmark/1"
PRECISIONS = ("highest", "high", "medium")  # PyTorch's, of float32 matrix products
EVALUATION_SEED = 10_000  # of the first evaluation episode; the others count on from it


class Cell(NamedTuple):
    """One run: an algorithm on a task from a seed.

    Example:
        >>> str(Cell("pwm@h16", "walker-walk", 0))
        'PWM (h16) on walker-walk, seed 0'
    """

    algorithm: str
    task: str
    seed: int

    @property
    def path(self) -> pathlib.PurePath:
        """Folder and name of the run's files."""
        return pathlib.PurePath(self.algorithm, f"{self.task.replace('/', '__')}-seed{self.seed}")

    def __str__(self) -> str:
        return f"{label_of(self.algorithm)} on {self.task}, seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """What a benchmark's folder holds: `benchmark.json`, and the files of its runs.

        benchmark.json                        the protocol, and what was asked for
        runs/<algorithm>/<task>-seed<n>.csv   a row for each evaluation
        state/...                             agents and replay buffers to go on from, logs, videos; git ignores it

    Attributes:
        folder: The folder.
        cells: The runs that were asked for.
        frames: Budget of each algorithm, in frames.
        every: Frames between two evaluations.
        episodes: Episodes of an evaluation.
        arguments: What differs from an algorithm's defaults, by algorithm.
        world_model: File of a frozen model that agents are trained in, None where they train in the tasks.
        data: Folder of the dataset that imagined episodes start from.
        precision: Of float32 matrix products, one of PyTorch's `set_float32_matmul_precision`.

    Raises:
        ValueError: If a name is unknown, or a number out of range.

    Example:
        >>> study = Study(pathlib.Path("runs/new"), (Cell("pwm", "walker-walk", 0),), {"pwm": 30_000})
        >>> study.evaluations("pwm"), study.is_done(study.cells[0])
        (6, False)
    """

    folder: pathlib.Path
    cells: tuple[Cell, ...] = ()
    frames: dict[str, int] = field(default_factory=dict)
    every: int = 5_000
    episodes: int = 10
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    world_model: str | None = None
    data: str | None = None
    precision: str = "highest"

    def __post_init__(self) -> None:
        for name, value in {"every": self.every, "episodes": self.episodes}.items():
            if value < 1:
                raise ValueError(f"`{name}` must be >= 1, got {value}.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"`precision` must be one of {', '.join(PRECISIONS)}, got {self.precision!r}.")
        if (self.world_model is None) != (self.data is None):
            raise ValueError(
                f"expected a world model and the data that imagined episodes start from, or neither, got "
                f"world_model={self.world_model!r} and data={self.data!r}."
            )
        for algorithm, frames in self.frames.items():
            algorithm_of(algorithm)
            if frames < self.every or frames % self.every:
                raise ValueError(
                    f"expected a whole number of evaluations, one every {self.every:,} frames, got {frames:,} frames "
                    f"for {label_of(algorithm)}. Change `frames` or `every`."
                )
        for algorithm, arguments in self.arguments.items():
            if algorithm not in self.frames:
                raise ValueError(
                    f"expected arguments of algorithms that are run, got some of {algorithm!r}: "
                    f"{nearest(algorithm, self.frames)}"
                )
            check_arguments(algorithm, arguments)
        for task in {cell.task for cell in self.cells}:
            env_id_of(task)

    # The folder

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Study:
        """Read the folder of a benchmark.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is of another format.
        """
        path = pathlib.Path(folder, "benchmark.json")
        if not path.exists():
            raise FileNotFoundError(
                f"expected benchmark.json in {os.fspath(folder)!r}, got none. Begin a benchmark with `run`."
            )
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format", None) != _FORMAT:
            raise ValueError(
                f"expected a folder of format {_FORMAT!r}, got {os.fspath(folder)!r} of another version of pwm_gym. "
                f"Use that version, or a new folder."
            )
        content.pop("version")
        content["cells"] = tuple(Cell(*cell) for cell in content["cells"])
        return cls(pathlib.Path(folder), **content)

    @property
    def version(self) -> str:
        """The version of pwm_gym that the folder was begun with."""
        path = self.folder / "benchmark.json"
        return json.loads(path.read_text(encoding="utf-8"))["version"] if path.exists() else __version__

    def join(self, other: Study) -> Study:
        """Add to a folder what is asked for now: runs and algorithms that are new, and larger budgets.

        Raises:
            ValueError: If scores of the two couldn't be compared: another protocol, other arguments of the same
                algorithm, another version of pwm_gym.
        """
        if self.version != __version__:
            raise ValueError(
                f"expected runs of pwm_gym {__version__}, got {str(self.folder)!r} of {self.version}: scores of two "
                f"versions are no comparison. Use a new folder; `report` still reads this one."
            )
        for name in ("every", "episodes", "world_model", "data", "precision"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ValueError(
                    f"expected {name}={ours!r} as in {str(self.folder)!r}, got {theirs!r}: scores are comparable under "
                    f"one protocol only. Use a new folder (`name`)."
                )
        for algorithm in self.frames.keys() & other.frames.keys():
            ours, theirs = self.arguments.get(algorithm, {}), other.arguments.get(algorithm, {})
            if ours != theirs:
                raise ValueError(
                    f"expected {algorithm!r} with {ours} as in {str(self.folder)!r}, got {theirs}. Call the variant "
                    f"{algorithm.partition('@')[0] + '@label'!r}, or use a new folder (`name`)."
                )
        frames = {**self.frames, **{k: max(v, self.frames.get(k, 0)) for k, v in other.frames.items()}}
        cells = dict.fromkeys((*self.cells, *other.cells))
        return replace(self, cells=tuple(cells), frames=frames, arguments={**self.arguments, **other.arguments})

    def save(self) -> None:
        """Write `benchmark.json`, and have git ignore the state."""
        content = {"format": _FORMAT, "version": self.version, **asdict(self)}
        content["cells"] = [list(cell) for cell in self.cells]
        del content["folder"]
        with atomic_write(self.folder / "benchmark.json") as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())
        ignore = self.folder / "state" / ".gitignore"
        ignore.parent.mkdir(parents=True, exist_ok=True)
        ignore.write_text("*\n", encoding="utf-8")

    # Runs

    def csv_path(self, cell: Cell) -> pathlib.Path:
        """Where the run's evaluations stand."""
        return self.folder / "runs" / cell.path.with_name(cell.path.name + ".csv")

    def state_path(self, cell: Cell) -> pathlib.Path:
        """Folder of what the run goes on from."""
        return self.folder / "state" / cell.path

    def film_path(self, cell: Cell) -> pathlib.Path:
        """Where the film of the run's final agent stands; a .txt in its place says why there is none."""
        return self.state_path(cell) / "video.mp4"

    def lacks_film(self, cell: Cell) -> bool:
        """Tell whether the run's final agent is to be filmed, and can be: that of each algorithm's first seed."""
        first = min(other.seed for other in self.cells if other[:2] == cell[:2])
        path = self.film_path(cell)
        agent = path.with_name(f"agent-{self.evaluations(cell.algorithm)}.zip")
        return cell.seed == first and agent.exists() and not (path.exists() or path.with_suffix(".txt").exists())

    def failure(self, cell: Cell) -> str | None:
        """Give the reason for which the run died when it last did, None if it didn't."""
        path = self.state_path(cell) / "failure.txt"
        return path.read_text(encoding="utf-8") if path.exists() else None

    def rows(self, cell: Cell) -> list[dict[str, str]]:
        """Read a run's evaluations; [] of one that has none yet."""
        path = self.csv_path(cell)
        if not path.exists():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def is_done(self, cell: Cell, rows: Sequence[Mapping[str, Any]] | None = None) -> bool:
        """Tell whether the run has all its evaluations."""
        return len(self.rows(cell) if rows is None else rows) >= self.evaluations(cell.algorithm)

    def evaluations(self, algorithm: str) -> int:
        """Count the evaluations of a run."""
        return self.frames[algorithm] // self.every

    def command(self, cell: Cell) -> str:
        """Give the command that repeats a run."""
        words = ["python", "-m", "pwm_gym.benchmark", "run", "--algorithms", cell.algorithm, "--tasks", cell.task]
        words += ["--seeds", str(cell.seed), "--frames", str(self.frames[cell.algorithm])]
        words += ["--every", str(self.every), "--episodes", str(self.episodes)]
        if self.world_model is not None and self.data is not None:
            words += ["--world-model", self.world_model, "--data", self.data]
        if self.precision != PRECISIONS[0]:
            words += ["--precision", self.precision]
        for key, value in self.arguments.get(cell.algorithm, {}).items():
            words += ["--set", f"{cell.algorithm}.{key}={json.dumps(value)}"]
        return shlex.join(words)


def write_csv(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows with all the columns that any of them has, in the order of their first appearance."""
    rows = list(rows)
    columns = dict.fromkeys(key for row in rows for key in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
