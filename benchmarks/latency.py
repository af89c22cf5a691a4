"""How long an action takes: TD-MPC2's planner, PWM and SAC, for one env and for 16, side by side in one process.

    python benchmarks/latency.py                    # results/planning/latency.csv
    python benchmarks/latency.py --device cuda --out latency_gpu.csv

The agents are untrained: what they answer does not change how long it takes. They take turns, so that whatever else
the machine does meets all of them; medians are reported, and ratios between medians of the same run. Each call is SB3's
`predict` on NumPy observations, as an evaluation makes it: planners get their state back, and begin with the last plan.
"""

from __future__ import annotations

import argparse
import csv
import io
import pathlib
import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import SAC

from pwm_gym import PWM, TDMPC2, plan_with
from pwm_gym.serialization import atomic_write

OUT = pathlib.Path(__file__).resolve().parents[1] / "results" / "planning" / "latency.csv"


def make_agents(task: str, sizes: list[str], device: str) -> dict[str, Any]:
    """Make one agent of each kind, by name."""
    env, common = gym.make(f"pwm_gym/{task}-v0"), {"buffer_size": 1_000, "seed": 0, "device": device}
    pwm = PWM("MlpPolicy", env, **common)  # type: ignore[arg-type]
    agents = {"SAC": SAC("MlpPolicy", env, **common), "PWM": pwm, "PWM, planning on top": plan_with(pwm)}  # type: ignore[arg-type]
    for size in sizes:
        kwargs = {"world_model_kwargs": {"size": size}}
        agents[f"TDMPC2, {size}"] = TDMPC2("MlpPolicy", env, policy_kwargs=kwargs, **common)  # type: ignore[arg-type]
    return agents


def measure(agents: dict[str, Any], num_envs: int, repeats: int) -> dict[str, float]:
    """Measure the median time of a call, in milliseconds, by agent."""
    rng = np.random.default_rng(0)
    states: dict[str, Any] = dict.fromkeys(agents)
    times: dict[str, list[float]] = {name: [] for name in agents}
    for repeat in range(repeats + 1):  # the first one warms up
        for name, agent in agents.items():
            observations = rng.normal(size=(num_envs, *agent.observation_space.shape)).astype(np.float32)
            start = time.perf_counter()
            _, states[name] = agent.predict(observations, state=states[name], deterministic=True)
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="walker-walk", help="whose spaces are used (default: %(default)s)")
    parser.add_argument("--sizes", nargs="+", default=["1M", "5M"], help="of TDMPC2 (default: 1M 5M)")
    parser.add_argument("--envs", type=int, nargs="+", default=[1, 16], help="(default: 1 16)")
    parser.add_argument("--repeats", type=int, default=21, help="calls of each agent (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    agents = make_agents(arguments.task, arguments.sizes, arguments.device)
    rows = []
    for num_envs in arguments.envs:
        medians = measure(agents, num_envs, arguments.repeats)
        for name, median in medians.items():
            rows.append(
                {
                    "agent": name,
                    "envs": num_envs,
                    "median_ms": f"{median:.2f}",
                    "ms_per_env": f"{median / num_envs:.2f}",
                    "times_pwm": f"{median / medians['PWM']:.1f}",
                    "repeats": arguments.repeats,
                    "task": arguments.task,
                    "device": arguments.device,
                }
            )
            print(rows[-1], flush=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(arguments.out) as file:
        file.write(text.getvalue().encode())


if __name__ == "__main__":
    main()
