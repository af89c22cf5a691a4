"""A dm_control task that knows the Jacobian of its step."""

from __future__ import annotations

import functools
from typing import Any

import mujoco
import numpy as np

from pwm_gym.envs.differentiable_simulator import DifferentiableSimulator, Step
from pwm_gym.envs.dm_control import DMControlEnv
from pwm_gym.envs.mujoco_jacobians import TangentSpace, difference, step_jacobians

__all__ = ["DMControlSimulator"]


class DMControlSimulator(DifferentiableSimulator):
    """A dm_control task: `mjd_transitionFD` for its physics, differences of its own observation and reward functions.

    Args:
        env: The task.
        integrator: See `DifferentiableSimulator`.

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
        from dm_control.rl.control import PhysicsError  # loaded by now, with its OpenGL backend chosen

        self._physics_error = PhysicsError
        self._substeps = round(self._dm.control_timestep() / self._physics.timestep())
        actions = self._dm.action_spec()
        self._middle, self._radius = (actions.maximum + actions.minimum) / 2, (actions.maximum - actions.minimum) / 2
        self.observation_space: Any = env.observation_space
        self.action_space: Any = env.action_space
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
            except self._physics_error:
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

        zero = evaluate(0, 0.0)
        columns = range(width + len(late))
        return np.stack([difference(functools.partial(evaluate, i), zero) for i in columns], axis=1)


def _flatten(observation: dict[str, Any]) -> np.ndarray:
    """Concatenate a task's observation in its own order, (O,), float64."""
    return np.concatenate([np.ravel(entry) for entry in observation.values()]).astype(np.float64)
