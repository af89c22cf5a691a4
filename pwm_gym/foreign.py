"""Other people's `torch.save` files, read without executing their pickles and without loading them whole."""

from __future__ import annotations

import math
import mmap
import os
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from pwm_gym.serialization import UnsafeFileError

__all__ = ["ForeignObject", "read_torch_file"]

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# What parsing a damaged or forged file can raise.
_DAMAGE = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


class ForeignObject:
    """An instance of a class that the caller allowed by name: its attributes, without the class or its code.

    Attributes:
        class_name: "module.Class", as the file names it.
        state: The attributes.
    """

    def __init__(self, class_name: str, state: dict[str, Any]) -> None:
        self.class_name = class_name
        self.state = state

    def __repr__(self) -> str:
        return f"ForeignObject({self.class_name!r}, {sorted(self.state)})"


class _Inert:
    """What a class in the file becomes: a holder of the state that the pickle sets. One subclass for each read."""

    class_name = ""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _InertDict(dict):
    """A dictionary that may also carry attributes, as state dictionaries do (`_metadata`); they are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Builds tensors, containers and inert holders only; storages become parts of one memory map of the file.

    Nothing that `find_class` returns is the file's: names are matched, never imported. What it returns is made for this
    read, so that a pickle which changes it (BUILD) reaches nothing outside.
    """

    def __init__(self, archive: zipfile.ZipFile, root: str, mapping: mmap.mmap, objects: Collection[str]) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self._archive, self._root, self._mapping, self._objects = archive, root, mapping, objects
        self._storages: dict[str, torch.Tensor] = {}
        self._dict = type("Dict", (_InertDict,), {})

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self._objects:
            return type(name, (_Inert,), {"class_name": full})
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if full == "collections.OrderedDict":
            return self._dict
        if module.partition(".")[0] == "tensordict":
            if name in ("TensorDict", "TensorDictParams"):
                return type(name, (_Inert,), {"class_name": "tensordict.TensorDict"})
            if name == "_make_td":
                return self._make_tensordict
            if name == "_StringOnlyDict":
                return self._dict
        plain = {
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_meta_tensor_no_storage": self._meta_tensor,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch.Size": self._tuple,
            "torch.device": self._device,
            "collections.deque": self._list,
            "builtins.set": self._list,
            "__builtin__.set": self._list,
        }
        if full in plain:
            return plain[full]
        raise UnsafeFileError(
            f"expected only tensors, plain containers and TensorDicts, got {full!r}; nothing was imported or executed. "
            f"Obtain the file again from its author in a safe format."
        )

    def persistent_load(self, key: Any) -> torch.Tensor:
        """Map one storage, (N,), of the archive."""
        kind, dtype, name, _, count = key
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(count, int):
            raise ValueError(f"unknown persistent id {kind!r}")
        if name not in self._storages:
            size = count * dtype.itemsize
            entry = self._archive.getinfo(f"{self._root}/data/{name}")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != size:
                raise ValueError(f"storage {name!r} has {entry.file_size} bytes instead of {size}, or is compressed")
            lengths = struct.unpack("<HH", self._mapping[entry.header_offset + 26 : entry.header_offset + 30])
            start = entry.header_offset + 30 + sum(lengths)
            if count:
                raw = np.frombuffer(self._mapping, np.uint8, size, start)
                if start % dtype.itemsize:
                    raw = raw.copy()
                storage = torch.from_numpy(raw).view(dtype)
            else:
                storage = torch.empty(0, dtype=dtype)
            self._storages[name] = storage
        if self._storages[name].dtype != dtype:
            raise ValueError(f"storage {name!r} is named with two dtypes")
        return self._storages[name]

    @staticmethod
    def _tensor(storage: torch.Tensor, offset: int, shape: Any, stride: Any, *_: Any) -> torch.Tensor:
        if any(n < 0 for n in (offset, *shape, *stride)) or len(shape) != len(stride):
            raise ValueError(f"tensor of shape {tuple(shape)} and stride {tuple(stride)}")
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if math.prod(shape) and last >= storage.numel():
            raise ValueError(f"tensor of shape {tuple(shape)} in a storage of {storage.numel()} values")
        return storage.as_strided(tuple(shape), tuple(stride), offset)

    @staticmethod
    def _meta_tensor(dtype: torch.dtype, shape: Any, *_: Any) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device="meta")

    @staticmethod
    def _parameter(data: torch.Tensor, *_: Any) -> torch.Tensor:
        return data

    @staticmethod
    def _make_tensordict(cls: Any, state: Any) -> Any:
        holder = cls()
        holder.__setstate__(state)
        return holder

    @staticmethod
    def _tuple(values: Any = ()) -> tuple[Any, ...]:
        return tuple(values)

    @staticmethod
    def _list(values: Any = (), *_: Any) -> list[Any]:
        return list(values)

    @staticmethod
    def _device(*parts: Any) -> str:
        return ":".join(str(part) for part in parts)


