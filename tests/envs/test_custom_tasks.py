"""TD-MPC2's own dm_control tasks against their formulas, written out here in closed form.

dm_control's `tolerance` is 0.1 ** ((distance to the bounds / margin) ** 2) by default, a straight line where it is
linear.
"""

import gymnasium as gym
import numpy as np
import pytest

import pwm_gym
from pwm_gym.envs.tasks import CUSTOM_TASKS


def simulation(task):
    """Return dm_control's environment of a task, freshly reset."""
    env = gym.make(f"pwm_gym/{task}-v0").unwrapped
    env.reset(seed=0)
    return env._simulator.env


def up(height, goal=1.2):
    return 1.0 if height >= goal else 0.1 ** (((goal - height) / (goal / 2)) ** 2)


def line(value, goal):
    return min(max(value / goal, 0.0), 1.0)


def z(physics, body):
    return physics.named.data.xpos[body, "z"]


def backwards(physics, speed):
    stand = (3 * up(physics.torso_height()) + (1 + physics.torso_upright()) / 2) / 4
    return stand * (5 * line(-physics.horizontal_velocity(), speed) + 1) / 6


def on_one_foot(physics, lifted):
    lift = (3 * up(z(physics, lifted)) + 2 * up(z(physics, "torso"))) / 5
    return lift * (5 * line(physics.speed(), 6) + 1) / 6


def jump(physics):
    heights = [up((z(physics, "torso") + z(physics, foot)) / 2) for foot in ("bfoot", "ffoot")]
    too_fast = max(abs(physics.speed()) - 0.5, 0.0)
    return (5 * np.mean(heights) + max(1 - too_fast / 0.5, 0.0)) / 6


def reach(physics, radius):
    return float(physics.finger_to_target_dist() <= radius + 0.01)  # the finger's own radius


def swing(physics):
    distance = np.linalg.norm(
        physics.named.data.site_xpos["target", ["x", "z"]] - physics.named.data.xpos["ball", ["x", "z"]]
    )
    speed = np.linalg.norm(physics.named.data.qvel[["ball_x", "ball_z"]])
    return (1 - physics.in_target()) * (line(distance, 0.5) + 2 * line(speed, 6)) / 3


FORMULAS = {
    "walker-walk-backwards": lambda p: backwards(p, 1),
    "walker-run-backwards": lambda p: backwards(p, 8),
    "cheetah-run-backwards": lambda p: line(-p.speed(), 8),
    "cheetah-run-front": lambda p: on_one_foot(p, "bfoot"),
    "cheetah-run-back": lambda p: on_one_foot(p, "ffoot"),
    "cheetah-jump": jump,
    "hopper-hop-backwards": lambda p: (0.6 <= p.height() <= 2) * line(-p.speed(), 1),
    "reacher-three-easy": lambda p: reach(p, 0.05),
    "reacher-three-hard": lambda p: reach(p, 0.015),
    "cup-spin": swing,
    "pendulum-spin": lambda p: line(abs(p.angular_velocity()[0]), 9),
}


def put(physics, qpos, qvel):
    """Set joint positions and velocities, and all that follows from them."""
    physics.data.qpos[:], physics.data.qvel[:] = qpos, qvel
    physics.forward()


def test_every_custom_task_has_its_formula():
    assert tuple(FORMULAS) == CUSTOM_TASKS


@pytest.mark.parametrize("task", CUSTOM_TASKS)
def test_reward_is_the_published_formula(task):
    env = simulation(task)
    physics, rng = env.physics, np.random.default_rng(0)
    rewards = []
    for _ in range(100):
        put(physics, rng.normal(size=physics.model.nq), rng.normal(size=physics.model.nv) * rng.choice([0.3, 2, 8]))
        if task.startswith("reacher"):
            near = physics.named.data.geom_xpos["finger", :2] + rng.normal(size=2) * 0.03
            physics.named.model.geom_pos["target", ["x", "y"]] = near
            physics.forward()
        rewards.append(env.task.get_reward(physics))
        assert rewards[-1] == pytest.approx(FORMULAS[task](physics), abs=1e-12)
    assert 0 <= min(rewards) < max(rewards) <= 1


def test_rewards_of_known_motions():
    pendulum = simulation("pendulum-spin")
    for velocity, reward in [(0, 0), (4.5, 0.5), (-4.5, 0.5), (9, 1), (-30, 1)]:
        put(pendulum.physics, 0, velocity)
        assert pendulum.task.get_reward(pendulum.physics) == pytest.approx(reward)
    cheetah = simulation("cheetah-run-backwards")
    for velocity, reward in [(3, 0), (-4, 0.5), (-8, 1), (-20, 1)]:
        put(cheetah.physics, 0, [velocity] + [0] * 8)  # slides as a whole
        assert cheetah.task.get_reward(cheetah.physics) == pytest.approx(reward)


@pytest.mark.parametrize("task", CUSTOM_TASKS)
def test_observation_is_the_suites(task):
    domain = task.split("-")[0]
    sibling = {"cup": "cup-catch", "pendulum": "pendulum-swingup", "reacher": "reacher-easy", "hopper": "hopper-hop"}
    suites = simulation(sibling.get(domain, f"{domain}-run")).task.get_observation
    env = simulation(task)
    ours, expected = env.task.get_observation(env.physics), suites(env.physics)
    assert list(ours) == list(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(ours[key], value)


@pytest.mark.parametrize(("task", "radius"), [("reacher-three-easy", 0.05), ("reacher-three-hard", 0.015)])
def test_three_link_reacher_has_the_published_arm(task, radius):
    env = simulation(task)
    physics = env.physics
    assert physics.named.model.geom_size["target", 0] == radius
    put(physics, 0, 0)
    ends = [physics.named.data.xpos[body, "x"] for body in ("arm0", "arm1", "hand", "finger")]
    np.testing.assert_allclose(ends, [0, 0.09, 0.18, 0.27])  # metres
    np.testing.assert_allclose(np.degrees(physics.named.model.jnt_range[["shoulder1", "wrist"]]), [[-80, 80]] * 2)
    assert physics.named.model.jnt_limited["shoulder0"] == 0
    # Half-lengths of the capsules: the hand is 1 cm longer.
    np.testing.assert_allclose(physics.named.model.geom_size[["arm0", "arm1", "hand"], 1], [0.045, 0.045, 0.05])


def test_cup_spin_mostly_starts_in_the_cup_and_elsewhere_without_contact():
    env = simulation("cup-spin")
    inside = []
    for _ in range(100):
        env.reset()
        inside.append(env.physics.in_target())
        assert env.physics.data.ncon == 0
    # 9 of 10, and some of the others by chance; 5 standard deviations are 0.15.
    assert 0.75 < np.mean(inside) < 1


def test_custom_tasks_are_found_by_name():
    with pytest.raises(ValueError, match="got 'cheetah-jmup'. Choose from cheetah-jump"):
        pwm_gym.envs.dm_control.DMControlEnv("cheetah-jmup")
