"""SB3's replay buffers, cut into episodes and filled with them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer

from pwm_gym.datasets.storage import Episode

__all__ = ["add_to_buffer", "episodes_of_buffer"]


def add_to_buffer(episodes: Iterable[Episode], buffer: ReplayBuffer) -> None:
    """Add episodes to a replay buffer of one env, step by step; see `OfflineDataset.add_to`."""
    if buffer.n_envs != 1:
        raise ValueError(f"expected a buffer of one env, got one of {buffer.n_envs}.")
    for episode in episodes:
        observations, actions = np.asarray(episode.observations), np.asarray(episode.actions)
        if buffer.obs_shape != observations.shape[1:] or buffer.action_dim != actions.shape[1]:
            raise ValueError(
                f"expected observations {buffer.obs_shape} and {buffer.action_dim} actions as in the buffer, got "
                f"{observations.shape[1:]} and {actions.shape[1]}."
            )
        for t, action in enumerate(actions):
            last = t == len(actions) - 1
            infos = [{"TimeLimit.truncated": True}] if last and not episode.terminated else [{}]
            # Whatever comes after an episode is another's, so that its last step must end it.
            buffer.add(
                observations[t][None], observations[t + 1][None], action[None], episode.rewards[t : t + 1],
                np.array([last]), infos,
            )  # fmt: skip


def episodes_of_buffer(buffer: ReplayBuffer) -> list[Episode]:
    """Cut a replay buffer into episodes, env by env and oldest first; see `OfflineDataset.from_replay_buffer`."""
    if isinstance(buffer, DictReplayBuffer) or len(buffer.obs_shape) != 1:
        raise ValueError(
            f"expected vector observations, got {buffer.observation_space}. Wrap the env in "
            f"gymnasium.wrappers.FlattenObservation."
        )
    if not isinstance(buffer.action_space, spaces.Box):
        raise ValueError(f"expected a Box action space, got {buffer.action_space}.")
    order = np.arange(buffer.size())
    if buffer.full:
        order = (order + buffer.pos) % buffer.buffer_size
    if buffer.optimize_memory_usage and buffer.full:  # the oldest row holds the newest step's next observation
        order = order[1:]
    episodes: list[Episode] = []
    for env in range(buffer.n_envs):
        episodes += _of_env(buffer, order, env)
    if not episodes:
        raise ValueError("expected transitions in the replay buffer, got an empty one. Collect data first.")
    return episodes


def _of_env(buffer: ReplayBuffer, order: np.ndarray, env: int) -> list[Episode]:
    """Cut one env's steps, given in order of time. An episode ends at its flag, or where the next step is another's."""
    compact = buffer.optimize_memory_usage
    observations, after = buffer.observations[order, env], (order + 1) % buffer.buffer_size
    next_observations = buffer.observations[after, env] if compact else buffer.next_observations[order, env]
    actions, rewards = buffer.actions[order, env], buffer.rewards[order, env]
    done = buffer.dones[order, env] > 0
    timeout = buffer.timeouts[order, env] > 0
    continues = ~done[:-1]
    numbers = getattr(buffer, "episode", None)
    if numbers is not None:
        continues &= numbers[order[:-1], env] == numbers[order[1:], env]
    elif not compact:
        continues &= (next_observations[:-1] == observations[1:]).all(1)
    begins = np.concatenate([[0], np.flatnonzero(~continues) + 1, [len(order)]])
    episodes = []
    for first, end in zip(begins[:-1], begins[1:], strict=True):
        ended = bool(end and done[end - 1])
        if compact and (ended or end < len(order)):  # where its last step led was not kept
            end, ended = end - 1, False
        if end <= first:
            continue
        episodes.append(
            Episode(
                np.concatenate([observations[first:end], next_observations[end - 1 : end]]).astype(np.float32),
                actions[first:end].astype(np.float32),
                rewards[first:end].astype(np.float32),
                terminated=ended and not timeout[end - 1],
                truncated=ended and bool(timeout[end - 1]),
            )
        )
    return episodes
