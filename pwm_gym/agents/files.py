"""Agents in SB3's zip format, without the pickles that SB3 would put there and execute on loading."""

from __future__ import annotations

import io
import json
import os
import pathlib
import pickle
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from stable_baselines3.common.save_util import save_to_zip_file
from stable_baselines3.common.type_aliases import TrainFreq

from pwm_gym.serialization import UnsafeFileError, atomic_write, from_json, to_json

__all__ = ["clear_load_errors", "read_agent_data", "with_suffix", "write_agent"]

_PICKLED = ":serialized:"  # SB3's mark of an entry that is a pickle


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
    except (zipfile.BadZipFile, EOFError, KeyError, json.JSONDecodeError, UnicodeDecodeError, RuntimeError) as error:
        raise ValueError(
            f"expected a complete agent in {name!r}, got a truncated or damaged file, or one of another agent: {error}"
        ) from error


def read_agent_data(
    path: str | os.PathLike[str] | io.BufferedIOBase, replaced: Collection[str], trust_pickle: bool
) -> dict[str, Any]:
    """Read the plain entries of an SB3 zip file.

    Args:
        path: The file, or one that is open; its position is restored.
        replaced: Entries that the caller replaces, which need not be readable.
        trust_pickle: Leave pickled entries to SB3 instead of raising.

    Returns:
        All entries that are plain.

    Raises:
        FileNotFoundError: If there is no such file.
        UnsafeFileError: If an entry would have to be unpickled and the caller didn't say so; nothing is executed.
        ValueError: If the file is truncated, damaged, or no agent.
    """
    if isinstance(path, str | os.PathLike):
        found = pathlib.Path(path) if pathlib.Path(path).exists() else with_suffix(path, "zip")
        content = found.read_bytes()
    else:
        position = path.tell()
        content = path.read()
        path.seek(position)
    with clear_load_errors(path), zipfile.ZipFile(io.BytesIO(content)) as archive:
        broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f"entry {broken!r} has a wrong checksum")
        entries = json.loads(archive.read("data").decode())
    pickled = [name for name, v in entries.items() if isinstance(v, dict) and _PICKLED in v and name not in replaced]
    if pickled and not trust_pickle:
        raise UnsafeFileError(
            f"expected plain JSON entries, got pickled ones for {', '.join(map(repr, pickled))}; unpickling can run "
            f"any code. If you trust the file's author, pass trust_pickle=True; or replace them with "
            f"custom_objects={{{pickled[0]!r}: ...}}."
        )
    return {
        name: from_json(v)
        for name, v in entries.items()
        if not (isinstance(v, dict) and _PICKLED in v) and name not in replaced
    }
