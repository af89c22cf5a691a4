"""Independent units of work on a Ray cluster: one machine without any set-up, or many."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import pathlib
import pickle
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch

from pwm_gym.versions import differences, source_checksum, versions

__all__ = ["Finished", "RayCluster"]

_TICK = 0.5  # seconds between two looks at the cluster, at most
_NODES_EVERY = 5.0  # seconds between two looks at its nodes
_CONNECT_SECONDS, _ANSWER_SECONDS = 5.0, 30.0  # to reach an address, and for what listens there to answer as Ray does
_STORE_BYTES = 160 * 2**20  # of a local object store, beside what is shared


class Finished(NamedTuple):
    """How a unit of work ended.

    Attributes:
        number: Of the unit, in the order given.
        result: What its function returned; None where it failed.
        failure: The reason why it failed, None if it didn't.
    """

    number: int
    result: Any
    failure: str | None


class _WrongNodeError(ValueError):
    """A node that can't work on any unit: another version, or without the run's folder."""


@dataclasses.dataclass(frozen=True)
class RayCluster:
    """Where units of work run, and what each of them needs.

    Wherever a `ray` argument is, this or the address alone can be given. A script that has called `ray.init` itself
    goes on with that cluster.

    Args:
        address: "local" for this machine, started for the run and stopped after it; "auto" for the cluster that this
            machine is a node of; or "HOST:PORT" of a head node, from one of the cluster's machines.
        cpus: Processors of a unit; torch gets as many threads, at least one.
        gpus: GPUs of a unit; 0.25 lets four units share one.
        retries: How often a unit whose worker or node died is begun again, from its last checkpoint.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> RayCluster("head-node:6379", gpus=0.25)
        RayCluster(address='head-node:6379', cpus=1.0, gpus=0.25, retries=3)
    """

    address: str = "local"
    cpus: float = 1.0
    gpus: float = 0.0
    retries: int = 3

    def __post_init__(self) -> None:
        if self.cpus < 0 or self.gpus < 0 or self.retries < 0 or self.cpus + self.gpus <= 0:
            raise ValueError(
                f"expected `cpus`, `gpus` and `retries` >= 0, and one of the former above 0, got {self.cpus}, "
                f"{self.gpus} and {self.retries}."
            )
        host, _, port = self.address.rpartition(":")
        if self.address not in ("local", "auto") and not (host and port.isdecimal() and "/" not in host):
            raise ValueError(
                f"expected an address 'local', 'auto' or 'HOST:PORT' of a head node, got {self.address!r}. From "
                f"outside the cluster, start the command on one of its machines (ray job submit, ssh)."
            )

    @property
    def device(self) -> str:
        """Where a unit's tensors go: to the GPU that Ray gives it, where it is given one."""
        return "cuda" if self.gpus else "cpu"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add --ray and what goes with it to a command."""
        group = parser.add_argument_group("on a Ray cluster")
        group.add_argument("--ray", metavar="ADDRESS", help="work there: local, auto, or HOST:PORT of the head node")
        group.add_argument("--ray-cpus", type=float, default=cls.cpus, help="of a unit of work (default: %(default)g)")
        group.add_argument("--ray-gpus", type=float, default=cls.gpus, help="the same, 0.25 to share one by four")
        group.add_argument("--ray-retries", type=int, default=cls.retries, help="of a unit whose machine died")

    @classmethod
    def of_arguments(cls, parsed: argparse.Namespace) -> RayCluster | None:
        """Read what `add_arguments` added; None without --ray."""
        return cls(parsed.ray, parsed.ray_cpus, parsed.ray_gpus, parsed.ray_retries) if parsed.ray else None

    @classmethod
    def of(cls, given: RayCluster | str) -> RayCluster:
        """Take a cluster, or its address alone."""
        return given if isinstance(given, RayCluster) else cls(given)

    def run(
        self,
        prepare: Callable[[Any], Callable[[Any], Any]],
        shared: Any,
        units: Sequence[Any],
        marker: str | os.PathLike[str],
    ) -> Iterator[Finished | None]:
        """Work on units, as many at a time as the cluster has room for.

        Arrays and tensors in `shared` go into Ray's object store once, and each process of a node reads them there,
        without a copy of its own: they can't be written to. A unit whose worker or node died is begun again elsewhere,
        so it has to go on from files in a folder that all nodes see. The others go on when one fails.

        Args:
            prepare: Makes the function that works on one unit, from `shared`; called once in each process.
            shared: What all units need.
            units: The units.
            marker: A file in the folder that all nodes must see.

        Yields:
            How a unit ended, as soon as it has; and None at least twice a second, to show progress by.

        Raises:
            ConnectionError: If nothing answers at the address.
            ImportError: If Ray is missing.
            ValueError: If no node has what a unit needs, runs the same versions, or sees the folder.
        """
        ray = _import_ray()
        content, arrays = _pack(ray, shared)
        with _connected(ray, self.address, len(content) + sum(array.nbytes for array in arrays)):
            self._check_room(ray)
            work = ray.remote(
                num_cpus=self.cpus, num_gpus=self.gpus, max_retries=self.retries, scheduling_strategy="SPREAD"
            )(_work)
            packed = [ray.put((content, arrays))]  # in a list, which Ray passes on as it is
            terms = _Terms(versions() | {"source": source_checksum()}, os.path.abspath(marker), max(1, int(self.cpus)))
            pending = {work.remote(packed, prepare, unit, terms): number for number, unit in enumerate(units)}
            looked = time.monotonic()
            try:
                while pending:
                    done, _ = ray.wait([*pending], timeout=_TICK)
                    for reference in done:
                        yield _finished(ray, reference, pending.pop(reference))
                    if not done:
                        if time.monotonic() - looked > _NODES_EVERY:
                            self._check_room(ray)
                            looked = time.monotonic()
                        yield None
            finally:
                for reference in pending:
                    ray.cancel(reference, force=True)

    def _check_room(self, ray: Any) -> None:
        """Check that there is a node on which a unit fits, as long as it has that to itself."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= self.cpus and node.get("GPU", 0) >= self.gpus for node in nodes):
            have = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
            raise ValueError(
                f"expected a node with the {self.cpus:g} CPUs and {self.gpus:g} GPUs of a unit, got {len(nodes)} nodes "
                f"with {have or 'nothing'}. Ask for less (--ray-cpus, --ray-gpus), or add a node that has it."
            )


