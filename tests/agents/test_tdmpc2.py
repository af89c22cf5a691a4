"""TDMPC2 as an SB3 algorithm, with models of its own and given ones; and plans on top of PWM."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from pwm_gym import (
    PWM,
    TDMPC2,
    LatentVectorEnv,
    Planner,
    WorldModel,
    WorldModelConfig,
    export_tdmpc2,
    load_tdmpc2,
    plan_with,
)
from pwm_gym.agents import TDMPC2Policy

PLANNER: dict[str, Any] = {"num_samples": 16, "num_elites": 4, "num_prior": 4, "iterations": 2}
SIZES: dict[str, Any] = {"latent_dim": 16, "encoder_dim": 16, "mlp_dim": 16, "num_bins": 21, "num_q": 2}
_TINY: dict[str, Any] = {
    "learning_starts": 10,
    "batch_size": 8,
    "train_freq": 5,
    "gradient_steps": 1,
    "seed_updates": 2,
    "buffer_size": 3_000,
    "policy_kwargs": {"world_model_kwargs": SIZES, "planner_kwargs": PLANNER},
    "seed": 0,
    "device": "cpu",
}


def make(env: Any, **overrides: Any) -> TDMPC2:
    """Make a tiny TDMPC2 on an env."""
    space = getattr(env, "single_observation_space", None) or getattr(env, "observation_space", None)
    policy = overrides.pop("policy", "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy")
    return TDMPC2(policy, env, **{**copy.deepcopy(_TINY), **overrides})


def make_model(observation_dim: int = 3, action_dim: int = 2, **fields: Any) -> WorldModel:
    """Make an untrained model with all that planning needs, whose values and rewards differ from 0."""
    torch.manual_seed(1)
    config = WorldModelConfig(observation_dim, action_dim, **{"policy_prior": True, **SIZES, **fields})
    model = WorldModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def pendulum() -> gym.Env:
    return gym.make("Pendulum-v1", max_episode_steps=8)


def watch(agent: Any) -> list[tuple[Any, Any]]:
    """Note the previous mean and the episode starts of every plan."""
    calls: list[tuple[Any, Any]] = []
    planner = agent.planner if hasattr(agent, "planner") else agent.policy.planner
    plan = planner.plan

    def spy(z: Any, noise: Any, previous: Any = None, episode_start: Any = None, *args: Any, **kwargs: Any) -> Any:
        calls.append((previous, None if episode_start is None else episode_start.tolist()))
        return plan(z, noise, previous, episode_start, *args, **kwargs)

    planner.plan = spy
    return calls


# The contract


@pytest.mark.parametrize("case", ["Box", "Dict", "matrix actions", "Pendulum", "cartpole", "terminates"])
def test_learns_predicts_and_survives_a_file(case: str, toy: Any, differences: Any, tmp_path: Any):
    envs: dict[str, Callable[[], gym.Env]] = {
        "Box": toy,
        "Dict": lambda: toy(spaces.Dict({"a": spaces.Box(-2.0, 2.0, (2, 3), np.float64), "b": spaces.Discrete(3)})),
        "matrix actions": lambda: toy(
            None, spaces.Box(np.full((2, 2), -3, np.float32), np.full((2, 2), 1, np.float32))
        ),
        "Pendulum": pendulum,
        "cartpole": lambda: gym.make("pwm_gym/cartpole-swingup-v0", max_episode_steps=8),
        "terminates": lambda: toy(terminates=True),
    }
    agent = make(envs[case]())
    assert agent.learn(25) is agent
    assert (agent.num_timesteps, agent._n_updates) == (25, 2 + 3)  # the seed's, and after steps 15, 20 and 25
    assert all(torch.isfinite(value) for value in agent._metrics.values())
    assert agent.world_model.predicts_termination == (case == "terminates")

    env = envs[case]()
    observation, _ = env.reset(seed=0)
    action, state = agent.predict(observation, deterministic=True)
    assert env.action_space.contains(action)
    np.testing.assert_array_equal(action, agent.predict(observation, deterministic=True)[0])
    assert not np.array_equal(action, agent.predict(observation)[0])
    assert state[0].shape == (1, 3, spaces.flatdim(env.action_space))

    agent.save(tmp_path / "agent")
    loaded = TDMPC2.load(tmp_path / "agent", env=envs[case](), device="cpu")
    assert differences(agent, loaded) == []
    np.testing.assert_array_equal(loaded.predict(observation, deterministic=True)[0], action)
    assert (loaded.gamma, loaded.learning_starts, loaded.horizon) == (agent.gamma, 10, 3)
    loaded.learn(15)
    assert differences(agent, loaded) != []

    agent.policy.save(tmp_path / "policy")
    policy = TDMPC2Policy.load(tmp_path / "policy", device="cpu")
    np.testing.assert_array_equal(policy.predict(observation, deterministic=True)[0], action)


@pytest.mark.parametrize("n", [1, 2])
def test_half_a_run_saved_loaded_and_gone_on_with_is_bit_equal_to_a_whole_one(n: int, differences: Any, tmp_path: Any):
    """Dropout included, which draws from torch's global generator."""
    fields = {"world_model_kwargs": {**SIZES, "dropout": 0.5}, "planner_kwargs": PLANNER}
    whole, half = (make(make_vec_env(pendulum, n), policy_kwargs=fields).learn(steps * n) for steps in (80, 40))
    half.save(tmp_path / "agent")
    half.save_replay_buffer(tmp_path / "replay")
    resumed = TDMPC2.load(tmp_path / "agent", env=make_vec_env(pendulum, n), device="cpu")
    resumed.load_replay_buffer(tmp_path / "replay")
    torch.manual_seed(99)
    resumed.learn(40 * n, reset_num_timesteps=False)
    assert (resumed.num_timesteps, resumed._n_updates) == (80 * n, whole._n_updates)
    assert differences(half, resumed) != []
    assert differences(whole, resumed) == []
    assert torch.equal(whole.planning.scale, resumed.planning.scale)
    for name in ("observations", "actions", "rewards"):
        ours, theirs = getattr(whole.replay_buffer, name)[:80], getattr(resumed.replay_buffer, name)[:80]
        np.testing.assert_array_equal(ours, theirs)


