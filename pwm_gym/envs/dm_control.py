"""dm_control's tasks as plain Gymnasium environments, with TD-MPC2's conventions."""

import difflib
import math
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from pwm_gym.envs.gl_backend import choose_gl_backend, require_gl_backend, require_own_process
from pwm_gym.envs.tasks import DM_CONTROL_TASKS

# Control steps in an episode, before action repeat: the suite's own limit for every task here.
EPISODE_CONTROL_STEPS = 1000

# Where TD-MPC2's name of a domain isn't the suite's.
_DOMAINS = {"cup": "ball_in_cup"}

# Domain -> what a reset draws anew in the *model* (its array, the element's name): the targets.
# MuJoCo's physics state is without them.
_MODEL_STATE = {
    "reacher": ("geom_pos", "target"),
    "finger": ("site_pos", "target"),
    "fish": ("geom_pos", "target"),
}


class DMControlEnv(gym.Env[np.ndarray, np.ndarray]):
    """One task of dm_control's suite, with the conventions of TD-MPC2 (arXiv:2310.16828).

    - Observations: the entries of the task's own dictionary, flattened and concatenated in the
      task's own order (`gymnasium.spaces.Dict` would sort them), (O,), float32.
    - Actions: (A,), float32, in [-1, 1], scaled to the task's own bounds. Values outside are
      clipped.
    - An action is repeated for `action_repeat` control steps and their rewards are summed. With the
      default 2 a step's reward is in [0, 2] and an episode's return in [0, 1000].
    - An episode lasts 1000 control steps: 500 steps of the env. Reaching the limit is a truncation,
      never a termination.
    - `infos["physics_state"]`, (P,), float64, at reset and at every step. `set_physics_state` puts
      the simulator back there exactly: the same actions then give the same observations and
      rewards, bit for bit.

    `self.np_random` is the only source of randomness, and each reset seeds the task from it: with
    its `bit_generator.state` restored, a new env repeats a reset.

    Pickling and copying keep the simulator's state, the time and the random state; the copy makes a
    rendering context of its own.

    Example:
        >>> import gymnasium as gym
        >>> import pwm_gym
        >>> env = gym.make("pwm_gym/cartpole-swingup-v0")
        >>> observation, info = env.reset(seed=0)
        >>> observation.shape, observation.dtype, env.action_space.shape
        ((5,), dtype('float32'), (1,))
        >>> observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        >>> again = env.unwrapped.set_physics_state(info["physics_state"])
        >>> bool((again == observation).all())
        True

    Attributes:
        task: TD-MPC2's name of the task.
        action_repeat: Control steps per env step.
        max_episode_steps: Env steps in an episode.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}

    # dm_control's environment and its `_PhysicsState`; both None after `close`.
    _env: Any
    _physics_state: Any

    def __init__(
        self,
        task: str,
        action_repeat: int = 2,
        render_mode: str | None = None,
        height: int = 384,
        width: int = 384,
        camera_id: int | str = 0,
    ):
        """Load the task.

        Args:
            task: TD-MPC2's name of the task, one of `pwm_gym.envs.DM_CONTROL_TASKS`.
            action_repeat: Control steps per env step, at least 1.
            render_mode: None, or "rgb_array" for frames from `render`.
            height: Height of a frame in pixels.
            width: Width of a frame in pixels.
            camera_id: Number or name of a camera of the model; -1 is MuJoCo's free camera.

        Raises:
            ValueError: If the task or the render mode is unknown, or a number is below 1.
            ImportError: If dm_control or shimmy isn't installed.
            gymnasium.error.DependencyNotInstalled: If frames are asked for and there is no OpenGL
                library to draw them.
        """
        _check_arguments(task, action_repeat, render_mode, height, width)
        if render_mode is not None:
            require_gl_backend()
        self.task = task
        self.action_repeat = action_repeat
        self.render_mode = render_mode
        self.height = height
        self.width = width
        self.camera_id = camera_id
        self.max_episode_steps = math.ceil(EPISODE_CONTROL_STEPS / action_repeat)
        self._control_steps = 0
        self._needs_reset = True
        self._load()

        actions = self._env.action_spec()
        self._action_middle = (actions.maximum + actions.minimum) / 2  # (A,)
        self._action_radius = (actions.maximum - actions.minimum) / 2  # (A,)
        self.action_space = spaces.Box(-1.0, 1.0, actions.shape, np.float32)
        size = sum(math.prod(spec.shape) for spec in self._env.observation_spec().values())
        # Finite bounds: Gymnasium's checker warns of infinite ones.
        limit = np.finfo(np.float32).max
        self.observation_space = spaces.Box(-limit, limit, (size,), np.float32)
        fps = round(1 / (self._env.control_timestep() * action_repeat), 6)
        self.metadata = {**self.metadata, "render_fps": int(fps) if fps.is_integer() else fps}

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
        self._require_open()
        super().reset(seed=seed)
        self._env.task.random.seed(int(self.np_random.integers(2**32)))
        observation = _flatten(self._env.reset().observation)
        self._control_steps = 0
        self._needs_reset = False
        return observation, {"physics_state": self._physics_state.read()}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Repeat an action for `action_repeat` control steps, fewer where the episode ends before.

        Args:
            action: (A,), in [-1, 1]; values outside are clipped.

        Returns:
            The observation, (O,), float32; the sum of the rewards; whether the task ended the
            episode, which none in the table does; whether the time limit did; the infos.

        Raises:
            ValueError: If the action has a wrong shape or isn't finite.
            gymnasium.error.ResetNeeded: If no episode is running.
        """
        if self._needs_reset:
            raise gym.error.ResetNeeded(
                f"`step` expected a running episode of {self.task}, got one that is over or has "
                "not begun. Call `reset` first."
            )
        control = self._action_middle + self._action_radius * self._checked(action)  # (A,)
        reward = 0.0
        for _ in range(self.action_repeat):
            timestep = self._env.step(control)
            reward += float(timestep.reward)
            self._control_steps += 1
            if timestep.last() or self._control_steps == EPISODE_CONTROL_STEPS:
                break
        _, _, terminated, truncated, _ = self._convert(timestep)
        truncated = truncated or self._control_steps == EPISODE_CONTROL_STEPS
        self._needs_reset = terminated or truncated
        infos = {"physics_state": self._physics_state.read()}
        return _flatten(timestep.observation), reward, terminated, truncated, infos

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
        self._require_open()
        state = np.asarray(state, np.float64)
        if state.shape != (self._physics_state.size,) or not np.isfinite(state).all():
            raise ValueError(
                f"`state` must be finite, of shape ({self._physics_state.size},), got {state} of "
                f'shape {state.shape}. Give the infos["physics_state"] of an env of the same task, '
                f"{self.task}."
            )
        self._physics_state.write(state)
        self._control_steps = 0
        self._needs_reset = False
        return _flatten(self._env.task.get_observation(self._env.physics))

    def get_physics_state(self) -> np.ndarray:
        """Read the present state, (P,), float64, as `infos["physics_state"]` holds it.

        Raises:
            gymnasium.error.ClosedEnvironmentError: If the env was closed.
        """
        self._require_open()
        return self._physics_state.read()

    @property
    def simulation(self) -> Any:
        """dm_control's own environment, with its `physics` and `task`; time limits are kept outside it."""
        self._require_open()
        return self._env

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
        self._require_open()
        require_own_process()
        frame = self._env.physics.render(self.height, self.width, self.camera_id)
        return np.ascontiguousarray(frame)  # (height, width, 3)

    def close(self) -> None:
        """Free the simulator and its rendering context; the env can't be used afterwards."""
        if self._env is not None:
            self._env.physics.free()
            self._env.close()
        self._env = self._physics_state = None
        self._needs_reset = True

    def __getstate__(self) -> dict[str, Any]:
        """Keep everything but the simulator, and of that its physics state."""
        state = self.__dict__.copy()
        del state["_env"], state["_convert"]
        if self._physics_state is not None:
            state["_physics_state"] = self._physics_state.read()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load the simulator again and put it where it was."""
        self.__dict__.update(state)
        self._load()
        if state["_physics_state"] is None:
            self.close()
        else:
            self._physics_state.write(state["_physics_state"])

    def _load(self) -> None:
        """Load the simulator: `_env`, its `_physics_state`, and shimmy's `_convert`."""
        suite, self._convert = _import_simulator()
        domain, _, task = self.task.partition("-")
        domain = _DOMAINS.get(domain, domain)
        # This class keeps the time, so that `set_physics_state` can begin it anew.
        task_kwargs = {"random": 0, "time_limit": math.inf}
        self._env = suite.load(domain, task.replace("-", "_"), task_kwargs=task_kwargs)
        # A reset also writes constants into the model (sizes, damping). `set_physics_state` needs
        # them, and may be called before the user's first reset.
        self._env.reset()
        self._physics_state = _PhysicsState(self._env.physics, _MODEL_STATE.get(domain))
        # MuJoCo draws no frame larger than this buffer.
        buffer = self._env.physics.model.vis.global_
        buffer.offheight = max(buffer.offheight, self.height)
        buffer.offwidth = max(buffer.offwidth, self.width)

    def _require_open(self) -> None:
        """Raise ClosedEnvironmentError after `close`."""
        if self._env is None:
            raise gym.error.ClosedEnvironmentError(
                f"Expected an open env of {self.task}, got a closed one. "
                f'Make another with gym.make("pwm_gym/{self.task}-v0").'
            )

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


