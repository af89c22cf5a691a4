"""Agents in SB3's zip format, without the pickles that SB3 would put there and execute on loading."""

from __future__ import annotations

import io
import json
import os
import pathlib
import pickle
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from stable_baselines3.common.save_util import save_to_zip_file
from stable_baselines3.common.type_aliases import TrainFreq

from pwm_gym.serialization import UnsafeFileError, atomic_write, from_json, to_json

__all__ = ["clear_load_errors", "read_agent", "with_suffix", "write_agent"]

_PICKLED = ":serialized:"  # SB3's mark of an entry that is a pickle
_DAMAGE = (  # what reading a damaged file can raise
    AssertionError,
    AttributeError,
    EOFError,
    KeyError,
    RuntimeError,
    TypeError,
    UnicodeDecodeError,
    json.JSONDecodeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def with_suffix(path: str | os.PathLike[str], suffix: str) -> pathlib.Path:
    """Append the suffix as SB3 does: only where the path has none."""
    path = pathlib.Path(path)
    return path if path.suffix else path.with_name(f"{path.name}.{suffix}")


def write_agent(
    path: str | os.PathLike[str] | io.BufferedIOBase,
    data: dict[str, Any],
    params: dict[str, dict],
    pytorch_variables: dict[str, Any],
) -> None:
    """Write an SB3 zip file whose entries are plain JSON and weights, atomically.

    Entries without a plain form (a schedule, a noise object, a class of the user's) are pickled by SB3 as usual;
    reading those takes trust_pickle=True.

    Args:
        path: The file, or one that is open.
        data: Attributes of the agent.
        params: State dicts by name.
        pytorch_variables: Tensors by name.
    """
    entries: dict[str, Any] = {}
    for name, value in data.items():
        try:
            plain = (value.frequency, value.unit.value) if isinstance(value, TrainFreq) else value
            entries[name] = to_json(plain)
        except TypeError:
            entries[name] = value
    if isinstance(path, str | os.PathLike):
        with atomic_write(with_suffix(path, "zip")) as file:
            save_to_zip_file(file, entries, params, pytorch_variables)  # type: ignore[arg-type]
    else:
        save_to_zip_file(path, entries, params, pytorch_variables)


@contextmanager
def clear_load_errors(path: Any) -> Iterator[None]:
    """Turn what reading a damaged or malicious file raises into errors that say so; nothing was executed."""
    name = os.fspath(path) if isinstance(path, str | os.PathLike) else "the file"
    try:
        yield
    except UnsafeFileError:
        raise
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(
            f"expected only tensors among the weights in {name!r}, got a pickle that wants to run code; nothing was "
            f"executed. Obtain the file again from its author."
        ) from error
    except _DAMAGE as error:
        raise ValueError(
            f"expected a complete agent in {name!r}, got a truncated or damaged file, or one of another agent: {error}"
        ) from error


def read_agent(
    path: str | os.PathLike[str] | io.BufferedIOBase,
    replaced: Collection[str],
    optional: Collection[str],
    trust_pickle: bool,
) -> tuple[io.BytesIO, dict[str, Any]]:
    """Read an SB3 zip file and its plain entries.

    Args:
        path: The file, or one that is open.
        replaced: Entries that the caller replaces; they are not looked at.
        optional: Entries that need not be readable.
        trust_pickle: Leave pickled entries to SB3 instead of raising.

    Returns:
        The file's content, as checked here, and all entries that are plain.

    Raises:
        FileNotFoundError: If there is no such file.
        UnsafeFileError: If an entry would have to be unpickled and the caller didn't say so; nothing is executed.
        ValueError: If the file is truncated, damaged, or no agent.
    """
    if isinstance(path, str | os.PathLike):
        found = pathlib.Path(path) if pathlib.Path(path).exists() else pathlib.Path(f"{os.fspath(path)}.zip")
        content = found.read_bytes()
    else:
        content = path.read()
    with clear_load_errors(path):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            broken = archive.testzip()
            if broken is not None:
                raise zipfile.BadZipFile(f"entry {broken!r} has a wrong checksum")
            for name in archive.namelist():
                with archive.open(name) as entry:
                    if name.endswith(".pth") and entry.read(1) == pickle.PROTO:
                        raise pickle.UnpicklingError(f"{name!r} is a bare pickle")
            entries = json.loads(archive.read("data").decode())
        entries = {name: value for name, value in entries.items() if name not in replaced}
        pickled = {name for name, value in entries.items() if isinstance(value, dict) and _PICKLED in value}
        unsafe = sorted(pickled.difference(optional))
        if unsafe and not trust_pickle:
            raise UnsafeFileError(
                f"expected plain JSON entries, got pickled ones for {', '.join(map(repr, unsafe))}; unpickling can run "
                f"any code. If you trust the file's author, pass trust_pickle=True; or replace them with "
                f"custom_objects={{{unsafe[0]!r}: ...}}."
            )
        return io.BytesIO(content), {name: from_json(entries[name]) for name in entries.keys() - pickled}
