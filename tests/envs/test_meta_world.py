"""MetaWorldEnv against Meta-World itself, TD-MPC2's protocol, and Gymnasium's and SB3's contracts."""

import copy
import functools
import pickle
import sys

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3.common.env_checker
from gymnasium.utils import env_checker, seeding

import pwm_gym
from pwm_gym.envs.gl_backend import choose_gl_backend
from pwm_gym.envs.meta_world import MetaWorldEnv

CAN_DRAW = choose_gl_backend() != "disable"
draws = pytest.mark.skipif(not CAN_DRAW, reason="no OpenGL library on this machine")
every_task = pytest.mark.parametrize("task", pwm_gym.tasks("MT50"))


def make(task, **kwargs):
    """Make a task's env without Gymnasium's wrappers."""
    return gym.make(f"pwm_gym/{task}-v0", **kwargs).unwrapped


@functools.cache
def made(task):
    """Make a task's env once for all tests; each resets it."""
    return make(task)


def random_actions(steps, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (steps, 4)).astype(np.float32)


def rollout(env, actions):
    """Step through actions, (T, 4): observations, rewards, physics states and successes."""
    observations, rewards, _, _, infos = zip(*map(env.step, actions), strict=True)
    states = np.stack([i["physics_state"] for i in infos])
    return np.stack(observations), np.array(rewards), states, np.array([i["success"] for i in infos])


def assert_equal_rollouts(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


@every_task
def test_both_checkers_have_nothing_to_say(task):
    env_checker.check_env(made(task), skip_render_check=True)
    stable_baselines3.common.env_checker.check_env(made(task), skip_render_check=True)


@draws
def test_checkers_have_nothing_to_say_about_rendering():
    env = make("mw-hammer", render_mode="rgb_array")
    env_checker.check_env(env)
    stable_baselines3.common.env_checker.check_env(env)
    env.close()


@every_task
def test_steps_equal_two_steps_of_meta_world(task):
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

    reference = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[task.removeprefix("mw-") + "-v3-goal-observable"](seed=0)
    assert reference.reward_function_version == "v2"
    reference._freeze_rand_vec, reference.seeded_rand_vec = False, True
    # What `reset(seed=5)` draws first is the seed of the episode.
    reference.np_random = np.random.default_rng(int(seeding.np_random(5)[0].integers(2**32)))
    expected, _ = reference.reset()
    reference.step(np.zeros(4))  # TD-MPC2 returns the observation from before this step

    env = made(task)
    observation, _ = env.reset(seed=5)
    assert observation.shape == (39,) and env.action_space.shape == reference.action_space.shape
    np.testing.assert_array_equal(observation, expected.astype(np.float32))
    for action in random_actions(10):
        observation, reward, terminated, _, infos = env.step(action)
        _, first, *_ = reference.step(action.astype(np.float64))
        expected, second, _, _, expected_infos = reference.step(action.astype(np.float64))
        np.testing.assert_array_equal(observation, expected.astype(np.float32))
        assert reward == first + second and type(reward) is float
        assert infos["success"] == float(infos["is_success"]) == expected_infos["success"]
        assert type(infos["is_success"]) is bool and not terminated


@every_task
def test_seed_decides_the_episode_and_physics_state_repeats_it(task):
    env, actions = made(task), random_actions(8)
    elsewhere = env.reset(seed=2)[0]
    rollout(env, actions[:3])
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, infos = env.reset(seed=1)
    future = rollout(env, actions)
    second = env.reset()[0]
    assert (first != elsewhere).any() and (second != first).any()
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002

    fresh = make(task)
    np.testing.assert_array_equal(fresh.reset(seed=1)[0], first)
    assert_equal_rollouts(rollout(fresh, actions), future)
    np.testing.assert_array_equal(fresh.reset()[0], second)
    # From another episode, and within the same one.
    np.testing.assert_array_equal(env.set_physics_state(infos["physics_state"]), first)
    assert_equal_rollouts(rollout(env, actions), future)
    np.testing.assert_array_equal(env.set_physics_state(future[2][3]), future[0][3])
    assert_equal_rollouts(rollout(env, actions[4:]), [x[4:] for x in future])
    fresh.close()


@pytest.mark.parametrize(("task", "goal"), [("mw-reach", slice(36, 39)), ("mw-push", slice(4, 7))])
def test_goals_and_objects_are_placed_anew_at_every_reset(task, goal):
    env = made(task)
    places = np.stack([env.reset(seed=0)[0][goal]] + [env.reset()[0][goal] for _ in range(4)])
    assert len(np.unique(places, axis=0)) == 5


def test_first_observation_repeats_the_present_frame_as_the_past_one():
    observation, _ = made("mw-hammer").reset(seed=0)
    np.testing.assert_array_equal(observation[:18], observation[18:36])
    following = made("mw-hammer").step(np.ones(4))[0]
    assert (following[:3] != following[18:21]).any()


@pytest.mark.parametrize(("action_repeat", "steps"), [(2, 100), (1, 200), (150, 2)])
def test_episode_is_200_control_steps_and_truncated(action_repeat, steps):
    env = make("mw-button-press", action_repeat=action_repeat)
    assert env.max_episode_steps == steps
    env.reset(seed=0)
    ends = [env.step(np.zeros(4))[2:4] for _ in range(steps)]
    assert ends == [(False, False)] * (steps - 1) + [(False, True)]
    assert env._simulator.env.curr_path_length == 201  # one at reset
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros(4))


