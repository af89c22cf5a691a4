"""Derivatives of MuJoCo's step in the tangent space of its state, where a quaternion has three dimensions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mujoco
import numpy as np

__all__ = ["STEP", "INTEGRATION", "TangentSpace", "check_model", "difference", "step_jacobians"]

# Step of all differences, in rad, m and their rates. Where a contact begins, the simulator's step jumps, and a
# difference across the jump is worthless; at 1e-6 that spoilt one env step in eight of walker-walk. So it is as small
# as float64 allows, and one-sided: roundoff then costs a relative 1e-6 of a Jacobian, and curvature less.
STEP = 1e-8
INTEGRATION = mujoco.mjtState.mjSTATE_INTEGRATION  # all inputs of mj_step, the solver's warm start among them


def check_model(model: mujoco.MjModel) -> None:
    """Refuse models with states that have no tangent.

    Raises:
        ValueError: If the model has delayed actuators or sensors, stateful plugins, or sleeping bodies.
    """
    features = {
        "delays (a history buffer)": getattr(model, "nhistory", 0) > 0,
        "stateful plugins": model.npluginstate > 0,
        "sleeping islands": bool(model.opt.enableflags & getattr(mujoco.mjtEnableBit, "mjENBL_SLEEP", 0)),
    }
    found = [name for name, present in features.items() if present]
    if found:
        raise ValueError(
            f"expected a model whose state is positions, velocities and activations, got one with {', '.join(found)}: "
            f"their part of the state has no derivative here. Use the env without gradients, or a model without them."
        )


class TangentSpace:
    """Displacements of a state by tangent vectors (position nv, velocity nv, activation na).

    Args:
        model: The model.
        data: The simulation to displace; it is overwritten.

    Example:
        >>> model = mujoco.MjModel.from_xml_string(
        ...     "<mujoco><worldbody><body><freejoint/><geom size='1'/></body></worldbody></mujoco>"
        ... )
        >>> data = mujoco.MjData(model)
        >>> space = TangentSpace(model, data)
        >>> space.dim, model.nq + model.nv  # seven numbers for six degrees of freedom
        (12, 13)
        >>> state = space.read()
        >>> space.displace(state, column=3, step=0.1)  # turn by 0.1 rad
        >>> data.qpos[3:].round(4).tolist()
        [0.9988, 0.05, 0.0, 0.0]
        >>> space.between(space.state(), state).round(4)[3].item()
        -0.1
    """

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData) -> None:
        self.model, self.data = model, data
        self.dim = 2 * model.nv + model.na
        self._size = mujoco.mj_stateSize(model, INTEGRATION)
        self._unit = np.zeros(model.nv)

    def read(self) -> np.ndarray:
        """Read all inputs of mj_step as one array."""
        state = np.empty(self._size)
        mujoco.mj_getState(self.model, self.data, state, INTEGRATION)
        return state

    def state(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Copy positions, velocities and activations."""
        return self.data.qpos.copy(), self.data.qvel.copy(), self.data.act.copy()

    def write(self, state: np.ndarray) -> None:
        """Put the simulation into what `read` gave."""
        mujoco.mj_setState(self.model, self.data, state, INTEGRATION)

    def displace(self, state: np.ndarray, column: int, step: float) -> None:
        """Write `state`, displaced by `step` along one axis; nothing that derives from it is computed.

        Args:
            state: What `read` gave.
            column: Axis of the tangent space, in 0..dim-1; from dim on, a control.
            step: Displacement.
        """
        self.write(state)
        nv = self.model.nv
        if column < nv:
            self._unit[column] = step
            mujoco.mj_integratePos(self.model, self.data.qpos, self._unit, 1.0)
            self._unit[column] = 0.0
        elif column < 2 * nv:
            self.data.qvel[column - nv] += step
        elif column < self.dim:
            self.data.act[column - 2 * nv] += step
        else:
            self.data.ctrl[column - self.dim] += step

    def between(self, start: Any, end: Any) -> np.ndarray:
        """Give the tangent vector (dim,) that leads from one (qpos, qvel, act) to another; arrays of `read` do too."""
        (q0, v0, a0), (q1, v1, a1) = self._parts(start), self._parts(end)
        difference = np.empty(self.dim)
        nv = self.model.nv
        mujoco.mj_differentiatePos(self.model, difference[:nv], 1.0, q0, q1)
        difference[nv : 2 * nv], difference[2 * nv :] = v1 - v0, a1 - a0
        return difference

    def _parts(self, state: Any) -> Any:
        if isinstance(state, tuple):
            return state
        nq, nv, na = self.model.nq, self.model.nv, self.model.na  # after the time, in this order
        return state[1 : 1 + nq], state[1 + nq : 1 + nq + nv], state[1 + nq + nv : 1 + nq + nv + na]


