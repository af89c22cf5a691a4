"""The 11 tasks that TD-MPC2 (arXiv:2310.16828) added to dm_control's suite for MT30.

They keep the suite's models, observations, episodes and, but for cup-spin, initial states; what is new is the reward,
and for reacher-three-* a third link. Each reward is in [0, 1] per control step.

This module imports dm_control, so only `pwm_gym.envs.dm_control` imports it, when an env is made.
"""

import math
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import numpy as np

from pwm_gym.envs.gl_backend import choose_gl_backend

choose_gl_backend()  # before dm_control is imported

from dm_control import suite  # noqa: E402
from dm_control.rl import control  # noqa: E402
from dm_control.suite import ball_in_cup, base, cheetah, common, hopper, pendulum, reacher, walker  # noqa: E402
from dm_control.utils.rewards import tolerance  # noqa: E402

__all__ = ["load"]

_STAND_HEIGHT = 1.2  # metres: the walker's torso, the cheetah's torso and feet


class _BackwardsWalker(walker.PlanarWalker):
    """Stand upright and move backwards, at `move_speed` metres per second or more."""

    def get_reward(self, physics: Any) -> float:
        standing = tolerance(physics.torso_height(), (_STAND_HEIGHT, math.inf), margin=_STAND_HEIGHT / 2)
        upright = (1 + physics.torso_upright()) / 2
        moving = _ramp(-physics.horizontal_velocity(), self._move_speed)
        return (3 * standing + upright) / 4 * (5 * moving + 1) / 6


class _BackwardsCheetah(cheetah.Cheetah):
    """Run backwards; all is earned from 8 metres per second on."""

    def get_reward(self, physics: Any) -> float:
        return _ramp(-physics.speed(), 8)


class _OneFootCheetah(cheetah.Cheetah):
    """Run with one foot in the air; all is earned from 6 metres per second on."""

    def __init__(self, lifted_foot: str, random: Any = None) -> None:
        super().__init__(random=random)
        self._lifted_foot = lifted_foot

    def get_reward(self, physics: Any) -> float:
        height = physics.named.data.xpos
        lifted = (3 * _raised(height[self._lifted_foot, "z"]) + 2 * _raised(height["torso", "z"])) / 5
        return lifted * (5 * _ramp(physics.speed(), 6) + 1) / 6


class _JumpingCheetah(cheetah.Cheetah):
    """Have torso and both feet in the air, without running."""

    def get_reward(self, physics: Any) -> float:
        height = physics.named.data.xpos
        raised = [_raised((height["torso", "z"] + height[foot, "z"]) / 2) for foot in ("bfoot", "ffoot")]
        still = tolerance(physics.speed(), (-0.5, 0.5), margin=0.5, value_at_margin=0, sigmoid="linear")
        return (5 * np.mean(raised) + still) / 6


class _BackwardsHopper(hopper.Hopper):
    """Hop backwards; all is earned from 1 metre per second on, and nothing while the torso is low."""

    def __init__(self, random: Any = None) -> None:
        super().__init__(hopping=True, random=random)

    def get_reward(self, physics: Any) -> float:
        return tolerance(physics.height(), (0.6, 2)) * _ramp(-physics.speed(), 1)


class _SpinningBall(ball_in_cup.BallInCup):
    """Swing the ball around the cup, far from it and fast.

    Nine of ten episodes begin with the ball in the cup, the others wherever cup-catch would begin.
    """

    def initialize_episode(self, physics: Any) -> None:
        anywhere = self.random.uniform() < 0.1
        while True:
            physics.named.data.qpos["ball_x"] = self.random.uniform(-0.2, 0.2)
            physics.named.data.qpos["ball_z"] = self.random.uniform(0.2, 0.5)
            physics.after_reset()
            if physics.data.ncon == 0 and (anywhere or physics.in_target()):
                break
        # Not the parent's: it would draw the ball again.
        base.Task.initialize_episode(self, physics)

    def get_reward(self, physics: Any) -> float:
        far = _ramp(np.linalg.norm(physics.ball_to_target()), 0.5)
        fast = _ramp(np.linalg.norm(physics.named.data.qvel[["ball_x", "ball_z"]]), 6)
        return (1 - physics.in_target()) * (far + 2 * fast) / 3


class _SpinningPendulum(pendulum.SwingUp):
    """Turn either way; all is earned from 9 radians per second on."""

    def get_reward(self, physics: Any) -> float:
        return _ramp(np.linalg.norm(physics.angular_velocity()), 9)


