"""Running a benchmark: each run in a process of its own or on a Ray cluster, a live display over all of them."""

from __future__ import annotations

import functools
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import rich
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pwm_gym.benchmark.algorithms import algorithm_of, env_id_of, label_of, real_env, training_env
from pwm_gym.benchmark.study import Cell, Study
from pwm_gym.cluster import RayCluster
from pwm_gym.serialization import atomic_write

__all__ = ["Outcome", "run"]

_REFRESH = 0.5  # seconds between two looks at the processes


class Outcome(NamedTuple):
    """How a run stands when `run` ends.

    Attributes:
        cell: The run.
        failure: Why it died, None if it is done.
    """

    cell: Cell
    failure: str | None


def run(
    folder: str | os.PathLike[str],
    algorithms: Sequence[str] = (),
    tasks: Sequence[str] = (),
    seeds: Sequence[int] = (),
    *,
    frames: int | Mapping[str, int] = 100_000,
    every: int = 5_000,
    episodes: int = 10,
    arguments: Mapping[str, Mapping[str, Any]] | None = None,
    world_model: str | None = None,
    data: str | None = None,
    precision: str = "highest",
    jobs: int = 1,
    threads: int = 1,
    device: str = "cpu",
    ray: RayCluster | str | None = None,
    console: Console | None = None,
) -> list[Outcome]:
    """Run every algorithm on every task from every seed, as far as it isn't done yet.

    Each run has a process of its own. It writes a row of its CSV after each evaluation, and goes on from there when
    `run` is called again, with the same curve as if it had never stopped. A run that dies leaves the others alone; its
    reason is shown, kept for the report, and forgotten once it is run again.

    Args:
        folder: The benchmark's folder, new or begun before. What is asked for is added to what it holds.
        algorithms: Names in `ALGORITHMS`; "pwm@h16" is a variant, with `arguments` of its own. None of algorithms,
            tasks and seeds, to go on with what the folder holds.
        tasks: Tasks of this package such as "walker-walk", or ids of other registered envs.
        seeds: Seeds.
        frames: Budget of each run in frames, which are env steps times the task's action repeat; one for all, or by
            algorithm. In a world model, imagined steps.
        every: Frames between two evaluations.
        episodes: Episodes of an evaluation, deterministic and from the same initial states for everyone.
        arguments: What differs from an algorithm's defaults, by algorithm; "num_envs" where it trains in several.
        world_model: File of a frozen single-task model. All agents are trained in it instead of in the task, and
            scored in the task.
        data: Folder of the dataset that imagined episodes start from.
        precision: Of float32 matrix products, "highest", "high" or "medium" (`torch.set_float32_matmul_precision`).
        jobs: Processes at the same time.
        threads: Threads of each.
        device: Of the agents.
        ray: Cluster to run on, or its address, instead of in processes here; it says how many run at the same time,
            how many threads each has, and whether agents are on a GPU. The folder must be one that all nodes see.
        console: Where the display goes; None for standard output.

    Returns:
        How each run stands.

    Raises:
        ConnectionError: If there is no cluster at the address.
        ImportError: If a cluster is asked for and Ray is missing.
        ValueError: If a name is unknown, nothing is asked for, a budget is no whole number of evaluations, the model
            doesn't fit a task, SHAC is asked for where there are no gradients, or the folder holds another protocol,
            other arguments or another version, or no node has room for a run.

    Example:
        >>> run("runs/new", ["pmw"], ["walker-walk"], seeds=[0, 1, 2])
        Traceback (most recent call last):
        ValueError: unknown algorithm 'pmw': did you mean 'pwm'?
    """
    path = pathlib.Path(folder)
    known = Study.open(path) if (path / "benchmark.json").exists() else None
    if not (algorithms or tasks or seeds) and known is not None:
        study, cells = known, known.cells
    else:
        for name, given in {"algorithm": algorithms, "task": tasks, "seed": seeds}.items():
            if not len(given):
                raise ValueError(f"expected at least one {name}, got none.")
        cells = tuple(dict.fromkeys(Cell(a, t, s) for s in seeds for t in tasks for a in algorithms))
        budgets = {a: frames if isinstance(frames, int) else _budget(frames, a) for a in algorithms}
        asked = {a: dict(settings) for a, settings in (arguments or {}).items()}
        study = Study(path, cells, budgets, every, episodes, asked, world_model, data, precision)
        study = study if known is None else known.join(study)
        _check_envs(study, cells)
        study.save()
    waiting = [cell for cell in cells if not study.is_done(cell) or study.lacks_film(cell)]
    console = console or rich.get_console()
    if ray is None:
        _run_here(study, cells, waiting, max(jobs, 1), threads, device, console)
    else:
        _run_on_ray(study, cells, waiting, RayCluster.of(ray), console)
    return [Outcome(cell, None if study.is_done(cell) else study.failure(cell)) for cell in cells]


