"""What a benchmark's CSVs hold, as arrays: curves of runs, comparable scores, and published ones beside them."""

from __future__ import annotations

import csv
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

import numpy as np

from pwm_gym.benchmark.study import Cell, Study
from pwm_gym.task_sets import CUSTOM_TASKS, DM_CONTROL_TASKS, META_WORLD_TASKS

__all__ = ["Results", "RunCurve", "published"]


class RunCurve(NamedTuple):
    """One run's evaluations, (T,) each."""

    frames: np.ndarray
    seconds: np.ndarray  # of training alone, on the wall clock
    values: np.ndarray  # the task's measure: mean return, or the success rate on Meta-World
    lowest: np.ndarray  # the worst episode's return
    highest: np.ndarray


class Published(NamedTuple):
    """A published curve, (T,) each, in the task's measure."""

    frames: np.ndarray
    values: np.ndarray
    seeds: int
    source: str


@functools.cache
def _published() -> dict[str, dict[str, Published]]:
    points: dict[tuple[str, str], list[dict[str, str]]] = {}
    with resources.files("pwm_gym.benchmark").joinpath("published.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            points.setdefault((row["task"], row["algorithm"]), []).append(row)
    found: dict[str, dict[str, Published]] = {}
    for (task, algorithm), rows in points.items():
        rows.sort(key=lambda row: float(row["frames"]))
        frames, values = (np.array([float(row[name]) for row in rows]) for name in ("frames", "value"))
        found.setdefault(task, {})[algorithm] = Published(frames, values, int(rows[0]["seeds"]), rows[0]["source"])
    return found


def published(task: str) -> dict[str, Published]:
    """Give the published single-task curves of a task, by algorithm; {} where there are none.

    They are TD-MPC2's, SAC's and DreamerV3's of the 30 dm_control tasks between 100,000 and a million frames, and of
    Meta-World's 50 after a million, means over 3 seeds.

    Example:
        >>> curve = published("cartpole-swingup")["TD-MPC2"]
        >>> int(curve.frames[0]), float(curve.values[0]), curve.source
        (100000, 839.4, 'github.com/nicklashansen/tdmpc2, results/tdmpc2')
    """
    return _published().get(task, {})


def measure_of(task: str) -> str:
    """Name what is compared on a task."""
    return "success rate" if task in META_WORLD_TASKS else "return"


def known_scale(task: str) -> tuple[float, float] | None:
    """Give the lowest and highest value of a task's measure, None where it isn't bounded."""
    if task in META_WORLD_TASKS:
        return 0.0, 1.0
    return (0.0, 1_000.0) if task in DM_CONTROL_TASKS + CUSTOM_TASKS else None


@dataclass(frozen=True)
class Results:
    """A benchmark's runs as they stand.

    Attributes:
        study: The folder.
        curves: Each run that has an evaluation.
    """

    study: Study
    curves: dict[Cell, RunCurve]

    @classmethod
    def read(cls, study: Study) -> Results:
        """Read the folder's CSVs.

        Raises:
            ValueError: If no run has an evaluation yet.
        """
        curves = {}
        for cell in study.cells:
            rows = study.rows(cell)
            if not rows:
                continue
            columns = [name for name in rows[0] if name.startswith("return_")]
            episodes = np.array([[float(row[name]) for name in columns] for row in rows])  # (T, episodes)
            measure = "success_rate" if measure_of(cell.task) == "success rate" else "mean_return"
            frames, seconds, values = (
                np.array([float(row[name]) for row in rows]) for name in ("frames", "train_wall_seconds", measure)
            )
            curves[cell] = RunCurve(frames, seconds, values, episodes.min(1), episodes.max(1))
        if not curves:
            raise ValueError(f"expected runs with an evaluation in {str(study.folder)!r}, got none. Call `run` first.")
        return cls(study, curves)

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The algorithms that have a run, in the order in which they were asked for."""
        return tuple(dict.fromkeys(cell.algorithm for cell in self.study.cells if cell in self.curves))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that have a run."""
        return tuple(dict.fromkeys(cell.task for cell in self.study.cells if cell in self.curves))

    def runs(self, algorithm: str, task: str) -> dict[int, RunCurve]:
        """Give the runs of one algorithm on one task by seed."""
        found = {cell.seed: curve for cell, curve in self.curves.items() if cell[:2] == (algorithm, task)}
        return dict(sorted(found.items()))

    def seeds_done(self, algorithm: str) -> tuple[int, ...]:
        """Give the seeds from which the algorithm is done on all tasks."""
        sets = [
            {seed for seed, run in self.runs(algorithm, task).items() if self._is_done(algorithm, run)}
            for task in self.tasks
        ]
        return tuple(sorted(set.intersection(*sets)))

    def _is_done(self, algorithm: str, run: RunCurve) -> bool:
        return len(run.values) >= self.study.evaluations(algorithm)

    def scores(self) -> dict[str, np.ndarray]:
        """Give comparable scores of the algorithms that are done on all tasks, from at least one seed.

        Returns are divided by 1,000 on dm_control, and success rates taken as they are. Where a task has no known
        scale, values go from 0 at the lowest to 1 at the highest value in this folder.

        Returns:
            {algorithm: (seeds, tasks, T)}, T the evaluations of the algorithm's budget.
        """
        low, high = np.array([self._scale(task) for task in self.tasks]).T[:, None, :, None]  # (1, tasks, 1)
        found = {}
        for algorithm in self.algorithms:
            count, seeds = self.study.evaluations(algorithm), self.seeds_done(algorithm)
            runs = [[self.runs(algorithm, task)[seed].values[:count] for task in self.tasks] for seed in seeds]
            if runs:
                found[algorithm] = (np.array(runs) - low) / (high - low)
        return found

    def _scale(self, task: str) -> tuple[float, float]:
        known = known_scale(task)
        if known is not None:
            return known
        values = np.concatenate([run.values for cell, run in self.curves.items() if cell.task == task])
        return float(values.min()), max(float(values.max()), float(values.min()) + 1e-12)

    def left_out(self) -> Sequence[str]:
        """Name the algorithms that aren't done on all tasks from any seed."""
        return [algorithm for algorithm in self.algorithms if not self.seeds_done(algorithm)]
