"""One simulated task that knows the Jacobian of its step: dm_control's tasks and Gymnasium's MuJoCo tasks."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import mujoco
import numpy as np
from dm_control.rl.control import PhysicsError
from gymnasium import spaces

from pwm_gym.envs.dm_control import DMControlEnv
from pwm_gym.envs.mujoco_jacobians import TangentSpace, check_model, difference, step_jacobians

__all__ = ["DMControlSimulator", "GymnasiumSimulator", "Simulator", "Step"]

# Arrays that mj_step computes on its way. One that a Gymnasium task reads before it steps belongs to its state.
_DERIVED = (
    "xpos xipos xquat xmat ximat geom_xpos site_xpos subtree_com subtree_linvel cvel cinert cfrc_ext cacc qacc "
    "qfrc_actuator qfrc_constraint actuator_force actuator_length actuator_velocity ten_length sensordata"
).split()
_BAD = {
    "qpos": mujoco.mjtWarning.mjWARN_BADQPOS,
    "qvel": mujoco.mjtWarning.mjWARN_BADQVEL,
    "qacc": mujoco.mjtWarning.mjWARN_BADQACC,
    "ctrl": mujoco.mjtWarning.mjWARN_BADCTRL,
}
_BAD_WARNINGS = [int(warning) for warning in _BAD.values()]


class Step(NamedTuple):
    """One env step of one simulator."""

    observation: np.ndarray  # (O,), float64
    reward: float
    terminated: bool
    # ∂ (next tangent state, observation, reward) / ∂ (tangent state, action), (n + O + 1, n + A); None if not asked for
    jacobian: np.ndarray | None


class Simulator(ABC):
    """One task in float64. Its tangent state, (n,), is what gradients flow through from step to step.

    Asking for Jacobians changes no number of the simulation.

    Args:
        env: The task, unwrapped; its simulator is used, and its renderer.
        integrator: MuJoCo's name of an integrator to use instead of the model's own; None to keep that.
    """

    tangent_dim: int
    observation_space: spaces.Box
    action_space: spaces.Box

    def __init__(self, env: Any, model: mujoco.MjModel, data: mujoco.MjData, integrator: str | None) -> None:
        self.env = env
        self._model, self._data = model, data
        _set_integrator(model, integrator)
        check_model(model)
        self._space = TangentSpace(model, data)

    @abstractmethod
    def reset(self, seed: int) -> np.ndarray:
        """Start an episode; gives the observation, (O,), float64."""

    @abstractmethod
    def step(self, action: np.ndarray, jacobian: bool) -> Step:
        """Take one env step with an action, (A,), float64, inside the action space."""

    @abstractmethod
    def read(self) -> np.ndarray:
        """Read the full state, (P,), float64."""

    @abstractmethod
    def write(self, state: np.ndarray) -> np.ndarray:
        """Put the simulator into a full state, (P,); gives the observation, (O,), float64."""

    def culprit(self) -> str | None:
        """Name what MuJoCo found to be no number or far too large since the last reset, or None."""
        if self._data.warning.number[_BAD_WARNINGS].any():
            first = next(name for name, warning in _BAD.items() if self._data.warning.number[warning])
            return f"{first}[{self._data.warning.lastinfo[_BAD[first]]}]"
        for name in ("qpos", "qvel", "act"):
            bad = np.flatnonzero(~np.isfinite(getattr(self._data, name)))
            if len(bad):
                return f"{name}[{bad[0]}]"
        return None


def _set_integrator(model: mujoco.MjModel, integrator: str | None) -> None:
    if integrator is None:
        return
    names = {name.removeprefix("mjINT_"): value for name, value in mujoco.mjtIntegrator.__members__.items()}
    found = {name.lower(): value for name, value in names.items()}.get(integrator.lower())
    if found is None:
        raise ValueError(
            f"`integrator` must be None for the task's own or one of {', '.join(names)}, got {integrator!r}."
        )
    model.opt.integrator = found


class DMControlSimulator(Simulator):
    """A dm_control task: `mjd_transitionFD` for its physics, differences of its own observation and reward functions.

    Args:
        env: The task.
        integrator: See `Simulator`.

    Example:
        >>> simulator = DMControlSimulator(DMControlEnv("pendulum-swingup"))
        >>> simulator.reset(seed=0).shape
        (3,)
        >>> simulator.step(np.array([0.5]), jacobian=True).jacobian.shape  # (2 + 3 + 1, 2 + 1)
        (6, 3)
    """

    def __init__(self, env: DMControlEnv, integrator: str | None = None) -> None:
        self._dm = env.simulation
        self._physics, self._task = self._dm.physics, self._dm.task
        super().__init__(env, self._physics.model.ptr, self._physics.data.ptr, integrator)
        self._substeps = round(self._dm.control_timestep() / self._physics.timestep())
        actions = self._dm.action_spec()
        self._middle, self._radius = (actions.maximum + actions.minimum) / 2, (actions.maximum - actions.minimum) / 2
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.tangent_dim = self._space.dim
        stages = np.repeat(self._model.sensor_needstage, self._model.sensor_dim)
        self._late = np.flatnonzero(stages == mujoco.mjtStage.mjSTAGE_ACC)  # sensors of where the last substep began
        self._probe: Any = None  # a second simulation of the same model, for differences; made when needed

    def reset(self, seed: int) -> np.ndarray:
        """Start an episode."""
        self.env.reset(seed=seed)
        return self._observe(self._physics)

    def read(self) -> np.ndarray:
        """Read the full state, (P,)."""
        return self.env.get_physics_state()

    def write(self, state: np.ndarray) -> np.ndarray:
        """Put the simulator into a full state, (P,)."""
        self.env.set_physics_state(state)
        return self._observe(self._physics)

    def _observe(self, physics: Any) -> np.ndarray:
        return _flatten(self._task.get_observation(physics))

    def step(self, action: np.ndarray, jacobian: bool) -> Step:
        """Repeat an action as the env does, and sum the rewards."""
        n, repeats = self.tangent_dim, self.env.action_repeat
        control = self._middle + self._radius * action  # (A,)
        chain = np.eye(n, n + len(action))  # ∂ state / ∂ (first state, action)
        slope, reward = np.zeros(n + len(action)), 0.0
        for k in range(repeats):
            if jacobian:
                state, sensors = self._differentiate(control)
            try:
                timestep = self._dm.step(control)
            except PhysicsError:
                nothing = np.full(self.observation_space.shape, np.nan)
                return Step(nothing, np.nan, False, np.zeros((n + len(nothing) + 1, n + len(action))))
            reward += float(timestep.reward)
            ends = timestep.last() or k == repeats - 1
            if jacobian:
                if not np.array_equal(self._data.ctrl, control):
                    raise ValueError(
                        f"expected {self.env.task} to hand actions to its actuators as they are, got other controls. "
                        f"Use the env without gradients."
                    )
                before, chain = chain, state[:, :n] @ chain
                drive = self._radius * state[:, n:]  # through the controls' scale
                chain[:, n:] += drive
                sensed = sensors[:, :n] @ before
                sensed[:, n:] += self._radius * sensors[:, n:]
                outputs = self._differentiate_outputs(ends)  # (1 or 1 + O, n + A + S)
                total = outputs[:, :n] @ chain + outputs[:, n + len(action) :] @ sensed
                total[:, n:] += self._radius * outputs[:, n : n + len(action)]
                slope += total[0]
            if ends:
                break
        terminated = timestep.last() and timestep.discount == 0.0
        observation = _flatten(timestep.observation)
        return Step(observation, reward, terminated, np.vstack([chain, total[1:], slope]) if jacobian else None)

    def _differentiate(self, control: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Differentiate the next control step, in the second simulation."""
        if self._probe is None:
            self._probe = self._physics.copy(share_model=True)
            self._probe_space = TangentSpace(self._model, self._probe.data.ptr)
        self._probe_space.write(self._space.read())
        self._probe.data.ptr.ctrl[:] = control
        return step_jacobians(self._probe_space, self._substeps, self._late)

    def _differentiate_outputs(self, observe: bool) -> np.ndarray:
        """Difference reward, and observation if asked for, in the present (state, controls, late sensors)."""
        base, late = self._space.read(), self._data.sensordata[self._late]
        data, physics = self._probe.data.ptr, self._probe
        width = self._space.dim + self._model.nu

        def evaluate(column: int, step: float) -> np.ndarray:
            self._probe_space.displace(base, column if column < width else 0, step if column < width else 0.0)
            mujoco.mj_step1(self._model, data)
            data.sensordata[self._late] = late
            if column >= width:
                data.sensordata[self._late[column - width]] += step
            reward = np.array([self._task.get_reward(physics)], np.float64)
            return np.concatenate([reward, self._observe(physics)]) if observe else reward

        columns = range(width + len(late))
        return np.stack([difference(functools.partial(evaluate, i)) for i in columns], axis=1)


