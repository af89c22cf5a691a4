"""The report of a benchmark: one HTML page that needs nothing else, a Markdown table, and one CSV of all runs."""

from __future__ import annotations

import base64
import html
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pwm_gym.benchmark import plots
from pwm_gym.benchmark.algorithms import label_of
from pwm_gym.benchmark.intervals import Interval, Statistics, statistics
from pwm_gym.benchmark.results import Results, known_scale, measure_of, published
from pwm_gym.benchmark.study import PRECISIONS, Cell, Study, write_csv
from pwm_gym.serialization import atomic_write

__all__ = ["report"]

_PUBLISHED = ("TD-MPC2", "SAC", "DreamerV3")
_ALONG = {
    "reward_correlation": "open-loop reward correlation",
    "latent_error": "open-loop latent error, share of variance",
    "gradient_norm": "gradient norm of the imagined return",
}


class _Table(NamedTuple):
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def report(folder: str | os.PathLike[str]) -> pathlib.Path:
    """Write report.html, report.md and results.csv into a benchmark's folder, of all runs as they stand.

    Args:
        folder: The folder.

    Returns:
        The page.

    Raises:
        FileNotFoundError: If the folder holds no benchmark.
        ImportError: If matplotlib or rliable is missing.
        ValueError: If no run has an evaluation yet, or the folder is of another format.

    Example:
        >>> report("runs/benchmark/nothing")
        Traceback (most recent call last):
        FileNotFoundError: expected benchmark.json in 'runs/benchmark/nothing', got none. Begin a benchmark with `run`.
    """
    study = Study.open(folder)
    results = Results.read(study)
    scores = results.scores()
    found = statistics(scores) if scores else None
    write_csv(study.folder / "results.csv", [row for cell in study.cells for row in study.rows(cell)])
    markdown = "\n\n".join(_markdown(results, found)) + "\n"
    with atomic_write(study.folder / "report.md") as file:
        file.write(markdown.encode())
    page = study.folder / "report.html"
    with atomic_write(page) as file:
        file.write("\n".join(_page(results, found)).encode())
    return page


# Tables


def _number(value: float, task: str) -> str:
    return f"{100 * value:.0f} %" if measure_of(task) == "success rate" else f"{value:,.0f}"


def _of(interval: Interval) -> str:
    return f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def _score_table(results: Results) -> _Table:
    head: tuple[str, ...] = (
        "task",
        "algorithm",
        "last evaluation",
        "frames",
        "seeds",
        "minutes",
        "worst of the last fifth / best",
    )
    head += tuple(f"{name}, published" for name in _PUBLISHED)
    rows = []
    for task, algorithm in ((task, algorithm) for task in results.tasks for algorithm in results.algorithms):
        runs = list(results.runs(algorithm, task).values())
        if not runs:
            continue
        last = [run.values[-1] for run in runs]
        steady = min(run.values[run.frames >= 0.8 * run.frames[-1]].min() for run in runs)
        best = max(run.values.max() for run in runs)
        frames = sorted({int(run.frames[-1]) for run in runs})
        spread = f" ({_number(min(last), task)} to {_number(max(last), task)})" if len(last) > 1 else ""
        row: tuple[str, ...] = (task, label_of(algorithm), _number(float(np.mean(last)), task) + spread)
        row += (" to ".join(f"{n:,}" for n in dict.fromkeys((frames[0], frames[-1]))), str(len(runs)))
        row += (f"{np.mean([run.seconds[-1] for run in runs]) / 60:,.1f}",)
        row += (f"{_number(steady, task)} / {_number(best, task)}",)
        rows.append(row + tuple(_published_at(task, name, frames[-1], results) for name in _PUBLISHED))
    return _Table(head, rows)


def _published_at(task: str, name: str, frames: int, results: Results) -> str:
    """Give a published score at as many frames; where the curve begins later, its first, and when that is."""
    curve = published(task).get(name)
    if curve is None or results.study.world_model is not None:
        return "–"
    if frames < curve.frames[0]:
        return f"{_number(curve.values[0], task)} at {curve.frames[0] / 1_000:,.0f}k"
    return _number(float(np.interp(frames, curve.frames, curve.values)), task)


def _aggregate_tables(results: Results, found: Statistics) -> Iterator[_Table]:
    rows = [
        (label_of(name), _of(interval), _of(found.iqm_last[name]), f"{results.study.frames[name]:,}")
        + (f"{len(results.seeds_done(name))} x {len(results.tasks)}",)
        for name, interval in found.iqm.items()
    ]
    frames = f"{found.evaluations * results.study.every:,} frames"
    yield _Table(("algorithm", f"IQM after {frames}", "IQM after all its frames", "frames", "seeds x tasks"), rows)
    if found.improvement:
        pairs = [(f"{label_of(a)} > {label_of(b)}", _of(value)) for (a, b), value in found.improvement.items()]
        yield _Table(("first > second", f"probability of improvement, {frames}"), pairs)


