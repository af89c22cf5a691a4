"""What the agents' tests share: a PWM that trains in a moment, toy envs of any spaces, exact comparison of agents."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from pwm_gym import PWM

_TINY: dict[str, Any] = {
    "learning_starts": 10,
    "train_freq": 5,
    "batch_size": 8,
    "model_batch_size": 8,
    "horizon": 3,
    "model_horizon": 3,
    "buffer_size": 3_000,
    "policy_kwargs": {
        "net_arch": [16],
        "world_model_kwargs": {"latent_dim": 16, "encoder_dim": 16, "mlp_dim": 16, "num_bins": 21},
    },
    "seed": 0,
    "device": "cpu",
}


@pytest.fixture
def make_agent() -> Callable[..., PWM]:
    """Make a tiny PWM on an env; MultiInputPolicy where the observations are a Dict."""

    def make(env: Any, **overrides: Any) -> PWM:
        space = getattr(env, "single_observation_space", None) or getattr(env, "observation_space", None)
        policy = overrides.pop("policy", "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy")
        return PWM(policy, env, **{**copy.deepcopy(_TINY), **overrides})

    return make


class Toy(gym.Env):
    """Observations drawn from the space, rewards of the action's size, episodes of `length` steps.

    Random numbers are drawn at resets only. An episode is cut by a time limit, or terminates where `terminates` is set.
    `faults` says at which step since the env was made which number comes out wrong: {17: ("reward", nan)}; kinds are
    "reward", "observation" and "last observation", and "reset" at the reset that follows.
    """

    def __init__(
        self,
        observation_space: spaces.Space | None = None,
        action_space: spaces.Space | None = None,
        length: int = 8,
        terminates: bool = False,
        faults: dict[int, tuple[str, float]] | None = None,
    ) -> None:
        self.observation_space = copy.deepcopy(observation_space or spaces.Box(-1.0, 1.0, (3,), np.float32))
        self.action_space = copy.deepcopy(action_space or spaces.Box(-1.0, 1.0, (2,), np.float32))
        self.length, self.terminates, self.faults = length, terminates, dict(faults or {})
        self.steps = self.elapsed = 0

    def _observe(self, kinds: tuple[str, ...]) -> Any:
        observation = self.observation_space.sample()
        kind, value = self.faults.get(self.steps, ("", 0.0))
        if kind in kinds:
            del self.faults[self.steps]
            broken = observation["box"] if isinstance(observation, dict) else observation
            broken[..., -1] = value
        return observation

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        self.elapsed = 0
        return self._observe(("reset",)), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), f"{action} is outside {self.action_space}"
        self.steps, self.elapsed = self.steps + 1, self.elapsed + 1
        ended = self.elapsed == self.length
        reward = -float(np.square(action).mean())
        if self.faults.get(self.steps, ("",))[0] == "reward":
            reward = self.faults.pop(self.steps)[1]
        observation = self._observe(("last observation",) if ended else ("observation",))
        return observation, reward, ended and self.terminates, ended and not self.terminates, {}


@pytest.fixture
def toy() -> type[Toy]:
    return Toy


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _leaves(f"{name}.{i}", inner)
    else:
        yield name, value


@pytest.fixture
def differences() -> Callable[[PWM, PWM], list[str]]:
    """Name every number in which the weights, targets, statistics and optimizers of two agents are not bit-equal."""

    def compare(first: PWM, second: PWM) -> list[str]:
        ours, theirs = (dict(_leaves("", agent.get_parameters())) for agent in (first, second))
        assert len(ours) > 50, "an agent has more parameters than that"
        if ours.keys() != theirs.keys():
            return sorted(ours.keys() ^ theirs.keys())
        equal = {k: np.array_equal(v, theirs[k]) for k, v in ours.items()}
        return [name for name, same in equal.items() if not same]

    return compare