def test_equal_seeds_give_bit_equal_runs_and_other_seeds_do_not(toy: Any, differences: Any):
    runs = [make(toy(), seed=seed).learn(30) for seed in (3, 3, 4)]
    assert differences(runs[0], runs[1]) == []
    assert len(differences(runs[0], runs[2])) > 30


def test_one_update_for_each_step_of_each_env_is_the_default(toy: Any):
    assert make(toy(), train_freq=1, gradient_steps=-1).learn(20)._n_updates == 2 + 10
    assert make(make_vec_env(toy, 3), train_freq=1, gradient_steps=-1).learn(24)._n_updates == 2 + 15


def test_the_seed_episodes_are_learned_from_once(toy: Any, tmp_path: Any):
    assert make(toy(), seed_updates=None).learn(15)._n_updates == 10 + 1
    assert make(toy(), seed_updates=0).learn(15)._n_updates == 1
    agent = make(toy(), seed_updates=7)
    assert agent.learn(10)._n_updates == 0
    assert agent.learn(5, reset_num_timesteps=False)._n_updates == 7 + 1
    agent.save(tmp_path / "agent")
    loaded = TDMPC2.load(tmp_path / "agent", env=toy(), device="cpu")
    assert loaded.learn(5, reset_num_timesteps=False)._n_updates == 7 + 2


def test_no_gradient_steps_leave_the_model_as_it_is(toy: Any, differences: Any):
    agent = make(toy(), gradient_steps=0)
    before = copy.deepcopy(agent.world_model.state_dict())
    agent.learn(30)
    assert agent._n_updates == 0
    assert all(torch.equal(before[name], value) for name, value in agent.world_model.state_dict().items())


