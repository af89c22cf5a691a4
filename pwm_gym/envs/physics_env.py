"""What the tasks of all simulators share: one plain `gymnasium.Env` around one loaded simulation."""

import math
from abc import ABC, abstractmethod
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from pwm_gym.envs.gl_backend import choose_gl_backend, require_gl_backend, require_own_process
from pwm_gym.task_sets import TASK_DIMS, require_task


class Simulator(ABC):
    """One task loaded into a simulator, which `PhysicsEnv` drives.

    Attributes:
        control_timestep: Seconds of simulated time in a control step.
        state_size: P, the length of a physics state.
    """

    control_timestep: float
    state_size: int

    @abstractmethod
    def begin(self, seed: int) -> np.ndarray:
        """Start an episode that the seed alone decides, and return its first observation, (O,), float32."""

    @abstractmethod
    def advance(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, dict[str, Any]]:
        """Take one control step.

        Args:
            action: (A,), float64, in [-1, 1].

        Returns:
            The observation, (O,), float32; the reward; whether the task ended the episode; infos.
        """

    @abstractmethod
    def read_state(self) -> np.ndarray:
        """Return all that decides the future, (P,), float64."""

    @abstractmethod
    def write_state(self, state: np.ndarray) -> np.ndarray:
        """Go back to a state that was read, (P,), and return the observation it had, (O,), float32."""

    @abstractmethod
    def draw(self, height: int, width: int, camera_id: int | str) -> np.ndarray:
        """Draw the present state, (height, width, 3), uint8."""

    @abstractmethod
    def free(self) -> None:
        """Free the simulation and its rendering context."""


