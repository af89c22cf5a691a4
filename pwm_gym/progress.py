"""The progress bar of every long step: rate and remaining time."""

from __future__ import annotations

import warnings
from typing import Any

from tqdm import TqdmExperimentalWarning, tqdm
from tqdm.rich import tqdm as rich_tqdm

__all__ = ["show_progress"]


def show_progress(total: float, description: str, unit: str, shown: bool = True, initial: float = 0) -> Any:
    """Make a bar that shows rate and remaining time; close it or use it as a context.

    Args:
        total: Units until the end.
        description: What is being done.
        unit: What is counted; "B" for bytes, which are shown in MB and GB.
        shown: Show it.
        initial: Units that were done before.

    Example:
        >>> with show_progress(3, "import", "episode", shown=False) as bar:
        ...     bar.update(3)
    """
    if not shown:
        return tqdm(total=total, disable=True)
    scale: dict[str, Any] = {"unit_scale": True, "unit_divisor": 1000} if unit == "B" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmExperimentalWarning)
        return rich_tqdm(total=total, desc=description, unit=unit, initial=initial, **scale)