@pytest.mark.filterwarnings("ignore:Constant")  # the policy asks for more than the action's bounds
def test_success_is_that_of_the_present_step():
    from metaworld.policies import SawyerReachV3Policy

    env = made("mw-reach")
    observation, _ = env.reset(seed=0)
    policy, successes = SawyerReachV3Policy(), []
    for step in range(60):
        action = np.clip(policy.get_action(observation.astype(np.float64)), -1, 1)
        observation, reward, *_, infos = env.step(action if step < 40 else -np.ones(4))
        assert 0 <= reward <= 20
        successes.append(infos["is_success"])
    assert not successes[0] and successes[39] and not successes[-1]  # reached, and left again


@draws
def test_frames_show_the_state():
    env = make("mw-push", render_mode="rgb_array", height=240, width=320)
    _, infos = env.reset(seed=0)
    first = env.render()
    assert first.shape == (240, 320, 3) and first.dtype == np.uint8
    assert first.flags["C_CONTIGUOUS"] and first.std() > 5
    rollout(env, np.ones((10, 4)))
    assert (env.render() != first).any()
    env.reset()
    env.set_physics_state(infos["physics_state"])
    np.testing.assert_array_equal(env.render(), first)
    env.close()


@draws
def test_camera_stands_upright():
    # Only the robot is red. Its base is behind the hand, so that most of it is in the picture's upper half.
    env = make("mw-reach", render_mode="rgb_array")
    env.reset(seed=0)
    red = np.argwhere((env.render().astype(int) @ [1, -1, -1]) > 60)  # (N, 2), row and column
    assert len(red) > 1000 and red[:, 0].mean() < 384 / 2
    env.close()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copies_go_on_alike(duplicate):
    env, actions = make("mw-pick-place"), random_actions(100)
    env.reset(seed=0)
    rollout(env, actions[:90])
    other = duplicate(env)
    assert_equal_rollouts(rollout(other, actions[90:]), rollout(env, actions[90:]))
    assert other._needs_reset and env._needs_reset
    np.testing.assert_array_equal(other.reset()[0], env.reset()[0])
    env.close()
    with pytest.raises(gym.error.ClosedEnvironmentError):
        duplicate(env).reset()


def test_frames_per_second_follow_the_action_repeat():
    assert made("mw-reach").metadata["render_fps"] == 40  # control steps last 0.0125 seconds


# Bad input


@pytest.mark.parametrize("action", [np.zeros(3), np.zeros((1, 4)), 0.0, [0.0, np.nan, 0, 0]])
def test_wrong_action_is_refused(action):
    env = made("mw-reach")
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"`action` must be finite, of shape \(4,\), got"):
        env.step(action)


def test_wrong_physics_state_is_refused():
    env = made("mw-reach")
    _, infos = env.reset(seed=0)
    with pytest.raises(ValueError, match=r"of shape \(3,\).*same task, mw-reach"):
        env.set_physics_state(np.zeros(3))
    with pytest.raises(ValueError, match="must be finite"):
        env.set_physics_state(infos["physics_state"] * np.nan)


def test_unknown_task_names_its_neighbours():
    with pytest.raises(ValueError, match="got 'mw-dor-open'. Choose from mw-door-open"):
        MetaWorldEnv("mw-dor-open")
    with pytest.raises(ValueError, match="Choose from mw-push"):
        MetaWorldEnv("push")


@pytest.mark.parametrize("kwargs", [{"render_mode": "human"}, {"action_repeat": 0}, {"height": 0}])
def test_wrong_argument_is_named(kwargs):
    with pytest.raises(ValueError, match=f"`{next(iter(kwargs))}` must be"):
        MetaWorldEnv("mw-reach", **kwargs)


def test_missing_simulator_names_the_pip_line(monkeypatch):
    for name in [m for m in sys.modules if m == "metaworld" or m.startswith("metaworld.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(ImportError, match=r'pip install "pwm-gym\[meta-world\]"'):
        MetaWorldEnv("mw-reach")


def test_closed_env_is_refused():
    env = make("mw-reach")
    _, infos = env.reset(seed=0)
    env.close()
    env.close()
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros(4))
    for call in (env.reset, lambda: env.set_physics_state(infos["physics_state"])):
        with pytest.raises(gym.error.ClosedEnvironmentError, match="Make another with gym.make"):
            call()
