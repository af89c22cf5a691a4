"""DMControlEnv against dm_control itself, and against Gymnasium's and SB3's contracts."""

import copy
import logging
import math
import pickle
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3.common.env_checker
from gymnasium.utils import env_checker, seeding
from gymnasium.vector import AsyncVectorEnv
from stable_baselines3.common.vec_env import SubprocVecEnv

import pwm_gym
from pwm_gym.envs.dm_control import _MODEL_STATE, DMControlEnv
from pwm_gym.envs.gl_backend import choose_gl_backend
from pwm_gym.task_sets import CUSTOM_TASKS, DM_CONTROL_TASKS

CAN_DRAW = choose_gl_backend() != "disable"
draws = pytest.mark.skipif(not CAN_DRAW, reason="no OpenGL library on this machine")
every_task = pytest.mark.parametrize("task", DM_CONTROL_TASKS + CUSTOM_TASKS)
suites_task = pytest.mark.parametrize("task", DM_CONTROL_TASKS)

# task: (domain and task in the suite, O, A, the entries in TD-MPC2's order)
SUITE = {
    "walker-stand": ("walker", "stand", 24, 6, "orientations height velocity"),
    "walker-walk": ("walker", "walk", 24, 6, "orientations height velocity"),
    "walker-run": ("walker", "run", 24, 6, "orientations height velocity"),
    "cheetah-run": ("cheetah", "run", 17, 6, "position velocity"),
    "reacher-easy": ("reacher", "easy", 6, 2, "position to_target velocity"),
    "reacher-hard": ("reacher", "hard", 6, 2, "position to_target velocity"),
    "acrobot-swingup": ("acrobot", "swingup", 6, 1, "orientations velocity"),
    "pendulum-swingup": ("pendulum", "swingup", 3, 1, "orientation velocity"),
    "cartpole-balance": ("cartpole", "balance", 5, 1, "position velocity"),
    "cartpole-balance-sparse": ("cartpole", "balance_sparse", 5, 1, "position velocity"),
    "cartpole-swingup": ("cartpole", "swingup", 5, 1, "position velocity"),
    "cartpole-swingup-sparse": ("cartpole", "swingup_sparse", 5, 1, "position velocity"),
    "cup-catch": ("ball_in_cup", "catch", 8, 2, "position velocity"),
    "finger-spin": ("finger", "spin", 9, 2, "position velocity touch"),
    "finger-turn-easy": (
        *("finger", "turn_easy", 12, 2),
        "position velocity touch target_position dist_to_target",
    ),
    "finger-turn-hard": (
        *("finger", "turn_hard", 12, 2),
        "position velocity touch target_position dist_to_target",
    ),
    "fish-swim": ("fish", "swim", 24, 5, "joint_angles upright target velocity"),
    "hopper-stand": ("hopper", "stand", 15, 4, "position velocity touch"),
    "hopper-hop": ("hopper", "hop", 15, 4, "position velocity touch"),
}


def make(task, **kwargs):
    """Make a task's env without Gymnasium's wrappers."""
    return gym.make(f"pwm_gym/{task}-v0", **kwargs).unwrapped


def make_in_worker():
    """Make an env in a worker process, which has imported nothing yet."""
    return gym.make("pwm_gym:pwm_gym/reacher-easy-v0")


def random_actions(env, steps, seed=0):
    """Draw actions, (T, A)."""
    size = (steps, *env.action_space.shape)
    return np.random.default_rng(seed).uniform(-1, 1, size).astype(np.float32)


def rollout(env, actions):
    """Step through actions, (T, A): observations, (T, O), rewards and physics states, (T, ...)."""
    observations, rewards, _, _, infos = zip(*map(env.step, actions), strict=True)
    return np.stack(observations), np.array(rewards), np.stack([i["physics_state"] for i in infos])


