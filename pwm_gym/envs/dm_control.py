"""dm_control's tasks as plain Gymnasium environments, with TD-MPC2's conventions."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from pwm_gym.envs.physics_env import PhysicsEnv, Simulator
from pwm_gym.task_sets import CUSTOM_TASKS, DM_CONTROL_TASKS

# Where TD-MPC2's name of a domain isn't the suite's.
_DOMAINS = {"cup": "ball_in_cup"}

# Domain -> what a reset draws anew in the *model* (its array, the element's name): the targets.
# MuJoCo's physics state is without them.
_MODEL_STATE = {
    "reacher": ("geom_pos", "target"),
    "finger": ("site_pos", "target"),
    "fish": ("geom_pos", "target"),
}


class DMControlEnv(PhysicsEnv):
    """One task of dm_control's suite or of `custom_tasks`, with the conventions of TD-MPC2 (arXiv:2310.16828).

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

    _tasks = DM_CONTROL_TASKS + CUSTOM_TASKS
    # The suite's own limit for every task here.
    _episode_control_steps = 1000

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
            task: TD-MPC2's name of the task, one of `pwm_gym.tasks("MT30")`.
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
        super().__init__(task, action_repeat, render_mode, height, width, camera_id)

    @property
    def simulation(self) -> Any:
        """dm_control's own environment, with its `physics` and `task`; time limits are kept outside it."""
        return self._opened().env  # type: ignore[attr-defined]

    def _load(self) -> Simulator:
        return _DMControl(self.task, self.height, self.width)


class _DMControl(Simulator):
    """dm_control's environment of a task.

    Attributes:
        env: dm_control's environment.
    """

    def __init__(self, task: str, height: int, width: int) -> None:
        """Load the task; frames can be drawn up to the height and width in pixels, or MuJoCo's buffer if larger."""
        suite, self._convert = _import_simulator()
        domain, _, name = task.partition("-")
        domain = _DOMAINS.get(domain, domain)
        # `PhysicsEnv` keeps the time, so that `set_physics_state` can begin it anew.
        task_kwargs = {"random": 0, "time_limit": math.inf}
        with _without_deprecations():
            if task in DM_CONTROL_TASKS:
                self.env = suite.load(domain, name.replace("-", "_"), task_kwargs=task_kwargs)
            else:
                from pwm_gym.envs import custom_tasks

                self.env = custom_tasks.load(task, **task_kwargs)
        # A reset also writes constants into the model (sizes, damping). `write_state` needs
        # them, and may be called before the user's first reset.
        self.env.reset()
        self._physics_state = _PhysicsState(self.env.physics, _MODEL_STATE.get(domain))
        self.state_size = self._physics_state.size
        self.control_timestep = self.env.control_timestep()
        # MuJoCo draws no frame larger than this buffer.
        buffer = self.env.physics.model.vis.global_
        buffer.offheight = max(buffer.offheight, height)
        buffer.offwidth = max(buffer.offwidth, width)
        bounds = self.env.action_spec()
        self._action_middle = (bounds.maximum + bounds.minimum) / 2  # (A,)
        self._action_radius = (bounds.maximum - bounds.minimum) / 2  # (A,)

    def begin(self, seed: int) -> np.ndarray:
        self.env.task.random.seed(seed)
        return _flatten(self.env.reset().observation)

    def advance(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, dict[str, Any]]:
        timestep = self.env.step(self._action_middle + self._action_radius * action)
        _, _, terminated, _, _ = self._convert(timestep)
        return _flatten(timestep.observation), float(timestep.reward), terminated, {}

    def read_state(self) -> np.ndarray:
        return self._physics_state.read()

    def write_state(self, state: np.ndarray) -> np.ndarray:
        self._physics_state.write(state)
        return _flatten(self.env.task.get_observation(self.env.physics))

    def draw(self, height: int, width: int, camera_id: int | str) -> np.ndarray:
        frame: np.ndarray = self.env.physics.render(height, width, camera_id)
        return frame

    def free(self) -> None:
        self.env.physics.free()
        self.env.close()


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


def _flatten(observation: dict[str, np.ndarray | float]) -> np.ndarray:
    """Concatenate a task's observation in its own order, (O,), float32."""
    entries = [np.ravel(entry) for entry in observation.values()]
    return np.concatenate(entries, dtype=np.float32, casting="same_kind")


def _import_simulator() -> tuple[Any, Any]:
    """Import dm_control and shimmy; MuJoCo's OpenGL backend must have been chosen before.

    Returns:
        dm_control's `suite`, and shimmy's converter of dm_env's time steps to Gymnasium's values.

    Raises:
        ImportError: If one of them isn't installed.
    """
    try:
        from dm_control import suite
        from shimmy.utils.dm_env import dm_env_step2gym_step
    except ModuleNotFoundError as error:
        raise ImportError(
            f"dm_control's tasks need dm_control and shimmy, but the module {error.name} is "
            'missing. Run: pip install "pwm-gym[dm-control]"'
        ) from error
    return suite, dm_env_step2gym_step


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """Hold back that dm_control's own models use attributes which MuJoCo deprecates: no user can act on it."""

    def keep(record: logging.LogRecord) -> bool:
        return "is deprecated" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
