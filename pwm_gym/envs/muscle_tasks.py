"""Standing, walking and running with muscles: dm_control tasks on the bodies of myo-sim.

- `myolegs`: 80 muscles of the legs (Rajagopal et al. 2016), under a rigid trunk without arms.
- `myotrunk`: those, and 72 that bend the spine: the abdominal wall, psoas and iliocostalis; 152 muscles, no arms.
- `myofullbody`: all 416, hands and fingers among them.

A control is a muscle's excitation, in [0, 1]; its activation follows with a delay and belongs to the state. The person
looks, walks and runs to -y, as in MyoSuite. Rewards, in [0, 1] per control step, have the form of dm_control's humanoid
(Tassa et al. 2018, arXiv:1801.00690), with its factors: an upright stand, little effort, and a speed. Here speed counts
only forward, effort is the muscles' activation, and upright is the line from pelvis to head:

    r = tolerance(head's height, >= 1.4 m) tolerance(cosine of tilt, >= 0.9) (4 + mean(1 - act²)) / 5 · motion
    motion = mean of tolerance(v_x), tolerance(v_y), margin 2 m/s,  for standing
    motion = (5 clip(v / goal, 0, 1) + 1) / 6,  with goal 1.25 m/s for walking and 4 m/s for running

with v the centre of mass's. An episode terminates when the head is lower than 1.1 m (it stands at 1.55 m).

This module imports dm_control, so only `pwm_gym.envs.dm_control` imports it, when an env is made.
"""

import collections
import copy
import functools
import math
from typing import Any

import numpy as np

from pwm_gym.envs.gl_backend import choose_gl_backend

choose_gl_backend()  # before dm_control is imported

import mujoco  # noqa: E402
from dm_control.mujoco import Physics  # noqa: E402
from dm_control.mujoco.wrapper import MjModel  # noqa: E402
from dm_control.rl import control  # noqa: E402
from dm_control.suite import base  # noqa: E402
from dm_control.utils.rewards import tolerance  # noqa: E402

__all__ = ["load"]

_CONTROL_TIMESTEP = 0.01  # s: 5 steps of the simulator
_STAND_HEIGHT, _FALL_HEIGHT = 1.4, 1.1  # m, of the head
_SPEEDS = {"stand": 0.0, "walk": 1.25, "run": 4.0}  # m/s

# The trunk's muscles in `myotrunk`: external and internal obliques, rectus abdominis, iliocostalis, psoas.
_TRUNK = ("EO", "IO", "rect_abd", "IL_", "Ps_")
_ROOT = "Full Body"
_PEDESTAL = 0.015  # m: myolegs stands on one in myo-sim's scene
_FOLLOW = mujoco.mjtCamLight.mjCAMLIGHT_TRACK


class _Upright(base.Task):
    """Stand, or move forward.

    Args:
        speed: m/s from which all is earned; 0 to stand still.
        random: Seed, or `numpy.random.RandomState`.
    """

    def __init__(self, speed: float, random: Any = None) -> None:
        super().__init__(random=random)
        self._speed = speed

    def initialize_episode(self, physics: Physics) -> None:
        """Begin standing, with velocities within 0.1 m/s and rad/s, and muscles active up to 0.1."""
        physics.data.qpos[:] = physics.model.key_qpos[0]
        physics.data.qvel[:] = self.random.uniform(-0.1, 0.1, physics.model.nv)
        physics.data.act[:] = self.random.uniform(0.0, 0.1, physics.model.na)
        super().initialize_episode(physics)

    def get_observation(self, physics: Physics) -> dict[str, np.ndarray]:
        """Show positions but the place on the floor, velocities and activations."""
        return collections.OrderedDict(
            position=physics.data.qpos[2:].copy(), velocity=physics.velocity(), activation=physics.activation()
        )

    def get_reward(self, physics: Physics) -> float:
        """Reward a step; the module tells how."""
        head, pelvis = physics.named.data.xpos["head"], physics.named.data.xpos["pelvis"]
        spine = head - pelvis
        standing = tolerance(head[2], (_STAND_HEIGHT, math.inf), margin=_STAND_HEIGHT / 4)
        tilt = spine[2] / np.linalg.norm(spine)
        upright = tolerance(tilt, (0.9, math.inf), sigmoid="linear", margin=1.9, value_at_margin=0)
        effort = (4 + np.mean(1 - np.square(physics.data.act))) / 5
        velocity = physics.named.data.sensordata["velocity"]
        if self._speed == 0.0:
            motion = tolerance(velocity[:2], margin=2).mean()
        else:
            motion = (5 * np.clip(-velocity[1] / self._speed, 0, 1) + 1) / 6
        return float(standing * upright * effort * motion)

    def get_termination(self, physics: Physics) -> float | None:
        """Terminate at a fall."""
        return 0.0 if physics.named.data.xpos["head", "z"] < _FALL_HEIGHT else None


