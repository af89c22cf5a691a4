"""Tasks with muscles: reward and fall against their formulas, exact states, gradients, and both checkers."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3.common.env_checker
import torch
from gymnasium.utils import env_checker

import pwm_gym
from pwm_gym import make_differentiable
from pwm_gym.envs.gl_backend import choose_gl_backend

CAN_DRAW = choose_gl_backend() != "disable"
BODIES = {"myolegs": 80, "myotrunk": 152, "myofullbody": 416}
every_body = pytest.mark.parametrize("body", BODIES)


def make(task: str, **kwargs: Any) -> Any:
    return gym.make(f"pwm_gym/{task}-v0", **kwargs).unwrapped


def physics_of(env: Any) -> Any:
    return env.simulation.physics


@pytest.mark.parametrize("task", ["myolegs-run", "myotrunk-stand", "myofullbody-walk"])
def test_neither_checker_has_anything_to_say(task: str):
    env_checker.check_env(make(task), skip_render_check=not CAN_DRAW)
    stable_baselines3.common.env_checker.check_env(make(task))


@every_body
def test_every_muscle_has_an_action_and_the_person_stands_on_the_floor(body: str):
    env = make(f"{body}-stand")
    observation, _ = env.reset(seed=0)
    physics = physics_of(env)
    assert env.action_space.shape == (BODIES[body],) == (physics.model.na,)
    assert len(observation) == physics.model.nq - 2 + physics.model.nv + physics.model.na
    heights = physics.named.data.xpos[["head", "pelvis"], "z"]
    assert heights == pytest.approx([1.547, 0.946], abs=2e-3)
    assert {physics.model.id2name(c.geom1, "geom") for c in physics.data.contact} == {"floor"}
    assert max(abs(contact.dist) for contact in physics.data.contact) < 1e-3


def test_controls_are_excitations_which_activations_follow():
    env = make("myolegs-stand", action_repeat=1)
    env.reset(seed=0)
    physics = physics_of(env)
    before = physics.activation()
    env.step(np.ones(80))
    assert (physics.control() == 1.0).all() and (physics.activation() > before).all()
    env.step(-np.ones(80))
    assert (physics.control() == 0.0).all()


def written_reward(physics: Any, goal: float) -> float:
    """Write the module's formula out in full, for positions near standing."""
    head, pelvis = physics.named.data.xpos["head"], physics.named.data.xpos["pelvis"]
    v = physics.named.data.sensordata["velocity"]
    low = max(0.0, 1.4 - head[2]) / 0.35
    height = math.exp(-0.5 * (low * math.sqrt(-2 * math.log(0.1))) ** 2)
    cosine = (head[2] - pelvis[2]) / math.dist(head, pelvis)
    upright = min(1.0, 1 - (0.9 - cosine) / 1.9)
    effort = (4 + (1 - physics.data.act**2).sum() / len(physics.data.act)) / 5
    if goal:
        motion = (5 * min(max(-v[1] / goal, 0.0), 1.0) + 1) / 6
    else:
        motion = sum(math.exp(math.log(0.1) * (x / 2) ** 2) for x in v[:2]) / 2
    return height * upright * effort * motion


@pytest.mark.parametrize(("name", "goal"), [("stand", 0.0), ("walk", 1.25), ("run", 4.0)])
def test_reward_is_the_written_formula(name: str, goal: float):
    env = make(f"myolegs-{name}", action_repeat=1)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    rewards = []
    for _ in range(50):
        _, reward, terminated, *_ = env.step(rng.uniform(-1, 1, 80))
        assert reward == pytest.approx(written_reward(physics_of(env), goal), rel=1e-9)
        rewards.append(reward)
    assert min(rewards) < 0.8 * max(rewards) and not terminated


