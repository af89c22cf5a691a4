"""Time SHAC on torch cartpole and pendulum until it balances: the pole within 0.2 rad for the last 2 s, 10 times of 10.

python benchmarks/swing_up.py      # results/ground_truth/swing_up.csv, swing_up.png: three seeds of each

A system and seed that the csv holds is not trained again.
"""

from __future__ import annotations

import argparse
import csv
import pathlib
import time
from typing import Any

import numpy as np
import torch
from tables import write_rows

from pwm_gym import SHAC, make_differentiable
from pwm_gym.serialization import atomic_write

SYSTEMS = ("TorchPendulum", "TorchCartPole")
EPISODES, LAST_STEPS, TOLERANCE = 10, 40, 0.2  # 40 steps of 0.05 s


def evaluate(agent: SHAC, system: str) -> tuple[int, float]:
    """Run 10 deterministic episodes: how many balance at the end, and the mean return."""
    env: Any = make_differentiable(f"pwm_gym/{system}-v0", EPISODES)
    observations, _ = env.reset(seed=1_000)
    cosine, total = (0 if system == "TorchPendulum" else 1), torch.zeros(EPISODES)
    upright = torch.ones(EPISODES, dtype=torch.bool)
    for t in range(env.horizon):
        if t >= env.horizon - LAST_STEPS:
            upright &= observations[:, cosine] > np.cos(TOLERANCE)
        actions, _ = agent.predict(observations.numpy(), deterministic=True)
        observations, rewards, *_ = env.step(torch.from_numpy(actions))
        total += rewards
    return int(upright.sum()), float(total.mean())


def train(system: str, seed: int, steps: int) -> list[dict[str, Any]]:
    """Train with the defaults on 64 envs until two evaluations in a row balance 10 times of 10.

    Evaluations come every 20 updates; seconds are the processor's, without them.
    """
    agent = SHAC("MlpPolicy", make_differentiable(f"pwm_gym/{system}-v0", 64), seed=seed)
    rows: list[dict[str, Any]] = []
    spent = 0.0
    while agent.num_timesteps < steps and [row["balanced of 10"] for row in rows[-2:]] != [10, 10]:
        start = time.process_time()
        agent.learn(20 * 64 * agent.horizon, reset_num_timesteps=not rows)
        spent += time.process_time() - start
        balanced, mean_return = evaluate(agent, system)
        rows.append({"system": system, "seed": seed, "steps": agent.num_timesteps, "core seconds": round(spent, 1)})
        rows[-1] |= {"balanced of 10": balanced, "return": round(mean_return, 1)}
        print(rows[-1], flush=True)
    return rows


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """Read the rows of runs that are done."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        kinds = {"system": str, "core seconds": float, "return": float}
        return [{key: kinds.get(key, int)(value) for key, value in row.items()} for row in csv.DictReader(file)]


def write(rows: list[dict[str, Any]], out: pathlib.Path) -> None:
    """Write the table and the picture."""
    from matplotlib.figure import Figure

    write_rows(out / "swing_up.csv", rows)
    figure = Figure(figsize=(8.0, 3.2), dpi=120, layout="constrained")
    for axes, system in zip(figure.subplots(1, 2), SYSTEMS, strict=True):
        for seed in sorted({row["seed"] for row in rows if row["system"] == system}):
            chosen = [row for row in rows if row["system"] == system and row["seed"] == seed]
            seconds, returns = [r["core seconds"] for r in chosen], [r["return"] for r in chosen]
            axes.plot(seconds, returns, marker="o", markersize=3, label=f"seed {seed}")
        axes.set(title=f"SHAC on {system}", xlabel="seconds of one core", ylabel="return of an episode")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    with atomic_write(out / "swing_up.png") as picture:
        figure.savefig(picture, format="png")


def main() -> None:
    """Train, and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600_000, help="at most, of each run")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/ground_truth"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = read(arguments.out / "swing_up.csv")
    done = {(row["system"], row["seed"]) for row in rows}
    for system in SYSTEMS:
        for seed in range(arguments.seeds):
            if (system, seed) not in done:
                rows += train(system, seed, arguments.steps)
                write(rows, arguments.out)


if __name__ == "__main__":
    main()