def _budget(frames: Mapping[str, int], algorithm: str) -> int:
    if algorithm not in frames:
        raise ValueError(f"expected `frames` for each algorithm, got none for {label_of(algorithm)}.")
    return frames[algorithm]


def _check_envs(study: Study, cells: Sequence[Cell]) -> None:
    """Make each env once, so that what doesn't fit is said before anything runs."""
    for name, task in dict.fromkeys(cell[:2] for cell in cells):
        algorithm = algorithm_of(name)
        algorithm.load_class()
        if algorithm.differentiable or study.world_model is not None:
            real_env(algorithm._replace(latent_face="numpy"), env_id_of(task), study.world_model).close()
            training_env(algorithm, env_id_of(task), study.every, 1, study.world_model, study.data).close()


# Runs


class _Running:
    """A run at work, here or on another machine, and what its files say of how far it is."""

    def __init__(self, study: Study, cell: Cell) -> None:
        self.study, self.cell, self.began = study, cell, time.monotonic()
        rows = study.rows(cell)
        self.frames_before = int(rows[-1]["frames"]) if rows else 0
        state = study.state_path(cell)
        state.mkdir(parents=True, exist_ok=True)
        for name in ("failure.txt", "progress.txt"):
            (state / name).unlink(missing_ok=True)

    def frames(self) -> int:
        """Read how many frames it has had, 0 before the first."""
        counted = self.study.state_path(self.cell) / "progress.txt"
        return int(counted.read_text(encoding="utf-8") or 0) if counted.exists() else 0

    def fail(self, reason: str) -> None:
        """See to it that the reason of its death is known, where it could not leave it itself."""
        path = self.study.state_path(self.cell) / "failure.txt"
        if not path.exists():
            with atomic_write(path) as file:
                file.write(reason.encode())


