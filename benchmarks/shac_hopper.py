"""Train SHAC to run on Hopper's true dynamics, and measure its speed on the unmodified Hopper-v5.

The reward is Hopper-v5's forward reward, minus smooth costs of what terminates it: the tilt and a low torso. An
episode's end has no gradient, so a policy that learns from Hopper-v5's own reward dives forward.

    python benchmarks/shac_hopper.py      # results/ground_truth/hopper.csv
"""

from __future__ import annotations

import argparse
import csv
import pathlib
import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv

from pwm_gym import SHAC, make_differentiable


class ForwardHopper(HopperEnv):
    """Run forward, upright: 1 + x' - (tilt / 0.2)² - 62.5 min(height - 1.1, 0)² - the control cost."""

    def _get_rew(self, x_velocity: float, action: np.ndarray) -> tuple[float, dict[str, float]]:
        height, tilt = self.data.qpos[1:3]
        cost = (tilt / 0.2) ** 2 + 62.5 * min(height - 1.1, 0.0) ** 2 + self.control_cost(action)
        return 1.0 + x_velocity - cost, {}


def evaluate(agent: SHAC, episodes: int = 3) -> dict[str, float]:
    """Run deterministic episodes of Hopper-v5: mean speed in m/s, length in steps, and return."""
    env, results = gym.make("Hopper-v5"), []
    for seed in range(episodes):
        observation, _ = env.reset(seed=seed)
        steps, total, ended = 0, 0.0, False
        while not ended:
            action, _ = agent.predict(observation.astype(np.float32), deterministic=True)
            observation, reward, terminated, truncated, infos = env.step(action)
            steps, total, ended = steps + 1, total + float(reward), terminated or truncated
        results.append((infos["x_position"] / (steps * 0.008), steps, total))
    speed, length, mean_return = np.mean(results, 0)
    return {"speed": round(speed, 2), "length": round(length, 1), "return": round(mean_return, 1)}


def main() -> None:
    """Train, print, and write the curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--num-envs", type=int, default=8)
    parser.add_argument("--horizon", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--critic-epochs", type=int, default=12)
    parser.add_argument("--integrator", default="implicitfast", help="while training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/ground_truth"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gym.register("ForwardHopper-v0", entry_point=ForwardHopper, max_episode_steps=1000)
    env = make_differentiable(
        "ForwardHopper-v0",
        arguments.num_envs,
        integrator=arguments.integrator,
        healthy_angle_range=(-0.8, 0.8),
    )
    agent = SHAC(
        "MlpPolicy",
        env,
        learning_rate=arguments.learning_rate,
        horizon=arguments.horizon,
        critic_epochs=arguments.critic_epochs,
        seed=arguments.seed,
    )
    rows: list[dict[str, Any]] = []
    while agent.num_timesteps < arguments.steps:
        agent.learn(4_000, reset_num_timesteps=not rows)
        row = {"steps": agent.num_timesteps, "core seconds": round(time.process_time())}
        rows.append({**row, **evaluate(agent)})
        print(rows[-1], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with open(arguments.out / "hopper.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
