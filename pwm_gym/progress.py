"""The progress bars of long steps, with remaining time: one bar, or one for each task and one for all."""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from tqdm import TqdmExperimentalWarning, tqdm
from tqdm.rich import tqdm as rich_tqdm

from pwm_gym.serialization import atomic_write

__all__ = ["Progress", "ProgressFile", "TaskProgress", "show_progress", "show_task_progress"]

_WRITE_EVERY = 1.0  # seconds


def show_progress(total: float, description: str, unit: str, shown: bool = True, initial: float = 0) -> Any:
    """Make a bar that shows rate and remaining time; close it or use it as a context.

    Args:
        total: Units until the end.
        description: What is being done.
        unit: What is counted; "B" for bytes, which are shown in MB and GB.
        shown: Show it.
        initial: Units that were done before.

    Example:
        >>> with show_progress(3, "import", "episode", shown=False) as bar:
        ...     bar.update(3)
    """
    if not shown:
        return tqdm(total=total, disable=True)
    scale: dict[str, Any] = {"unit_scale": True, "unit_divisor": 1000} if unit == "B" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmExperimentalWarning)
        return rich_tqdm(total=total, desc=description, unit=unit, initial=initial, **scale)


class TaskProgress:
    """Bars of several tasks and of all together.

    Args:
        bars: Draws them; None to show nothing.
        totals: Units of each task.
    """

    def __init__(self, bars: Bars | None, totals: Mapping[str, float]) -> None:
        self._bars = bars
        self._rows: dict[str, Any] = {}
        if bars is not None:
            self._rows = {task: bars.add_task(task, total=total) for task, total in totals.items()}
            self._all = bars.add_task("all tasks", total=sum(totals.values()))

    def advance(self, tasks: Sequence[str], units: float) -> None:
        """Count `units` more of each of the tasks."""
        if self._bars is not None:
            for task in tasks:
                self._bars.advance(self._rows[task], units)
            self._bars.advance(self._all, units * len(tasks))

    def show(self, done: Mapping[str, float]) -> None:
        """Set how many units of each of the tasks are done."""
        if self._bars is not None:
            for task, units in done.items():
                self._bars.update(self._rows[task], completed=units)
            rows = set(self._rows.values())
            self._bars.update(self._all, completed=sum(bar.completed for bar in self._bars.tasks if bar.id in rows))


class ProgressFile:
    """Counts units of tasks in a file, for the bars of another process, maybe on another machine.

    Args:
        path: The file; written once a second at most.

    Example:
        >>> import tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "progress.json")
        >>> ProgressFile(path).advance(["walk"], 2)
        >>> ProgressFile.read(path)
        {'walk': 2}
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path, self._next = path, 0.0
        self._done: dict[str, float] = {}

    def advance(self, tasks: Sequence[str], units: float) -> None:
        """Count `units` more of each of the tasks."""
        self._done |= {task: self._done.get(task, 0) + units for task in tasks}
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _WRITE_EVERY
            with atomic_write(self._path) as file:
                file.write(json.dumps(self._done).encode())

    @staticmethod
    def read(path: pathlib.Path) -> dict[str, float]:
        """Read what was written last; {} where nothing was."""
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}


Progress = TaskProgress | ProgressFile


@contextlib.contextmanager
def show_task_progress(totals: Mapping[str, float], shown: bool = True) -> Iterator[TaskProgress]:
    """Show a bar for each task and one for all, while the context lasts.

    Args:
        totals: Units of each task.
        shown: Show them.

    Example:
        >>> with show_task_progress({"walk": 3, "run": 3}, shown=False) as progress:
        ...     progress.advance(["walk", "run"], 3)
    """
    if not shown:
        yield TaskProgress(None, totals)
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Bars(*columns, TimeRemainingColumn()) as bars:
        yield TaskProgress(bars, totals)