def difference(evaluate: Callable[[float], np.ndarray], base: np.ndarray, room: float = np.inf) -> np.ndarray:
    """Difference a function of one displacement at 0, to the side where there is room.

    Args:
        evaluate: Of the displacement; gives (N,).
        base: What it gives at 0, (N,).
        room: Largest displacement allowed; below `STEP`, the function is displaced the other way.
    """
    step = STEP if room >= STEP else -STEP
    return (evaluate(step) - base) / step


def step_jacobians(space: TangentSpace, substeps: int, sensors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Differentiate `substeps` steps from the present state of `space.data`, with its controls held.

    Each substep's Jacobians come from `mujoco.mjd_transitionFD` and are chained. It refuses RK4, where mj_step itself
    is differenced over all substeps. Its derivatives of touch sensors disagree with central differences, so where
    sensors are asked for, mj_step is differenced in the last substep.

    Args:
        space: The simulation, which this function moves by `substeps`.
        substeps: Steps of the simulator.
        sensors: Entries of the sensor data to differentiate too, (S,): those of the acceleration stage, which mj_step
            computes from the state that it starts from.

    Returns:
        ∂ next state / ∂ (state, controls), (n, n + nu), and ∂ sensors / ∂ (state, controls), (S, n + nu).
    """
    if space.model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4:
        return _differenced(space, substeps, sensors)
    model, data, n = space.model, space.data, space.dim
    state, control = np.empty((n, n)), np.empty((n, model.nu))
    chain, sensed = np.eye(n, n + model.nu), np.empty((0, n + model.nu))
    for k in range(substeps):
        if k == substeps - 1 and len(sensors):
            step, measured = _differenced(space, 1, sensors)
            state, control = step[:, :n], step[:, n:]
            sensed = measured[:, :n] @ chain
            sensed[:, n:] += measured[:, n:]
        else:
            mujoco.mjd_transitionFD(model, data, STEP, False, state, control, None, None)
            mujoco.mj_step(model, data)
        chain = state @ chain
        chain[:, n:] += control
    return chain, sensed


def _differenced(space: TangentSpace, substeps: int, sensors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    model, data, n = space.model, space.data, space.dim
    start, room = space.read(), np.full(n + model.nu, np.inf)
    limited = np.flatnonzero(model.actuator_ctrllimited)  # beyond its range a control has no effect
    room[n + limited] = model.actuator_ctrlrange[limited, 1] - data.ctrl[limited]
    mujoco.mj_step(model, data, substeps)
    origin, end = space.state(), space.read()

    def outcome() -> np.ndarray:
        return np.concatenate([space.between(origin, space.state()), data.sensordata[sensors]])

    def evaluate(column: int, step: float) -> np.ndarray:
        space.displace(start, column, step)
        mujoco.mj_step(model, data, substeps)
        return outcome()

    base = outcome()
    columns = [difference(functools.partial(evaluate, i), base, room[i]) for i in range(n + model.nu)]
    space.write(end)
    jacobian = np.stack(columns, axis=1)
    return jacobian[:n], jacobian[n:]
