"""What MT80 costs at 48M and 317M on 1, 8 and 64 GPUs: python benchmarks/cluster_plan.py [--out results/cluster].

Counts what can be counted (FLOPs, bytes of weights, activations, windows and messages, by running one update on
torch's "meta" device, which computes shapes alone), takes rates that were measured here from results/, and assumes
the rest: every assumption is a constant below, with its source. Nothing is trained and no GPU is needed.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import pathlib
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from tables import write_rows
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from pwm_gym.training import PAPER, world_model_loss
from pwm_gym.training.planning_learner import PlanningLearner
from pwm_gym.world_model import WorldModel, WorldModelConfig

RESULTS = pathlib.Path(__file__).parents[1] / "results"

# MT80 as TD-MPC2 published it: 545 million transitions of 80 tasks, in 5.45 million episodes of 100 steps.
STEPS, EPISODES, TASKS, OBSERVATIONS, ACTIONS = 545e6, 5.45e6, 80, 39, 6
UPDATES = 2_700_000  # of the checkpoint that PWM's published MT80 scores come from
SIZES = ("48M", "317M")
BATCH, HORIZON = PAPER["batch_size"], PAPER["horizon"]

# Assumed of an NVIDIA H100 SXM, by its data sheet: dense matrix products, memory, links in one direction.
TF32, BF16, MEMORY, MEMORY_RATE = 495e12, 989e12, 80e9, 3.35e12
NVLINK, NETWORK, GPUS_OF_A_NODE = 450e9, 50e9, 8  # 400 Gbit/s InfiniBand for each GPU
SLOW_NETWORK = 12.5e9 / GPUS_OF_A_NODE  # 100 Gbit/s Ethernet for a node, to compare
# Assumed of how much of it one gets. Products of 1024 to 16,384 rows are no large language model's.
UTILISATION, LINK_UTILISATION = 0.35, 0.7
LATENCY = 20e-6  # seconds of one hop of a message
LAUNCH = 6e-6  # seconds of starting one kernel from Python, which an update of few rows can't go below
DISK_READS = 400e3  # random reads/s of a node's NVMe SSD, where the data is not in its memory; three for each window

EXTRACTION = {"updates": 3_000, "rollouts": 64, "horizon": 16, "seeds": 10, "share_of_gpu": 0.25}


class Update(NamedTuple):
    """One update of a batch, counted."""

    flops: float
    kernels: int
    activations: float  # bytes that the backward pass needs
    parameters: int
    trained: int  # of them, by the model's own loss


@functools.cache
def count(size: str, batch: int, tasks: int = TASKS, horizon: int = HORIZON, planning: bool = True) -> Update:
    """Count one update of the world model on a batch, forward and backward, values and policy prior included."""
    dims: dict[str, Any] = {"observation_dim": OBSERVATIONS, "action_dim": ACTIONS, "num_tasks": tasks}
    with torch.device("meta"):
        model = WorldModel(WorldModelConfig.preset(size, planning=planning, **dims)).train()
        windows = torch.rand(horizon + 1, batch, OBSERVATIONS), torch.rand(horizon, batch, ACTIONS)
        rewards, ends = torch.rand(horizon, batch), torch.zeros(horizon, batch, dtype=torch.bool)
        task = torch.zeros(batch, dtype=torch.int64) if tasks else None
    learner = _MetaLearner(model) if planning else None
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        held.append(tensor)  # so that no two storages have one id
        return tensor

    held: list[torch.Tensor] = []
    with FlopCounterMode(display=False) as counter, _Kernels() as kernels, torch.device("meta"):
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _, latents = world_model_loss(model, *windows, rewards, ends, 0.99, task, learner)
        loss.backward()
        if learner is not None:
            _update_prior(model, latents.detach(), task)
    weights = {id(p.untyped_storage()) for p in model.parameters()}
    apart = sum(p.numel() for p in model.policy_prior.parameters()) if model.policy_prior else 0
    targets = sum(p.numel() for p in model.value.target.parameters()) if model.value else 0
    total = sum(p.numel() for p in model.parameters())
    activations = sum(size for key, size in saved.items() if key not in weights)
    return Update(counter.get_total_flops(), kernels.count, activations, total - targets, total - targets - apart)


class _Kernels(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts operations, each of which is a kernel at least."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


class _MetaLearner(PlanningLearner):
    """Without a generator, which the meta device has none of."""

    def __init__(self, model: WorldModel) -> None:
        super().__init__(model, seed=None)  # type: ignore[arg-type]


def _update_prior(model: WorldModel, latents: torch.Tensor, task: torch.Tensor | None) -> None:
    """Pass through prior and values as `PlanningLearner.update_prior` does."""
    noise = torch.zeros(*latents.shape[:-1], model.config.action_dim)
    sample = model.prior(latents, task, noise=noise)
    logits = model.q_logits(latents, sample.actions, task)[:2]
    assert model.policy_prior is not None
    torch.autograd.grad(logits.mean() + sample.entropy.mean(), list(model.policy_prior.parameters()))


def all_reduce_seconds(size: float, gpus: int, network: float = NETWORK) -> float:
    """Time an all-reduce by rings, one through each GPU's own network link: 2 (N - 1) / N of the bytes, and hops."""
    if gpus == 1:
        return 0.0
    rate = NVLINK if gpus <= GPUS_OF_A_NODE else min(NVLINK, network * GPUS_OF_A_NODE)
    return 2 * (gpus - 1) / gpus * size / (rate * LINK_UTILISATION) + 2 * math.ceil(math.log2(gpus)) * LATENCY


