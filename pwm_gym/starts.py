"""Where imagined rollouts start: one sampler for replay buffers, datasets, real envs and plain observations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.buffers import ReplayBuffer

__all__ = ["StartSampler", "StartSource", "Starts", "as_start_sampler"]


class Starts(NamedTuple):
    """Real states for imagined rollouts to start from."""

    observations: Any  # (B, *shape), real observations; a dict of such arrays for Dict spaces
    physics_state: np.ndarray | None = None  # (B, P), float64, from which the simulator can draw them


StartSampler = Callable[[int, np.random.Generator], Starts]


@runtime_checkable
class StartSource(Protocol):
    """Anything that samples real states itself, as `SequenceReplayBuffer` does."""

    def sample_starts(self, batch_size: int, rng: np.random.Generator | None = None, physics: bool = False) -> Starts:
        """Sample `batch_size` states; with `physics`, only such whose physics state is known."""
        ...


def _stack(rows: list[Any]) -> Any:
    if isinstance(rows[0], dict):
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return np.stack(rows)


def _from_env(env: gym.Env, physics: bool) -> StartSampler:
    def sample(batch_size: int, rng: np.random.Generator) -> Starts:
        resets = [env.reset(seed=int(rng.integers(2**31))) for _ in range(batch_size)]
        states = [info.get("physics_state") for _, info in resets]
        if physics and any(state is None for state in states):
            raise ValueError("expected a 'physics_state' in the start env's reset infos. Use a pwm_gym/<task>-v0 env.")
        return Starts(_stack([o for o, _ in resets]), np.stack(states) if physics else None)  # type: ignore[arg-type]

    return sample


def _from_observations(observations: Any) -> StartSampler:
    entries = observations.values() if isinstance(observations, dict) else [observations]
    counts = {np.shape(entry)[:1] for entry in entries}  # one of (N,)
    if len(counts) != 1 or counts & {(), (0,)}:
        shapes = [tuple(np.shape(entry)) for entry in entries]
        raise ValueError(f"expected at least one start observation, as (N, *shape) with one N, got shapes {shapes}.")
    count = counts.pop()[0]

    def sample(batch_size: int, rng: np.random.Generator) -> Starts:
        index = rng.integers(count, size=batch_size)
        if isinstance(observations, dict):
            return Starts({key: value[index] for key, value in observations.items()})
        return Starts(observations[index])

    return sample


def as_start_sampler(start: Any, physics: bool = False) -> StartSampler:
    """Make a sampler of start states.

    Args:
        start: One of
            real observations, (N, *shape), array, tensor or dict of such: sampled uniformly;
            a `SequenceReplayBuffer` or another `StartSource`: sampled by itself;
            an SB3 `ReplayBuffer`: sampled uniformly over its transitions;
            a Minari dataset (anything with `iterate_episodes`): all its observations but the last of each episode;
            a `gymnasium.Env`: its initial states, one reset for each;
            a function `(batch_size, rng) -> Starts`.
        physics: Sample only states that the simulator can draw, with their physics state.

    Raises:
        TypeError: If `start` is none of these.
        ValueError: If it holds nothing to sample.
    """
    if isinstance(start, StartSource):
        return lambda batch_size, rng: start.sample_starts(batch_size, rng, physics)
    if isinstance(start, ReplayBuffer):

        def sample(batch_size: int, rng: np.random.Generator) -> Starts:
            if start.size() == 0:
                raise ValueError("expected transitions in the replay buffer, got an empty one. Collect data first.")
            time, env = rng.integers(start.size(), size=batch_size), rng.integers(start.n_envs, size=batch_size)
            stored: Any = start.observations
            return Starts(
                {k: v[time, env] for k, v in stored.items()} if isinstance(stored, dict) else stored[time, env]
            )

        return sample
    if isinstance(start, gym.Env):
        return _from_env(start, physics)
    if isinstance(start, np.ndarray | torch.Tensor | dict):
        return _from_observations(start)
    if hasattr(start, "iterate_episodes"):
        episodes = [episode.observations for episode in start.iterate_episodes()]
        if not episodes:
            raise ValueError("expected episodes in the dataset, got none.")
        if isinstance(episodes[0], dict):
            return _from_observations({k: np.concatenate([e[k][:-1] for e in episodes]) for k in episodes[0]})
        return _from_observations(np.concatenate([episode[:-1] for episode in episodes]))
    if callable(start):
        return start
    raise TypeError(
        f"expected start observations (N, *shape), a replay buffer, a dataset, an env or a function, got "
        f"{type(start).__name__}."
    )