def assert_equal_rollouts(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


# Registration


def test_the_table_is_the_suite_part_of_mt30():
    assert tuple(SUITE) == DM_CONTROL_TASKS


def test_loading_a_task_logs_nothing(caplog: pytest.LogCaptureFixture):
    gym.make("pwm_gym/cheetah-run-v0").close()
    gym.make("pwm_gym/cheetah-jump-v0").close()
    assert not caplog.records
    assert not logging.getLogger("absl").filters


def test_import_loads_no_simulator():
    code = (
        "import sys, gymnasium, pwm_gym\n"
        "registered = {i for i in gymnasium.registry if i.startswith('pwm_gym/')}\n"
        "assert {f'pwm_gym/{task}-v0' for task in pwm_gym.tasks('MT80')} | {'pwm_gym/Latent-v0'} <= registered\n"
        "assert len(registered) == 81 + 4  # and torch physics\n"
        "assert not {'dm_control', 'metaworld', 'mujoco', 'shimmy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registering_again_changes_nothing():
    before = dict(gym.registry)
    pwm_gym.envs.register()
    assert gym.registry == before


def test_latent_env_is_only_made_as_a_vector():
    assert gym.spec("pwm_gym/Latent-v0").entry_point is None
    with pytest.raises(gym.error.Error, match="entry_point is not specified"):
        gym.make("pwm_gym/Latent-v0")


@every_task
def test_gymnasium_checker_has_nothing_to_say(task):
    env_checker.check_env(make(task), skip_render_check=not CAN_DRAW)


@every_task
def test_sb3_checker_has_nothing_to_say(task):
    stable_baselines3.common.env_checker.check_env(make(task))


@every_task
def test_made_env_runs_an_episode(task):
    env = gym.make(f"pwm_gym/{task}-v0")
    assert env.spec.max_episode_steps is None
    env.reset(seed=0)
    for step, action in enumerate(random_actions(env, 500), start=1):
        observation, reward, terminated, truncated, _ = env.step(action)
        assert observation.dtype == np.float32 and type(reward) is float and 0 <= reward <= 2
        assert not terminated and truncated == (step == 500)


# dm_control's own numbers


@suites_task
def test_spaces_have_the_published_sizes(task):
    _, _, observation_dim, action_dim, _ = SUITE[task]
    env = make(task)
    limit = np.finfo(np.float32).max
    box = gym.spaces.Box
    assert env.observation_space == box(-limit, limit, (observation_dim,), np.float32)
    assert env.action_space == box(-1, 1, (action_dim,), np.float32)


@suites_task
def test_steps_equal_two_steps_of_dm_control(task):
    from dm_control import suite

    domain, name, _, _, keys = SUITE[task]
    # What `reset(seed=5)` draws first is the seed of the task.
    seed = int(seeding.np_random(5)[0].integers(2**32))
    reference = suite.load(domain, name, task_kwargs={"random": np.random.RandomState(seed)})

    def flat(observation):
        return np.concatenate([np.ravel(observation[key]) for key in keys.split()])

    env = make(task)
    observation, _ = env.reset(seed=5)
    timestep = reference.reset()
    assert list(timestep.observation) == keys.split()
    np.testing.assert_array_equal(observation, flat(timestep.observation).astype(np.float32))
    for action in random_actions(env, 40):
        observation, reward, _, _, _ = env.step(action)
        first, second = reference.step(action), reference.step(action)
        assert reward == first.reward + second.reward
        np.testing.assert_array_equal(observation, flat(second.observation).astype(np.float32))


@suites_task
def test_the_time_limit_is_the_suites(task):
    from dm_control import suite

    domain, name, *_ = SUITE[task]
    reference = suite.load(domain, name)
    reference.reset()
    action = np.zeros(reference.action_spec().shape)
    steps = 1
    while not (timestep := reference.step(action)).last():
        steps += 1
    assert (steps, timestep.discount) == (1000, 1.0)


def test_actions_are_scaled_and_clipped_to_the_tasks_bounds(monkeypatch):
    from dm_control import suite

    load = suite.load

    def load_with_other_bounds(*args, **kwargs):
        env = load(*args, **kwargs)
        env.physics.model.actuator_ctrlrange[:] = (-2, 4)
        return env

    monkeypatch.setattr(suite, "load", load_with_other_bounds)
    env = make("reacher-easy")
    env.reset(seed=0)
    # The middle is 1, the radius 3.
    for action, control in [([-1, 1], [-2, 4]), ([0, 0.5], [1, 2.5]), ([-9, 9], [-2, 4])]:
        env.step(np.array(action))
        np.testing.assert_array_equal(env._simulator.env.physics.control(), control)


def test_one_control_step_per_action_without_repeat():
    env, repeating = make("walker-walk", action_repeat=1), make("walker-walk")
    env.reset(seed=0), repeating.reset(seed=0)
    assert (env.max_episode_steps, repeating.max_episode_steps) == (1000, 500)
    for action in random_actions(env, 5):
        _, first, *_ = env.step(action)
        observation, second, *_ = env.step(action)
        expected, reward, *_ = repeating.step(action)
        assert reward == first + second
        np.testing.assert_array_equal(observation, expected)


# The end of an episode


def test_the_limit_cuts_an_action_short():
    # 1000 = 333 x 3 + 1: the last action lasts one control step. cartpole-balance pays at most 1 each.
    env = make("cartpole-balance", action_repeat=3)
    env.reset(seed=0)
    truncations, rewards = [], []
    for _ in range(334):
        _, reward, terminated, truncated, _ = env.step(np.zeros(1))
        truncations.append(truncated)
        rewards.append(reward)
        assert not terminated
    assert truncations == [False] * 333 + [True]
    assert rewards[0] > 1 >= rewards[-1]


def test_discount_zero_is_a_termination_and_cuts_an_action_short(monkeypatch):
    env = make("cartpole-balance")
    env.reset(seed=0)
    monkeypatch.setattr(env._simulator.env.task, "get_termination", lambda physics: 0.0)
    _, reward, terminated, truncated, _ = env.step(np.zeros(1))
    assert (terminated, truncated) == (True, False)
    assert 0 < reward <= 1


def test_step_needs_a_running_episode():
    env = make("cartpole-swingup", action_repeat=1000)
    with pytest.raises(gym.error.ResetNeeded, match="Call `reset` first"):
        env.step(np.zeros(1))
    env.reset(seed=0)
    assert env.step(np.zeros(1))[3]
    with pytest.raises(gym.error.ResetNeeded, match="Call `reset` first"):
        env.step(np.zeros(1))


# Randomness


@every_task
def test_seed_decides_the_episode(task):
    a, b = make(task), make(task)
    b.reset(seed=9)
    actions = random_actions(a, 10)
    b.step(actions[0])
    np.testing.assert_array_equal(a.reset(seed=1)[0], b.reset(seed=1)[0])
    assert_equal_rollouts(rollout(a, actions), rollout(b, actions))
    second, _ = a.reset()
    np.testing.assert_array_equal(second, b.reset()[0])
    assert (second != a.reset(seed=1)[0]).any()
    assert (a.reset(seed=2)[0] != a.reset(seed=1)[0]).any()


@pytest.mark.parametrize("task", ["walker-walk", "finger-turn-hard", "fish-swim", "cup-catch"])
def test_random_state_decides_the_next_resets(task):
    env = make(task)
    env.reset(seed=3)
    rollout(env, random_actions(env, 5))
    state = env.np_random.bit_generator.state
    expected = [env.reset() for _ in range(3)]

    fresh = make(task)
    fresh.reset(seed=4)
    fresh.np_random.bit_generator.state = state
    for observation, infos in expected:
        again, again_infos = fresh.reset()
        np.testing.assert_array_equal(again, observation)
        np.testing.assert_array_equal(again_infos["physics_state"], infos["physics_state"])


# The physics state


@every_task
def test_physics_state_repeats_the_future_exactly(task):
    env = make(task)
    _, infos = env.reset(seed=0)
    start = infos["physics_state"]
    assert start.dtype == np.float64 and start.ndim == 1
    actions = random_actions(env, 90)
    observations, rewards, states = rollout(env, actions)

    never_reset, elsewhere = make(task), make(task)
    elsewhere.reset(seed=1)
    rollout(elsewhere, actions[:7])
    for other in (never_reset, elsewhere):
        other.set_physics_state(start)
        assert_equal_rollouts(rollout(other, actions), (observations, rewards, states))
        at_30 = other.set_physics_state(states[30])
        np.testing.assert_array_equal(at_30, observations[30])
        assert at_30.dtype == np.float32
        future = (observations[31:], rewards[31:], states[31:])
        assert_equal_rollouts(rollout(other, actions[31:]), future)


@every_task
def test_resets_change_nothing_of_the_model_but_what_the_state_holds(task):
    domain = task.split("-")[0]
    env = make(task)
    env.reset(seed=0)
    model = env._simulator.env.physics.model
    names = [n for n in dir(model.ptr) if isinstance(getattr(model.ptr, n), np.ndarray)]
    before = {name: getattr(model.ptr, name).copy() for name in names}
    for _ in range(3):
        env.reset()
    if domain in _MODEL_STATE:
        array, name = _MODEL_STATE[domain]
        index = model.name2id(name, array.split("_")[0])
        before[array][index] = getattr(model.ptr, array)[index]
    for name in names:
        np.testing.assert_array_equal(getattr(model.ptr, name), before[name], err_msg=name)


def test_set_physics_state_begins_a_new_time_limit_and_draws_no_random_number():
    env = make("cartpole-swingup", action_repeat=500)
    _, infos = env.reset(seed=0)
    random_state = env.np_random.bit_generator.state
    for _ in range(2):  # before the end, and after it
        env.step(np.zeros(1))
        env.set_physics_state(infos["physics_state"])
        assert not env.step(np.zeros(1))[3]
        assert env.step(np.zeros(1))[3]
        env.set_physics_state(infos["physics_state"])
    assert env.np_random.bit_generator.state == random_state


def test_wrong_physics_state_is_refused():
    env = make("reacher-easy")
    _, infos = env.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape \(10,\), got .* of shape \(3,\)"):
        env.set_physics_state(np.zeros(3))
    with pytest.raises(ValueError, match="must be finite"):
        env.set_physics_state(infos["physics_state"] * np.nan)


# Rendering


@draws
@pytest.mark.parametrize("task", ["cartpole-swingup", "reacher-easy"])
def test_frames_show_the_state(task):
    env = make(task, render_mode="rgb_array")
    _, infos = env.reset(seed=0)
    first = env.render()
    assert first.shape == (384, 384, 3) and first.dtype == np.uint8
    assert first.flags["C_CONTIGUOUS"] and first.std() > 5
    rollout(env, np.ones((20, *env.action_space.shape)))
    assert (env.render() != first).any()
    env.set_physics_state(infos["physics_state"])
    np.testing.assert_array_equal(env.render(), first)
    env.close()


@draws
def test_frames_may_be_larger_than_mujocos_buffer():
    env = make("reacher-easy", render_mode="rgb_array", height=500, width=700, camera_id=-1)
    env.reset(seed=0)
    assert env.render().shape == (500, 700, 3)
    env.close()


def test_frames_per_second_follow_the_action_repeat():
    # Control steps last 0.025, 0.01 and 0.04 seconds.
    tasks = [("walker-walk", 2, 20), ("cartpole-swingup", 2, 50), ("fish-swim", 1, 25)]
    for task, action_repeat, fps in tasks:
        assert make(task, action_repeat=action_repeat).metadata["render_fps"] == fps
    assert make("fish-swim").metadata["render_fps"] == 12.5
    assert "render_fps" not in DMControlEnv.metadata


def test_render_without_a_mode_says_how_to_get_frames():
    env = make("reacher-easy")
    env.reset(seed=0)
    with pytest.warns(UserWarning, match='render_mode="rgb_array"'):
        assert env.render() is None


# Copies and workers


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copies_go_on_alike(duplicate):
    env = make("finger-turn-hard")
    env.reset(seed=0)
    actions = random_actions(env, 500)
    rollout(env, actions[:20])
    other = duplicate(env)
    assert_equal_rollouts(rollout(other, actions[20:]), rollout(env, actions[20:]))
    assert other._needs_reset and env._needs_reset
    np.testing.assert_array_equal(other.reset()[0], env.reset()[0])
    assert other.spec == env.spec
    env.close()
    with pytest.raises(gym.error.ClosedEnvironmentError):
        duplicate(env).reset()


def test_workers_give_what_one_process_gives():
    single = make("reacher-easy")
    expected = [single.reset(seed=3)[0], single.step(np.ones(2))[0]]
    physics_state = single.reset(seed=3)[1]["physics_state"]

    envs = AsyncVectorEnv([make_in_worker], context="spawn")
    observations, infos = envs.reset(seed=3)
    np.testing.assert_array_equal(observations[0], expected[0])
    np.testing.assert_array_equal(infos["physics_state"][0], physics_state)
    np.testing.assert_array_equal(envs.step(np.ones((1, 2), np.float32))[0][0], expected[1])
    envs.close()

    vec_env = SubprocVecEnv([make_in_worker], start_method="spawn")
    vec_env.seed(3)
    np.testing.assert_array_equal(vec_env.reset()[0], expected[0])
    np.testing.assert_array_equal(vec_env.step(np.ones((1, 2)))[0][0], expected[1])
    vec_env.close()


# Bad input


@pytest.mark.parametrize("action", [np.zeros(3), np.zeros((1, 2)), 0.0, [0.0, math.nan], [math.inf, 0]])
def test_wrong_action_is_refused(action):
    env = make("reacher-easy")
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"`action` must be finite, of shape \(2,\), got"):
        env.step(action)


def test_unknown_task_names_its_neighbours():
    with pytest.raises(ValueError, match="got 'walker-wlak'. Choose from walker-walk"):
        DMControlEnv("walker-wlak")
    with pytest.raises(ValueError, match="Choose from walker-stand, .*, hopper-hop"):
        DMControlEnv("quadruped")


@pytest.mark.parametrize("kwargs", [{"render_mode": "human"}, {"action_repeat": 0}, {"height": 0}, {"width": -1}])
def test_wrong_argument_is_named(kwargs):
    with pytest.raises(ValueError, match=f"`{next(iter(kwargs))}` must be"):
        DMControlEnv("walker-walk", **kwargs)


@pytest.mark.parametrize("module", ["dm_control", "shimmy"])
def test_missing_simulator_names_the_pip_line(monkeypatch, module):
    for name in [m for m in sys.modules if m == module or m.startswith(f"{module}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "pwm-gym\[dm-control\]"'):
        DMControlEnv("walker-walk")


def test_closed_env_is_refused():
    env = make("reacher-easy", **({"render_mode": "rgb_array"} if CAN_DRAW else {}))
    _, infos = env.reset(seed=0)
    env.close()
    env.close()
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros(2))
    calls = [env.reset, lambda: env.set_physics_state(infos["physics_state"])]
    for call in calls + [env.render] * CAN_DRAW:
        with pytest.raises(gym.error.ClosedEnvironmentError, match="Make another with gym.make"):
            call()
