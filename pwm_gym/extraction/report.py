"""What extracted policies scored, in a table and a plot, with the published scores beside."""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.resources
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from pwm_gym.serialization import atomic_write

__all__ = ["TaskResult", "published_scores", "write_report"]

_JOINT = ("PWM MT30", "PWM MT80"), ("TD-MPC2 multi-task MT30", "TD-MPC2 multi-task MT80")  # the first that there is
_BARS = {  # column of the table -> what the plot calls it
    "data_mean": "data, mean",
    "data_best_tenth": "data, best tenth",
    "score": "this policy",
    "published_pwm": "published: PWM",
    "published_tdmpc2": "TD-MPC2, multi-task",
    "published_single": "best single-task",
}


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """A policy and what it scored on the real env."""

    task: str
    agent: str  # file, for `PWM.load`
    updates: int  # of the policy in the model
    real_steps: int  # decisions in the real env while learning
    seconds: float  # of training by the clock, its share where several tasks were trained together
    cpu_seconds: float  # the same of this process's CPU time
    data_mean: float  # return of an episode in the data
    data_best_tenth: float  # the same of the best tenth
    returns: tuple[float, ...]  # of the real episodes; () where none was played
    successes: tuple[bool, ...]  # of each; () where the env doesn't tell

    @property
    def score(self) -> float:
        """Success rate where publications of the task give it, else mean return; NaN without episodes."""
        told = self.successes if published_scores(self.task)[0] == "success" else self.returns
        return float(np.mean(told)) if told else float("nan")

    def save(self, path: pathlib.Path) -> None:
        """Write it as JSON, atomically."""
        with atomic_write(path) as file:
            file.write(json.dumps(dataclasses.asdict(self), indent=1).encode())

    @classmethod
    def load(cls, path: pathlib.Path) -> Self:
        """Read what `save` wrote."""
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**fields, "returns": tuple(fields["returns"]), "successes": tuple(fields["successes"])})


@functools.cache
def _published() -> dict[str, list[dict[str, str]]]:
    text = importlib.resources.files("pwm_gym.extraction").joinpath("published_scores.csv").read_text(encoding="utf-8")
    tasks: dict[str, list[dict[str, str]]] = {}
    for row in csv.DictReader(io.StringIO(text)):
        tasks.setdefault(row["task"], []).append(row)
    return tasks


def published_scores(task: str) -> tuple[str, dict[str, float]]:
    """Look up what was published for a task of MT80: from one multi-task model, and by single-task experts.

    The numbers were read from the authors' result files, which the package's published_scores.csv names for each; most
    are means of 3 seeds, PWM's of one run. Experts' are at 1M frames and at the end of their training.

    Args:
        task: Name of the task.

    Returns:
        What is scored, "return" or "success", and {algorithm: score}; {} for a task that nothing is known of.

    Example:
        >>> kind, scores = published_scores("walker-walk")
        >>> kind, scores["PWM MT30"], scores["SAC 1M"]
        ('return', 985.79, 957.3)
        >>> published_scores("mw-door-open")[0]
        'success'
    """
    rows = _published().get(task, [])
    kind = "success" if any(row["success"] for row in rows) else "return"
    return kind, {row["algorithm"]: float(row[kind]) for row in rows if row[kind]}


def _row(result: TaskResult) -> dict[str, Any]:
    kind, published = published_scores(result.task)
    joint = [next((published[name] for name in names if name in published), None) for names in _JOINT]
    single = {name: score for name, score in published.items() if "MT" not in name}
    best = max(single, key=single.__getitem__) if single else None
    scores = np.array(result.successes if kind == "success" else result.returns, float)
    return {
        "task": result.task,
        "kind": kind,  # what score and published scores are
        "score": scores.mean() if len(scores) else None,
        "lowest": scores.min() if len(scores) else None,
        "highest": scores.max() if len(scores) else None,
        "episodes": len(scores),
        "mean_return": float(np.mean(result.returns)) if result.returns else None,
        "data_mean": result.data_mean,  # returns, whatever is scored
        "data_best_tenth": result.data_best_tenth,
        "published_pwm": joint[0],
        "published_tdmpc2": joint[1],
        "published_single": single[best] if best else None,
        "published_single_by": best,
        "updates": result.updates,
        "real_steps": result.real_steps,
        "seconds": result.seconds,
        "cpu_seconds": result.cpu_seconds,
    }


def write_report(results: Sequence[TaskResult], folder: pathlib.Path) -> None:
    """Write table.csv, table.md and scores.png.

    Args:
        results: Of each task.
        folder: Where the files go.

    Raises:
        ImportError: If matplotlib is missing.
    """
    rows = [_row(result) for result in results]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    _write(folder / "table.csv", text.getvalue())
    _write(folder / "table.md", _markdown(rows))
    _plot(rows, folder / "scores.png")


def _write(path: pathlib.Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def _number(value: float | None, kind: str) -> str:
    return "" if value is None else f"{value:.2f}" if kind == "success" else f"{value:.0f}"


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| task | score is | data: mean return | data: best tenth | this policy | lowest to highest of its episodes "
        "| published: PWM 48M | TD-MPC2 48M, multi-task | best single-task | training, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kind, best = row["kind"], row["published_single_by"]
        span = f"{_number(row['lowest'], kind)} to {_number(row['highest'], kind)}" if row["episodes"] else ""
        cells = [row["task"], kind, f"{row['data_mean']:.0f}", f"{row['data_best_tenth']:.0f}"]
        cells += [_number(row["score"], kind), span]
        cells += [_number(row[name], kind) for name in ("published_pwm", "published_tdmpc2")]
        cells += [f"{_number(row['published_single'], kind)} ({best})" if best else "", f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _height(row: dict[str, Any], column: str) -> float:
    """Give a bar's height: success, or a return over 1000; none for the data's returns where success is scored."""
    if row[column] is None or (row["kind"] == "success" and column.startswith("data_")):
        return float("nan")
    return float(row[column]) / (1.0 if row["kind"] == "success" else 1_000.0)


def _plot(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Draw a group of bars for each task: success, or return over 1000."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('a plot needs matplotlib: pip install "pwm-gym[examples]"') from error
    figure = Figure(figsize=(max(6.0, 1.3 * len(rows) + 2.0), 4.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    places, width = np.arange(len(rows)), 0.8 / len(_BARS)
    for index, (column, label) in enumerate(_BARS.items()):
        heights = [_height(row, column) for row in rows]
        left, alpha = places + (index - len(_BARS) / 2) * width, 1.0 if column == "score" else 0.55
        axes.bar(left, heights, width, align="edge", color=f"C{index}", alpha=alpha, label=label)
    axes.set_xticks(places, [row["task"] for row in rows], rotation=30, ha="right")
    axes.set(ylabel="return / 1000, or success", title="a policy for each task from one world model")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=3, frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