def test_values_prior_and_model_all_learn(toy: Any):
    agent = make(toy())
    before = copy.deepcopy(agent.world_model.state_dict())
    agent.learn(40)
    parts = ("encoder", "dynamics", "reward_head", "value.online", "value.target", "policy_prior")
    for part in parts:
        names = [name for name in before if name.startswith(part)]
        assert any(not torch.equal(before[name], agent.world_model.state_dict()[name]) for name in names), part
    assert {"value_loss", "prior_loss", "model_loss", "prior_entropy"} <= agent._metrics.keys()


def test_every_optimizer_follows_the_schedule_and_the_encoder_is_slower(toy: Any):
    agent = make(toy(), learning_rate=lambda remaining: 1e-3 * remaining).learn(25)
    rate = 1e-3 * agent._current_progress_remaining
    groups = agent.policy.model_optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.3 * rate, rate])
    assert agent.planning.optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_callbacks_stop_a_run_and_vec_normalize_reaches_the_model(toy: Any):
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.num_timesteps < 12

    env = VecNormalize(DummyVecEnv([lambda: toy(spaces.Box(90.0, 110.0, (3,), np.float32))]))
    agent = make(env).learn(40, callback=Stop())
    assert agent.num_timesteps == 12
    assert agent.learn(20).replay_buffer.observations[:20].mean() > 90.0


@pytest.mark.parametrize(
    ("limit", "gamma", "starts"), [(8, 0.95, 1_000), (200, 0.975, 1_000), (500, 0.99, 2_500), (None, 0.99, 1_000)]
)
def test_discount_and_seed_episodes_follow_the_length_of_episodes(
    limit: int | None, gamma: float, starts: int, toy: Any
):
    env = toy() if limit is None else gym.make("Pendulum-v1", max_episode_steps=limit)
    agent = make(env, learning_starts=None, seed_updates=None)
    assert agent.gamma == pytest.approx(gamma)
    assert float(agent.world_model.discount()) == pytest.approx(gamma)
    assert (agent.learning_starts, agent.seed_updates) == (starts, starts)
    given = make(env, gamma=0.8)
    assert (given.gamma, float(given.world_model.discount())) == (0.8, pytest.approx(0.8))


def test_published_settings_are_the_defaults(toy: Any):
    agent = TDMPC2("MlpPolicy", toy(), device="cpu", buffer_size=100)
    config, planner = agent.world_model.config, agent.policy.planner
    assert (config.latent_dim, config.mlp_dim, config.num_q, config.policy_prior) == (512, 512, 5, True)
    assert (agent.batch_size, agent.rho, agent.tau, agent.ent_coef, agent.lr_schedule(1)) == (
        256,
        0.5,
        0.01,
        1e-4,
        3e-4,
    )
    assert (planner.horizon, agent.horizon, planner.num_samples) == (3, 3, 512)
    assert agent.policy.planner is not None
    small = TDMPC2("MlpPolicy", toy(), horizon=5, policy_kwargs={"world_model_kwargs": {"size": "1M"}}, buffer_size=100)
    assert (small.world_model.config.latent_dim, small.policy.planner.horizon) == (128, 5)


# Acting


