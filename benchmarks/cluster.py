"""What a cluster costs and gives: python benchmarks/cluster.py extract | ranks [--out results/cluster].

extract: eight tasks of a 19M model, one after another here, on Ray with the model shared, and on Ray with a copy of it
in each process: whether the policies are equal, the time that Ray adds to a unit, the memory of a process.
ranks: one world model trained by one process, by two, by two that share out its weights, and by two of which one is
killed, gone on with by one and by two: the largest difference of any update's loss.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
from tables import put_row

import pwm_gym.extraction.run as extraction
from pwm_gym import PWM, OfflineDataset, WorldModel, WorldModelConfig, extract
from pwm_gym.cluster import RayCluster
from pwm_gym.datasets import Episode

TASKS = tuple(f"task-{i}" for i in range(8))
SETTINGS: dict[str, Any] = {"updates": 20, "num_envs": 8, "horizon": 4, "episodes": 0, "together": 1}
NOTHING = 200  # units that do nothing, to time what a unit costs
UPDATES, KILLED_AT = 40, 15


def make_dataset(tasks: tuple[str, ...], episodes: int = 4, width: int = 39) -> OfflineDataset:
    """Random data of MT80's widths; what it holds is of no matter here."""
    rng = np.random.default_rng(0)

    def episode(task: int) -> Episode:
        observations, actions = rng.normal(size=(51, width)), rng.uniform(-1, 1, (50, 6))
        return Episode(observations, actions, observations[1:, 0], truncated=True, task=task)

    return OfflineDataset([episode(task) for task in range(len(tasks)) for _ in range(episodes)], tasks)


# Extraction on Ray


def own_memory() -> dict[str, float]:
    """Memory of this process in MB: with its share of what it shares (PSS), and what it has alone (USS)."""
    sizes = {}
    for line in pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, size, *_ = line.split()
        sizes[name.rstrip(":")] = int(size) / 1024
    return {"pss_mb": sizes["Pss"], "uss_mb": sizes["Private_Clean"] + sizes["Private_Dirty"]}


def measuring(folder: pathlib.Path, copies: bool) -> type:
    """Make a worker that notes its memory after each unit."""

    class Worker(extraction._Worker):
        def __init__(self, shared: Any) -> None:
            self._before = own_memory()["uss_mb"]
            if copies:
                plans, device = shared
                model, for_task = copy.deepcopy(plans[0].world_model), WorldModel.for_task
                WorldModel.for_task = lambda self, task, share=False: for_task(self, task)  # type: ignore[method-assign]
                shared = [dataclasses.replace(plan, world_model=model) for plan in plans], device
            super().__init__(shared)

        def __call__(self, unit: Any) -> None:
            super().__call__(unit)
            (folder / f"{os.getpid()}.json").write_text(json.dumps(own_memory() | {"begun_with_mb": self._before}))

    return Worker


def equal(a: pathlib.Path, b: pathlib.Path) -> bool:
    """Tell whether all policies of two folders are equal bit for bit."""
    for task in TASKS:
        ours, theirs = (PWM.load(folder / f"{task}.zip").policy.state_dict() for folder in (a, b))
        if any(not torch.equal(value, theirs[name]) for name, value in ours.items()):
            return False
    return True


