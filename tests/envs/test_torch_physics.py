"""Torch physics: laws of mechanics, numbers by hand, gradients, episodes and pictures."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from pwm_gym import make_differentiable
from pwm_gym.envs.torch_physics import GRAVITY, TorchBallWall, TorchCartPole, TorchDoublePendulum, TorchPendulum

SYSTEMS = [TorchPendulum, TorchCartPole, TorchDoublePendulum, TorchBallWall]
every_system = pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.__name__)


def random_actions(env: Any, steps: int) -> Tensor:
    shape, generator = (steps, *env.action_space.shape), torch.Generator().manual_seed(0)
    return 1.6 * torch.rand(shape, generator=generator, dtype=torch.float64) - 0.8


def pendulum_energy(state: Tensor) -> Tensor:
    angle, turn = state.unbind(-1)
    return turn.square() / 6.0 + 0.5 * GRAVITY * torch.cos(angle)  # a rod of 1 kg and 1 m: I = 1/3


def cart_pole_energy(state: Tensor) -> Tensor:
    _, angle, speed, turn = state.unbind(-1)
    pole = (speed + 0.5 * turn * torch.cos(angle)).square() + (0.5 * turn * torch.sin(angle)).square()
    return 0.5 * speed.square() + 0.1 * (0.5 * pole + GRAVITY * 0.5 * torch.cos(angle))


def double_pendulum_energy(state: Tensor) -> Tensor:
    first, second, first_turn, second_turn = state.unbind(-1)
    both = first_turn * second_turn * torch.cos(first - second)
    kinetic = 0.25 * 0.5 * (first_turn.square() + 0.5 * second_turn.square() + both)
    return kinetic + 0.5 * GRAVITY * 0.5 * (2.0 * torch.cos(first) + torch.cos(second))


@pytest.mark.parametrize(
    ("system", "energy"),
    [
        (TorchPendulum, pendulum_energy),
        (TorchCartPole, cart_pole_energy),
        (TorchDoublePendulum, double_pendulum_energy),
    ],
)
def test_energy_is_conserved_without_a_push(system: Any, energy: Any):
    env = system(8, dtype=torch.float64, horizon=50)
    env.reset(seed=0)
    state = np.random.default_rng(0).uniform(-1.5, 1.5, (8, env.state_dim))
    env.set_state(state)
    before = energy(torch.from_numpy(state))
    for _ in range(40):
        env.step(torch.zeros(8, 1))
    assert (energy(torch.from_numpy(env.get_state())) - before).abs().max() < 0.02


def test_a_pendulum_falls_as_the_formula_says():
    env = TorchPendulum(1, dtype=torch.float64)
    env.reset(seed=0)
    env.set_state(np.array([[0.5 * math.pi, 0.0]]))
    # θ'' = 1.5 g + 6 a = 14.715 + 3 on the level:  θ ≈ π/2 + θ'' t²/2 and θ' ≈ θ'' t after t = 0.05
    env.step(torch.tensor([[0.5]]))
    assert env.get_state()[0] == pytest.approx([0.5 * math.pi + 0.5 * 17.715 * 0.05**2, 17.715 * 0.05], rel=1e-3)


def test_a_pushed_cart_pole_keeps_its_momentum_balance():
    env = TorchCartPole(1, dtype=torch.float64)
    env.reset(seed=0)
    env.set_state(np.array([[0.0, math.pi, 0.0, 0.0]]))
    env.step(torch.tensor([[0.2]]))  # F = 2 N for 0.05 s gives 0.1 N s
    _, angle, speed, turn = env.get_state()[0]
    assert speed + 0.1 * (speed + 0.5 * turn * math.cos(angle)) == pytest.approx(0.1, rel=1e-6)


@every_system
def test_gradients_equal_central_differences(system: Any):
    steps = min(system.steps, 5)
    env = system(3, dtype=torch.float64, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(seed=0)
    state = env.get_state()

    def objective(actions: Tensor) -> Tensor:
        env.set_state(state)
        total = torch.zeros(3, dtype=torch.float64)
        for action in actions:
            observations, rewards, *_ = env.step(action)
            total = total + rewards + observations.sum(-1)
        return total

    actions = random_actions(env, steps).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(actions).sum(), actions)
    for t in range(steps):
        shift = torch.zeros_like(actions)
        shift[t] = 1e-6
        central = (objective(actions + shift) - objective(actions - shift)) / 2e-6
        assert gradient[t, :, 0].tolist() == pytest.approx(central.tolist(), rel=1e-5, abs=1e-7)


def test_the_wall_stops_low_throws_and_hides_the_jump_from_the_gradient():
    env = TorchBallWall(4, dtype=torch.float64)
    env.reset(seed=0)
    actions = torch.tensor([[-1.0], [-0.5], [0.5], [1.0]], dtype=torch.float64, requires_grad=True)
    _, rewards, _, truncated, infos = env.step(actions)
    # Straight ahead it lies where it is; 22.5° would reach 7.2 m but meets the wall at 6 m; 67.5° flies over it to
    # v² sin 135° / g; straight up it comes back.
    far = 10.0 * math.sin(0.75 * math.pi) / GRAVITY
    assert rewards.tolist() == pytest.approx([0.0, 0.6, far, 0.0], abs=1e-12)
    (gradient,) = torch.autograd.grad(rewards.sum(), actions)
    assert gradient[1] == 0.0, "at the wall nothing tells that a steeper throw would clear it"
    assert gradient[2, 0].item() == pytest.approx(10.0 / GRAVITY * 0.5 * math.pi * math.cos(0.75 * math.pi))
    assert gradient.isfinite().all() and truncated.all() and infos["final_obs"].shape == (4, 2)


# Episodes


@every_system
def test_it_is_registered_and_keeps_its_spaces(system: Any):
    name = f"pwm_gym/{system.__name__}-v0"
    assert gym.spec(f"pwm_gym/{system.__name__}-v0").vector_entry_point
    for env in (make_differentiable(name, 3), gym.make_vec(name, 3)):
        assert isinstance(env, system) and env.num_envs == 3
        face = env.numpy()
        observations, _ = face.reset(seed=0)
        assert observations in face.observation_space
        assert face.step(face.action_space.sample())[0] in face.observation_space


@every_system
def test_the_horizon_truncates_and_never_terminates(system: Any):
    env = system(2)
    env.reset(seed=0)
    for t in range(system.steps):
        _, _, terminated, truncated, infos = env.step(torch.zeros(2, 1))
        assert not terminated.any() and bool(truncated.all()) == (t == system.steps - 1)
    assert infos["_final_obs"].all() and infos["continue_prob"].eq(1.0).all()


def test_next_step_autoreset_spends_a_step_on_the_reset():
    env = TorchPendulum(2, horizon=2, autoreset_mode=AutoresetMode.NEXT_STEP)
    env.reset(seed=0)
    env.reset(options={"reset_mask": np.array([False, True])})
    action = torch.ones(2, 1, requires_grad=True)
    env.step(action)
    env.reset(options={"reset_mask": np.array([False, True])})
    ended, _, _, truncated, _ = env.step(action)
    assert truncated.tolist() == [True, False]
    begun, rewards, _, truncated, _ = env.step(action)
    assert rewards[0] == 0.0 and rewards[1] != 0.0 and truncated.tolist() == [False, True]
    assert not torch.equal(begun[0], ended[0])
    (gradient,) = torch.autograd.grad(begun[0].sum() + rewards[0], action, allow_unused=True)
    assert gradient[0] == 0.0


def test_equal_seeds_give_equal_trajectories():
    def run(seed: int) -> Tensor:
        env = TorchCartPole(3, horizon=4)
        return torch.stack([env.reset(seed=seed)[0]] + [env.step(torch.ones(3, 1))[0] for _ in range(6)])

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


def test_masked_resets_leave_the_others_and_their_gradients_alone():
    env = TorchPendulum(2)
    env.reset(seed=0)
    action = torch.zeros(2, 1, requires_grad=True)
    before = env.step(action)[0]
    after, _ = env.reset(options={"reset_mask": np.array([True, False])})
    assert not torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
    (gradient,) = torch.autograd.grad(env.step(torch.zeros(2, 1))[1].sum(), action)
    assert gradient[0] == 0.0 and gradient[1] != 0.0


def test_it_computes_in_the_given_precision():
    for dtype in (torch.float32, torch.float64):
        env = TorchDoublePendulum(2, dtype=dtype)
        assert env.reset(seed=0)[0].dtype == env.step(torch.zeros(2, 1))[1].dtype == dtype


def test_states_that_overflow_name_their_env():
    env = TorchCartPole(3)
    env.reset(seed=0)
    state = env.get_state()
    state[2, 3] = 1e30
    env.set_state(state)
    with pytest.raises(ValueError, match=r"expected finite numbers, got observation .* in env 2 at its step 1"):
        env.step(torch.zeros(3, 1))


def test_mujocos_arguments_are_refused():
    with pytest.raises(ValueError, match="`integrator` and `num_threads` are MuJoCo's"):
        make_differentiable("pwm_gym/TorchPendulum-v0", integrator="RK4")


# Pictures


@every_system
def test_pictures_show_the_state(system: Any):
    env = system(2, render_mode="rgb_array", size=64, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(seed=0)
    before = env.render([0])
    env.step(torch.full((2, 1), 0.4))
    after = env.render()
    assert len(before) == 1 and len(after) == 2
    assert after[0].shape == (64, 64, 3) and after[0].dtype == np.uint8
    assert not np.array_equal(before[0], after[0]), "the motion can be seen"
    assert (after[0] == 255).all(-1).mean() > 0.5, "the background is white"
    assert system(1).render() is None
