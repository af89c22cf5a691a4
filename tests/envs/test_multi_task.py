"""The multi-task vector env against the single tasks, Gymnasium's autoreset modes, and SB3."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor

import pwm_gym
from pwm_gym.envs import PaddedTask, multi_task_vector_env

TASKS = ("pendulum-spin", "walker-walk", "mw-reach")
SIZES = [(3, 1), (24, 6), (39, 4)]


def random_actions(steps, num_envs, size, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (steps, num_envs, size)).astype(np.float32)


def test_rows_are_the_single_tasks_padded_with_zeros():
    envs = multi_task_vector_env(TASKS)
    assert envs.single_observation_space.shape == (39,) and envs.single_action_space.shape == (6,)
    singles = [gym.make(f"pwm_gym/{task}-v0") for task in TASKS]

    def check(observations, expected):
        for row, own, (size, _) in zip(observations, expected, SIZES, strict=True):
            np.testing.assert_array_equal(row, np.concatenate([own, np.zeros(39 - size)], dtype=np.float32))
        assert observations in envs.observation_space

    observations, _ = envs.reset(seed=4)
    check(observations, [env.reset(seed=4 + i)[0] for i, env in enumerate(singles)])
    for actions in random_actions(5, 3, 6):
        observations, rewards, *_ = envs.step(actions)
        steps = [env.step(a[:size]) for env, a, (_, size) in zip(singles, actions, SIZES, strict=True)]
        check(observations, [step[0] for step in steps])
        np.testing.assert_array_equal(rewards, [step[1] for step in steps])
    envs.close()


def test_infos_carry_task_and_action_mask_at_reset_and_step():
    envs = multi_task_vector_env(TASKS, envs_per_task=2)
    for infos in (envs.reset(seed=0)[1], envs.step(np.zeros((6, 6), np.float32))[4]):
        np.testing.assert_array_equal(infos["task"], [0, 0, 1, 1, 2, 2])
        np.testing.assert_array_equal(infos["action_mask"].sum(-1), [1, 1, 6, 6, 4, 4])
        assert infos["action_mask"].dtype == bool and infos["action_mask"][0].tolist() == [True] + [False] * 5
        assert "physics_state" not in infos
    envs.close()


def test_padded_part_of_an_action_does_nothing():
    a, b = multi_task_vector_env(TASKS), multi_task_vector_env(TASKS)
    a.reset(seed=0), b.reset(seed=0)
    actions = random_actions(1, 3, 6)[0]
    masked = actions * b.step(actions)[4]["action_mask"]
    b.reset(seed=0)
    assert data_equivalence(a.step(masked), b.step(actions), exact=True)
    a.close(), b.close()


def test_index_and_padding_follow_the_task_set():
    envs = multi_task_vector_env(["cup-spin", "pendulum-spin"], task_set=pwm_gym.tasks("MT80"))
    observations, infos = envs.reset(seed=0)
    assert observations.shape == (2, 39) and envs.single_action_space.shape == (6,)
    assert infos["task"].tolist() == [28, 29]
    envs.close()


def test_same_step_ends_with_the_final_padded_observation():
    # 500 and 100 control steps an action: episodes of two steps in both simulators.
    tasks = {"pendulum-spin": 500, "mw-reach": 100}
    for task, action_repeat in tasks.items():
        settings = {"task_set": TASKS, "action_repeat": action_repeat}
        envs = multi_task_vector_env([task], autoreset_mode=AutoresetMode.SAME_STEP, **settings)
        assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
        start, _ = envs.reset(seed=0)
        actions = np.ones((1, 6), np.float32)
        envs.step(actions)
        observations, _, terminated, truncated, infos = envs.step(actions)
        assert not terminated[0] and truncated[0]
        assert infos["final_obs"][0].shape == (39,) and (infos["final_obs"][0] != observations[0]).any()
        assert infos["final_info"]["task"][0] == infos["task"][0] == TASKS.index(task)
        assert (observations[0] != start[0]).any()
        envs.close()


def test_next_step_resets_one_step_later():
    envs = multi_task_vector_env(["pendulum-spin", "cup-spin"], action_repeat=500)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    envs.reset(seed=0)
    actions = np.ones((2, 2), np.float32)
    envs.step(actions)
    assert envs.step(actions)[3].all()
    _, rewards, terminated, truncated, infos = envs.step(actions)
    assert not rewards.any() and not terminated.any() and not truncated.any()
    assert infos["task"].tolist() == [0, 1]
    envs.close()


def test_equal_seeds_give_equal_trajectories_over_several_episodes():
    runs = []
    for _ in range(2):
        envs = multi_task_vector_env(["pendulum-spin", "reacher-three-easy"], action_repeat=500)
        envs.action_space.seed(0)
        runs.append([envs.reset(seed=3), *(envs.step(envs.action_space.sample()) for _ in range(5))])
        envs.close()
    assert data_equivalence(*runs, exact=True)


@pytest.mark.expensive
def test_workers_give_what_one_process_gives():
    runs = []
    for mode in ("sync", "async"):
        envs = multi_task_vector_env(["pendulum-spin", "mw-reach"], vectorization_mode=mode)
        runs.append([envs.reset(seed=0), *(envs.step(actions) for actions in random_actions(3, 2, 4))])
        envs.close()
    assert data_equivalence(*runs, exact=True)


def test_sb3_learns_in_it():
    envs = multi_task_vector_env(
        ["pendulum-spin", "reacher-three-easy"], autoreset_mode=AutoresetMode.SAME_STEP, action_repeat=500
    )
    vec_env = VecMonitor(pwm_gym.as_sb3_vec_env(envs))
    vec_env.reset()
    for _ in range(2):
        _, _, dones, infos = vec_env.step(np.zeros((2, 3), np.float32))
    assert dones.all()
    assert [info["task"] for info in infos] == [0, 1]
    assert [info["action_mask"].tolist() for info in infos] == [[True, False, False], [True] * 3]
    assert infos[0]["TimeLimit.truncated"] and infos[0]["terminal_observation"].shape == (8,)
    assert PPO("MlpPolicy", vec_env, n_steps=4, batch_size=8, device="cpu").learn(8).num_timesteps == 8
    vec_env.close()


def test_success_of_meta_world_reaches_sb3():
    envs = multi_task_vector_env(["mw-reach"], autoreset_mode=AutoresetMode.SAME_STEP, action_repeat=100)
    vec_env = pwm_gym.as_sb3_vec_env(envs)
    vec_env.reset()
    vec_env.step(np.zeros((1, 4), np.float32))
    _, _, dones, infos = vec_env.step(np.zeros((1, 4), np.float32))
    assert dones[0] and infos[0]["is_success"] is False
    vec_env.close()


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"tasks": ["walker-wlak"]}, "got 'walker-wlak'. Choose from walker-walk"),
        ({"tasks": ["mw-reach"], "task_set": pwm_gym.tasks("MT30")}, "got 'mw-reach'. Choose from"),
        ({"tasks": []}, "`tasks` must name a task"),
        ({"tasks": TASKS, "envs_per_task": 0}, "`envs_per_task` must be >= 1"),
        ({"tasks": TASKS, "vectorization_mode": "threads"}, '`vectorization_mode` must be "sync" or "async"'),
    ],
)
def test_wrong_argument_is_named(kwargs, expected):
    with pytest.raises(ValueError, match=expected):
        multi_task_vector_env(**kwargs)


def test_padded_task_refuses_what_does_not_fit():
    env = gym.make("pwm_gym/walker-walk-v0")
    with pytest.raises(ValueError, match=r"at least the task's own \(24, 6\), got \(24, 5\)"):
        PaddedTask(env, task=0, observation_dim=24, action_dim=5)
    with pytest.raises(ValueError, match="two Box spaces"):
        PaddedTask(gym.make("CartPole-v1"), task=0, observation_dim=24, action_dim=6)
    padded = PaddedTask(env, task=0, observation_dim=39, action_dim=8)
    padded.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape \(8,\), got \(6,\)"):
        padded.step(np.zeros(6))