class _Process(_Running):
    """A run in a process of its own on this machine."""

    def __init__(self, study: Study, cell: Cell, threads: int, device: str) -> None:
        super().__init__(study, cell)
        state = study.state_path(cell)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        root = str(pathlib.Path(__file__).parents[2])  # so that it runs the package that this one runs
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "pwm_gym.benchmark.worker", str(study.folder), *map(str, cell)]
        with (state / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--threads", str(threads), "--device", device],
                env=os.environ | dict.fromkeys(names, str(threads)) | {"PYTHONPATH": path},
                stdin=subprocess.PIPE,  # closes when this process is gone, and the run ends then
                stdout=log,
                stderr=log,
            )

    def finished(self) -> bool:
        """Tell whether it has ended, and if it died, see to it that the reason is known."""
        code = self.process.poll()
        if code is None:
            return False
        assert self.process.stdin is not None
        self.process.stdin.close()
        if code:
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            log = self.study.state_path(self.cell) / "log.txt"
            lines = (log.read_text(encoding="utf-8", errors="replace").splitlines() or [""])[-1]
            self.fail(f"{how}{': ' + lines if code > 0 and lines else ''}")
        return True

    def stop(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()


def _run_here(
    study: Study,
    cells: Sequence[Cell],
    waiting: list[Cell],
    jobs: int,
    threads: int,
    device: str,
    console: Console,
) -> None:
    """Run what is waiting in processes, `jobs` at a time."""
    running: list[_Process] = []
    with _display(study, cells, console) as show:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(_Process(study, waiting.pop(0), threads, device))
                show(running)
                time.sleep(_REFRESH)
                running = [process for process in running if not process.finished()]
            show(running)
        finally:
            for process in running:  # after Ctrl-C: they go on from their last evaluations next time
                process.stop()


def _run_on_ray(
    study: Study, cells: Sequence[Cell], waiting: list[Cell], cluster: RayCluster, console: Console
) -> None:
    """Run what is waiting on a cluster, as many at a time as it has room for."""
    runs = {cell: _Running(study, cell) for cell in waiting}
    files = {name: os.path.abspath(path) for name in ("world_model", "data") if (path := getattr(study, name))}
    shared = replace(study, folder=study.folder.resolve(), **files), cluster.device
    with _display(study, cells, console) as show:
        for event in cluster.run(_worker, shared, waiting, shared[0].folder / "benchmark.json"):
            if event is not None:
                ended = runs.pop(waiting[event.number])
                if event.failure is not None:
                    ended.fail(event.failure)
            show([run for run in runs.values() if run.frames()])
        show([])


def _worker(shared: tuple[Study, str]) -> Callable[[Cell], bool]:
    from pwm_gym.benchmark.worker import attempt  # a program too, which its own package must not import before it runs

    return functools.partial(attempt, *shared)


# Display


@contextmanager
def _display(study: Study, cells: Sequence[Cell], console: Console) -> Iterator[Any]:
    """Give a function that shows how the runs stand: a live table in a terminal, lines of what is new elsewhere."""
    if not console.is_terminal:
        seen: dict[Cell, str] = {}

        def show_lines(running: Sequence[_Running]) -> None:
            for cell in cells:
                line = _line(study, cell, running)
                if line and seen.get(cell) != line:
                    seen[cell] = line
                    console.print(line, highlight=False, soft_wrap=True)

        yield show_lines
        return
    with Live(console=console, refresh_per_second=2, transient=False) as live:
        yield lambda running: live.update(_table(study, cells, running, console.height))


def _line(study: Study, cell: Cell, running: Sequence[_Running]) -> str:
    rows, failure = study.rows(cell), study.failure(cell)
    if failure is not None and not any(process.cell == cell for process in running):
        return f"{cell}: died, {failure} (run it again to go on)"
    if not rows:
        return ""
    done = " done" if len(rows) >= study.evaluations(cell.algorithm) else ""
    return f"{cell}: {int(rows[-1]['frames']):,} frames, return {float(rows[-1]['mean_return']):.1f}{done}"


def _table(study: Study, cells: Sequence[Cell], running: Sequence[_Running], height: int) -> Table:
    """Draw the runs; where the terminal is too low for all, those that run, that died and that wait come first."""
    active = {process.cell: process for process in running}
    done = {cell for cell in cells if study.is_done(cell)}
    died = {cell for cell in cells if study.failure(cell) is not None and cell not in active}
    table = Table(
        title=f"{study.folder.name}: {len(done)} of {len(cells)} runs done, {len(died)} died", title_justify="left"
    )
    for name in ("run", "progress", "frames", "return", "training", "left"):
        table.add_column(name, justify="left" if name in ("run", "progress") else "right")
    shown = sorted(cells, key=lambda cell: (cell not in active, cell not in died, cell in done))[: max(height - 6, 4)]
    for cell in cells:
        if cell in shown:
            table.add_row(*_cells_of(study, cell, active.get(cell)))
    if len(shown) < len(cells):
        table.caption = f"and {len(cells) - len(shown)} more"
    return table


def _cells_of(study: Study, cell: Cell, process: _Running | None) -> tuple[Any, ...]:
    rows, budget, failure = study.rows(cell), study.frames[cell.algorithm], study.failure(cell)
    frames, left = int(rows[-1]["frames"]) if rows else 0, ""
    state: Any = ProgressBar(total=budget, completed=frames, width=20)
    if process is not None:
        frames = max(frames, process.frames())
        state = ProgressBar(total=budget, completed=frames, width=20)
        if frames > process.frames_before:
            rate = (time.monotonic() - process.began) / (frames - process.frames_before)
            left = f"{rate * (budget - frames):,.0f} s"
    elif failure is not None:
        state = Text(f"died: {failure}", style="red")
    elif study.is_done(cell, rows):
        state = Text("done", style="green")
    elif not rows:
        state = Text("waiting")
    last = f"{float(rows[-1]['mean_return']):.1f}" if rows else ""
    seconds = f"{float(rows[-1]['train_wall_seconds']):,.0f} s" if rows else ""
    return str(cell), state, f"{frames:,} of {budget:,}", last, seconds, left
