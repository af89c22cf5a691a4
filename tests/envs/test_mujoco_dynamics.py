"""MuJoCo tasks with gradients: against the registered tasks, central differences of rollouts, and bad input."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.utils import EzPickle, seeding
from gymnasium.vector import AutoresetMode
from torch import Tensor

from pwm_gym import as_sb3_vec_env, make_differentiable
from pwm_gym.envs.mujoco_dynamics import MujocoVectorEnv
from pwm_gym.envs.mujoco_jacobians import check_model

SAME_STEP, NEXT_STEP, DISABLED = AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED
PENDULUM = "pwm_gym/pendulum-swingup-v0"

# A ball on a hinge with a motor that builds up its force: an activation, and with the free ball a quaternion.
SLOW_MOTOR = """
<mujoco><option timestep="0.01" integrator="{integrator}"/><worldbody>
  <body><joint name="hinge" axis="0 1 0" damping="0.1"/><geom type="capsule" fromto="0 0 0 0.5 0 0" size="0.05"/>
    <body pos="0.5 0 0"><joint type="ball" damping="0.02"/><geom type="box" pos="0.1 0.02 0.03" size="0.1 0.2 0.05"/>
  </body></body></worldbody>
<actuator><general joint="hinge" dyntype="filter" dynprm="0.05" gainprm="2" ctrlrange="-1 1"/></actuator></mujoco>
"""


class SlowMotor(MujocoEnv, EzPickle):
    """Not registered; copies of it are made by copying."""

    def __init__(self, path: str) -> None:
        EzPickle.__init__(self, path)
        MujocoEnv.__init__(self, path, 2, spaces.Box(-np.inf, np.inf, (12,), np.float64))

    def _get_obs(self) -> np.ndarray:
        return np.concatenate([self.data.qpos, self.data.qvel, self.data.act, self.data.xpos[2, :2]])

    def reset_model(self) -> np.ndarray:
        self.set_state(self.init_qpos, self.init_qvel + self.np_random.uniform(-1.0, 1.0, 4))
        return self._get_obs()

    def step(self, action: np.ndarray) -> Any:
        self.do_simulation(action, self.frame_skip)
        observation = self._get_obs()[:12]
        return observation, float(self.data.qvel[0] - np.square(action).sum()), False, False, {}


@pytest.fixture
def slow_motor(tmp_path: Any) -> Any:
    def make(integrator: str = "Euler") -> SlowMotor:
        path = tmp_path / f"{integrator}.xml"
        path.write_text(SLOW_MOTOR.format(integrator=integrator))
        return SlowMotor(str(path))

    return make


def random_actions(env: Any, steps: int, seed: int = 0, share: float = 0.6) -> Tensor:
    low, high = (torch.as_tensor(bound).double() for bound in (env.action_space.low, env.action_space.high))
    unit = torch.rand(steps, *low.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (low + high) / 2 + share * (2.0 * unit - 1.0) * (high - low) / 2


def gradient_error(env: MujocoVectorEnv, horizon: int, warm_up: int) -> Tensor:
    """Compare a gradient through rewards and observations with central differences of rollouts, relatively, (B,)."""
    env.reset(seed=0)
    with torch.no_grad():
        for action in random_actions(env, warm_up, seed=1, share=0.4):
            env.step(action)
    state = env.get_state()
    weights = torch.linspace(-1.0, 1.0, env.single_observation_space.shape[0], dtype=torch.float64)  # type: ignore

    def objective(actions: Tensor) -> Tensor:
        env.set_state(state)
        total = torch.zeros(env.num_envs, dtype=torch.float64)
        for action in actions:
            observations, rewards, *_ = env.step(action)
            total = total + rewards + observations @ weights
        return total

    actions = random_actions(env, horizon).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(actions).sum(), actions)
    central, step = torch.zeros_like(actions), 1e-6
    with torch.no_grad():
        for t in range(horizon):
            for j in range(actions.shape[-1]):
                shift = torch.zeros_like(actions)
                shift[t, :, j] = step
                central[t, :, j] = (objective(actions + shift) - objective(actions - shift)) / (2.0 * step)
    assert (central.square().sum((0, 2)) > 0.0).all(), "the objective depends on the actions"
    return (gradient - central).square().sum((0, 2)).sqrt() / central.square().sum((0, 2)).sqrt()


# Gradients


@pytest.mark.parametrize(
    ("task", "kwargs"),
    [
        ("pwm_gym/cartpole-swingup-v0", {}),  # RK4
        ("pwm_gym/cartpole-swingup-v0", {"integrator": "implicitfast"}),
        ("pwm_gym/reacher-easy-v0", {}),  # a target in the model
        ("pwm_gym/cheetah-run-v0", {}),  # contacts
        ("pwm_gym/hopper-hop-v0", {}),  # touch sensors
        ("Hopper-v5", {}),  # RK4
        ("Hopper-v5", {"integrator": "implicitfast"}),
        ("Ant-v5", {}),  # a quaternion, and a reward that looks at a body's position of one substep ago
    ],
    ids=str,
)
def test_gradients_equal_central_differences_of_rollouts(task: str, kwargs: dict[str, Any]):
    env = make_differentiable(task, 2, autoreset_mode=DISABLED, dtype=torch.float64, **kwargs)
    assert gradient_error(env, horizon=3, warm_up=8).max() < 1e-3  # type: ignore[arg-type]


@pytest.mark.parametrize("integrator", ["Euler", "RK4"])
def test_activations_and_quaternions_carry_gradients(integrator: str, slow_motor: Any):
    env = make_differentiable(slow_motor(integrator), 2, horizon=50, autoreset_mode=DISABLED, dtype=torch.float64)
    assert env.dynamics.tangent_dim == 4 + 4 + 1  # type: ignore[attr-defined]
    assert gradient_error(env, horizon=4, warm_up=3).max() < 1e-4  # type: ignore[arg-type]


def test_what_a_task_remembers_of_the_step_before_is_found_and_nothing_else():
    remembered = {"Hopper-v5": 0, "Ant-v5": 14 * 3, "Humanoid-v5": 14 * 3}  # every body's position
    for task, numbers in remembered.items():
        dynamics: Any = make_differentiable(task, 1).dynamics  # type: ignore[attr-defined]
        model = dynamics._simulators[0].env.model
        assert dynamics.tangent_dim == 2 * model.nv + numbers, task


def test_asking_for_gradients_changes_no_number():
    env = make_differentiable("pwm_gym/hopper-hop-v0", 2, horizon=4)
    runs = []
    for gradients in (False, True):
        env.reset(seed=3)
        steps = [env.step(action.float().requires_grad_(gradients))[:2] for action in random_actions(env, 6)]
        runs.append([tensor.detach() for step in steps for tensor in step])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_without_gradients_no_jacobian_is_computed_and_no_second_simulation_is_made():
    for task in (PENDULUM, "Hopper-v5"):
        env: Any = make_differentiable(task, 2)
        env.reset(seed=0)
        actions = torch.zeros(env.action_space.shape)
        env.step(actions)
        with torch.no_grad():
            infos = env.step(actions.clone().requires_grad_())[4]
        assert "jacobian_norm" not in infos
        assert all(simulator._probe is None for simulator in env.dynamics._simulators)
        assert env.step(actions.requires_grad_())[4]["jacobian_norm"].shape == (2,)


def test_no_gradient_crosses_an_episodes_end_or_detach():
    env = make_differentiable(PENDULUM, 2, horizon=3)
    for cut in ("autoreset", "reset_mask", "detach"):
        env.reset(seed=0)
        first = torch.zeros(2, 1, requires_grad=True)
        env.step(first)
        if cut == "detach":
            env.detach()
        elif cut == "reset_mask":
            env.reset(options={"reset_mask": np.array([True, False])})
        else:
            env.step(torch.zeros(2, 1))
            final = env.step(torch.zeros(2, 1))[4]["final_obs"]
            assert torch.autograd.grad(final.sum(), first, retain_graph=True)[0].abs().min() > 0
        rewards = env.step(torch.zeros(2, 1, requires_grad=True))[0].sum(-1)
        for row in range(2):
            (gradient,) = torch.autograd.grad(rewards[row], first, retain_graph=True, allow_unused=True)
            survives = cut == "reset_mask" and row == 1
            assert (gradient is not None and bool(gradient[row] != 0)) == survives, (cut, row)


def test_actions_outside_are_clipped_without_gradient():
    env = make_differentiable(PENDULUM, 2)
    env.reset(seed=0)
    state = env.get_state()  # type: ignore[attr-defined]
    actions = torch.tensor([[3.0], [0.5]], requires_grad=True)
    observations = env.step(actions)[0]
    (gradient,) = torch.autograd.grad(observations.sum(), actions)
    assert gradient[0] == 0 and gradient[1] != 0
    env.set_state(state)  # type: ignore[attr-defined]
    assert torch.equal(env.step(torch.tensor([[1.0], [0.5]]))[0], observations)


# The registered task


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("task", ["pwm_gym/cheetah-run-v0", "pwm_gym/cartpole-swingup-v0", "Hopper-v5"])
def test_every_number_is_that_of_the_registered_task(task: str, threads: int):
    env = make_differentiable(task, 2, num_threads=threads)
    observations, _ = env.reset(seed=5)
    seeds = seeding.np_random(5)[0].integers(2**31, size=2)
    registered = [gym.make(task) for _ in range(2)]
    assert env.horizon == (1000 if task == "Hopper-v5" else 500)  # type: ignore[attr-defined]
    for i, (single, seed) in enumerate(zip(registered, seeds, strict=True)):
        assert np.array_equal(single.reset(seed=int(seed))[0].astype(np.float32), observations[i].numpy())
    for actions in random_actions(env, 10).float():
        observations, rewards, terminated, _, _ = env.step(actions)
        for i, single in enumerate(registered):
            observation, reward, ended, _, _ = single.step(actions[i].numpy())
            assert np.array_equal(observation.astype(np.float32), observations[i].numpy())
            assert np.float32(reward) == rewards[i].numpy() and ended == bool(terminated[i])
    env.close()


@pytest.mark.parametrize("task", ["pwm_gym/hopper-hop-v0", "Ant-v5"])
def test_a_state_that_is_set_again_gives_the_same_future_bit_for_bit(task: str):
    env: Any = make_differentiable(task, 2, dtype=torch.float64)
    env.reset(seed=0)
    actions = random_actions(env, 12)
    before = [env.step(action)[0] for action in actions[:6]][-1]
    state = env.get_state()
    future = [env.step(action)[:2] for action in actions[6:]]
    env.reset(seed=9)
    assert torch.equal(env.set_state(state), before)
    again = [env.step(action)[:2] for action in actions[6:]]
    assert all(torch.equal(a, b) for x, y in zip(future, again, strict=True) for a, b in zip(x, y, strict=True))
    other: Any = make_differentiable(task, 2, dtype=torch.float64)
    other.set_state(state)
    assert torch.equal(other.step(actions[6])[0], future[0][0])


def test_equal_seeds_give_equal_trajectories_and_others_do_not():
    def run(seed: int) -> Tensor:
        env = make_differentiable("pwm_gym/reacher-easy-v0", 2, horizon=2)
        first, _ = env.reset(seed=seed)
        return torch.stack([first] + [env.step(torch.zeros(2, 2))[0] for _ in range(5)])

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert not torch.equal(run(0)[0, 0], run(0)[0, 1]), "each env has a start of its own"


# Episodes


@pytest.mark.parametrize("mode", [SAME_STEP, NEXT_STEP, DISABLED])
def test_the_horizon_truncates_in_every_autoreset_mode(mode: AutoresetMode):
    env = make_differentiable(PENDULUM, 2, horizon=2, autoreset_mode=mode)
    env.reset(seed=0)
    actions = torch.zeros(2, 1)
    assert not env.step(actions)[3].any()
    last, _, terminated, truncated, infos = env.step(actions)
    assert truncated.all() and not terminated.any() and infos["continue_prob"].eq(1.0).all()
    if mode == SAME_STEP:
        assert infos["_final_obs"].all() and not torch.equal(infos["final_obs"], last)
        return
    assert "final_obs" not in infos
    if mode == DISABLED:
        with pytest.raises(gym.error.ResetNeeded, match=r"envs \[0, 1\] have ended"):
            env.step(actions)
        first, _ = env.reset(options={"reset_mask": np.array([True, True])})
    else:
        first, rewards, terminated, truncated, _ = env.step(actions)
        assert not rewards.any() and not (terminated | truncated).any()
    assert not torch.equal(first, last)
    assert not env.step(actions)[3].any(), "a new episode has the whole horizon"


def test_a_fall_terminates_hopper_and_its_gradient_stays_finite():
    env = make_differentiable("Hopper-v5", 2)
    env.reset(seed=0)
    for _ in range(200):
        actions = torch.ones(2, 3, requires_grad=True)
        _, rewards, terminated, truncated, infos = env.step(actions)
        if terminated.any():
            break
        env.detach()
    row = int(terminated.nonzero()[0])
    assert not truncated[row] and infos["continue_prob"][row] == 0.0 and infos["_final_obs"][row]
    (gradient,) = torch.autograd.grad(infos["final_obs"][row].sum() + rewards[row], actions)
    assert gradient[row].isfinite().all() and gradient[row].abs().sum() > 0


def test_the_other_faces_work_on_it():
    env = make_differentiable(PENDULUM, 2, horizon=2)
    face = env.numpy()
    observations, _ = face.reset(seed=0)
    assert observations in face.observation_space
    adapter = as_sb3_vec_env(make_differentiable(PENDULUM, 2, horizon=1))
    adapter.reset()
    _, _, dones, infos = adapter.step(np.zeros((2, 1), np.float32))
    assert dones.all() and infos[0]["TimeLimit.truncated"] and infos[0]["terminal_observation"].shape == (3,)


def test_frames_are_drawn_from_the_simulator():
    env: Any = make_differentiable(PENDULUM, 2, render_mode="rgb_array", height=48, width=64)
    env.reset(seed=0)
    (frame,) = env.render([1])
    assert frame.shape == (48, 64, 3) and frame.dtype == np.uint8 and frame.std() > 0
    assert make_differentiable(PENDULUM, 1).render() is None
    env.close()


# Bad input


def test_envs_whose_dynamics_have_no_gradients_are_refused():
    with pytest.raises(ValueError, match=r"got <.*Pendulum.*>, which has no gradients. Learn a model of it instead"):
        make_differentiable("Pendulum-v1", 2)
    with pytest.raises(ValueError, match="expected a task without wrappers of its own, got ClipAction"):
        make_differentiable(gym.wrappers.ClipAction(gym.make("Hopper-v5")), 2)
    with pytest.raises(TypeError, match="`env` must be a registered id or a gymnasium.Env, got int"):
        make_differentiable(3)  # type: ignore[arg-type]


def test_arguments_that_do_not_fit_are_refused(slow_motor: Any):
    with pytest.raises(ValueError, match=r"`integrator` must be None .* or one of EULER, RK4, .*, got 'magic'"):
        make_differentiable(PENDULUM, 1, integrator="magic")
    with pytest.raises(ValueError, match="`num_envs` must be >= 1, got 0"):
        make_differentiable("pwm_gym/TorchPendulum-v0", 0)
    with pytest.raises(ValueError, match=r"arguments of the task only with an id, got \['frame_skip'\]"):
        make_differentiable(gym.make("Hopper-v5"), 1, frame_skip=2)
    with pytest.raises(ValueError, match="expected `horizon` for .*, which has no time limit of its own"):
        make_differentiable(slow_motor(), 1)


def test_models_with_states_that_have_no_tangent_are_refused():
    model = mujoco.MjModel.from_xml_string(
        "<mujoco><worldbody><body><joint name='j'/><geom size='1'/></body></worldbody>"
        "<actuator><motor joint='j' delay='0.02' nsample='3'/></actuator></mujoco>"
    )
    with pytest.raises(ValueError, match=r"got one with delays \(a history buffer\)"):
        check_model(model)


@pytest.mark.parametrize("task", [PENDULUM, "Hopper-v5"])
def test_a_simulation_that_diverges_names_env_step_and_culprit(task: str):
    env: Any = make_differentiable(task, 3)
    env.reset(seed=0)
    env.step(torch.zeros(env.action_space.shape))
    env.dynamics._simulators[1]._data.qvel[0] = np.nan
    with pytest.raises(ValueError, match=r"of env 1 .*at its step 2 .*first bad number: q(pos|vel)\[0\]"):
        env.step(torch.zeros(env.action_space.shape))


def test_bad_actions_and_states_are_refused():
    env: Any = make_differentiable(PENDULUM, 2)
    with pytest.raises(gym.error.ResetNeeded, match="call reset"):
        env.step(torch.zeros(2, 1))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="expected finite actions, got nan for env 1 at index 0"):
        env.step(torch.tensor([[0.0], [torch.nan]]))
    with pytest.raises(ValueError, match=r"expected actions of shape \(2, 1\) on cpu, got \(1, 2\)"):
        env.step(torch.zeros(1, 2))
    with pytest.raises(TypeError, match="expected a tensor of actions, got ndarray"):
        env.step(np.zeros((2, 1)))
    state = env.get_state()
    with pytest.raises(ValueError, match=r"must be finite, of shape \(2, \d+\), got shape \(1, \d+\)"):
        env.set_state(state[:1])
    state[0, 0] = np.inf
    with pytest.raises(ValueError, match="with numbers that are not finite"):
        env.set_state(state)


class Forgetful(HopperEnv):
    """Rewards the number of steps taken, which MuJoCo's state doesn't know."""

    taken = 0

    def _get_rew(self, x_velocity: float, action: np.ndarray) -> tuple[float, dict[str, float]]:
        self.taken += 1
        return float(self.taken), {}


def test_a_task_that_keeps_something_of_its_own_between_steps_is_refused():
    env = make_differentiable(Forgetful(), 1, horizon=10)
    env.reset(seed=0)
    env.step(torch.zeros(1, 3))  # without gradients it may
    with pytest.raises(ValueError, match="expected Forgetful to be a function of MuJoCo's state and the action"):
        for _ in range(3):
            env.step(torch.zeros(1, 3, requires_grad=True))
