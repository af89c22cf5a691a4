"""How long an action takes: TD-MPC2's planner, PWM and SAC, for one env and for 16, side by side in one process.

    python benchmarks/latency.py                    # results/planning/latency.csv
    python benchmarks/latency.py --device cuda --out latency_gpu.csv

The agents are untrained: what they answer does not change how long it takes. They take turns, so that whatever else the
machine does meets all of them, and call for at least 50 ms each time; medians over the calls are reported, and ratios
between medians of the same run. Each call is SB3's `predict` on NumPy observations, as an evaluation makes it: planners
get their state back, and begin with the last plan.
"""

from __future__ import annotations

import argparse
import pathlib
import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import SAC
from tables import write_rows

from pwm_gym import PWM, TDMPC2, plan_with

TURN = 0.05  # seconds that an agent calls at least before the next one does
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


def measure(agents: dict[str, Any], num_envs: int, turns: int) -> dict[str, float]:
    """Measure the median time of a call, in milliseconds, by agent, over `turns` of each."""
    rng = np.random.default_rng(0)
    states: dict[str, Any] = dict.fromkeys(agents)
    times: dict[str, list[float]] = {name: [] for name in agents}
    for turn in range(turns + 1):  # the first one warms up
        for name, agent in agents.items():
            end = time.perf_counter() + TURN
            while (start := time.perf_counter()) < end:
                observations = rng.normal(size=(num_envs, *agent.observation_space.shape)).astype(np.float32)
                _, states[name] = agent.predict(observations, state=states[name], deterministic=True)
                if turn:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="walker-walk", help="whose spaces are used (default: %(default)s)")
    parser.add_argument("--sizes", nargs="+", default=["1M", "5M"], help="of TDMPC2 (default: 1M 5M)")
    parser.add_argument("--envs", type=int, nargs="+", default=[1, 16], help="(default: 1 16)")
    parser.add_argument("--turns", type=int, default=21, help="of each agent (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    agents = make_agents(arguments.task, arguments.sizes, arguments.device)
    rows = []
    for num_envs in arguments.envs:
        medians = measure(agents, num_envs, arguments.turns)
        for name, median in medians.items():
            rows.append(
                {
                    "agent": name,
                    "envs": num_envs,
                    "median_ms": f"{median:.2f}",
                    "ms_per_env": f"{median / num_envs:.2f}",
                    "times_pwm": f"{median / medians['PWM']:.1f}",
                    "turns": arguments.turns,
                    "task": arguments.task,
                    "device": arguments.device,
                }
            )
            print(rows[-1], flush=True)
    write_rows(arguments.out, rows)


if __name__ == "__main__":
    main()