class _PhysicsState:
    """All that decides a simulation's future, as one array.

    In this order: MuJoCo's full physics state (time, positions, velocities, activations), the
    solver's warm start, the force sensors, and the task's target.

    The warm start is last step's acceleration; without it walker-walk differs by 5e-7 after 60
    steps. The force sensors (hopper's and finger's touch) can't be computed from the rest, because
    dm_control ends a step with `mj_step1`, which leaves them as they were before the integration.

    Attributes:
        size: P, the number of values.
    """

    def __init__(self, physics: Any, model_state: tuple[str, str] | None):
        """Find the parts of the state.

        Args:
            physics: dm_control's `Physics`.
            model_state: The target's array in the model, and its name; None without a target.
        """
        import mujoco

        self._mujoco = mujoco
        self._model, self._data = physics.model.ptr, physics.data.ptr
        self._signature = mujoco.mjtState.mjSTATE_FULLPHYSICS | mujoco.mjtState.mjSTATE_WARMSTART
        stages = np.repeat(self._model.sensor_needstage, self._model.sensor_dim)
        self._force_sensors = np.flatnonzero(stages == mujoco.mjtStage.mjSTAGE_ACC)
        self._target = np.empty(0)
        if model_state is not None:
            array, name = model_state
            index = physics.model.name2id(name, array.removesuffix("_pos"))
            self._target = getattr(self._model, array)[index]  # (3,), a view into the model
        self._sensors_at = mujoco.mj_stateSize(self._model, self._signature)
        self._target_at = self._sensors_at + len(self._force_sensors)
        self.size = self._target_at + len(self._target)

    def read(self) -> np.ndarray:
        """Return the simulator's present state, (P,), float64."""
        state = np.empty(self.size)
        physics = state[: self._sensors_at]
        self._mujoco.mj_getState(self._model, self._data, physics, self._signature)
        state[self._sensors_at : self._target_at] = self._data.sensordata[self._force_sensors]
        state[self._target_at :] = self._target
        return state

    def write(self, state: np.ndarray) -> None:
        """Put the simulator into a state, (P,), float64, and compute all that follows from it."""
        self._target[:] = state[self._target_at :]
        physics = state[: self._sensors_at]
        self._mujoco.mj_setState(self._model, self._data, physics, self._signature)
        self._mujoco.mj_step1(self._model, self._data)
        self._data.sensordata[self._force_sensors] = state[self._sensors_at : self._target_at]


