"""Import, sampling and training from shards in TD-MPC2's MT30 layout: rates and peak memory.

    python benchmarks/datasets.py FOLDER [--gigabytes 5] [--shards 2] [--out results/datasets/large.csv]

FOLDER gets random shards of that size and the dataset made from them (as much again); both are removed at the end.
Each part runs in a process of its own. "anonymous" is memory that only the process holds; "resident" adds pages of
mapped files that happen to be in memory, which the system takes back when it needs them.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import torch
from tables import write_rows

from pwm_gym import OfflineDataset, WorldModel, WorldModelConfig, fit_world_model
from pwm_gym.task_sets import TASK_DIMS, tasks

ROWS, WIDTHS = 501, (24, 6)
EPISODE_BYTES = ROWS * 4 * (sum(WIDTHS) + 2)
BATCH_SIZE, HORIZON = 256, 16


class PeakMemory:
    """Watches a process's own memory while a block runs; in MB."""

    def __enter__(self):
        self.anonymous, self.resident, self._running = 0.0, 0.0, True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while self._running:
            lines = pathlib.Path("/proc/self/status").read_text().splitlines()
            status = dict(line.split(":", 1) for line in lines)
            self.anonymous = max(self.anonymous, int(status["RssAnon"].split()[0]) / 1000)
            self.resident = max(self.resident, int(status["VmHWM"].split()[0]) / 1000)
            time.sleep(0.02)

    def __exit__(self, *_):
        self._running = False
        self._thread.join()


def make_shard(path, gigabytes, seed):
    """Write a shard of random numbers without holding it in memory."""
    episodes = int(gigabytes * 1e9 / EPISODE_BYTES)
    rng, names = np.random.default_rng(seed), tasks("MT30")
    dims = np.array([TASK_DIMS[name] for name in names])
    shapes = {"obs": (ROWS, WIDTHS[0]), "action": (ROWS, WIDTHS[1]), "reward": (ROWS,), "task": (ROWS,)}
    files = {key: path.with_suffix(f".{key}") for key in shapes}
    dtypes = {key: np.int32 if key == "task" else np.float32 for key in shapes}
    maps = {k: np.memmap(files[k], dtypes[k], "w+", shape=(episodes, *shape)) for k, shape in shapes.items()}
    for begin in range(0, episodes, 500):
        part = slice(begin, min(begin + 500, episodes))
        count = part.stop - begin
        task = rng.integers(len(names), size=count)
        for i, key in enumerate(("obs", "action")):
            values = rng.random((count, *shapes[key]), dtype=np.float32) * 2 - 1
            maps[key][part] = values * (np.arange(WIDTHS[i]) < dims[task, i, None])[:, None]
        maps["action"][part, 0] = np.nan
        maps["reward"][part] = rng.random((count, ROWS), dtype=np.float32)
        maps["reward"][part, 0] = np.nan
        maps["task"][part] = task[:, None]
    torch.save({key: torch.from_numpy(array) for key, array in maps.items()}, path)
    for file in files.values():
        file.unlink()


def import_shards(folder):
    """Import all shards."""
    OfflineDataset.from_tdmpc2(folder / "shards", folder / "dataset", "MT30")
    size = sum(file.stat().st_size for file in (folder / "shards").iterdir())
    return size / 1e6, "MB"


def sample(folder):
    """Sample windows at random places of the whole dataset."""
    dataset, rng = OfflineDataset.load(folder / "dataset"), np.random.default_rng(0)
    batches = 1000
    for _ in range(batches):
        windows = dataset.sample_windows(BATCH_SIZE, HORIZON, rng)
    size = sum(tensor.nbytes for tensor in (windows.observations, windows.actions, windows.rewards))
    return batches * size / 1e6, "MB"


def train(folder):
    """Fit a model of 5M parameters to one task, and count the windows that it saw."""
    dataset = OfflineDataset.load(folder / "dataset").of_tasks("walker-run")
    torch.manual_seed(0)
    config = WorldModelConfig.preset("5M", observation_dim=dataset.observation_dim, action_dim=dataset.action_dim)
    model = WorldModel(config, dataset.observation_space, dataset.action_space)
    updates = 10
    fit_world_model(model, dataset, updates, BATCH_SIZE, HORIZON, rho=0.99, seed=0)
    return updates * BATCH_SIZE, "windows"


PARTS = {"import": import_shards, "sample": sample, "train": train}


def main():
    """Run all parts, or the one that a parent process asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--gigabytes", type=float, default=5.0, help="of one shard")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, help="table to write, .csv")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        with PeakMemory() as peak:
            start = time.perf_counter()
            amount, unit = PARTS[args.part](args.folder)
            seconds = time.perf_counter() - start
        row = {"part": args.part, "amount": round(amount), "unit": unit, "seconds": round(seconds, 1)}
        row |= {"rate_per_second": round(amount / seconds, 1), "peak_anonymous_mb": round(peak.anonymous)}
        print(json.dumps(row | {"peak_resident_mb": round(peak.resident)}))
        return
    shards = args.folder / "shards"
    shards.mkdir(parents=True)
    try:
        for i in range(args.shards):
            make_shard(shards / f"chunk_{i}.pt", args.gigabytes, i)
        rows = []
        for part in PARTS:
            command = [sys.executable, __file__, str(args.folder), "--part", part]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    finally:
        shutil.rmtree(args.folder)
    if args.out:
        write_rows(args.out, rows)


if __name__ == "__main__":
    main()
