"""Train SHAC to run on Hopper's true dynamics, and measure its speed on the unmodified Hopper-v5.

The reward is Hopper-v5's forward reward, minus smooth costs of what terminates it: the tilt and a low torso. An
episode's end has no gradient, so a policy that learns from Hopper-v5's own reward dives forward.

    python benchmarks/shac_hopper.py      # results/ground_truth/hopper.csv, hopper.png, hopper_frames.png

A run that was stopped goes on from its last evaluation, whose agent is in runs/shac_hopper/.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from tables import write_rows

from pwm_gym import SHAC, make_differentiable
from pwm_gym.serialization import atomic_write


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
    speed, length, mean_return = np.mean(results, 0).tolist()
    return {"speed": round(speed, 2), "length": round(length, 1), "return": round(mean_return, 1)}


def write(rows: list[dict[str, Any]], agent: SHAC, out: pathlib.Path) -> None:
    """Write the curve, and eight frames of a second of Hopper-v5."""
    import imageio.v3 as iio
    from matplotlib.figure import Figure

    write_rows(out / "hopper.csv", rows)
    figure = Figure(figsize=(5.0, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot([row["steps"] for row in rows], [row["speed"] for row in rows], "o-", markersize=3)
    axes.axhline(3.0, color="0.6", linestyle="--")
    axes.set(title="SHAC on Hopper-v5's true dynamics", xlabel="env steps", ylabel="speed of an episode in m/s")
    axes.grid(alpha=0.3)
    with atomic_write(out / "hopper.png") as picture:
        figure.savefig(picture, format="png")
    env = gym.make("Hopper-v5", render_mode="rgb_array", width=160, height=240, camera_name="track")
    observation, _ = env.reset(seed=0)
    frames: list[Any] = []
    for step in range(325):
        if step >= 200 and step % 16 == 0:
            frames.append(env.render())
        action, _ = agent.predict(observation.astype(np.float32), deterministic=True)
        observation, _, terminated, *_ = env.step(action)
        if terminated:
            observation, _ = env.reset()
    with atomic_write(out / "hopper_frames.png") as picture:
        picture.write(iio.imwrite("<bytes>", np.hstack(frames), extension=".png"))


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
    parser.add_argument("--state", type=pathlib.Path, default=pathlib.Path("runs/shac_hopper"))
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
    state = arguments.state / f"seed{arguments.seed}"
    rows: list[dict[str, Any]] = []
    if (state / "rows.json").exists():
        rows = json.loads((state / "rows.json").read_text(encoding="utf-8"))
        agent = SHAC.load(state / f"agent-{rows[-1]['steps']}", env=env)
    else:
        settings = {"learning_rate": arguments.learning_rate, "horizon": arguments.horizon}
        agent = SHAC("MlpPolicy", env, **settings, critic_epochs=arguments.critic_epochs, seed=arguments.seed)
    while agent.num_timesteps < arguments.steps:
        start = time.process_time()
        agent.learn(4_000, reset_num_timesteps=False)
        spent = time.process_time() - start + (rows[-1]["core seconds"] if rows else 0.0)
        rows.append({"steps": agent.num_timesteps, "core seconds": round(spent), **evaluate(agent)})
        print(rows[-1], flush=True)
        agent.save(state / f"agent-{agent.num_timesteps}")
        with atomic_write(state / "rows.json") as file:
            file.write(json.dumps(rows).encode())
    write(rows, agent, arguments.out)


if __name__ == "__main__":
    main()