def _plain(value: Any) -> Any:
    """Turn inert holders into plain dictionaries and `ForeignObject`s."""
    if isinstance(value, _Inert):
        state = getattr(value, "state", {})
        if value.class_name != "tensordict.TensorDict":
            return ForeignObject(value.class_name, _plain(dict(state)))
        entries = state.get("_tensordict", state.get("_param_td"))
        if entries is None:
            raise ValueError(f"a TensorDict of an unknown version, with attributes {sorted(state)}")
        return _plain(entries)
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(entry) for entry in value)
    if isinstance(value, type) or callable(value) and not isinstance(value, torch.Tensor):
        raise ValueError(f"a bare class or function {value!r}")
    return value


def _open_archive(file: Any, name: str, verify: bool) -> tuple[zipfile.ZipFile, str]:
    """Open a file as an archive that `torch.save` wrote, and find the folder that its entries stand in."""
    if file.read(1) == pickle.PROTO:
        raise UnsafeFileError(
            f"expected a torch.save archive in {name!r}, got a bare pickle; nothing was executed. "
            f"Whoever trusts it can save it again with a current torch."
        )
    archive = zipfile.ZipFile(file)
    (root,) = (entry[: -len("/data.pkl")] for entry in archive.namelist() if entry.endswith("/data.pkl"))
    if f"{root}/byteorder" in archive.namelist() and archive.read(f"{root}/byteorder").decode() != sys.byteorder:
        raise ValueError("a file of another byte order")
    if verify and (broken := archive.testzip()) is not None:
        raise ValueError(f"wrong checksum of {broken!r}")
    return archive, root


def read_torch_file(path: str | os.PathLike[str], objects: Collection[str] = (), verify: bool = True) -> Any:
    """Read a file that `torch.save` wrote, without executing its pickle; tensors are memory-mapped.

    Plain containers and tensors are read as they are, `Parameter`s as tensors, TensorDicts (tensordict is not needed)
    and OrderedDicts as dictionaries, sets and deques as lists, devices as strings. Tensors lie on the CPU whatever
    device they were saved from; they are views of a private memory map, so that only what is touched is read, and
    writing to one changes no file. The map is closed when the last of them is gone.

    Args:
        path: The file.
        objects: "module.Class" names whose instances are read as `ForeignObject`s, without importing the class.
        verify: Check the checksums, which reads the whole file.

    Raises:
        FileNotFoundError: If there is no such file.
        UnsafeFileError: If the file names anything else; nothing of it is imported or executed.
        ValueError: If the file is truncated, damaged, or no such archive.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "shard.pt")
        >>> torch.save({"reward": torch.arange(3.0)}, file)
        >>> read_torch_file(file)
        {'reward': tensor([0., 1., 2.])}
    """
    name = os.fspath(path)
    with open(path, "rb") as file:
        try:
            archive, root = _open_archive(file, name, verify)
            with archive:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                return _plain(_Unpickler(archive, root, mapping, objects).load())
        except UnsafeFileError as error:
            raise UnsafeFileError(f"{name!r}: {error}") from error
        except _DAMAGE as error:
            raise ValueError(
                f"expected a complete torch.save archive in {name!r}, got a truncated or damaged file ({error}). "
                f"Copy it again."
            ) from error