class PhysicsEnv(gym.Env[np.ndarray, np.ndarray], ABC):
    """A task of a simulator: action repeat, time limit, exact physics states, frames, seeding, copies.

    `self.np_random` is the only source of randomness, and each reset seeds the simulator from it: with its
    `bit_generator.state` restored, a new env repeats a reset.

    Pickling and copying keep the simulator's state, the time and the random state; the copy makes a rendering context
    of its own.

    Attributes:
        task: Name of the task, TD-MPC2's where it has one.
        action_repeat: Control steps per env step.
        max_episode_steps: Env steps in an episode.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}

    # The tasks that a class plays, and the control steps in their episodes, before action repeat.
    _tasks: tuple[str, ...]
    _episode_control_steps: int

    _simulator: Simulator | None  # None after `close`

    def __init__(
        self, task: str, action_repeat: int, render_mode: str | None, height: int, width: int, camera_id: int | str
    ):
        """Load the task; the classes for a simulator document the arguments."""
        require_task(task, self._tasks)
        _check_arguments(action_repeat, render_mode, height, width)
        choose_gl_backend()
        if render_mode is not None:
            require_gl_backend()
        self.task = task
        self.action_repeat = action_repeat
        self.render_mode = render_mode
        self.height = height
        self.width = width
        self.camera_id = camera_id
        self.max_episode_steps = math.ceil(self._episode_control_steps / action_repeat)
        self._control_steps = 0
        self._needs_reset = True

        dims = TASK_DIMS[task]
        self.action_space = spaces.Box(-1.0, 1.0, (dims.action,), np.float32)
        # Finite bounds: Gymnasium's checker warns of infinite ones.
        limit = np.finfo(np.float32).max
        self.observation_space = spaces.Box(-limit, limit, (dims.observation,), np.float32)
        self._simulator = self._load()
        fps = round(1 / (self._simulator.control_timestep * action_repeat), 6)
        self.metadata = {**self.metadata, "render_fps": int(fps) if fps.is_integer() else fps}

    @abstractmethod
    def _load(self) -> Simulator:
        """Load `self.task`."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: Seed of `self.np_random`; None goes on with its present state.
            options: Unused.

        Returns:
            The first observation, (O,), float32, and the infos.

        Raises:
            gymnasium.error.ClosedEnvironmentError: If the env was closed.
        """
        simulator = self._opened()
        super().reset(seed=seed)
        observation = simulator.begin(int(self.np_random.integers(2**32)))
        self._control_steps = 0
        self._needs_reset = False
        return observation, {"physics_state": simulator.read_state()}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Repeat an action for `action_repeat` control steps, fewer where the episode ends before.

        Args:
            action: (A,), in [-1, 1]; values outside are clipped.

        Returns:
            The observation, (O,), float32; the sum of the rewards; whether the task ended the episode, by a fall;
            whether the time limit did; the infos.

        Raises:
            ValueError: If the action has a wrong shape or isn't finite.
            gymnasium.error.ResetNeeded: If no episode is running.
        """
        if self._needs_reset:
            raise gym.error.ResetNeeded(
                f"`step` expected a running episode of {self.task}, got one that is over or has "
                "not begun. Call `reset` first."
            )
        simulator = self._opened()
        action = self._checked(action)
        total = 0.0
        for _ in range(self.action_repeat):
            observation, reward, terminated, infos = simulator.advance(action)
            total += reward
            self._control_steps += 1
            truncated = self._control_steps == self._episode_control_steps
            if terminated or truncated:
                break
        self._needs_reset = terminated or truncated
        return observation, total, terminated, truncated, {"physics_state": simulator.read_state(), **infos}

    def get_physics_state(self) -> np.ndarray:
        """Read the present state, (P,), float64, as `infos["physics_state"]` holds it.

        Raises:
            gymnasium.error.ClosedEnvironmentError: If the env was closed.
        """
        return self._opened().read_state()

    def set_physics_state(self, state: np.ndarray) -> np.ndarray:
        """Put the simulator into a state that an env of the same task reported.

        `step` goes on from there, with a fresh time limit, and `render` draws it. No earlier
        `reset` is needed, and `self.np_random` is left alone.

        Args:
            state: `infos["physics_state"]`, (P,).

        Returns:
            The observation of that state, (O,), float32.

        Raises:
            ValueError: If the state has a wrong shape or isn't finite.
            gymnasium.error.ClosedEnvironmentError: If the env was closed.
        """
        simulator = self._opened()
        state = np.asarray(state, np.float64)
        if state.shape != (simulator.state_size,) or not np.isfinite(state).all():
            raise ValueError(
                f"`state` must be finite, of shape ({simulator.state_size},), got {state} of "
                f'shape {state.shape}. Give the infos["physics_state"] of an env of the same task, '
                f"{self.task}."
            )
        observation = simulator.write_state(state)
        self._control_steps = 0
        self._needs_reset = False
        return observation

    def render(self) -> np.ndarray | None:
        """Draw the simulator's present state.

        Returns:
            The frame, (height, width, 3), uint8, or None without a render mode.

        Raises:
            gymnasium.error.ClosedEnvironmentError: If the env was closed.
            RuntimeError: If this process was forked after its parent had drawn a frame.
        """
        if self.render_mode is None:
            gym.logger.warn(
                "`render` was called without a render mode, so there is no frame. Make the env "
                f'with gym.make("pwm_gym/{self.task}-v0", render_mode="rgb_array").'
            )
            return None
        simulator = self._opened()
        require_own_process()
        return np.ascontiguousarray(simulator.draw(self.height, self.width, self.camera_id))  # (height, width, 3)

    def close(self) -> None:
        """Free the simulator and its rendering context; the env can't be used afterwards."""
        if self._simulator is not None:
            self._simulator.free()
        self._simulator = None
        self._needs_reset = True

    def __getstate__(self) -> dict[str, Any]:
        """Keep everything but the simulator, and of that its physics state."""
        physics_state = None if self._simulator is None else self._simulator.read_state()
        return {**self.__dict__, "_simulator": physics_state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load the simulator again and put it where it was."""
        self.__dict__.update(state)
        if state["_simulator"] is not None:
            self._simulator = self._load()
            self._simulator.write_state(state["_simulator"])

    def _opened(self) -> Simulator:
        """Return the simulator, or raise ClosedEnvironmentError after `close`."""
        if self._simulator is None:
            raise gym.error.ClosedEnvironmentError(
                f"Expected an open env of {self.task}, got a closed one. "
                f'Make another with gym.make("pwm_gym/{self.task}-v0").'
            )
        return self._simulator

    def _checked(self, action: np.ndarray) -> np.ndarray:
        """Return the action, (A,), in float64 and clipped to [-1, 1], or raise ValueError."""
        action = np.asarray(action, np.float64)
        if action.shape != self.action_space.shape or not np.isfinite(action).all():
            raise ValueError(
                f"`action` must be finite, of shape {self.action_space.shape}, got {action} of "
                f"shape {action.shape}. Give one number in [-1, 1] per actuator; if it is NaN, "
                "look at the policy that chose it."
            )
        return np.minimum(np.maximum(action, -1.0), 1.0)


def _check_arguments(action_repeat: int, render_mode: str | None, height: int, width: int) -> None:
    """Raise ValueError for a constructor argument that can't be."""
    if render_mode not in (None, "rgb_array"):
        raise ValueError(
            f'`render_mode` must be None or "rgb_array", got {render_mode!r}. '
            'Give "rgb_array" and show the frames that `render` returns.'
        )
    for name, value in {"action_repeat": action_repeat, "height": height, "width": width}.items():
        if value < 1:
            raise ValueError(f"`{name}` must be >= 1, got {value}. Leave it out for the default.")