class GymnasiumSimulator(Simulator):
    """A Gymnasium MuJoCo task: its whole step is differenced, as rewards are computed inside, with any integrator.

    Some tasks read, before they step, what the step before left behind (Ant its torso's, Humanoid its bodies'
    positions of one substep ago). Such arrays are found by trying, and belong to the tangent state.

    Args:
        env: The task, unwrapped.
        make_copy: Makes another one like it.
        integrator: See `Simulator`.

    Raises:
        ValueError: If the task's spaces aren't boxes.

    Example:
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
        low, high = self.action_space.low - action, self.action_space.high - action

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
            after = space.between(base, space.state())
            return np.concatenate([after, _read(probe.data, self._memory), observation, [reward]])

        base = space.state()  # where the differences count from; any state will do
        self._plain = evaluate(width, 0.0)[width:]
        base = space.state()
        mujoco.mj_copyData(self._after, probe.model, probe.data)
        jacobian = np.empty((width + len(self._plain), width + len(action)))
        for i in range(n):
            jacobian[:, i] = difference(functools.partial(evaluate, i))
        for j in range(len(action)):
            jacobian[:, width + j] = difference(
                functools.partial(evaluate, width + j), min(low[j], 0.0), max(high[j], 0.0)
            )
        # What is remembered has no part in the physics, so its result is put there instead of computed again.
        probe.do_simulation = lambda *_: mujoco.mj_copyData(probe.data, probe.model, self._after)
        for i in range(n, width):
            jacobian[:, i] = difference(functools.partial(evaluate, i))
        del probe.do_simulation
        return jacobian


def _read(data: mujoco.MjData, names: list[str]) -> np.ndarray:
    return np.concatenate([np.ravel(getattr(data, name)) for name in names] or [np.empty(0)])


def _write(data: mujoco.MjData, names: list[str], values: np.ndarray) -> None:
    for name in names:
        array = getattr(data, name)
        array[...] = values[: array.size].reshape(array.shape)
        values = values[array.size :]


def _flatten(observation: dict[str, Any]) -> np.ndarray:
    """Concatenate a task's observation in its own order, (O,), float64."""
    return np.concatenate([np.ravel(entry) for entry in observation.values()]).astype(np.float64)
