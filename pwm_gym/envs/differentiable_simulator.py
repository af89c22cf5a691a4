"""What one simulated MuJoCo task offers to differentiable envs: steps with their Jacobians, and its full state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import mujoco
import numpy as np
from gymnasium import spaces

from pwm_gym.envs.mujoco_jacobians import TangentSpace, check_model

__all__ = ["DifferentiableSimulator", "Step"]

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


class DifferentiableSimulator(ABC):
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