def _ramp(value: Any, goal: float) -> float:
    """Return 1 from the goal on and less in proportion below, never under 0."""
    return tolerance(value, (goal, math.inf), margin=goal, value_at_margin=0, sigmoid="linear")


def _raised(height: float) -> float:
    """Return 1 from 1.2 metres on, 0.1 at half of that: a Gaussian below."""
    return tolerance(height, (_STAND_HEIGHT, math.inf), margin=_STAND_HEIGHT / 2)


# Task -> the suite's domain and any task of it, and what makes the new task.
_TASKS: dict[str, tuple[str, str, Callable[..., base.Task], dict[str, Any]]] = {
    "walker-walk-backwards": ("walker", "walk", _BackwardsWalker, {"move_speed": 1}),
    "walker-run-backwards": ("walker", "run", _BackwardsWalker, {"move_speed": 8}),
    "cheetah-run-backwards": ("cheetah", "run", _BackwardsCheetah, {}),
    "cheetah-run-front": ("cheetah", "run", _OneFootCheetah, {"lifted_foot": "bfoot"}),
    "cheetah-run-back": ("cheetah", "run", _OneFootCheetah, {"lifted_foot": "ffoot"}),
    "cheetah-jump": ("cheetah", "run", _JumpingCheetah, {}),
    "hopper-hop-backwards": ("hopper", "hop", _BackwardsHopper, {}),
    "reacher-three-easy": ("reacher", "easy", reacher.Reacher, {"target_size": 0.05}),
    "reacher-three-hard": ("reacher", "hard", reacher.Reacher, {"target_size": 0.015}),
    "cup-spin": ("ball_in_cup", "catch", _SpinningBall, {}),
    "pendulum-spin": ("pendulum", "swingup", _SpinningPendulum, {}),
}


def load(task: str, random: Any = None, time_limit: float = math.inf) -> control.Environment:
    """Build one of the tasks as dm_control builds its own.

    Args:
        task: TD-MPC2's name of the task, one of `pwm_gym.envs.tasks.CUSTOM_TASKS`.
        random: Seed, or `numpy.random.RandomState`.
        time_limit: Seconds of simulated time in an episode.

    Returns:
        dm_control's environment.

    Example:
        >>> load("pendulum-spin", random=0).reset().observation["velocity"]
        array([0.])
    """
    domain, sibling, task_class, kwargs = _TASKS[task]
    suites_own = suite.load(domain, sibling)
    physics = suites_own.physics
    if domain == "reacher":
        physics = reacher.Physics.from_xml_string(_three_link_reacher(), common.ASSETS)
    return control.Environment(
        physics,
        task_class(random=random, **kwargs),
        time_limit=time_limit,
        control_timestep=suites_own.control_timestep(),
    )


def _three_link_reacher() -> str:
    """Return the suite's reacher with an arm of three links, 9 cm apart, as MJCF."""
    model = ET.fromstring(common.read_model("reacher.xml"))
    world, actuators = model.find("worldbody"), model.find("actuator")
    assert world is not None and actuators is not None, "the suite's reacher has a world and actuators"
    arm = world.find("body")
    assert arm is not None, "the suite's reacher has an arm"
    finger = arm.find("body/body[@name='finger']")
    assert finger is not None, "the suite's reacher has a finger"

    # Link after link, each a capsule that turns around its near end; the hand is 1 cm longer than the others.
    links = [("arm0", "shoulder0", 0.09), ("arm1", "shoulder1", 0.09), ("hand", "wrist", 0.1)]
    limits = {"limited": "true", "range": "-80 80"}  # degrees
    at = int(list(world).index(arm))
    world.remove(arm)
    parent, position = world, "0 0 .01"
    for number, (name, joint, length) in enumerate(links):
        body = ET.Element("body", name=name, pos=position)
        capsule = {"type": "capsule", "fromto": f"0 0 0 {length} 0 0", "size": ".01", "material": "self"}
        ET.SubElement(body, "geom", {"name": name, **capsule})
        ET.SubElement(body, "joint", {"name": joint, **(limits if number > 0 else {})})
        if parent is world:
            world.insert(at, body)
        else:
            parent.append(body)
        parent, position = body, ".09 0 0"
    finger.set("pos", position)
    parent.append(finger)

    for motor in list(actuators):
        actuators.remove(motor)
    for _, joint, _ in links:
        ET.SubElement(actuators, "motor", name=joint, joint=joint)
    return ET.tostring(model, encoding="unicode")
