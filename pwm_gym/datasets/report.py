"""What a dataset holds: a table of returns by task, and their histograms."""

from __future__ import annotations

import math
import os
import pathlib
from typing import TYPE_CHECKING

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from pwm_gym.serialization import atomic_write

if TYPE_CHECKING:
    from pwm_gym.datasets.offline import OfflineDataset

__all__ = ["plot_returns", "summary_table"]

_QUANTILES = {"min": 0.0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "max": 1.0}
_COLUMNS = 5  # of pictures side by side


def _returns_by_task(dataset: OfflineDataset) -> dict[str, tuple[np.ndarray, int]]:
    """{task: (returns of its episodes, its steps)}, of the tasks that have episodes."""
    returns, found = dataset.returns(), {}
    for number, name in enumerate(dataset.tasks):
        mine = dataset.task_ids == number
        if mine.any():
            found[name] = returns[mine], int(dataset.lengths[mine].sum())
    return found


def summary_table(dataset: OfflineDataset) -> Table:
    """Tabulate episodes, steps and quantiles of the return by task; see `OfflineDataset.summary`."""
    title = f"{dataset.num_episodes:,} episodes, {dataset.num_steps:,} steps; quantiles are of the return"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("task", no_wrap=True)
    for heading in ("episodes", "steps", "obs", "act", *_QUANTILES):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, (returns, steps) in _returns_by_task(dataset).items():
        number = dataset.tasks.index(name)
        dims = (str(dataset.observation_dims[number]), str(dataset.action_dims[number]))
        quantiles = [f"{q:.4g}" for q in np.quantile(returns, list(_QUANTILES.values()))]
        table.add_row(name, f"{len(returns):,}", f"{steps:,}", *dims, *quantiles)
    return table


def plot_returns(dataset: OfflineDataset, path: str | os.PathLike[str]) -> None:
    """Draw a histogram of returns for each task; see `OfflineDataset.plot_returns`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('a plot needs matplotlib: pip install "pwm-gym[examples]"') from error
    found = _returns_by_task(dataset)
    columns = min(_COLUMNS, len(found))
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(3.2 * columns + 0.5, 2.4 * rows + 0.3), dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (name, (returns, _)) in zip(panels, found.items(), strict=False):
        axes.hist(returns, bins=min(40, max(5, len(returns) // 4)), color="C0")
        axes.set_title(f"{name} ({len(returns):,})", fontsize=9)
        axes.tick_params(labelsize=8)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    figure.supxlabel("return of an episode", fontsize=9)
    figure.supylabel("episodes", fontsize=9)
    with atomic_write(path) as file:
        figure.savefig(file, format=pathlib.Path(path).suffix.lstrip(".") or "png")