def _finished(ray: Any, reference: Any, number: int) -> Finished:
    try:
        return Finished(number, ray.get(reference), None)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, _WrongNodeError):
            raise ValueError(str(cause)) from error
        if isinstance(cause, ModuleNotFoundError):
            raise ValueError(f"expected the same packages on every node, got one without: {cause}") from error
        return Finished(number, None, f"{type(cause).__name__}: {cause}")
    except ray.exceptions.RayError as error:  # its worker or node died once too often
        return Finished(number, None, f"{type(error).__name__}: {str(error).splitlines()[0]}")


# The connection


def _import_ray() -> Any:
    if importlib.util.find_spec("ray") is None:
        raise ImportError('units of work on a cluster need Ray: pip install "pwm-gym[ray]"')
    # Ray's coming default: it leaves CUDA_VISIBLE_DEVICES alone where a unit has no GPU. It warns until one chooses.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    return ray


@contextmanager
def _connected(ray: Any, address: str, shared_bytes: int) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine, and leave it again."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options |= {"include_dashboard": False, "object_store_memory": _STORE_BYTES + shared_bytes}
    else:
        _check_address(address)
    try:
        ray.init(address=address, **options)
    except RuntimeError as error:  # other versions of Python or Ray
        raise ValueError(f"expected to join the cluster at {address!r}, but: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Check that a head node answers: Ray itself would try for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    advice = "Is the head node up (ray start --head), and its port open to this machine?"
    try:
        if host:
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"expected a Ray cluster at {address!r}, got none ({error}). {advice}") from error
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", *(("--address", address) if host else ())]
    try:
        subprocess.run(command, timeout=_ANSWER_SECONDS, check=True, capture_output=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        raise ConnectionError(
            f"expected a Ray cluster at {address!r}, got nothing that answers as one. {advice} On another machine than "
            f"the head node, ~/.ray/auth_token must be that node's."
        ) from error


# What processes share


def _tensor_of(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():  # it is meant to be read-only
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def _pack(ray: Any, value: Any) -> tuple[bytes, list[np.ndarray]]:
    """Pickle a value apart from its arrays, which Ray's object store then maps into each process that reads them."""

    class Pickler(ray.cloudpickle.CloudPickler):
        def reducer_override(self, value: Any) -> Any:
            if type(value) is torch.Tensor and value.device.type == "cpu" and not value.requires_grad:
                return _tensor_of, (value.contiguous().numpy(),)
            return super().reducer_override(value)

    stream, buffers = BytesIO(), list[pickle.PickleBuffer]()
    Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
    return stream.getvalue(), [np.asarray(buffer.raw()) for buffer in buffers]


# In a worker


class _Terms(NamedTuple):
    """What a node must have to work on a unit."""

    versions: dict[str, str]
    marker: str
    threads: int


_prepared: tuple[Any, Callable[[Any], Any]] | None = None  # of the run that this process last worked for


def _work(packed: list[Any], prepare: Callable[[Any], Callable[[Any], Any]], unit: Any, terms: _Terms) -> Any:
    """Work on one unit; what all units share is unpacked once in each process."""
    global _prepared
    if _prepared is None or _prepared[0] != packed[0]:
        import ray

        _check_node(terms)
        torch.set_num_threads(terms.threads)
        content, arrays = ray.get(packed[0])
        try:
            _prepared = packed[0], prepare(pickle.loads(content, buffers=arrays))
        except (OSError, ValueError, ImportError) as error:  # such as a dataset's file that is missing here
            raise _WrongNodeError(f"expected to begin on {socket.gethostname()}, but: {error}") from error
    return _prepared[1](unit)


def _check_node(terms: _Terms) -> None:
    here, host = versions() | {"source": source_checksum()}, socket.gethostname()
    if terms.versions != here:
        raise _WrongNodeError(
            f"expected the same versions on every node, got, here and on {host}: {differences(terms.versions, here)}. "
            f"Install the same everywhere, or start all nodes from one environment."
        )
    if not pathlib.Path(terms.marker).exists():
        raise _WrongNodeError(
            f"expected every node to see the run's folder, got a node, {host}, without {terms.marker!r}. Choose an "
            f"`out` on a file system that all nodes share."
        )