def load(task: str, random: Any = None, time_limit: float = math.inf) -> control.Environment:
    """Build one of the tasks as dm_control builds its own.

    Args:
        task: Name of the task, one of `pwm_gym.task_sets.MUSCLE_TASKS`.
        random: Seed, or `numpy.random.RandomState`.
        time_limit: Seconds of simulated time in an episode.

    Returns:
        dm_control's environment.

    Raises:
        ImportError: If myo-sim isn't installed.

    Example:
        >>> load("myolegs-run", random=0).action_spec().shape
        (80,)
    """
    body, _, name = task.partition("-")
    physics = Physics.from_model(MjModel(copy.copy(_compiled(body))))
    return control.Environment(
        physics,
        _Upright(_SPEEDS[name], random),
        time_limit=time_limit,
        control_timestep=_CONTROL_TIMESTEP,
    )


@functools.lru_cache
def _compiled(body: str) -> mujoco.MjModel:
    """Compile a body on an endless floor; seconds, so once a process."""
    try:
        import myo_sim
    except ModuleNotFoundError as error:
        raise ImportError(
            f"tasks with muscles need myo-sim, but the module {error.name} is missing. "
            'Run: pip install "pwm-gym[muscles]"'
        ) from error
    source = "myolegs" if body == "myolegs" else "myofullbody"
    spec = myo_sim.load_spec(source)
    if body == "myotrunk":
        legs = {muscle.name for muscle in myo_sim.load_spec("myolegs").actuators}
        for arm in ("myoarm_r_root", "myoarm_l_root"):
            spec.delete(spec.body(arm))
        for muscle in list(spec.actuators):
            if muscle.name not in legs and not muscle.name.startswith(_TRUNK):
                spec.delete(spec.tendon(muscle.target))
                spec.delete(muscle)
    _replace_scene(spec)
    for sensor in list(spec.sensors):
        spec.delete(sensor)
    spec.add_sensor(
        name="velocity",
        type=mujoco.mjtSensor.mjSENS_SUBTREELINVEL,
        objtype=mujoco.mjtObj.mjOBJ_BODY,
        objname=_ROOT,
    )
    (standing,) = myo_sim.add_posture_keyframes(spec, source, ["standing"])
    if body == "myolegs":
        standing.qpos[2] -= _PEDESTAL
    return spec.compile()


def _replace_scene(spec: mujoco.MjSpec) -> None:
    """Put an endless chequered floor at height 0 in place of myo-sim's room, with two cameras that follow."""
    world = spec.worldbody
    for element in [*world.geoms, *world.lights, *spec.cameras]:
        spec.delete(element)
    used = {geom.meshname for geom in spec.geoms}
    for mesh in list(spec.meshes):
        if mesh.name not in used:
            spec.delete(mesh)
    kept = {geom.material for geom in spec.geoms}
    for material in list(spec.materials):
        if material.name not in kept:
            spec.delete(material)
    shown = {name for material in spec.materials for name in material.textures}
    for texture in list(spec.textures):
        if texture.name not in shown:
            spec.delete(texture)
    spec.add_texture(
        name="floor",
        type=mujoco.mjtTexture.mjTEXTURE_2D,
        builtin=mujoco.mjtBuiltin.mjBUILTIN_CHECKER,
        width=128,
        height=128,
        rgb1=[0.78, 0.8, 0.82],
        rgb2=[0.65, 0.68, 0.72],
    )
    spec.add_texture(
        type=mujoco.mjtTexture.mjTEXTURE_SKYBOX,
        builtin=mujoco.mjtBuiltin.mjBUILTIN_GRADIENT,
        width=64,
        height=384,
        rgb1=[0.95, 0.97, 1.0],
        rgb2=[0.6, 0.7, 0.8],
    )
    floor = spec.add_material(name="floor", texrepeat=[1, 1], texuniform=True)
    floor.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = "floor"
    world.add_geom(name="floor", type=mujoco.mjtGeom.mjGEOM_PLANE, size=[0, 0, 0.1], material="floor")
    world.add_light(pos=[-1, -3, 4], dir=[0.2, 0.6, -0.8], diffuse=[0.7, 0.7, 0.7], mode=_FOLLOW)
    spec.visual.rgba.haze = [0.75, 0.82, 0.88, 1.0]
    root = spec.body(_ROOT)
    root.add_camera(name="side", pos=[-2.6, -0.1, 0.0], xyaxes=[0, -1, 0, 0.05, 0, 1], mode=_FOLLOW)
    root.add_camera(name="front", pos=[-1.3, -2.25, 0.0], xyaxes=[0.87, -0.5, 0, 0.03, 0.05, 1], mode=_FOLLOW)
