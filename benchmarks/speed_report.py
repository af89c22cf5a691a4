"""The report of `speed.py`: a Markdown page and two plots, from its tables alone."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import IO

from pwm_gym.serialization import atomic_write

Row = Mapping[str, str]
Tables = Mapping[str, Sequence[Row]]
HEADINGS = {
    "update": "One policy update in a frozen model (H = 16, three critics, 8 x 4 critic minibatches)",
    "memory": "Growth of the resident memory in an update",
    "env": "`LatentVectorEnv.step` (5M, latent 512)",
    "predict": "`predict`",
    "kernel": "Operations, forward and backward",
}
SHOWN = {"num_envs": "envs", "horizon": "horizon", "latent_dim": "latent size"}


def met(row: Row) -> str:
    """Say whether a goal is met; nothing where there is none."""
    if not row["goal"]:
        return ""
    ratio, goal = float(row["ratio"]), float(row["goal"])
    return "yes" if (ratio <= goal if row["better"] == "lower" else ratio >= goal) else "**no**"


def ratio_lines(rows: Sequence[Row]) -> list[str]:
    """Lay ratios out as a table."""
    lines = [
        "| case | threads | ratio | median (quartiles) | goal | met | denominator, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["measure"], row["threads"])):
        sign = "≤" if row["better"] == "lower" else "≥"
        goal = f"{sign} {row['goal']}" if row["goal"] else ""
        value = f"{float(row['ratio']):.2f} ({float(row['low']):.2f} to {float(row['high']):.2f})"
        cells = [row["case"], row["threads"], row["measure"], value, goal, met(row), row["denominator_ms"]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page(tables: Tables) -> str:
    """Write the page."""
    lines = [
        "# Speed, as measured",
        "",
        "Written by `benchmarks/speed.py`; docs/speed.md says what the ratios mean.",
        "",
    ]
    ratios = tables["ratios"]
    for processor in sorted({row["processor"] for row in ratios}):
        here = [row for row in ratios if row["processor"] == processor]
        dates = sorted({row["date"] for row in here})
        versions = ", ".join(sorted({row["torch"] for row in here}))
        loads = sorted(float(row["load"]) for row in here if row["load"]) or [0.0]
        days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        lines += [f"## {processor}", "", f"torch {versions}; {days}; load {loads[0]:g} to {loads[-1]:g}.", ""]
        for part, heading in HEADINGS.items():
            rows = [row for row in here if row["part"] == part]
            if rows:
                lines += [f"### {heading}", "", *ratio_lines(rows), ""]
    if tables["accuracy"]:
        lines += ["## Against float64", "", "| what | arithmetic | relative error | 1 - cosine |", "|---|---|---|---|"]
        for row in tables["accuracy"]:
            lines.append(
                f"| {row['what']} | {row['arithmetic']} | {row['relative_error']} | {row['one_minus_cosine']} |"
            )
        lines.append("")
    if tables["loop"]:
        counts = sorted({row["envs"] for row in tables["loop"]}, key=int)
        lines += ["## The whole loop: PWM online on cartpole-swingup", ""]
        lines += [f"| part | {' | '.join(f'{n} env(s): share | ms per decision' for n in counts)} |"]
        lines += [f"|---|{'---|---|' * len(counts)}"]
        found = {(row["part"], row["envs"]): row for row in tables["loop"]}
        for part in dict.fromkeys(row["part"] for row in tables["loop"]):
            rows = [found[part, n] for n in counts if (part, n) in found]
            cells = [f"{100 * float(row['share']):.1f} % | {float(row['ms_per_decision']):.2f}" for row in rows]
            lines.append(f"| {part} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def draw_updates(file: IO[bytes], updates: Sequence[Row]) -> None:
    """Plot the updates' ratios with their goals."""
    from matplotlib.figure import Figure

    panels = [
        ("products / ", "share of an update that its\nmatrix products take"),
        ("reference", "times faster than PWM's\nreleased code"),
    ]
    figure = Figure(figsize=(11, 0.6 + 0.28 * max(4, len(updates))), layout="constrained")
    for axes, (start, title) in zip(figure.subplots(1, 2), panels, strict=True):
        rows = [row for row in updates if row["measure"].startswith(start)][::-1]
        labels = [f"{row['case']}, {row['threads']} thread(s)\n{row['measure'].split(' / ')[1]}" for row in rows]
        median, low, high = ([float(row[name]) for row in rows] for name in ("ratio", "low", "high"))
        spread = [
            [m - one for m, one in zip(median, low, strict=True)],
            [one - m for m, one in zip(median, high, strict=True)],
        ]
        axes.barh(range(len(rows)), median, xerr=spread, color="#0072b2", height=0.6)
        for y, row in enumerate(rows):
            if row["goal"]:
                axes.plot([float(row["goal"])] * 2, [y - 0.4, y + 0.4], color="#d55e00", linewidth=2)
        axes.set_yticks(range(len(rows)), labels, fontsize=7)
        axes.set_title(f"{title} (line: goal)", fontsize=9)
    figure.savefig(file, format="png", dpi=120)


def draw_growth(file: IO[bytes], growth: Sequence[Row]) -> None:
    """Plot how the time of a rollout grows with envs, horizon and latent size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, varied in zip(figure.subplots(1, 3), SHOWN, strict=True):
        rows = sorted((row for row in growth if row["varied"] == varied), key=lambda row: int(row[varied]))
        for kind in ("forward", "with gradients"):
            axes.loglog([int(r[varied]) for r in rows], [float(r[f"{kind}_ms"]) for r in rows], marker=".", label=kind)
        others = [f"{SHOWN[name]} {rows[0][name]}" for name in SHOWN if name != varied and rows]
        axes.set_xlabel(SHOWN[varied])
        axes.set_ylabel("ms for a rollout")
        axes.set_title(", ".join(others), fontsize=9)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(file, format="png", dpi=120)


def write_report(path: pathlib.Path, tables: Tables) -> None:
    """Write the page into a folder, and plots of what has been measured."""
    with atomic_write(path / "speed.md") as file:
        file.write(page(tables).encode())
    updates = [row for row in tables["ratios"] if row["part"] == "update"]
    for name, draw, rows in (("updates", draw_updates, updates), ("growth", draw_growth, tables["growth"])):
        if rows:
            with atomic_write(path / f"{name}.png") as file:
                draw(file, rows)
