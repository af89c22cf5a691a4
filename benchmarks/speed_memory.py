"""How much memory an update needs beyond what is there before it, in a process of its own.

The first update of all isn't counted: moments of Adam and the libraries' buffers stay from then on. After it the heap's
free pages are given back, because what later updates need would hide in them.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import pathlib
import re
import sys
from typing import Any

from speed_timing import Ratio, in_fresh_process, make_row
from speed_update import CASES, make_agent, make_reference

GOAL = 0.35  # of the released code's growth
UPDATES = 3


def _status(field: str) -> float:
    """Read a field of this process's status, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024.0 * int(found[1])


def peak_growth(case: str, root: pathlib.Path | None) -> float:
    """Measure by how many bytes the resident memory grows at most during a few updates.

    Args:
        case: One of `CASES`.
        root: The released code, to measure that; None for ours.
    """
    size, batch = CASES[case]
    if root is not None:
        update = make_reference(root, size, batch)
    else:
        agent = make_agent(size, batch)
        update = functools.partial(agent.train, 1, batch)
    update()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    for _ in range(UPDATES):
        update()
    return _status("VmHWM") - before


def measure_memory(case: str, rounds: int, root: pathlib.Path | None) -> list[dict[str, Any]]:
    """Compare the growth of the memory with the released code's, on Linux."""
    if root is None or not sys.platform.startswith("linux") or not os.access("/proc/self/clear_refs", os.W_OK):
        return []
    ours, theirs = (sorted(in_fresh_process(peak_growth, case, which) for _ in range(rounds)) for which in (None, root))
    middle = rounds // 2
    value = Ratio(ours[middle] / theirs[middle], ours[0] / theirs[-1], ours[-1] / theirs[0])
    print(f"{case}: {ours[middle] / 2**20:.0f} MiB, reference {theirs[middle] / 2**20:.0f} MiB", flush=True)
    return [make_row("memory", case, "update / reference", value, 1, rounds, GOAL, "lower")]