def test_a_plan_depends_on_the_last_one_until_the_episode_ends(toy: Any):
    agent = make(toy(), world_model=make_model())
    observations = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    first, state = agent.predict(observations, deterministic=True)
    then, _ = agent.predict(observations, state, np.zeros(2, bool), deterministic=True)
    assert not np.array_equal(first, then)
    mixed, _ = agent.predict(observations, state, np.array([True, False]), deterministic=True)
    np.testing.assert_allclose(mixed, [first[0], then[1]], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(then, agent.predict(observations, state, deterministic=True)[0])


def test_envs_are_planned_for_in_one_batch_as_alone(toy: Any):
    agent = make(toy(), world_model=make_model())
    observations = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    actions, state = agent.predict(observations, deterministic=True)
    for observation, action, mean in zip(observations, actions, state[0], strict=True):
        alone, own_state = agent.predict(observation, deterministic=True)
        np.testing.assert_allclose(alone, action, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(own_state[0][0], mean, rtol=1e-4, atol=1e-5)


def test_evaluate_policy_hands_states_on_and_begins_anew_with_each_episode(toy: Any):
    agent = make(toy(), world_model=make_model())
    calls = watch(agent)
    env = DummyVecEnv([lambda: toy(length=3), lambda: toy(length=4)])
    evaluate_policy(agent, env, n_eval_episodes=4, warn=False)
    assert calls[0][0] is None
    assert all(previous is not None for previous, _ in calls[1:])
    assert [start for _, start in calls[:6]] == [
        [True, True],
        [False, False],
        [False, False],
        [True, False],
        [False, True],
        [False, False],
    ]


def test_collecting_warm_starts_each_env_and_begins_anew_with_each_episode(toy: Any):
    env = DummyVecEnv([lambda: toy(length=3), lambda: toy(length=4)])
    agent = make(env, learning_starts=0, train_freq=1, gradient_steps=0)
    calls = watch(agent)
    agent.learn(12)
    assert calls[0][0] is None
    assert all(previous is not None for previous, _ in calls[1:])
    assert [start for _, start in calls] == [
        [True, True],
        [False, False],
        [False, False],
        [True, False],
        [False, True],
        [False, False],
    ]
    agent.learn(4)  # a new run begins with a reset
    assert calls[6][1] == [True, True]


def test_stored_actions_are_the_executed_ones_in_units_of_the_model(toy: Any):
    box = spaces.Box(np.array([-3.0, 0.0], np.float32), np.array([1.0, 2.0], np.float32))
    executed: list[np.ndarray] = []

    class Recording(toy):  # type: ignore[misc]
        def step(self, action: np.ndarray) -> Any:
            executed.append(action)
            return super().step(action)

    agent = make(Recording(None, box), learning_starts=0, gradient_steps=0).learn(10)
    stored = agent.replay_buffer.actions[:10, 0]
    np.testing.assert_allclose(agent.policy.unscale_action(stored), executed, rtol=1e-5, atol=1e-6)
    assert np.abs(stored).max() <= 1.0


def test_a_copy_of_a_policy_plans_with_its_own_model(toy: Any):
    policy = make(toy(), world_model=make_model()).policy
    copied = copy.deepcopy(policy)
    observation = np.array([0.3, -0.2, 0.5], np.float32)
    before, _ = copied.predict(observation, deterministic=True)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    np.testing.assert_array_equal(copied.predict(observation, deterministic=True)[0], before)
    assert not np.array_equal(policy.predict(observation, deterministic=True)[0], before)


def test_a_state_of_other_envs_is_refused(toy: Any):
    agent = make(toy(), world_model=make_model())
    _, state = agent.predict(np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match=r"expected the mean of a plan for as many envs and of the same horizon"):
        agent.predict(np.zeros((3, 3), np.float32), state)


# A given model


def test_a_given_model_is_planned_with_at_once_and_left_as_it_is(toy: Any):
    model = make_model(discounts=(0.9,))
    before = copy.deepcopy(model.state_dict())
    agent = make(toy(), world_model=model)
    assert agent.gamma == 0.9
    observation = np.array([0.3, -0.2, 0.5], np.float32)
    action, _ = agent.predict(observation, deterministic=True)
    planner = Planner(model, **PLANNER)
    with torch.no_grad():
        z = model.encode(torch.from_numpy(observation)[None])
    plan = planner.plan(z, planner.draw(1, torch.Generator().manual_seed(0)), deterministic=True)
    np.testing.assert_allclose(action, plan.actions[0].numpy(), rtol=1e-5, atol=1e-6)
    assert torch.equal(agent.policy.world_model.encoder[0][0].weight, model.encoder[0][0].weight)
    agent.learn(30)
    assert agent._n_updates > 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not torch.equal(agent.policy.world_model.encoder[0][0].weight, model.encoder[0][0].weight)


def test_a_model_alone_makes_an_agent_that_can_be_given_an_env_later(toy: Any, tmp_path: Any):
    model = make_model()
    agent = make(None, world_model=model)
    observation = np.zeros(3, np.float32)
    action, _ = agent.predict(observation, deterministic=True)
    np.testing.assert_array_equal(make(toy(), world_model=model).predict(observation, deterministic=True)[0], action)
    agent.save(tmp_path / "agent")
    loaded = TDMPC2.load(tmp_path / "agent", device="cpu")
    np.testing.assert_array_equal(loaded.predict(observation, deterministic=True)[0], action)
    with_bounds = make_model_of(toy(), model)
    later = make(None, world_model=with_bounds)
    later.set_env(DummyVecEnv([toy, toy]))
    assert later.learn(30).replay_buffer.n_envs == 2


def make_model_of(env: gym.Env, model: WorldModel) -> WorldModel:
    """Give a model an env's spaces."""
    same = WorldModel(model.config, env.observation_space, env.action_space).eval()
    same.load_state_dict(model.state_dict())
    return same


def test_checkpoints_of_tdmpc2_are_planned_with_one_task_of_several_included(tmp_path: Any):
    fields: dict[str, Any] = {"tasks": ("walker-walk", "cup-catch"), "observation_dims": (24, 8), "action_dims": (6, 2)}
    several = make_model(24, 6, **fields, num_bins=101)
    export_tdmpc2(several, tmp_path / "two.pt")
    model = load_tdmpc2(tmp_path / "two.pt", tasks=("walker-walk", "cup-catch"))
    env = gym.make("pwm_gym/cup-catch-v0", max_episode_steps=4)
    agent = make(env, world_model=model.for_task("cup-catch"))
    assert agent.gamma == 0.99
    rewards, lengths = evaluate_policy(agent, env, n_eval_episodes=2, return_episode_rewards=True, warn=False)
    assert lengths == [4, 4]
    observation, _ = env.reset(seed=0)
    action, _ = agent.predict(observation, deterministic=True)
    planner = Planner(several, **PLANNER)
    noise = agent.policy.planner.draw(1, torch.Generator().manual_seed(0))
    padded = {
        name: torch.nn.functional.pad(getattr(noise, name), (0, 4))
        for name in ("prior", "samples", "terminal", "action")
    }
    with torch.no_grad():
        z = several.encode(torch.nn.functional.pad(torch.from_numpy(observation), (0, 16))[None], 1)
    plan = planner.plan(z, noise._replace(**padded), deterministic=True, task=1)
    np.testing.assert_allclose(action, plan.actions[0, :2].numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"observation_dim": 4}, "of observation_dim 4 as in the config, got one of 3"),
        ({"action_dim": 3}, "of action_dim 3 as in the config, got one of 2"),
        ({"num_q": 0}, r"expected a world model with a value ensemble.*WorldModelConfig.preset\(..., planning=True\)"),
        ({"policy_prior": False}, "expected a world model with a policy prior"),
        ({"reward_in_task_units": False}, "expected rewards in task units"),
        ({"tasks": ("a", "b")}, r"expected a single-task world model, got one of 2 tasks. Take one.*for_task\('a'\)"),
        ({"num_tasks": 3}, r"got one of 3 tasks. Take one out with world_model.for_task\(0\)"),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_planned_with_is_refused(model: dict[str, Any], message: str, toy: Any):
    with pytest.raises(ValueError, match=message):
        make(toy(), world_model=make_model(**model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"horizon": 0}, "`horizon` must be >= 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be >= 1"),
        ({"rho": 1.5}, r"`rho` must be in \[0, 1\], got 1.5"),
        ({"gamma": -0.1}, r"`gamma` must be in \[0, 1\]"),
        ({"policy_kwargs": {"planner_kwargs": {"num_elites": 600}}}, "`num_samples` not below the latter two"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str, toy: Any):
    with pytest.raises(ValueError, match=message):
        make(toy(), **arguments)


def test_training_with_nothing_says_so(toy: Any):
    with pytest.raises(ValueError, match="expected transitions in the replay buffer, got an empty one"):
        make(toy()).train(1, 8)


def test_pwm_learns_in_the_planners_model(toy: Any):
    """One world model class for both: a TDMPC2's model is an env for PWM."""
    agent = make(toy()).learn(20)
    latent_env = agent.make_latent_env(num_envs=4)
    assert isinstance(latent_env, LatentVectorEnv)
    pwm = PWM("MlpPolicy", latent_env, policy_kwargs={"net_arch": [8]}, seed=0).learn(48)
    assert toy().action_space.contains(pwm.predict(agent.observation_space.sample())[0])


# PWM with a plan on top


def test_plans_on_top_of_pwm_use_its_policy_and_critics(make_agent: Any, toy: Any):
    agent = make_agent(toy()).learn(30)
    planned = plan_with(agent, **PLANNER)
    observations = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    actions, state = planned.predict(observations, deterministic=True)
    actor, critic = agent.policy.actor.latent_actor, agent.critic.value
    planner = Planner(
        agent.world_model,
        lambda z, noise, task: actor(z, noise)[0],
        lambda z, a, task: critic(z).min(0, keepdim=True).values,
        agent.gamma,
        **PLANNER,
    )
    with torch.no_grad():
        z = agent.world_model.encode(agent.world_model.preprocess(observations))
    noise = planner.draw(1, torch.Generator().manual_seed(0))
    plan = planner.plan(z, noise, deterministic=True)
    np.testing.assert_allclose(actions, plan.actions.numpy(), rtol=1e-5, atol=1e-6)
    assert not np.array_equal(actions, agent.predict(observations, deterministic=True)[0])
    with pytest.raises(NotImplementedError, match="save the agent, and call plan_with again"):
        planned.save("planned")
    calls = watch(planned)
    evaluate_policy(planned, DummyVecEnv([toy, toy]), n_eval_episodes=2, warn=False)
    assert len(calls) == 8

    agent.learn(20, reset_num_timesteps=False)  # what the agent learns is planned with
    assert not np.array_equal(actions, planned.predict(observations, deterministic=True)[0])


def test_plans_on_top_of_pwm_follow_it_into_another_model(make_agent: Any, toy: Any):
    agent = make_agent(toy()).learn(30)
    planned = plan_with(agent, **PLANNER)
    observation = np.zeros(3, np.float32)
    before = planned.predict(observation, deterministic=True)[0]
    agent.set_env(LatentVectorEnv(copy.deepcopy(agent.world_model), np.zeros((4, 3), np.float32), 4, 3))
    assert planned.planner.world_model is agent.world_model
    np.testing.assert_array_equal(planned.predict(observation, deterministic=True)[0], before)


def test_plans_on_top_of_gsde_are_refused(make_agent: Any, toy: Any):
    with pytest.raises(ValueError, match="expected a PWM that explores without gSDE"):
        plan_with(make_agent(toy(), use_sde=True))


# Learning


class Reach(gym.Env):
    """A point on a line that is pushed: it earns 1 near the middle and starts away from it."""

    observation_space = spaces.Box(-2.0, 2.0, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.x, self.v, self.t = float(self.np_random.choice([-1.0, 1.0])), 0.0, 0
        return np.array([self.x, self.v], np.float32), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.v = float(np.clip(0.8 * self.v + 0.2 * float(action[0]), -1.0, 1.0))
        self.x, self.t = float(np.clip(self.x + self.v * 0.5, -2.0, 2.0)), self.t + 1
        reward = float(np.exp(-8.0 * self.x**2))
        return np.array([self.x, self.v], np.float32), reward, False, self.t == 30, {}


@pytest.mark.expensive
def test_it_learns_to_reach_a_point():
    agent = TDMPC2(
        "MlpPolicy",
        Reach(),
        learning_starts=300,
        seed_updates=300,
        batch_size=64,
        policy_kwargs={
            "world_model_kwargs": {"latent_dim": 32, "encoder_dim": 32, "mlp_dim": 32, "num_q": 2},
            "planner_kwargs": {"num_samples": 64, "num_elites": 8, "num_prior": 8, "iterations": 4},
        },
        seed=0,
        device="cpu",
    )
    before, _ = evaluate_policy(agent, Reach(), n_eval_episodes=4, warn=False)
    agent.learn(600)
    after, _ = evaluate_policy(agent, Reach(), n_eval_episodes=4, warn=False)
    assert after > 15.0 > 2.0 * before
