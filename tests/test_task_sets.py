"""The names, sets and sizes of the tasks."""

import gymnasium as gym
import pytest

import pwm_gym
from pwm_gym.task_sets import TASK_DIMS, TaskDims


def test_sets_are_numbered_as_in_td_mpc2():
    mt30, mt50, mt80 = (pwm_gym.tasks(name) for name in ("MT30", "MT50", "MT80"))
    assert (len(mt30), len(mt50), len(mt80)) == (30, 50, 80)
    assert mt80 == mt30 + mt50 and len(set(mt80)) == 80
    # Some of the indices that its datasets and checkpoints use.
    published = {
        **{0: "walker-stand", 3: "cheetah-run", 6: "acrobot-swingup", 12: "cup-catch", 16: "fish-swim"},
        **{18: "hopper-hop", 19: "walker-walk-backwards", 24: "cheetah-jump", 28: "cup-spin", 29: "pendulum-spin"},
        **{30: "mw-assembly", 40: "mw-disassemble", 62: "mw-push-back", 75: "mw-bin-picking", 79: "mw-hand-insert"},
    }
    assert {index: mt80[index] for index in published} == published


def test_every_task_is_registered_and_has_dims():
    assert tuple(TASK_DIMS) == pwm_gym.tasks("MT80") + pwm_gym.tasks("locomotion") + pwm_gym.tasks("muscles")
    for task in TASK_DIMS:
        assert gym.spec(f"pwm_gym/{task}-v0").kwargs == {"task": task}


def test_largest_dims_are_the_published_paddings():
    def largest(name):
        dims = [TASK_DIMS[task] for task in pwm_gym.tasks(name)]
        return TaskDims(max(d.observation for d in dims), max(d.action for d in dims))

    assert (largest("MT30"), largest("MT50"), largest("MT80")) == ((24, 6), (39, 4), (39, 6))


@pytest.mark.parametrize("task", pwm_gym.tasks("MT30") + pwm_gym.tasks("locomotion") + pwm_gym.tasks("muscles"))
def test_dims_are_dm_controls_own(task):
    env = gym.make(f"pwm_gym/{task}-v0").unwrapped
    simulation = env._simulator.env
    observation, _ = env.reset(seed=0)
    assert TASK_DIMS[task] == (len(observation), *simulation.action_spec().shape)
    assert env.observation_space.shape == observation.shape
    assert env.action_space.shape == simulation.action_spec().shape


@pytest.mark.parametrize(
    ("name", "expected"),
    [("mt30", "Choose from MT30."), ("MT81", "Choose from MT80."), ("walker", "Choose from MT30, MT50, MT80, loc")]
    + [("Muscle", "Choose from muscles.")]
    + [(None, "got None. Choose from")],
)
def test_unknown_set_names_the_nearest(name, expected):
    with pytest.raises(ValueError, match=expected):
        pwm_gym.tasks(name)
