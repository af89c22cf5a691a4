"""How fast updates, envs, kernels and actions are, as ratios within one run; docs/speed.md says what they mean.

    git clone https://github.com/imgeorgiev/PWM
    python benchmarks/speed.py --reference PWM                # everything, into results/speed/
    python benchmarks/speed.py --parts env kernel
    python benchmarks/speed.py --reference PWM --check 0.15   # fails where a ratio is 15 % worse than the stored one

What is compared takes turns in one process; a ratio is the median over the turns, with the quartiles as its spread. On
one thread CPU time counts, on several the wall clock. Each measurement has a process of its own and its rows are
written at once; a row of the same processor, sizes and threads is replaced. Without `--reference` what is compared with
the released code is left out, and so are other libraries that aren't installed (mbrl, torchrl).
"""

from __future__ import annotations

import argparse
import csv
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from speed_env import measure_growth, measure_peers, measure_step
from speed_kernels import KERNELS, measure_kernel
from speed_loop import measure_loop
from speed_memory import measure_memory
from speed_report import write_report
from speed_timing import in_fresh_process, make_row, ratio
from speed_update import CASES, measure_accuracy, measure_defaults, measure_update
from tables import put_row

from pwm_gym import bf16

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIZES_OF_PLANNER = ["1M", "5M"]
Rows = list[dict[str, Any]]
KEYS: dict[str, Sequence[str]] = {  # columns that tell the rows of a table apart
    "ratios": ("processor", "part", "case", "measure", "threads"),
    "accuracy": ("what", "arithmetic"),
    "growth": ("varied", "num_envs", "horizon", "latent_dim"),
    "loop": ("envs", "part"),
}


def measure_predict(num_envs: int, rounds: int) -> Rows:
    """Compare how long `predict` takes: SB3's SAC and planning against PWM, for so many observations at once."""
    from latency import make_agents, measure

    agents = make_agents("walker-walk", SIZES_OF_PLANNER, "cpu")
    turns = [measure(agents, num_envs, 1) for _ in range(rounds)]
    times = {name: 1e-3 * np.array([turn[name] for turn in turns]) for name in agents}
    below = float(np.median(times["PWM"]))
    return [
        make_row("predict", f"{num_envs} observations", f"{name} / PWM", ratio(of, times["PWM"]), 1, rounds,
                 better="lower" if name == "SAC" else "higher", seconds=below)
        for name, of in times.items() if name != "PWM"
    ]  # fmt: skip


def measure_kernels(rounds: int) -> dict[str, Rows]:
    """Measure all kernels' speed and accuracy, those with products also with bf16 factors where we have them."""
    found = [measure_kernel(name, rounds) for name in KERNELS]
    if bf16.available():
        found += [measure_kernel(name, rounds, bf16=True) for name in KERNELS if "linear" in name]
    return {"ratios": [row for row, _ in found], "accuracy": [row for _, errors in found for row in errors]}


def jobs(
    parts: Sequence[str], rounds: int, threads: Sequence[int], reference: pathlib.Path | None
) -> list[tuple[Any, ...]]:
    """List what is to be measured: (table, threads, function, arguments...)."""
    listed: list[tuple[Any, ...]] = []
    if "kernel" in parts:
        listed.append(("", 1, measure_kernels, 2 * rounds))
    if "env" in parts:
        for envs, turns in ((64, 2 * rounds), (4_096, rounds)):
            listed += [("ratios", 1, function, envs, turns) for function in (measure_step, measure_peers)]
        listed.append(("growth", 1, measure_growth, 2))
    if "predict" in parts:
        listed += [("ratios", 1, measure_predict, n, 2 * rounds) for n in (1, 16)]
    if "loop" in parts:
        listed += [("loop", 1, measure_loop, envs) for envs in (1, 4)]
    if "memory" in parts:
        listed += [("ratios", 1, measure_memory, case, 1, reference) for case in CASES]
    if "update" in parts:
        listed += [("ratios", n, measure_update, case, n, rounds, reference) for n in threads for case in CASES]
        listed.append(("ratios", 1, measure_defaults, "walker-walk", 2 * rounds))
    if "accuracy" in parts:
        listed += [("accuracy", 1, measure_accuracy, case) for case in CASES]
    return listed


PARTS = ("kernel", "env", "predict", "loop", "memory", "update", "accuracy")


def read(path: pathlib.Path) -> list[dict[str, str]]:
    """Read a table; it has no rows where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def worse(
    stored: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]], tolerance: float
) -> tuple[list[str], int]:
    """Find measured ratios that are worse than the stored ones of the same processor, sizes and threads.

    Args:
        stored: Rows of the table of ratios.
        measured: New ones.
        tolerance: Share of a stored ratio by which a new one may be worse.

    Returns:
        A line for each ratio that is worse, and how many could be compared.
    """
    before = {tuple(str(row[name]) for name in KEYS["ratios"]): row for row in stored}
    lines, compared = [], 0
    for row in measured:
        key = tuple(str(row[name]) for name in KEYS["ratios"])
        if key not in before:
            continue
        compared += 1
        new, old = float(row["ratio"]), float(before[key]["ratio"])
        change = new / old if row["better"] == "lower" else old / new
        if change > 1.0 + tolerance:
            lines.append(f"{', '.join(key[1:])} thread(s): {new:.3f}, stored {old:.3f} ({row['better']} is better)")
    return lines, compared


def run(listed: list[tuple[Any, ...]], keep: Callable[[str, dict[str, Any]], None]) -> None:
    """Measure, each in a process of its own, and hand out the rows with the names of their tables."""
    for table, threads, function, *arguments in listed:
        found = in_fresh_process(function, *arguments, threads=threads)
        for name, rows in (found if isinstance(found, dict) else {table: found}).items():
            for row in rows:
                print({k: v for k, v in row.items() if k not in ("processor", "torch", "date", "load")}, flush=True)
                keep(name, row)


def main() -> None:
    """Measure, and write the tables or compare with them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=pathlib.Path, help="a checkout of github.com/imgeorgiev/PWM")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of updates (default: %(default)s)")
    parser.add_argument(
        "--check", type=float, metavar="TOLERANCE", help="compare with the stored ratios, write nothing"
    )
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results" / "speed")
    arguments = parser.parse_args()
    measured: Rows = []

    def keep(table: str, row: dict[str, Any]) -> None:
        if arguments.check is None:
            put_row(arguments.out / f"{table}.csv", row, KEYS[table])
        elif table == "ratios":
            measured.append(row)

    reference = None if arguments.reference is None else arguments.reference.resolve()
    run(jobs(arguments.parts, arguments.rounds, arguments.threads, reference), keep)
    tables = {name: read(arguments.out / f"{name}.csv") for name in KEYS}
    if arguments.check is None:
        write_report(arguments.out, tables)
        return
    lines, compared = worse(tables["ratios"], measured, arguments.check)
    print(f"{compared} of {len(measured)} ratios have a stored one of this processor; {len(lines)} are worse.")
    print("\n".join(lines))
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