def run_extraction(out: pathlib.Path, size: str) -> None:
    """Extract eight policies in three ways."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dims: dict[str, Any] = {"observation_dim": 39, "action_dim": 6, "tasks": TASKS}
    model, dataset = WorldModel(WorldModelConfig.preset(size, **dims)).eval(), make_dataset(TASKS)
    folder = pathlib.Path(tempfile.mkdtemp())
    plain, before = extraction._Worker, own_memory()["uss_mb"]
    for way in ("here", "shared", "copies"):
        (folder / "memory" / way).mkdir(parents=True)
        extraction._Worker = plain if way == "here" else measuring(folder / "memory" / way, way == "copies")  # type: ignore[misc, assignment]
        began = time.perf_counter()
        results = extract(model, dataset, out=folder / way, ray=None if way == "here" else RayCluster(), **SETTINGS)
        seconds = time.perf_counter() - began
        memory = [json.loads(path.read_text()) for path in (folder / "memory" / way).iterdir()]
        memory = memory or [own_memory() | {"begun_with_mb": before}]
        row = {"size": size, "model_mb": round(4 * sum(p.numel() for p in model.parameters()) / 2**20, 1), "way": way}
        row |= {"processes": len(memory), "seconds": round(seconds, 1)}
        row["training_cpu_seconds"] = round(sum(result.cpu_seconds for result in results.values()), 1)
        row |= {name: round(float(np.mean([one[name] for one in memory])), 1) for name in memory[0]}
        row["equal_to_here"] = way == "here" or equal(folder / "here", folder / way)
        print(row, flush=True)
        put_row(out / "extraction.csv", row, ("size", "way"))
    time_units(out, folder)
    shutil.rmtree(folder)


def time_units(out: pathlib.Path, folder: pathlib.Path) -> None:
    """Time units that do nothing."""
    marker = folder / "marker"
    marker.touch()
    began, ends = time.perf_counter(), []
    for event in RayCluster().run(lambda shared: len, None, [()] * NOTHING, marker):
        if event is not None:
            ends.append(time.perf_counter() - began)
    row = {"what": "a unit that does nothing", "units": NOTHING, "first_after_s": round(ends[0], 2)}
    row["ms_of_each_further"] = round(1e3 * (ends[-1] - ends[0]) / (NOTHING - 1), 2)
    print(row, flush=True)
    put_row(out / "units.csv", row, ("what",))


# Pre-training in several processes


def train(data: pathlib.Path, out: pathlib.Path, processes: int, *more: str, kill_at: int | None = None) -> None:
    """Run the command line, under torchrun if in several processes; kill one when a checkpoint of `kill_at` stands."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "pwm_gym", "pretrain", str(data), "--out", str(out), "--size", "1M", "--device", "cpu"]
    command += ["--updates", str(UPDATES), "--batch-size", "16", "--horizon", "3", "--held-out", "0"]
    command += ["--checkpoint-every", "5", "--tensorboard", *more]
    with (out.parent / f"{out.name}.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while kill_at is not None and process.poll() is None:
        time.sleep(0.1)
        if step_of(out) >= kill_at:
            os.kill(max(ranks_of(process.pid)), signal.SIGKILL)
            break
    code = process.wait(timeout=900)
    if (code != 0) != (kill_at is not None):
        raise RuntimeError((out.parent / f"{out.name}.log").read_text()[-3000:])


def ranks_of(pid: int) -> list[int]:
    """List the processes that torchrun started."""
    started = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(one) for one in started if b"pretrain" in pathlib.Path(f"/proc/{one}/cmdline").read_bytes()]


def step_of(out: pathlib.Path) -> int:
    """Read how far a run's checkpoint is, 0 without."""
    path = out / "checkpoint.pt"
    return int(torch.load(path, weights_only=True)["step"]) if path.exists() else 0


def curve(out: pathlib.Path) -> dict[int, float]:
    """Read a run's loss by update from its TensorBoard files; what was done twice counts once, the last time."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses: dict[int, float] = {}
    for path in sorted(out.glob("events*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(path)).Reload()
        if "train/model_loss" in events.Tags()["scalars"]:
            losses |= {event.step: event.value for event in events.Scalars("train/model_loss")}
    return losses


def run_ranks(out: pathlib.Path) -> None:
    """Train in each of the ways and compare their losses with those of one process."""
    folder = pathlib.Path(tempfile.mkdtemp())
    make_dataset(TASKS[:2]).save(folder / "data")
    train(folder / "data", folder / "one", 1)
    reference = curve(folder / "one")
    train(folder / "data", folder / "killed", 2, kill_at=KILLED_AT)
    died_at = step_of(folder / "killed")
    ways: dict[str, tuple[int, tuple[str, ...]]] = {"two, one killed, then one": (1, ())}
    ways |= {"two, one killed, then two": (2, ()), "two": (2, ()), "two, sharded": (2, ("--sharded",))}
    for way, (processes, more) in ways.items():
        target = folder / way.replace(", ", "-").replace(" ", "-")
        if "killed" in way:
            shutil.copytree(folder / "killed", target)
        began = time.perf_counter()
        train(folder / "data", target, processes, *more)
        losses = curve(target)
        gaps = [abs(losses[step] - loss) / abs(loss) for step, loss in reference.items() if step in losses]
        row = {"way": way, "gone_on_from": died_at if "killed" in way else 0, "compared_updates": len(gaps)}
        row |= {"first_loss": round(reference[min(reference)], 5), "last_loss": round(losses[UPDATES], 5)}
        row |= {"largest_relative_difference": f"{max(gaps):.1e}", "seconds": round(time.perf_counter() - began, 1)}
        print(row, flush=True)
        put_row(out / "ranks.csv", row, ("way",))
    shutil.rmtree(folder)


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("extract", "ranks"))
    parser.add_argument("--size", default="19M", help="of the model whose policies are extracted")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parents[1] / "results/cluster")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "extract":
        run_extraction(args.out, args.size)
    else:
        run_ranks(args.out)


if __name__ == "__main__":
    main()