def plan(size: str, gpus: int, bf16: bool, sample_rate: float) -> dict[str, Any]:
    """Plan pre-training of one size on some GPUs, at the published global batch."""
    whole, rows = count(size, BATCH), BATCH // gpus
    own = whole._replace(flops=whole.flops / gpus, activations=whole.activations / gpus)  # both are of windows
    compute = own.flops / ((BF16 if bf16 else TF32) * UTILISATION)
    launches = own.kernels * LAUNCH
    network, slow = (all_reduce_seconds(4.0 * own.parameters, gpus, rate) for rate in (NETWORK, SLOW_NETWORK))
    optimizer = 4.0 * 7 * own.parameters / MEMORY_RATE  # reads weight, gradient, two moments; writes three
    window = 4 * ((HORIZON + 1) * OBSERVATIONS + HORIZON * (ACTIONS + 1))
    reading = rows * window / sample_rate  # by the process itself, before it starts its kernels
    disk = rows * min(gpus, GPUS_OF_A_NODE) * 3 / DISK_READS  # of a node; beside all else
    # Messages go beside the backward pass, two thirds of the work; kernels are started while others run.
    busy = max(compute, launches)
    step = max(reading + busy + optimizer + max(0.0, network - 2 / 3 * busy), disk)
    parts = {"compute": compute, "kernel launches": launches, "network": network, "reading": reading, "disk": disk}
    waits = parts | {"network": network - 2 / 3 * busy}
    memory = 16.0 * own.parameters + own.activations * (0.6 if bf16 else 1.0)
    return {
        "size": size,
        "gpus": gpus,
        "precision": "bf16" if bf16 else "tf32",
        "windows_of_each": rows,
        "tflop_of_an_update": round(whole.flops / 1e12, 2),
        **{f"{name.replace(' ', '_')}_ms": round(1e3 * value, 2) for name, value in parts.items()},
        "update_ms": round(1e3 * step, 2),
        "bottleneck": max(waits, key=lambda name: waits[name]),
        "hours": round(UPDATES * step / 3600, 1),
        "gpu_hours": round(gpus * UPDATES * step / 3600),
        "speedup_over_1": 0.0,
        "memory_gb_of_each": round(memory / 1e9, 1),
        "network_ms_at_100_gbit_s": round(1e3 * slow, 2),
        "sent_gb_of_each_update": round(2 * (gpus - 1) / gpus * 4 * own.parameters / 1e9, 2),
        "checkpoint_gb": round(12 * own.parameters / 1e9, 1),
        "exaflop_in_all": round(whole.flops * UPDATES / 1e18),
    }


def extraction(size: str, gpus: int) -> dict[str, Any]:
    """Plan a policy for each task from each seed, as independent units of work."""
    with torch.device("meta"):
        dims: dict[str, Any] = {"observation_dim": OBSERVATIONS, "action_dim": ACTIONS}
        model = WorldModel(WorldModelConfig.preset(size, **dims))
    parts = [p.numel() for part in (model.dynamics, model.reward_head) for p in part.parameters() if p.ndim == 2]
    rows = EXTRACTION["rollouts"] * EXTRACTION["horizon"]
    flops = 4.0 * sum(parts) * rows  # forward, and backward to the inputs
    units = TASKS * EXTRACTION["seeds"]
    kernels = EXTRACTION["horizon"] * 2 * 60  # of a step of the model, the actor and their backward passes, about
    compute, launches = flops / (TF32 * UTILISATION), kernels * LAUNCH
    together = round(1 / EXTRACTION["share_of_gpu"])
    update = max(compute * together, launches) / together
    hours = units * EXTRACTION["updates"] * update / 3600 / gpus
    return {
        "size": size,
        "gpus": gpus,
        "units": int(units),
        "gflop_of_an_update": round(flops / 1e9, 1),
        "bottleneck": "compute" if compute * together > launches else "kernel launches",
        "hours": round(hours, 2),
        "model_gb_shared_by_a_node": round(4 * sum(p.numel() for p in model.parameters()) / 1e9, 2),
        "agents_gb": round(units * 4 * sum(p.numel() for p in model.parameters()) / 1e9, 1),
    }


