"""Files that never execute code: atomic writes, JSON forms of spaces and classes, safe weight loading."""

from __future__ import annotations

import importlib
import math
import os
import pathlib
import pickle
import struct
import tempfile
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import IO, Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.utils import LinearSchedule

__all__ = ["UnsafeFileError", "atomic_write", "from_json", "is_json_form", "load_tensors", "to_json"]

# Classes from these packages may be named in a file; naming one only imports it, it is never unpickled.
_TRUSTED_PACKAGES = ("torch.nn", "torch.optim", "stable_baselines3", "pwm_gym")
_NUMBERS = "biuf"  # NumPy's kinds of dtypes that have a JSON form
# What parsing a damaged file can raise.
_DAMAGE = (AssertionError, AttributeError, ImportError, LookupError, OverflowError, RuntimeError, TypeError)


class UnsafeFileError(ValueError):
    """A file holds a pickle that reading would have to execute, and the caller did not ask for that."""


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Write a file under a temporary name and rename it at the end, so that `path` is never half-written.

    Args:
        path: Where the file is to stand; missing folders are made.

    Yields:
        A binary file to write to. If the block raises, an older file at `path` stays as it was.
    """
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes the file private; give it a new file's usual mode
        os.replace(name, target)
    except BaseException:
        pathlib.Path(name).unlink(missing_ok=True)
        raise


def load_tensors(path: str | os.PathLike[str] | IO[bytes], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a file written by `torch.save` that holds only tensors and plain containers.

    Args:
        path: The file, or one that is open.
        device: Where the tensors go.

    Raises:
        FileNotFoundError: If there is no such file.
        UnsafeFileError: If the file holds anything else; nothing of it is executed.
        ValueError: If the file is truncated or no such archive.
    """
    name = os.fspath(path) if isinstance(path, str | os.PathLike) else "the file"
    with open(path, "rb") if isinstance(path, str | os.PathLike) else nullcontext(path) as file:
        try:
            _check_archive(file)
            return torch.load(file, map_location=device, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UnsafeFileError(
                f"expected only tensors and plain containers in {name!r}, got a pickle that wants to run "
                f"code; nothing was executed. Obtain the file again from its author in a safe format."
            ) from error
        except (*_DAMAGE, EOFError, OSError, ValueError, struct.error, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(
                f"expected a complete checkpoint in {name!r}, got a truncated or damaged file ({error}). Copy it again."
            ) from error


def _check_archive(file: IO[bytes]) -> None:
    """Check that a file is an archive as `torch.save` writes it, with the checksums that torch itself reads over."""
    start = file.tell()
    kind = file.read(1)
    file.seek(start)
    if kind == pickle.PROTO:
        raise pickle.UnpicklingError("a bare pickle")
    with zipfile.ZipFile(file) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise zipfile.BadZipFile(f"wrong checksum of {broken!r}")
    file.seek(start)


def _array_to_json(array: np.ndarray) -> dict[str, Any]:
    """Store equal values once: most bounds are one number repeated."""
    values = array.ravel().tolist()
    if values and all(v == values[0] for v in values):
        values = values[:1]
    return {"shape": list(array.shape), "dtype": array.dtype.name, "values": values}


def _number_type(name: str) -> np.dtype:
    dtype = np.dtype(name)
    if dtype.kind not in _NUMBERS:
        raise ValueError(f"expected a type of plain numbers, got {name!r}.")
    return dtype


def _array_from_json(form: dict[str, Any]) -> np.ndarray:
    shape = tuple(form["shape"])
    values = np.asarray(form["values"], dtype=_number_type(form["dtype"]))
    return np.full(shape, values[0]) if values.size == 1 != math.prod(shape) else values.reshape(shape)


def _space_to_json(space: spaces.Space) -> dict[str, Any] | None:
    if isinstance(space, spaces.Box):
        return {"Box": [_array_to_json(space.low), _array_to_json(space.high)], "dtype": np.dtype(space.dtype).name}
    if isinstance(space, spaces.Dict):
        items = {key: _space_to_json(value) for key, value in space.spaces.items()}
        return None if None in items.values() else {"Dict": list(items.items())}
    if isinstance(space, spaces.Discrete):
        return {"Discrete": [int(space.n), int(space.start)], "dtype": np.dtype(space.dtype).name}
    if isinstance(space, spaces.MultiDiscrete):
        return {"MultiDiscrete": [_array_to_json(space.nvec), _array_to_json(space.start)]}
    if isinstance(space, spaces.MultiBinary):
        return {"MultiBinary": list(space.shape)}
    return None


def _space_from_json(form: dict[str, Any]) -> spaces.Space:
    if "Box" in form:
        low, high = (_array_from_json(bound) for bound in form["Box"])
        return spaces.Box(low, high, dtype=_number_type(form["dtype"]).type)
    if "Dict" in form:
        return spaces.Dict([(key, _space_from_json(value)) for key, value in form["Dict"]])  # a dict would be sorted
    if "Discrete" in form:
        count, first = form["Discrete"]
        return spaces.Discrete(count, start=first, dtype=_number_type(form["dtype"]).type)
    if "MultiDiscrete" in form:
        counts, firsts = (_array_from_json(part) for part in form["MultiDiscrete"])
        return spaces.MultiDiscrete(counts, dtype=counts.dtype.type, start=firsts)
    if "MultiBinary" in form:
        shape = form["MultiBinary"]
        return spaces.MultiBinary(shape[0] if len(shape) == 1 else shape)
    raise ValueError(f"expected a space's JSON form, got {sorted(form)}. The file is damaged or from a newer version.")


def _is_trusted(module: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in _TRUSTED_PACKAGES)


def to_json(value: Any) -> Any:
    """Turn a value into plain JSON types that `from_json` restores, or raise TypeError where there is no such form.

    Known beyond JSON's own types: tuples, deques, NumPy scalars and arrays, torch devices and dtypes, Gymnasium spaces
    made of Box, Dict, Discrete, MultiDiscrete and MultiBinary, SB3's LinearSchedule, and classes of torch.nn,
    torch.optim, stable_baselines3 and pwm_gym (by name).

    Args:
        value: What to store.

    Raises:
        TypeError: If the value, or something inside it, has no such form.
    """
    if isinstance(value, np.generic) and value.dtype.kind in _NUMBERS:  # before float, which np.float64 is too
        return {"!scalar": value.item(), "dtype": value.dtype.name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [to_json(v) for v in value]
    if isinstance(value, dict) and all(isinstance(k, str) and not k.startswith("!") for k in value):
        return {k: to_json(v) for k, v in value.items()}
    if type(value) is tuple:
        return {"!tuple": [to_json(v) for v in value]}
    if isinstance(value, deque):
        return {"!deque": [to_json(v) for v in value], "maxlen": value.maxlen}
    if isinstance(value, np.ndarray) and value.dtype.kind in _NUMBERS:
        return {"!array": _array_to_json(value)}
    if isinstance(value, torch.device):
        return {"!device": str(value)}
    if type(value) is LinearSchedule:
        return {"!linear": [to_json(v) for v in (value.start, value.end, value.end_fraction)]}
    if isinstance(value, spaces.Space):
        form = _space_to_json(value)
        if form is not None:
            return {"!space": form}
    if isinstance(value, type) and _is_trusted(value.__module__) and "<locals>" not in value.__qualname__:
        return {"!class": f"{value.__module__}:{value.__qualname__}"}
    raise TypeError(f"{type(value).__name__} has no plain JSON form")


def is_json_form(form: Any) -> bool:
    """Tell whether `form` is a marked form that `to_json` wrote for something beyond JSON's own types."""
    return isinstance(form, dict) and any(k.startswith("!") for k in form)


def from_json(form: Any) -> Any:
    """Restore what `to_json` stored. Nothing is executed beyond importing a named class of a trusted package.

    Args:
        form: Plain JSON types.

    Raises:
        UnsafeFileError: If the form names a class outside the trusted packages.
        ValueError: If the form is not one that `to_json` writes.
    """
    try:
        return _restore(form)
    except _DAMAGE as error:
        raise ValueError(f"expected a form written by pwm_gym, got a damaged one ({error!r}).") from error


def _restore(form: Any) -> Any:
    if isinstance(form, list):
        return [_restore(v) for v in form]
    if not isinstance(form, dict):
        return form
    if not is_json_form(form):
        return {k: _restore(v) for k, v in form.items()}
    if "!tuple" in form:
        return tuple(_restore(v) for v in form["!tuple"])
    if "!deque" in form:
        return deque((_restore(v) for v in form["!deque"]), maxlen=form["maxlen"])
    if "!scalar" in form:
        return _number_type(form["dtype"]).type(form["!scalar"])
    if "!array" in form:
        return _array_from_json(form["!array"])
    if "!device" in form:
        return torch.device(form["!device"])
    if "!linear" in form:
        start, end, end_fraction = (float(_restore(v)) for v in form["!linear"])
        return LinearSchedule(start, end, end_fraction)
    if "!space" in form:
        return _space_from_json(form["!space"])
    if "!class" in form:
        module, _, name = str(form["!class"]).partition(":")
        if not _is_trusted(module):
            raise UnsafeFileError(
                f"expected a class of {', '.join(_TRUSTED_PACKAGES)}, got {module}.{name}; it was not imported. "
                f"If you trust the file's author, pass trust_pickle=True."
            )
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        if not (isinstance(found, type) and _is_trusted(found.__module__)):  # no way out through `module.os.x`
            raise UnsafeFileError(f"expected {module}.{name} to be a class of a trusted package, got {found!r}.")
        return found
    raise ValueError(f"expected a form written by pwm_gym, got keys {sorted(form)}. The file is from a newer version.")