def _check_arguments(task: str, action_repeat: int, render_mode: str | None, height: int, width: int) -> None:
    """Raise ValueError for a constructor argument that can't be."""
    if task not in DM_CONTROL_TASKS:
        near = difflib.get_close_matches(str(task), DM_CONTROL_TASKS, cutoff=0.4)
        raise ValueError(
            f"`task` must be one of pwm_gym.envs.DM_CONTROL_TASKS, got {task!r}. "
            f"Choose from {', '.join(near or DM_CONTROL_TASKS)}."
        )
    if render_mode not in (None, "rgb_array"):
        raise ValueError(
            f'`render_mode` must be None or "rgb_array", got {render_mode!r}. '
            'Give "rgb_array" and show the frames that `render` returns.'
        )
    for name, value in {"action_repeat": action_repeat, "height": height, "width": width}.items():
        if value < 1:
            raise ValueError(f"`{name}` must be >= 1, got {value}. Leave it out for the default.")


def _flatten(observation: dict[str, np.ndarray | float]) -> np.ndarray:
    """Concatenate a task's observation in its own order, (O,), float32."""
    entries = [np.ravel(entry) for entry in observation.values()]
    return np.concatenate(entries, dtype=np.float32, casting="same_kind")


def _import_simulator() -> tuple[Any, Any]:
    """Import dm_control and shimmy, with MuJoCo's OpenGL backend chosen before.

    Returns:
        dm_control's `suite`, and shimmy's converter of dm_env's time steps to Gymnasium's values.

    Raises:
        ImportError: If one of them isn't installed.
    """
    choose_gl_backend()
    try:
        from dm_control import suite
        from shimmy.utils.dm_env import dm_env_step2gym_step
    except ModuleNotFoundError as error:
        raise ImportError(
            f"dm_control's tasks need dm_control and shimmy, but the module {error.name} is "
            'missing. Run: pip install "pwm-gym[dm-control]"'
        ) from error
    return suite, dm_env_step2gym_step
