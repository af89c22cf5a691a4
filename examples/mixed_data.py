"""Collect a small offline dataset of three tasks: whatever PWM met while it began to learn, and random actions.

python examples/mixed_data.py --out runs/three_tasks
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import gymnasium as gym
import numpy as np

from pwm_gym import PWM, OfflineDataset
from pwm_gym.datasets import Episode
from pwm_gym.replay import SequenceReplayBuffer

# Decisions that PWM takes in each task
DECISIONS = {"cartpole-swingup": 3_000, "reacher-easy": 3_000, "walker-walk": 4_000}


def replayed(buffer: SequenceReplayBuffer, task: int) -> Iterator[Episode]:
    """Yield the whole episodes of a replay buffer of one env."""
    ends = np.flatnonzero(buffer.dones[: buffer.size(), 0])
    for first, last in zip([0, *(ends[:-1] + 1)], ends, strict=True):
        steps = slice(first, last + 1)
        observations = np.concatenate([buffer.observations[steps, 0], buffer.next_observations[last : last + 1, 0]])
        truncated = bool(buffer.timeouts[last, 0])
        yield Episode(observations, buffer.actions[steps, 0], buffer.rewards[steps, 0], not truncated, truncated, task)


def random(env: gym.Env, episodes: int, task: int, seed: int) -> Iterator[Episode]:
    """Yield episodes of uniformly random actions."""
    env.action_space.seed(seed)
    for episode in range(episodes):
        observations, actions, rewards, ended = [env.reset(seed=seed + episode)[0]], [], [], False
        while not ended:
            actions.append(env.action_space.sample())
            observation, reward, terminated, truncated, _ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(float(reward))
            ended = terminated or truncated
        yield Episode(np.stack(observations), np.stack(actions), np.array(rewards), terminated, truncated, task)


def main() -> None:
    """Collect and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the dataset")
    parser.add_argument("--random-episodes", type=int, default=8, help="of each task")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    episodes: list[Episode] = []
    for task, (name, decisions) in enumerate(DECISIONS.items()):
        env = gym.make(f"pwm_gym/{name}-v0")
        agent = PWM("MlpPolicy", env, seed=arguments.seed, device="cpu")
        agent.learn(decisions)
        episodes += replayed(agent.sequence_replay(), task)
        episodes += random(env, arguments.random_episodes, task, arguments.seed)
        returns = [float(e.rewards.sum()) for e in episodes if e.task == task]
        print(f"{name}: {len(returns)} episodes, returns {min(returns):.0f} to {max(returns):.0f}", flush=True)
    OfflineDataset(episodes, list(DECISIONS)).save(arguments.out)


if __name__ == "__main__":
    main()
