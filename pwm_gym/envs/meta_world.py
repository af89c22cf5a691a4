"""Meta-World's 50 tasks as plain Gymnasium environments, with TD-MPC2's conventions."""

from typing import Any

import numpy as np

from pwm_gym.envs.physics_env import PhysicsEnv, Simulator
from pwm_gym.envs.tasks import META_WORLD_TASKS

# TD-MPC2 moves Meta-World's camera nearer to the table.
_CAMERA, _CAMERA_POSITION = "corner2", (0.75, 0.075, 0.7)  # metres

_OBSERVATION_DIM = 39


class MetaWorldEnv(PhysicsEnv):
    """One task of Meta-World's MT50, in the protocol of TD-MPC2 (arXiv:2310.16828).

    - Observations: the hand's position and opening and the objects' poses now, (18,), the same one control step ago,
      (18,), and the goal's position, (3,): (39,) in all, float32.
    - Actions: (4,), float32, in [-1, 1]: the hand's displacement along x, y, z and the gripper's effort. Values
      outside are clipped.
    - An action is repeated for `action_repeat` control steps and their rewards, Meta-World's v2 rewards, are summed.
      With the default 2 a step's reward is in [0, 20] and an episode's return in [0, 2000].
    - An episode lasts 200 control steps: 100 steps of the env. Reaching the limit is a truncation; nothing terminates.
    - The objects and the goal are placed anew at every reset. After that one control step is taken with a zero action,
      while the observation from before it is returned.
    - `infos["is_success"]`, bool, and `infos["success"]`, the same as a float, tell at every step whether the task is
      solved at present. An episode counts as solved if its *last* step is.
    - `infos["physics_state"]`, (P,), float64, at reset and at every step. `set_physics_state` puts the simulator back
      there exactly: the same actions then give the same observations and rewards, bit for bit.

    The simulation is Farama's Meta-World 3; docs/tasks.md lists what differs from the version that TD-MPC2 used.

    Example:
        >>> import gymnasium as gym
        >>> import pwm_gym
        >>> env = gym.make("pwm_gym/mw-drawer-open-v0")
        >>> observation, info = env.reset(seed=0)
        >>> observation.shape, observation.dtype, env.action_space.shape
        ((39,), dtype('float32'), (4,))
        >>> observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        >>> info["is_success"]
        False
        >>> again = env.unwrapped.set_physics_state(info["physics_state"])
        >>> bool((again == observation).all())
        True

    Attributes:
        task: TD-MPC2's name of the task.
        action_repeat: Control steps per env step.
        max_episode_steps: Env steps in an episode.
    """

    _tasks = META_WORLD_TASKS
    _episode_control_steps = 200

    def __init__(
        self,
        task: str,
        action_repeat: int = 2,
        render_mode: str | None = None,
        height: int = 384,
        width: int = 384,
        camera_id: int | str = _CAMERA,
    ):
        """Load the task.

        Args:
            task: TD-MPC2's name of the task, one of `pwm_gym.tasks("MT50")`.
            action_repeat: Control steps per env step, at least 1.
            render_mode: None, or "rgb_array" for frames from `render`.
            height: Height of a frame in pixels.
            width: Width of a frame in pixels.
            camera_id: Number or name of a camera of the model; -1 is MuJoCo's free camera.

        Raises:
            ValueError: If the task or the render mode is unknown, or a number is below 1.
            ImportError: If metaworld isn't installed.
            gymnasium.error.DependencyNotInstalled: If frames are asked for and there is no OpenGL
                library to draw them.
        """
        super().__init__(task, action_repeat, render_mode, height, width, camera_id)

    def _load(self) -> Simulator:
        return _MetaWorld(self.task)


