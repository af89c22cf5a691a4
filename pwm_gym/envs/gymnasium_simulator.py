"""A Gymnasium MuJoCo task that knows the Jacobian of its step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mujoco
import numpy as np
from gymnasium import spaces

from pwm_gym.envs.differentiable_simulator import DifferentiableSimulator, Step
from pwm_gym.envs.mujoco_jacobians import TangentSpace, difference

__all__ = ["GymnasiumSimulator"]

# Arrays that mj_step computes on its way. One that a Gymnasium task reads before it steps belongs to its state.
_DERIVED = (
    "xpos",
    "xipos",
    "xquat",
    "xmat",
    "ximat",
    "geom_xpos",
    "site_xpos",
    "subtree_com",
    "subtree_linvel",
    "cvel",
    "cinert",
    "cfrc_ext",
    "cacc",
    "qacc",
    "qfrc_actuator",
    "qfrc_constraint",
    "actuator_force",
    "actuator_length",
    "actuator_velocity",
    "ten_length",
    "sensordata",
)


class GymnasiumSimulator(DifferentiableSimulator):
    """A Gymnasium MuJoCo task: its whole step is differenced, as rewards are computed inside, with any integrator.

    Some tasks read, before they step, what the step before left behind (Ant its torso's, Humanoid its bodies'
    positions of one substep ago). Such arrays are found by trying, and belong to the tangent state.

    Args:
        env: The task, unwrapped.
        make_copy: Makes another one like it.
        integrator: See `DifferentiableSimulator`.

    Raises:
        ValueError: If the task's spaces aren't boxes.

    Example:
        >>> import gymnasium as gym
        >>> make = lambda: gym.make("InvertedPendulum-v5").unwrapped
        >>> simulator = GymnasiumSimulator(make(), make)
        >>> simulator.reset(seed=0).shape
        (4,)
        >>> simulator.step(np.array([0.5]), jacobian=True).jacobian.shape  # (4 + 4 + 1, 4 + 1)
        (9, 5)
    """

    def __init__(self, env: Any, make_copy: Callable[[], Any], integrator: str | None = None) -> None:
        super().__init__(env, env.model, env.data, integrator)
        if not isinstance(env.observation_space, spaces.Box) or len(env.observation_space.shape) != 1:
            raise ValueError(f"expected observations in a flat Box, got {env.observation_space}.")
        low, high = env.observation_space.low, env.observation_space.high
        self.observation_space = spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)
        self.action_space = env.action_space
        self._make_copy = make_copy
        self._memory, self._shown = self._find_stale()
        self.tangent_dim = self._space.dim + len(_read(self._data, self._memory))
        self._probe: Any = None  # a second env for differences; made when needed

    def reset(self, seed: int) -> np.ndarray:
        """Start an episode."""
        return np.array(self.env.reset(seed=seed)[0], np.float64)

    def read(self) -> np.ndarray:
        """Read the full state, (P,): all inputs of mj_step, and what the step before left behind for the task."""
        return np.concatenate([self._space.read(), _read(self._data, self._memory + self._shown)])

    def write(self, state: np.ndarray) -> np.ndarray:
        """Put the simulator into a full state, (P,)."""
        left_behind = len(_read(self._data, self._memory + self._shown))
        inputs = state[: len(state) - left_behind]
        self._space.write(inputs)
        mujoco.mj_forward(self._model, self._data)  # for the renderer
        self._space.write(inputs)  # mj_forward moved the warm start
        _write(self._data, self._memory + self._shown, state[len(inputs) :])
        self._data.warning.number[:] = 0
        return np.array(self.env._get_obs(), np.float64)

    def _find_stale(self) -> tuple[list[str], list[str]]:
        """Find by trying which derived arrays the next step depends on, and which others the observation does."""
        middle = np.clip(np.zeros(self.action_space.shape), self.action_space.low, self.action_space.high)
        self.env.reset(seed=0)
        self.env.step(middle)
        start = self._space.read()
        arrays = {name: getattr(self._data, name).copy() for name in _DERIVED}

        def put(name: str | None) -> None:
            self._space.write(start)
            for other, values in arrays.items():
                getattr(self._data, other)[...] = values + (1e-3 if other == name else 0.0)

        def stepped(name: str | None) -> np.ndarray:
            put(name)
            observation, reward, *_ = self.env.step(middle)
            return np.append(observation, reward)

        def shown(name: str | None) -> np.ndarray:
            put(name)
            return np.array(self.env._get_obs())

        memory = [name for name in _DERIVED if not np.array_equal(stepped(None), stepped(name))]
        return memory, [n for n in _DERIVED if n not in memory and not np.array_equal(shown(None), shown(n))]

    def step(self, action: np.ndarray, jacobian: bool) -> Step:
        """Take one step of the task."""
        slopes = self._differentiate(action) if jacobian else None
        observation, reward, terminated, _, _ = self.env.step(action)
        observation = np.array(observation, np.float64)
        if self.culprit() is not None:
            return Step(np.full_like(observation, np.nan), np.nan, False, slopes)
        if jacobian and not np.array_equal(np.append(observation, reward), self._plain):
            raise ValueError(
                f"expected {type(self.env).__name__} to be a function of MuJoCo's state and the action, got another "
                f"observation or reward from the same state: it keeps something of its own between steps. Use it "
                f"without gradients, or move what it keeps into MuJoCo's userdata."
            )
        return Step(observation, float(reward), bool(terminated), slopes)

    def _differentiate(self, action: np.ndarray) -> np.ndarray:
        """Difference the next step in (state, memory, action), in the second env."""
        if self._probe is None:
            self._probe = self._make_copy()
            self._probe.model.opt.integrator = self._model.opt.integrator
            self._probe.reset(seed=0)
            self._probe_space = TangentSpace(self._probe.model, self._probe.data)
            self._after = mujoco.MjData(self._probe.model)
        probe, space, n = self._probe, self._probe_space, self._space.dim
        start, memory = self._space.read(), _read(self._data, self._memory)
        width = n + len(memory)

        def evaluate(column: int, step: float) -> np.ndarray:
            remembered, chosen = memory.copy(), action.copy()
            if column < n:
                space.displace(start, column, step)
            else:
                space.write(start)
                part, index = (remembered, column - n) if column < width else (chosen, column - width)
                part[index] += step
            _write(probe.data, self._memory, remembered)
            observation, reward, *_ = probe.step(chosen)
            moved = space.between(origin, space.state())
            return np.concatenate([moved, _read(probe.data, self._memory), observation, [reward]])

        origin = space.state()  # any state, until the plain outcome is known
        plain = evaluate(width, 0.0)
        origin, plain[:n] = space.state(), 0.0
        self._plain = plain[width:]
        mujoco.mj_copyData(self._after, probe.model, probe.data)
        columns = [difference(functools.partial(evaluate, i), plain) for i in range(n)]
        driven = [
            difference(functools.partial(evaluate, width + j), plain, room)
            for j, room in enumerate(self.action_space.high - action)
        ]
        # What is remembered has no part in the physics, so its result is put there instead of computed again.
        probe.do_simulation = lambda *_: mujoco.mj_copyData(probe.data, probe.model, self._after)
        columns += [difference(functools.partial(evaluate, i), plain) for i in range(n, width)]
        del probe.do_simulation
        return np.stack(columns + driven, axis=1)


def _read(data: mujoco.MjData, names: list[str]) -> np.ndarray:
    return np.concatenate([np.ravel(getattr(data, name)) for name in names] or [np.empty(0)])


def _write(data: mujoco.MjData, names: list[str], values: np.ndarray) -> None:
    for name in names:
        array = getattr(data, name)
        array[...] = values[: array.size].reshape(array.shape)
        values = values[array.size :]
