"""Collect a small offline dataset of mixed quality: all that a random search met while it looked for linear policies.

Each episode acts by a = tanh(W o + b + noise). The first ones draw W and b at random, the later ones near the best so
far, so returns go from random to moderate. With the data comes no gradient and no network, so this takes a minute.

    python examples/mixed_data.py cartpole-swingup reacher-easy walker-walk --out runs/three_tasks
"""

from __future__ import annotations

import argparse

import gymnasium as gym
import numpy as np

from pwm_gym import OfflineDataset
from pwm_gym.datasets import Episode


def run(env: gym.Env, weights: np.ndarray, rng: np.random.Generator, task: int) -> Episode:
    """Act by one linear policy, (A, O + 1), for one episode."""
    observations, actions, rewards, ended = [env.reset(seed=int(rng.integers(2**31)))[0]], [], [], False
    noise = rng.choice([0.0, 0.3, 1.0])
    while not ended:
        action = weights @ np.append(observations[-1], 1.0) + noise * rng.normal(size=len(weights))
        actions.append(np.tanh(action).astype(np.float32))
        observation, reward, terminated, truncated, _ = env.step(actions[-1])
        observations.append(observation)
        rewards.append(float(reward))
        ended = terminated or truncated
    return Episode(np.stack(observations), np.stack(actions), np.array(rewards), terminated, truncated, task)


def search(env: gym.Env, episodes: int, rng: np.random.Generator, task: int) -> list[Episode]:
    """Look for a linear policy, and keep all episodes."""
    shape = (env.action_space.shape[0], env.observation_space.shape[0] + 1)  # type: ignore[index]
    best, highest, found = np.zeros(shape), -np.inf, []
    for number in range(episodes):
        weights = rng.normal(size=shape) if number < episodes // 2 else best + 0.3 * rng.normal(size=shape)
        found.append(run(env, weights, rng, task))
        if found[-1].rewards.sum() > highest:
            best, highest = weights, found[-1].rewards.sum()
    return found


def main() -> None:
    """Collect and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", help="such as walker-walk")
    parser.add_argument("--out", required=True, help="folder of the dataset")
    parser.add_argument("--episodes", type=int, default=60, help="of each task")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    episodes: list[Episode] = []
    for task, name in enumerate(arguments.tasks):
        rng = np.random.default_rng([arguments.seed, task])
        found = search(gym.make(f"pwm_gym/{name}-v0"), arguments.episodes, rng, task)
        returns = [float(episode.rewards.sum()) for episode in found]
        print(f"{name}: {len(found)} episodes, returns {min(returns):.0f} to {max(returns):.0f}", flush=True)
        episodes += found
    OfflineDataset(episodes, arguments.tasks).save(arguments.out)


if __name__ == "__main__":
    main()