def _run_table(results: Results) -> _Table:
    rows = []
    for cell in results.study.cells:
        evaluations = results.study.rows(cell)
        state, last = _state(results.study, cell, len(evaluations)), evaluations[-1] if evaluations else {}
        frames = f"{int(last['frames']):,}" if last else "0"
        rows.append((label_of(cell.algorithm), cell.task, str(cell.seed), state, frames, last.get("machine", "")))
    return _Table(("algorithm", "task", "seed", "state", "frames", "machine"), rows)


def _state(study: Study, cell: Cell, evaluations: int) -> str:
    if evaluations >= study.evaluations(cell.algorithm):
        return "done"
    reason = study.failure(cell)
    if reason is not None:
        return f"died: {reason}"
    return "unfinished" if evaluations else "not begun"


# Words


def _protocol(results: Results) -> str:
    study = results.study
    where = "in the tasks themselves" if study.world_model is None else "in a frozen world model; frames are imagined"
    return (
        f"Agents learn {where}. Every {study.every:,} frames each is scored by {study.episodes} deterministic episodes "
        f"from the same initial states for all. Frames are env steps times the task's action repeat, as publications "
        f"count them; training time is on the wall clock, without the evaluations."
    )


def _aggregate_words(results: Results, found: Statistics | None) -> str:
    if found is None:
        return "No algorithm is done on all tasks yet, so there is no aggregate."
    frames = results.study.every * found.evaluations
    unknown = [task for task in results.tasks if known_scale(task) is None]
    words = (
        f"Interquartile means (IQM) of scores over {len(results.tasks)} task{'s' if len(results.tasks) > 1 else ''}, "
        f"compared after {frames:,} frames, which all algorithms have had. Scores are returns / 1,000 on dm_control "
        f"and success rates on Meta-World; 95 % intervals are from rliable's stratified bootstrap over seeds."
    )
    if unknown:
        words += (
            f" The returns of {', '.join(unknown)} have no known scale: there 0 and 1 are the lowest and highest "
            f"evaluation in this folder."
        )
    if results.left_out():
        words += f" Left out, because not done on all tasks: {', '.join(map(label_of, results.left_out()))}."
    if min(len(results.seeds_done(name)) for name in found.iqm) < 3:
        words += " With fewer than three seeds these intervals say little."
    return words


def _settings(results: Results) -> list[str]:
    study = results.study
    arithmetic = [] if study.precision == PRECISIONS[0] else [f"float32 products of {study.precision} precision"]
    return arithmetic + [
        f"{label_of(name)}: {study.arguments[name] if study.arguments.get(name) else 'defaults'}, "
        f"{study.frames[name]:,} frames"
        for name in results.algorithms
    ]


def _versions(results: Results) -> list[str]:
    rows = (row for cell in results.study.cells for row in results.study.rows(cell))
    return list(dict.fromkeys(row["versions"] for row in rows))


# Markdown


def _markdown(results: Results, found: Statistics | None) -> Iterator[str]:
    def lines(table: _Table) -> str:
        rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (table.head, *table.rows)]
        return "\n".join([rows[0], "|" + "---|" * len(table.head), *rows[1:]])

    yield _protocol(results)
    yield lines(_score_table(results))
    yield _aggregate_words(results, found)
    if found is not None:
        yield from map(lines, _aggregate_tables(results, found))
    table = _run_table(results)
    open_runs = [row for row in table.rows if row[3] != "done"]
    if open_runs:
        yield "Runs that are not done:"
        yield lines(_Table(table.head, open_runs))
    yield "\n".join(f"- {line}" for line in [*_settings(results), *_versions(results)])


# HTML

_STYLE = """
:root { color-scheme: light; --line: #d9dde3; --soft: #5b6470; }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; }
main { max-width: 82rem; margin: 0 auto; padding: 1rem clamp(0.8rem, 3vw, 2.5rem) 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0 0.5rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 0.4rem; }
p { max-width: 46rem; margin: 0.4rem 0 0.8rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem 1.5rem; }
figure { margin: 0; min-width: 0; }
figcaption { color: var(--soft); font-size: 0.85rem; }
img, video { width: 100%; height: auto; display: block; }
.films { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 10.5rem), 1fr)); gap: 1rem; }
.wide { overflow-x: auto; margin: 0.6rem 0 1rem; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem 0.3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; max-width: 13rem; }
td { white-space: nowrap; }
tr.group th { padding-top: 0.9rem; }
td.long { white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
code { font-size: 0.82rem; overflow-wrap: anywhere; }
"""


