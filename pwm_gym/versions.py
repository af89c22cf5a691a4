"""Which versions run here: what a result says that it came from, and what processes of one run must share."""

from __future__ import annotations

import functools
import pathlib
import platform
import zlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

__all__ = ["differences", "source_checksum", "versions"]

_PACKAGES = ("torch", "stable_baselines3", "gymnasium", "numpy", "mujoco", "dm_control", "metaworld")


def versions() -> dict[str, str]:
    """Give the versions of this package, Python and whatever results depend on, {name: version}.

    Example:
        >>> list(versions())[:3]
        ['pwm_gym', 'python', 'torch']
    """
    from pwm_gym import __version__  # which stands below that package's own imports

    found = {"pwm_gym": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@functools.cache
def source_checksum() -> str:
    """Checksum of this package's source, eight hexadecimal digits: two checkouts of one version number differ in it.

    Example:
        >>> len(source_checksum())
        8
    """
    root, checksum = pathlib.Path(__file__).parent, 0
    for path in sorted(root.rglob("*.py")):
        checksum = zlib.crc32(path.relative_to(root).as_posix().encode() + path.read_bytes(), checksum)
    return f"{checksum:08x}"


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    """Name what differs between two processes; "" where nothing does.

    Args:
        here: {what: value} of one process.
        there: The same of another.

    Example:
        >>> differences({"torch": "2.12.0"}, {"torch": "2.13.0"})
        "torch '2.12.0' and '2.13.0'"
    """
    names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    return ", ".join(f"{name} {here.get(name)!r} and {there.get(name)!r}" for name in names)