def test_forward_is_where_the_toes_point_and_pays():
    env = make("myolegs-run", action_repeat=1)
    env.reset(seed=0)
    position = physics_of(env).named.data.xpos
    assert position["toes_r", "y"] < position["calcn_r", "y"] - 0.1
    rewards = {}
    for speed in (-2.0, 0.0, 2.0):
        env.reset(seed=0)
        physics_of(env).data.qvel[1] = -speed
        rewards[speed] = env.step(np.zeros(80))[1]
    assert rewards[-2.0] == pytest.approx(rewards[0.0], rel=0.1) and rewards[2.0] > 2.5 * rewards[0.0]


@every_body
def test_a_fall_terminates(body: str):
    env = make(f"{body}-run")
    env.reset(seed=0)
    terminated, steps = False, 0
    while not terminated:
        _, _, terminated, truncated, _ = env.step(-np.ones(BODIES[body]))
        steps += 1
        assert not truncated
    assert 10 < steps < 60, "limp muscles hold nobody up"
    assert physics_of(env).named.data.xpos["head", "z"] < 1.1
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros(BODIES[body]))


@every_body
def test_physics_state_repeats_the_future_exactly(body: str):
    env, other = make(f"{body}-walk"), make(f"{body}-walk")
    env.reset(seed=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (12, BODIES[body]))
    steps = [env.step(action) for action in actions]
    again = other.set_physics_state(steps[4][4]["physics_state"])
    np.testing.assert_array_equal(again, steps[4][0])
    for action, (observation, reward, *_) in zip(actions[5:], steps[5:], strict=True):
        repeated, repeated_reward, *_ = other.step(action)
        np.testing.assert_array_equal(repeated, observation)
        assert repeated_reward == reward


def test_seeds_decide_how_an_episode_begins_but_not_the_posture():
    env = make("myolegs-stand")
    first, second, third = (env.reset(seed=seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, second)
    assert (first != third).any()
    np.testing.assert_array_equal(first[:33], third[:33])


@pytest.mark.skipif(not CAN_DRAW, reason="no OpenGL library on this machine")
def test_frames_show_the_person_from_two_sides():
    env = make("myolegs-run", render_mode="rgb_array", height=96, width=96)
    env.reset(seed=0)
    side = env.render()
    env.camera_id = "front"
    front = env.render()
    assert side.shape == (96, 96, 3) and (side != front).any()
    assert side[:, 40:56].std() > 20, "somebody stands in the middle"


def test_gradients_of_rewards_reach_excitations_as_central_differences_have_it():
    env: Any = make_differentiable("pwm_gym/myolegs-run-v0", 1, dtype=torch.float64)
    env.reset(seed=0)
    state = env.get_state()
    generator = torch.Generator().manual_seed(0)
    plan = 0.5 * torch.rand(2, 1, 80, generator=generator, dtype=torch.float64) - 0.25
    direction = torch.randn(2, 1, 80, generator=generator, dtype=torch.float64)

    def total(actions: torch.Tensor) -> torch.Tensor:
        env.set_state(state)
        return sum(env.step(action)[1].sum() for action in actions)  # type: ignore[return-value]

    actions = plan.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(actions), actions)
    with torch.no_grad():
        difference = (total(plan + 1e-4 * direction) - total(plan - 1e-4 * direction)) / 2e-4
    assert abs(float(difference)) > 1e-6
    assert float((gradient * direction).sum()) == pytest.approx(float(difference), rel=1e-3)


def test_without_myo_sim_the_error_tells_what_to_install():
    code = (
        "import sys; sys.modules['myo_sim'] = None\n"
        "import gymnasium as gym, pwm_gym\n"
        "try:\n    gym.make('pwm_gym/myolegs-run-v0')\n"
        "except ImportError as error:\n    print(error)\n"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert 'pip install "pwm-gym[muscles]"' in output


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match="got 'myolegs-fly'. Choose from .*myolegs-run"):
        pwm_gym.envs.dm_control.DMControlEnv("myolegs-fly")  # type: ignore[attr-defined]