def _page(results: Results, found: Statistics | None) -> Iterator[str]:
    title = f"{', '.join(map(label_of, results.algorithms))} on {len(results.tasks)} task"
    title += "s" if len(results.tasks) > 1 else ""
    yield f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<style>{_STYLE}</style>\n<main>\n<h1>{html.escape(title)}</h1>"
    yield _paragraph(_protocol(results))
    yield "<h2>Scores</h2>" + _paragraph(
        "The last evaluation's mean over seeds, and the lowest and highest seed. Minutes are of training. Published "
        "scores are at as many frames, or at their curve's first point."
    )
    yield _html_table(_score_table(results), grouped=True)
    yield from _learning_curves(results)
    yield "<h2>Over all tasks</h2>" + _paragraph(_aggregate_words(results, found))
    if found is not None:
        yield from map(_html_table, _aggregate_tables(results, found))
        yield from _aggregate_pictures(results, found)
    yield from _diagnosis(results)
    yield from _films(results)
    yield "<h2>Runs</h2>" + _html_table(_run_table(results))
    yield "<ul>" + "".join(f"<li>{html.escape(line)}" for line in [*_settings(results), *_versions(results)]) + "</ul>"
    commands = [results.study.command(cell) for cell in results.study.cells]
    yield "<details><summary>The commands of all runs</summary>"
    yield "".join(f"<p><code>{html.escape(command)}</code>" for command in commands) + "</details>\n</main>\n</html>"


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _html_table(table: _Table, grouped: bool = False) -> str:
    """Write a table; if `grouped`, the first column's cells become headings above the rows that share them."""
    lines, before = [], None
    for row in table.rows:
        if grouped and row[0] != before:
            before = row[0]
            lines.append(f'<tr class="group"><th colspan="{len(row) - 1}">{html.escape(before)}</th></tr>')
        cells = (f"<td{' class=long' if len(cell) > 60 else ''}>{html.escape(cell)}</td>" for cell in row[grouped:])
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head[grouped:])
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n' + "\n".join(lines) + "\n</table></div>"


def _picture(svg: str, alt: str) -> str:
    data = base64.b64encode(svg.encode()).decode()
    return f'<figure><img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}"></figure>'


def _grid(pictures: Sequence[str]) -> str:
    return '<div class="grid">\n' + "\n".join(pictures) + "\n</div>"


def _learning_curves(results: Results) -> Iterator[str]:
    yield "<h2>Against frames</h2>" + _paragraph(
        "Lines are means over seeds, bands the range between seeds, thin lines single runs. Published curves are means "
        "over 3 seeds of single-task agents, from github.com/nicklashansen/tdmpc2."
    )
    yield _grid([_picture(plots.against_frames(results, task), f"{task} against frames") for task in results.tasks])
    yield "<h2>Against time</h2>" + _paragraph("Training alone, on the machines named below.")
    yield _grid([_picture(plots.against_time(results, task), f"{task} against time") for task in results.tasks])


def _aggregate_pictures(results: Results, found: Statistics) -> Iterator[str]:
    names, every = results.algorithms, results.study.every
    pictures = [
        _picture(plots.iqm_curves(found, names, every), "interquartile mean against frames"),
        _picture(plots.profiles(found, names), "performance profiles"),
        _picture(plots.iqm(found, names), "interquartile means"),
    ]
    if found.improvement:
        pictures.append(_picture(plots.improvement(found), "probabilities of improvement"))
    yield _grid(pictures)


def _diagnosis(results: Results) -> Iterator[str]:
    """Show for agents with a world model how it and the policy's gradients are, after the last evaluation."""
    for algorithm in results.algorithms:
        curves: dict[str, dict[str, np.ndarray]] = {name: {} for name in _ALONG}
        rows = []
        for cell in results.study.cells:
            last: Any = (results.study.rows(cell) or [{}])[-1]
            if cell.algorithm != algorithm or not last.get("diagnosis/critic_bias"):
                continue
            label = f"{cell.task}, seed {cell.seed}"
            for name in _ALONG:
                curves[name][label] = np.array(last[f"diagnosis/{name}"].split(), dtype=float)
            figures = (last[f"diagnosis/{name}"] for name in ("imagined_reward", "real_reward", "critic_bias"))
            rows.append((label, *(f"{float(value):.3g}" for value in figures)))
        if rows:
            yield f"<h2>{html.escape(label_of(algorithm))}: model and gradients</h2>" + _paragraph(
                "After the last evaluation, against the agent's own newest experience: rewards per step; the critic's "
                "bias in standard deviations of its targets."
            )
            yield _html_table(_Table(("run", "imagined reward", "real reward", "critic bias"), rows))
            yield _grid([_picture(plots.along_horizon(_ALONG[name], curves[name]), name) for name in _ALONG])


def _films(results: Results) -> Iterator[str]:
    figures = []
    for algorithm, task in dict.fromkeys(cell[:2] for cell in results.study.cells):
        cells = [cell for cell in results.study.cells if cell[:2] == (algorithm, task)]
        cell = min(cells, key=lambda one: one.seed)
        path, caption = results.study.film_path(cell), f"{label_of(algorithm)}, {task}, seed {cell.seed}"
        if path.exists():
            data = base64.b64encode(path.read_bytes()).decode()
            film = f'<video controls muted loop playsinline src="data:video/mp4;base64,{data}"></video>'
        elif path.with_suffix(".txt").exists():
            film = _paragraph(f"No video: {path.with_suffix('.txt').read_text(encoding='utf-8')}")
        else:
            continue
        figures.append(f"<figure>{film}<figcaption>{html.escape(caption)}</figcaption></figure>")
    if figures:
        yield '<h2>Videos</h2>\n<p>The final agents, one episode each.</p>\n<div class="films">'
        yield "\n".join(figures) + "\n</div>"
