"""Timing of pieces of work that take turns, and the ratios between them."""

from __future__ import annotations

import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

Clock = Callable[[], float]


class Ratio(NamedTuple):
    """A ratio over the rounds of one run: its median, and the quartiles as its spread."""

    median: float
    low: float
    high: float


def clock(threads: int) -> Clock:
    """Choose what to time with: on one thread its CPU time, which other work on the machine hardly touches."""
    return time.process_time if threads == 1 else time.perf_counter


def interleave(
    work: Mapping[str, Callable[[], Any]],
    rounds: int,
    now: Clock = time.perf_counter,
    at_least: float = 0.0,
    warm_up: int = 1,
) -> dict[str, np.ndarray]:
    """Time pieces of work that take turns, so that whatever else the machine does meets all of them.

    Args:
        work: The pieces, by name.
        rounds: Turns of each.
        now: The clock.
        at_least: Seconds of a turn: a short piece is repeated until they have passed.
        warm_up: Turns before, which are not timed.

    Returns:
        Seconds of one execution, (rounds,), by name.
    """
    repeats: dict[str, int] = {}
    for name, piece in work.items():
        for _ in range(warm_up):
            piece()
        began = now()
        piece()
        repeats[name] = max(1, round(at_least / max(now() - began, 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, piece in work.items():
            began = now()
            for _ in range(repeats[name]):
                piece()
            seconds[name].append((now() - began) / repeats[name])
    return {name: np.array(values) for name, values in seconds.items()}


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> Ratio:
    """Compare two pieces of work round by round."""
    low, median, high = np.quantile(numerator / denominator, [0.25, 0.5, 0.75])
    return Ratio(float(median), float(low), float(high))


def in_fresh_process(function: Callable[..., Any], *args: Any, threads: int = 1) -> Any:
    """Call a function in a process of its own, whose memory and settings nothing else has touched."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (threads,)) as pool:
        return pool.submit(function, *args).result()


def processor() -> str:
    """Name the processor, with the instructions that decide which matrix products are quick."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            fields = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
    except OSError:
        return name
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    known = {"avx512f": "AVX-512", "avx512_bf16": "AVX-512 bf16", "amx_bf16": "AMX"}
    flags = fields.get("flags", "").split()
    extras = [text for flag, text in known.items() if flag in flags]
    return ", ".join([fields.get("model name", name).replace("(R)", ""), *extras])


def where() -> dict[str, str]:
    """Describe where and when something was measured, and how many processes ran meanwhile."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return {"processor": processor(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "load": load}


def make_row(
    part: str,
    case: str,
    measure: str,
    value: Ratio,
    threads: int,
    rounds: int,
    goal: float | None = None,
    better: str = "higher",
    seconds: float | None = None,
) -> dict[str, Any]:
    """Make a row of the table of results.

    Args:
        part: What was measured.
        case: With which sizes.
        measure: Numerator and denominator.
        value: Their ratio.
        threads: Threads of torch.
        rounds: Turns that the quantiles are of.
        goal: What is wanted of the ratio.
        better: "higher" or "lower".
        seconds: Median of the denominator.
    """
    return {
        "part": part,
        "case": case,
        "measure": measure,
        "threads": threads,
        "ratio": f"{value.median:.3f}",
        "low": f"{value.low:.3f}",
        "high": f"{value.high:.3f}",
        "goal": "" if goal is None else goal,
        "better": better,
        "denominator_ms": "" if seconds is None else f"{1e3 * seconds:.4g}",
        "rounds": rounds,
        **where(),
    }
