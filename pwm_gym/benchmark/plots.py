"""The pictures of a report, as SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pwm_gym.benchmark.algorithms import label_of
from pwm_gym.benchmark.intervals import Interval, Statistics
from pwm_gym.benchmark.results import Results, measure_of, published

__all__ = ["along_horizon", "against_frames", "against_time", "improvement", "iqm", "iqm_curves", "profiles"]

# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b")
_PUBLISHED = {"TD-MPC2": ("--", "s"), "SAC": ("-.", "x"), "DreamerV3": (":", "^")}  # line and marker
_WIDTH, _HEIGHT = 4.4, 3.7  # inches, at which letters can be read on a phone


def color_of(algorithm: str, algorithms: Sequence[str]) -> str:
    """Give an algorithm's colour, the same in all pictures of a report."""
    return _COLORS[algorithms.index(algorithm) % len(_COLORS)]


def _draw(paint: Callable[[Any], None], height: float = _HEIGHT) -> str:
    """Make a figure, let `paint` fill its axes, and give its SVG, the same for the same content."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('a plot needs matplotlib: pip install "pwm-gym[benchmark]"') from error
    style: Any = {"svg.hashsalt": "pwm_gym", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.subplots()
        axes.grid(alpha=0.25)
        paint(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _thousands(axes: Any) -> None:
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x else "0")


def _legend(axes: Any) -> None:
    axes.figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=2, columnspacing=1.0)


def _runs(axes: Any, results: Results, task: str, x_of: Callable[[Any], np.ndarray], name: str) -> None:
    """Draw each algorithm's mean over seeds with the range between them, and its single runs thinly."""
    for algorithm in results.algorithms:
        runs = list(results.runs(algorithm, task).values())
        if not runs:
            continue
        color = color_of(algorithm, results.algorithms)
        count = min(len(run.values) for run in runs)
        for run in runs:
            axes.plot(x_of(run), run.values, color=color, linewidth=0.7, alpha=0.45)
        x = np.mean([x_of(run)[:count] for run in runs], 0)
        values = np.array([run.values[:count] for run in runs])  # (seeds, T)
        label = f"{label_of(algorithm)}, {len(runs)} seed{'s' if len(runs) > 1 else ''}"
        axes.plot(x, values.mean(0), color=color, marker="o", markersize=3, linewidth=1.6, label=label)
        axes.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.12, linewidth=0)
    axes.set(title=task, xlabel=name, ylabel=measure_of(task))
    axes.set_xlim(left=0.0)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))


def against_frames(results: Results, task: str) -> str:
    """Draw a task's runs against frames, with published curves that begin where the runs end or before."""

    def paint(axes: Any) -> None:
        imagined = results.study.world_model is not None
        _runs(axes, results, task, lambda run: run.frames, "imagined steps" if imagined else "frames")
        limit = max(run.frames[-1] for cell, run in results.curves.items() if cell.task == task)
        right, top = 1.02 * limit, axes.get_ylim()[1]
        for name, curve in {} if imagined else published(task).items():
            line, marker = _PUBLISHED[name]
            style: dict[str, Any] = {"color": "0.35", "linewidth": 1.1, "linestyle": line}
            near = curve.frames <= 1.05 * limit
            if near.any():
                axes.plot(
                    curve.frames[near],
                    curve.values[near],
                    marker=marker,
                    markersize=5,
                    label=f"{name}, published",
                    **style,
                )
                right, top = max(right, 1.02 * curve.frames[near][-1]), max(top, 1.04 * curve.values[near].max())
            else:
                label = f"{name} at {curve.frames[0] / 1_000:g}k, published"
                axes.axhline(curve.values[0], label=label, **style)
                top = max(top, 1.04 * curve.values[0])
        axes.set_xlim(right=right)
        axes.set_ylim(top=top)
        _thousands(axes)
        _legend(axes)

    return _draw(paint)


def against_time(results: Results, task: str) -> str:
    """Draw a task's runs against the training's time on the wall clock."""

    def paint(axes: Any) -> None:
        _runs(axes, results, task, lambda run: run.seconds / 60.0, "minutes of training")
        _legend(axes)

    return _draw(paint)


def iqm(found: Statistics, algorithms: Sequence[str]) -> str:
    """Draw the interquartile means with their intervals; `algorithms` are all of the report's, for their colours."""
    colors = [color_of(name, algorithms) for name in found.iqm]
    rows = {label_of(name): value for name, value in found.iqm.items()}
    return _intervals(rows, colors, "interquartile mean of scores")


def improvement(found: Statistics) -> str:
    """Draw the probabilities of improvement with their intervals."""
    pairs = {f"{label_of(a)} > {label_of(b)}": value for (a, b), value in found.improvement.items()}
    return _intervals(pairs, ["0.3"] * len(pairs), "probability that the first scores higher", middle=0.5)


def _intervals(rows: Mapping[str, Interval], colors: Sequence[str], name: str, middle: float | None = None) -> str:
    def paint(axes: Any) -> None:
        for i, (interval, color) in enumerate(zip(rows.values(), colors, strict=True)):
            axes.barh(i, interval.high - interval.low, left=interval.low, height=0.55, color=color, alpha=0.35)
            axes.plot([interval.value] * 2, [i - 0.27, i + 0.27], color=color, linewidth=2)
        if middle is not None:
            axes.axvline(middle, color="0.5", linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel=name, xlim=(min(0.0, *(row.low for row in rows.values())) - 0.02, 1.02))

    return _draw(paint, 0.9 + 0.33 * len(rows))


def iqm_curves(found: Statistics, algorithms: Sequence[str], every: int) -> str:
    """Draw the interquartile means after each evaluation, `every` frames apart, as far as each algorithm's budget."""

    def paint(axes: Any) -> None:
        for name, curve in found.iqm_curve.items():
            x, color = every * np.arange(1, len(curve.value) + 1), color_of(name, algorithms)
            axes.plot(x, curve.value, color=color, marker="o", markersize=3, label=label_of(name))
            axes.fill_between(x, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)
        axes.set(xlabel="frames", ylabel="interquartile mean of scores")
        axes.set_xlim(left=0.0)
        _thousands(axes)
        _legend(axes)

    return _draw(paint)


def profiles(found: Statistics, algorithms: Sequence[str]) -> str:
    """Draw the performance profiles."""

    def paint(axes: Any) -> None:
        for name, profile in found.profile.items():
            color = color_of(name, algorithms)
            axes.plot(found.taus, profile.value, color=color, drawstyle="steps-post", label=label_of(name))
            axes.fill_between(found.taus, profile.low, profile.high, color=color, alpha=0.15, linewidth=0, step="post")
        axes.set(xlabel="score τ", ylabel="share of runs above τ", xlim=(0.0, 1.0), ylim=(-0.02, 1.02))
        _legend(axes)

    return _draw(paint)


def along_horizon(name: str, curves: Mapping[str, np.ndarray]) -> str:
    """Draw a figure of the diagnosis against the steps of imagined rollouts, a line for each task."""

    def paint(axes: Any) -> None:
        for i, (label, values) in enumerate(curves.items()):
            x = np.arange(1, len(values) + 1)
            axes.plot(x, values, color=_COLORS[i % len(_COLORS)], marker="o", markersize=3, label=label)
        axes.set(title=name, xlabel="imagined steps")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        _legend(axes)

    return _draw(paint)