class _MetaWorld(Simulator):
    """Meta-World's environment of a task.

    A physics state is, in this order: the seed of the episode; the observation; MuJoCo's full physics state, the pose
    of the body that pulls the hand, and the solver's warm start. The seed stands for all that a reset draws or
    computes once and Meta-World keeps outside of MuJoCo's state: where furniture stands in the model, the goal, and
    the distances that scale the reward.

    Attributes:
        env: Meta-World's environment.
    """

    def __init__(self, task: str) -> None:
        self._mujoco, environments = _import_simulator()
        name = task.removeprefix("mw-")
        # The seed is for the constructor alone. Without one it would draw from NumPy's global generator, with one it
        # puts that back.
        self.env = environments[f"{name}-v3-goal-observable"](seed=0)
        self.env._freeze_rand_vec = False  # place the objects anew at every reset …
        self.env.seeded_rand_vec = True  # … by `env.np_random`
        camera = self.env.model.camera(_CAMERA)
        camera.pos = _CAMERA_POSITION
        # It hangs upside down: roll it by half a turn.
        self._mujoco.mju_mulQuat(camera.quat, camera.quat.copy(), np.array([0.0, 0.0, 0.0, 1.0]))
        self.control_timestep = self.env.dt
        self._renderer: Any = None

        state = self._mujoco.mjtState
        self._signature = (
            state.mjSTATE_FULLPHYSICS | state.mjSTATE_MOCAP_POS | state.mjSTATE_MOCAP_QUAT | state.mjSTATE_WARMSTART
        )
        self.state_size = 1 + _OBSERVATION_DIM + self._mujoco.mj_stateSize(self.env.model, self._signature)
        # A reset first lets the hand settle among what the last episode left, then moves the furniture.
        self._furniture = self.env.model.body_pos.copy(), self.env.model.site_pos.copy()
        self.begin(0)

    def begin(self, seed: int) -> np.ndarray:
        model = self.env.model
        self._mujoco.mj_resetData(model, self.env.data)
        model.body_pos[:], model.site_pos[:] = self._furniture
        self.env.np_random = np.random.default_rng(seed)
        self._seed = seed
        observation, _ = self.env.reset()
        self.env.step(np.zeros(4))
        self._observation = np.asarray(observation, np.float32)  # (39,)
        return self._observation.copy()

    def advance(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, dict[str, Any]]:
        observation, reward, _, _, infos = self.env.step(action)
        self._observation = observation.astype(np.float32)
        success = bool(infos["success"])
        return self._observation.copy(), float(reward), False, {"is_success": success, "success": float(success)}

    def read_state(self) -> np.ndarray:
        state = np.empty(self.state_size)
        state[0] = self._seed
        state[1 : 1 + _OBSERVATION_DIM] = self._observation
        self._mujoco.mj_getState(self.env.model, self.env.data, state[1 + _OBSERVATION_DIM :], self._signature)
        return state

    def write_state(self, state: np.ndarray) -> np.ndarray:
        seed = int(state[0])
        if seed != self._seed:
            self.begin(seed)
        model, data, physics = self.env.model, self.env.data, state[1 + _OBSERVATION_DIM :]
        self._mujoco.mj_setState(model, data, physics, self._signature)
        self._mujoco.mj_forward(model, data)
        self._mujoco.mj_setState(model, data, physics, self._signature)  # mj_forward changed the warm start
        self.env._get_obs()  # what the next observation shows as one control step ago
        self.env.curr_path_length = 0
        self._observation = state[1 : 1 + _OBSERVATION_DIM].astype(np.float32)
        return self._observation.copy()

    def draw(self, height: int, width: int, camera_id: int | str) -> np.ndarray:
        if self._renderer is None:
            buffer = self.env.model.vis.global_  # MuJoCo draws no frame larger than this
            buffer.offheight, buffer.offwidth = max(buffer.offheight, height), max(buffer.offwidth, width)
            self._renderer = self._mujoco.Renderer(self.env.model, height, width)
        self._renderer.update_scene(self.env.data, camera_id)
        frame: np.ndarray = self._renderer.render()
        return frame

    def free(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
        self.env.close()


def _import_simulator() -> tuple[Any, dict[str, Any]]:
    """Import MuJoCo and Meta-World; MuJoCo's OpenGL backend must have been chosen before.

    Returns:
        The module mujoco, and Meta-World's classes that show the goal, by name.

    Raises:
        ImportError: If one of them isn't installed.
    """
    try:
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
    except ModuleNotFoundError as error:
        raise ImportError(
            f"Meta-World's tasks need metaworld, but the module {error.name} is missing. "
            'Run: pip install "pwm-gym[meta-world]"'
        ) from error
    return mujoco, ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