def measured() -> dict[str, float]:
    """Turn the rates that were measured on one thread into FLOP/s and bytes/s."""
    with (RESULTS / "datasets/large.csv").open() as file:
        rates = {row["part"]: float(row["rate_per_second"]) for row in csv.DictReader(file)}
    # benchmarks/datasets.py trains the 5M model of one task on windows of 16 steps, without planning.
    window = count("5M", 64, tasks=0, planning=False).flops / 64
    with (RESULTS / "extraction/batched.csv").open() as file:
        extracted = {row["model"]: float(row["one_by_one_s"]) / float(row["tasks"]) for row in csv.DictReader(file)}
    units = TASKS * EXTRACTION["seeds"] * EXTRACTION["updates"] / 3600
    hours = {f"{size}_extraction_core_hours": seconds * units for size, seconds in extracted.items()}
    return {"core_gflops": rates["train"] * window / 1e9, "sample_mb_s": rates["sample"], **hours}


def seconds_of_an_operation() -> float:
    """Time what starting an operation costs on the host: one thread, an update of one window, layers of eight."""
    torch.set_num_threads(1)
    dims: dict[str, Any] = {"latent_dim": 8, "encoder_dim": 8, "encoder_layers": 3, "mlp_dim": 8, "num_q": 5}
    model = WorldModel(WorldModelConfig(OBSERVATIONS, ACTIONS, num_tasks=2, policy_prior=True, **dims))
    model.to(torch.float64)  # by PyTorch's own operations, as on a GPU
    windows = torch.rand(HORIZON + 1, 1, OBSERVATIONS).double(), torch.rand(HORIZON, 1, ACTIONS).double()
    rewards, ends = torch.rand(HORIZON, 1).double(), torch.zeros(HORIZON, 1, dtype=torch.bool)
    learner, task = PlanningLearner(model), torch.zeros(1, dtype=torch.int64)

    def update() -> None:
        world_model_loss(model, *windows, rewards, ends, 0.99, task, learner)[0].backward()

    with _Kernels() as kernels:
        update()
    spent = []
    for _ in range(5):
        began = time.thread_time()
        update()
        spent.append(time.thread_time() - began)
    return min(spent) / kernels.count


def queue(units: int, gpus: int, seconds: float, spread: float = 0.15) -> float:
    """Simulate units of work, handed out one by one to whoever is free; gives the share of the time that is lost."""
    rng, free = np.random.default_rng(0), np.zeros(gpus)
    times = seconds * rng.lognormal(-(spread**2) / 2, spread, units)
    for one in times:
        free[free.argmin()] += one
    return 1.0 - times.sum() / gpus / float(free.max())


def main() -> None:
    """Write plan.csv and extraction_plan.csv, and print what they rest on."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "cluster")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    here = measured()
    rate = 1e6 * here["sample_mb_s"]
    rows = [plan(size, gpus, bf16, rate) for size in SIZES for bf16 in (False, True) for gpus in (1, 8, 64)]
    for row in rows:
        alone = next(r for r in rows if (r["size"], r["precision"], r["gpus"]) == (row["size"], row["precision"], 1))
        row["speedup_over_1"] = round(alone["hours"] / row["hours"], 1)
    write_rows(out / "plan.csv", rows)
    policies = [extraction(size, gpus) for size in SIZES for gpus in (1, 8, 64)]
    for row in policies:
        slots = math.ceil(row["gpus"] / EXTRACTION["share_of_gpu"])
        row["idle_share_simulated"] = round(float(queue(row["units"], slots, 1.0)), 3)
    write_rows(out / "extraction_plan.csv", policies)
    stored = 4 * (STEPS * (OBSERVATIONS + ACTIONS + 1) + EPISODES * OBSERVATIONS) / 1e9
    print(f"MT80 on disk: {stored:.0f} GB; a window of {HORIZON} steps: {4 * (17 * 39 + 16 * 7)} bytes")
    print(f"one CPU thread here: {here}; {1e6 * seconds_of_an_operation():.1f} us for starting an operation")
    for size in SIZES:
        update = count(size, BATCH)
        days = update.flops * UPDATES / (here["core_gflops"] * 1e9) / 86400
        print(f"{size}: {update} -> {days / 365:.0f} years of one CPU thread")
    for row in [*rows, *policies]:
        print(row)


if __name__ == "__main__":
    main()
