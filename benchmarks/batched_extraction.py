"""Policies of many tasks in one batched program, timed against one after another in the same run.

    OMP_NUM_THREADS=1 python benchmarks/batched_extraction.py

The two take turns, update by update, so that whatever else the machine does slows both down alike. The ratio is that of
their quickest rounds, which are the least disturbed; beside it stand the median, lowest and highest ratio of a round.
On a CPU seconds are of CPU time at equal threads, on a GPU of the wall clock. The model is multi-task, of tasks with
the sizes of the study's; its weights and the data are random, as speed doesn't depend on them. The table is
results/extraction/batched.csv; a row of the same device and sizes is replaced in it.
"""

import argparse
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tables import put_row

from pwm_gym import PWM, LatentVectorEnv, OfflineDataset, WorldModel, WorldModelConfig
from pwm_gym.agents.policy_bank import PolicyBank
from pwm_gym.datasets import Episode
from pwm_gym.extraction import SETTINGS
from pwm_gym.task_sets import TASK_DIMS

ROOT = pathlib.Path(__file__).resolve().parents[1]
TASKS = (
    *("cartpole-swingup", "pendulum-swingup", "cup-catch", "finger-spin", "reacher-easy", "walker-walk"),
    *("mw-door-close", "mw-handle-press"),
)


def make(tasks: tuple[str, ...], size: str, num_envs: int, device: str) -> tuple[WorldModel, list[PWM]]:
    """Make a multi-task model and an agent for each task."""
    torch.manual_seed(0)
    dims = [TASK_DIMS[task] for task in tasks]
    config = WorldModelConfig.preset(
        size,
        tasks=tasks,
        observation_dim=max(d.observation for d in dims),
        action_dim=max(d.action for d in dims),
        observation_dims=tuple(d.observation for d in dims),
        action_dims=tuple(d.action for d in dims),
    )
    model = WorldModel(config).to(device).eval()
    rng = np.random.default_rng(0)
    episodes = [
        Episode(rng.normal(size=(51, d.observation)), rng.uniform(-1, 1, (50, d.action)), np.ones(50), task=i)
        for i, d in enumerate(dims)
    ]
    data = OfflineDataset(episodes, tasks)
    horizon = SETTINGS["horizon"]
    envs = [LatentVectorEnv(model, data, num_envs=num_envs, horizon=horizon, task=task) for task in tasks]
    return model, [PWM("MlpPolicy", env, seed=0, **SETTINGS) for env in envs]


def seconds(work: Callable[[], Any], device: str) -> float:
    """Time a piece of work: of the CPU, or on a GPU by the wall clock."""
    if device == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    """Measure and add to the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=len(TASKS), help="the first so many (default: %(default)s)")
    parser.add_argument("--size", default="5M", help="default: %(default)s")
    parser.add_argument("--num-envs", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results" / "extraction" / "batched.csv")
    arguments = parser.parse_args()
    device, tasks = arguments.device, TASKS[: arguments.tasks]
    model, together = make(tasks, arguments.size, arguments.num_envs, device)
    _, alone = make(tasks, arguments.size, arguments.num_envs, device)
    bank = PolicyBank(together, model)

    def one_by_one() -> None:
        for agent in alone:
            agent.train(1, arguments.num_envs)

    def batched() -> None:
        bank.train(1)

    for work in (one_by_one, batched):
        work()  # allocates what later updates reuse
    times = np.array([[seconds(work, device) for work in (one_by_one, batched)] for _ in range(arguments.rounds)])
    ratios = times[:, 1] / times[:, 0]
    row = {
        "device": torch.cuda.get_device_name() if device != "cpu" else f"cpu, {torch.get_num_threads()} thread(s)",
        "model": arguments.size,
        "tasks": len(tasks),
        "envs": arguments.num_envs,
        "horizon": SETTINGS["horizon"],
        "rounds": arguments.rounds,
        "one_by_one_s": round(float(times[:, 0].min()), 4),
        "batched_s": round(float(times[:, 1].min()), 4),
        "ratio": round(float(times[:, 1].min() / times[:, 0].min()), 3),
        "ratio_median": round(float(np.median(ratios)), 3),
        "ratio_lowest": round(float(ratios.min()), 3),
        "ratio_highest": round(float(ratios.max()), 3),
    }
    print(row)
    put_row(arguments.out, row, ("device", "model", "tasks", "envs", "horizon"))


if __name__ == "__main__":
    main()
