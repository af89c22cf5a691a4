"""Several processes that train one model: what each does of a batch, and what they must agree on."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from stable_baselines3.common.utils import get_device
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from pwm_gym.versions import differences, source_checksum, versions

__all__ = ["Ranks"]

T = TypeVar("T")
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # that torchrun sets
_LAST_WORDS = 5.0  # seconds that the first process waits for the others to have read what was said


class Ranks:
    """The processes of one run, this one among them; alone, unless `join` made it.

    Every process draws the same random numbers for the whole batch and works on its own part of it, and gradients are
    averaged: the result does not depend on the number of processes but for the order of sums.

    Attributes:
        rank: This process's number.
        size: Their count.
        device: Where this one trains; None alone, where the caller says.
        sharded: Whether each holds a part of the weights and of the optimizer's state (FSDP) instead of all (DDP).

    Example:
        >>> alone = Ranks()
        >>> alone.part(6), alone.agree("learning rate", {"rate": 1.0})
        (slice(0, 6, None), None)
    """

    def __init__(self) -> None:
        self.rank, self.size, self.sharded = 0, 1, False
        self.device: torch.device | None = None
        self._timeout, self._said = 0.0, 0
        self._store: Any = None
        self._module: Any = None

    @staticmethod
    def launched() -> bool:
        """Tell whether torchrun, or somebody else who sets its variables, started this process as one of several."""
        return all(name in os.environ for name in _ENVIRONMENT) and int(os.environ["WORLD_SIZE"]) > 1

    @classmethod
    @contextmanager
    def join(
        cls,
        device: torch.device | str = "auto",
        sharded: bool = False,
        timeout: float = 120.0,
        patience: float = 1800.0,
    ) -> Iterator[Self]:
        """Meet the other processes that torchrun started, and part from them at the end.

        Args:
            device: "cpu" for gloo; "cuda", or "auto" where there is a GPU, for nccl and the process's own GPU.
            sharded: Share out weights and optimizer state instead of having all of them in each process.
            timeout: Seconds to wait for all to come, and for each to say what they must agree on.
            patience: Seconds that a process may lag behind in training, its validation included.

        Raises:
            ConnectionError: If not all come in time.
            ValueError: If torchrun's variables are missing, or the processes run different versions.
        """
        missing = [name for name in _ENVIRONMENT if name not in os.environ]
        if missing:
            raise ValueError(f"expected to be started by torchrun, got no {', '.join(missing)} in the environment.")
        ranks = cls()
        ranks.rank, ranks.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        ranks.sharded, ranks._timeout = sharded and ranks.size > 1, timeout
        chosen = get_device(device)
        if chosen.type == "cuda":
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(chosen)
        ranks.device = chosen
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        try:
            ranks._store = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))[0]
        except (dist.DistError, RuntimeError) as error:
            raise ConnectionError(
                f"expected {ranks.size} processes to meet at {where} within {timeout:g} s, got fewer ({error}). Are "
                f"all started, and is the port open between their machines?"
            ) from error
        what = {"source": source_checksum(), "device": chosen.type, "sharded": sharded}
        ranks.agree("versions", versions() | what)
        store = dist.PrefixStore("group", ranks._store)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        span = timedelta(seconds=patience)
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=span)
        try:
            yield ranks
        except BaseException:
            if backend == "gloo":  # nccl could wait for the others first; the end of this process tells them, too
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()

    # What processes must agree on

    def _exchange(self, what: str, value: Any) -> list[Any]:
        """Tell the others a plain value, and hear theirs, by rank."""
        if self.size == 1:
            return [value]
        self._said += 1
        keys = [f"{self._said}/{what}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], json.dumps(value))
        try:
            self._store.wait(keys, timedelta(seconds=self._timeout))
        except (dist.DistError, RuntimeError) as error:
            silent = [str(rank) for rank, key in enumerate(keys) if not self._has(key)]
            raise ConnectionError(
                f"expected all {self.size} processes to say their {what} within {self._timeout:g} s, got nothing from "
                f"{', '.join(silent)}. The reason stands in their logs."
            ) from error
        values = [json.loads(self._store.get(key)) for key in keys]
        read, until = f"{self._said}/read", time.monotonic() + _LAST_WORDS
        self._store.add(read, 1)
        while self.rank == 0 and self._store.add(read, 0) < self.size and time.monotonic() < until:
            time.sleep(0.01)  # the values are kept in this process, which may end next
        return values

    def _has(self, key: str) -> bool:
        try:
            return self._store.check([key])
        except (dist.DistError, RuntimeError):  # the process that keeps the values is gone
            return False

    def agree(self, what: str, value: dict[str, Any]) -> None:
        """Check that all processes have equal values.

        Args:
            what: What they are.
            value: This process's, plain JSON types.

        Raises:
            ConnectionError: If one says nothing in time.
            ValueError: If one has others.
        """
        plain = json.loads(json.dumps(value))
        theirs = self._exchange(what, {"host": socket.gethostname(), "value": plain})
        for rank, other in enumerate(theirs):
            if other["value"] != theirs[0]["value"]:
                raise ValueError(
                    f"expected the same {what} in all {self.size} processes, got in 0 on {theirs[0]['host']} and in "
                    f"{rank} on {other['host']}: {differences(theirs[0]['value'], other['value'])}."
                )

    def together(self, what: str, action: Callable[[], T]) -> T:
        """Do something that each process does for itself, and fail in all where it fails in one.

        Args:
            what: What it is.
            action: Does it.

        Raises:
            ConnectionError: If one says nothing in time.
            ValueError: If it raises OSError or ValueError in one.
        """
        failure, result = None, None
        try:
            result = action()
        except (OSError, ValueError) as error:
            if self.size == 1:
                raise
            failure = str(error)
        told = self._exchange(what, {"host": socket.gethostname(), "failure": failure})
        failed = [f"{rank} on {one['host']}: {one['failure']}" for rank, one in enumerate(told) if one["failure"]]
        if failed:
            raise ValueError(f"expected to {what} in all {self.size} processes, but in {'; in '.join(failed)}")
        return result  # type: ignore[return-value]

    # A batch

    def part(self, count: int) -> slice:
        """Give this process's part of a batch.

        Args:
            count: Rows of the whole batch.

        Raises:
            ValueError: If they can't be shared out evenly.
        """
        if count % self.size:
            raise ValueError(
                f"expected a batch that {self.size} processes share evenly, got {count}. Change `batch_size` or the "
                f"number of processes."
            )
        own = count // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    @torch.no_grad()
    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over the processes, in one message."""
        if self.size > 1:
            flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
            dist.all_reduce(flat)
            flat /= self.size
            for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def gather(self, rows: Tensor) -> Tensor:
        """Put the processes' rows, (B / N,) each, together in their order, (B,); no gradient flows."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def any(self, flag: bool) -> bool:
        """Tell whether a flag is set in any process."""
        if self.size == 1:
            return flag
        number = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return bool(number)

    # A model

    def wrap(
        self, module: nn.Module, apart: Sequence[nn.Parameter] = (), idle: Sequence[nn.Parameter] = ()
    ) -> nn.Module:
        """Have the gradients of a module averaged, or with `sharded` its parameters shared out.

        Args:
            module: The module; its `forward` gives the loss. Sharded, its parameters are replaced by distributed ones,
                so that optimizers must be made afterwards.
            apart: Parameters that are no part of this loss, and stay whole in every process.
            idle: Parameters that don't yet take part in this loss. Wrap the module again when they do.
        """
        if self.size == 1:
            return module
        if self.sharded:
            from torch.distributed.device_mesh import init_device_mesh  # here: they take a second to import
            from torch.distributed.fsdp import fully_shard

            assert self.device is not None
            mesh = init_device_mesh(self.device.type, (self.size,))
            self._module = fully_shard(module, mesh=mesh, ignored_params=set(apart), reshard_after_forward=False)
            return module
        others = [parameter for parameter in (*apart, *idle) if parameter.requires_grad]
        for parameter in others:  # whose gradients would be waited for
            parameter.requires_grad_(False)
        wrapped = DistributedDataParallel(module, gradient_as_bucket_view=True)
        for parameter in others:
            parameter.requires_grad_(True)
        return wrapped

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Have the weights of a sharded module in every process, to be read outside of its `forward`."""
        if self._module is None:
            yield
            return
        self._module.unshard()
        yield
        self._module.reshard()

    def full(self, state: Any) -> Any:
        """Collect what is shared out in a state dict; all processes must call it."""
        if isinstance(state, dict):
            return {key: self.full(value) for key, value in state.items()}
        return state.full_tensor() if hasattr(state, "full_tensor") else state

    def share_out(self, value: Any, like: Tensor) -> Any:
        """Undo `full` for one tensor: give each process its part, where `like` is shared out and of that shape."""
        if not hasattr(like, "full_tensor") or not isinstance(value, Tensor) or value.shape != like.shape:
            return value
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, like.device_mesh, like.placements)  # type: ignore[attr-defined]
