"""SHAC on torch physics: learning, files, callbacks, logs, the adaptive horizon and bad input."""

from __future__ import annotations

import csv
import pathlib
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback

from pwm_gym import PWM, SHAC, make_differentiable
from pwm_gym.agents.shac_policy import SHACPolicy
from pwm_gym.latent_env import LatentVectorEnv

PENDULUM = "pwm_gym/TorchPendulum-v0"


def make_env(name: str = PENDULUM, num_envs: int = 4, **kwargs: Any) -> Any:
    return make_differentiable(name, num_envs, **kwargs)


def make_agent(env: Any = None, **overrides: Any) -> SHAC:
    settings: dict[str, Any] = {"horizon": 8, "policy_kwargs": {"net_arch": [16]}, "seed": 0}
    return SHAC("MlpPolicy", make_env() if env is None else env, **{**settings, **overrides})


def weights(agent: SHAC) -> list[torch.Tensor]:
    return [value.clone() for value in agent.policy.state_dict().values()]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Learning


@pytest.mark.parametrize(
    ("task", "face"), [(PENDULUM, "numpy"), ("pwm_gym/pendulum-swingup-v0", "torch"), ("Hopper-v5", "torch")]
)
def test_learns_on_every_kind_and_face_of_a_differentiable_env(task: str, face: str):
    env = make_env(task, 2)
    agent = make_agent(env if face == "torch" else env.numpy(), horizon=4)
    before = weights(agent)
    assert agent.learn(16) is agent
    assert agent.num_timesteps == 16 and agent._n_updates == 2
    assert not equal(before, weights(agent))
    observation = np.zeros(agent.observation_space.shape, np.float32)
    assert agent.predict(observation)[0] in agent.action_space
    assert agent.predict(np.stack([observation] * 3), deterministic=True)[0].shape == (3, *agent.action_space.shape)


def test_a_rollout_goes_on_where_the_one_before_ended():
    env = make_env(horizon=20)
    agent = make_agent(env)
    agent.learn(2 * 8 * 4)
    assert (env._elapsed == 16).all()
    agent.learn(8 * 4, reset_num_timesteps=False)
    assert (env._elapsed == 4).all(), "24 steps with an end after 20"
    assert agent.num_timesteps == 96


def test_equal_seeds_give_bit_equal_runs_and_others_do_not():
    runs = [weights(make_agent(seed=seed).learn(96)) for seed in (0, 0, 1)]
    assert equal(runs[0], runs[1]) and not equal(runs[0], runs[2])


def test_observations_are_normalised_by_what_was_seen():
    agent = make_agent().learn(8 * 4)
    normalizer = agent.policy.actor.normalizer
    assert float(normalizer.count) == pytest.approx(32.0, abs=1e-3)
    assert normalizer.mean.abs().sum() > 0.0
    plain = make_agent(policy_kwargs={"normalize_observations": False, "net_arch": [16]}).learn(8 * 4)
    observation = torch.ones(2, 3)
    assert torch.equal(plain.policy.actor.normalizer(observation), observation)
    assert not torch.equal(normalizer(observation), observation)


def test_statistics_are_held_still_within_an_update_and_stored_once():
    agent = make_agent()
    assert agent.policy.critic_target._normalizer[0] is agent.policy.actor.normalizer
    names = [name for name in agent.policy.state_dict() if "normalizer" in name]
    assert sorted(names) == [f"actor.normalizer.{n}" for n in ("count", "mean", "var")]


def test_the_target_critic_follows_slowly():
    agent = make_agent(tau=0.0)
    before = [p.clone() for p in agent.policy.critic_target.parameters()]
    agent.learn(64)
    assert equal(before, list(agent.policy.critic_target.parameters()))
    agent = make_agent(tau=1.0).learn(64)
    assert equal(list(agent.policy.critic.parameters()), list(agent.policy.critic_target.parameters()))


def test_the_adaptive_horizon_grows_where_steps_are_soft_and_shrinks_where_they_are_stiff():
    horizons = []
    for limit in (1e9, 1e-9):
        agent = make_agent(
            make_env("pwm_gym/pendulum-swingup-v0", 2),
            horizon=6,
            horizon_min=4,
            horizon_max=8,
            stiffness_limit=limit,
        )
        agent.learn(5 * 2 * 8)
        horizons.append(agent._adaptive_horizon)
    assert horizons == [8.0, 4.0]


def test_an_adaptive_horizon_needs_an_env_that_tells_its_stiffness():
    with pytest.raises(ValueError, match=r"expected infos\['jacobian_norm'\] from the env"):
        make_agent(horizon_max=16).learn(64)


# Files


def test_a_file_gives_the_same_agent_that_can_go_on(tmp_path: pathlib.Path):
    agent = make_agent(horizon_max=None).learn(64)
    agent.save(tmp_path / "shac")
    for env in (None, make_env(num_envs=3)):
        loaded = SHAC.load(tmp_path / "shac", env=env)
        assert equal(weights(agent), weights(loaded))
        observations = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
        ours, theirs = (a.predict(observations, deterministic=True)[0] for a in (agent, loaded))
        assert np.array_equal(ours, theirs)
    loaded.learn(24, reset_num_timesteps=False)
    assert loaded.num_timesteps == 64 + 24
    assert not equal(weights(agent), weights(loaded))


def test_a_policy_survives_a_file_of_its_own(tmp_path: pathlib.Path):
    policy = make_agent().policy
    policy.save(tmp_path / "policy.pt")
    again = SHACPolicy.load(tmp_path / "policy.pt")
    ours, theirs = (p.predict(np.ones(3, np.float32), deterministic=True)[0] for p in (policy, again))
    assert np.array_equal(ours, theirs)


# Callbacks and logs


class Record(BaseCallback):
    def __init__(self, stop: int | None = None) -> None:
        super().__init__()
        self.stop, self.calls = stop, []  # type: ignore[var-annotated]

    def _on_rollout_start(self) -> None:
        self.calls.append("start")

    def _on_step(self) -> bool:
        self.calls.append("step")
        return self.n_calls != self.stop

    def _on_rollout_end(self) -> None:
        self.calls.append("end")


def test_callbacks_are_called_for_every_step_and_can_stop():
    record = Record()
    make_agent(horizon=3).learn(2 * 3 * 4, callback=record)
    assert record.calls == ["start", "step", "step", "step", "end"] * 2
    agent = make_agent(horizon=3)
    agent.learn(1_000, callback=Record(stop=5))
    assert agent.num_timesteps == 5 * 4 and agent._n_updates == 1


def test_logs_have_the_keys_that_people_plot(tmp_path: pathlib.Path):
    from stable_baselines3.common.logger import configure

    agent = make_agent(make_env(horizon=10), horizon=2)
    agent.set_logger(configure(str(tmp_path), ["csv"]))
    agent.learn(2 * 4 * 27, log_interval=1)
    agent.logger.close()
    with open(tmp_path / "progress.csv", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert float(row["rollout/ep_len_mean"]) == 10.0
    keys = ["rollout/ep_rew_mean", "time/fps", "time/total_timesteps", "train/learning_rate", "train/n_updates"]
    keys += [
        f"train/{name}" for name in ("actor_loss", "critic_loss", "actor_grad_norm", "value", "entropy", "horizon")
    ]
    assert all(np.isfinite(float(row[key])) for key in keys)


def test_reported_returns_are_those_of_whole_episodes():
    env = make_env(horizon=6, num_envs=2)
    agent = make_agent(env, horizon=4)
    rewards: list[np.ndarray] = []

    class Rewards(BaseCallback):
        def _on_step(self) -> bool:
            rewards.append(self.locals["rewards"][len(rewards) % 4])
            return True

    agent.learn(3 * 4 * 2, callback=Rewards())
    reported = [info["r"] for info in agent.ep_info_buffer or ()]
    totals = np.array(rewards).reshape(2, 6, 2).sum(1)  # two episodes of 6 steps in 2 envs
    assert reported == pytest.approx(totals.flatten().tolist(), rel=1e-5)


@pytest.mark.filterwarnings("ignore::tqdm.TqdmExperimentalWarning")
def test_progress_bar_reaches_the_end(capsys: pytest.CaptureFixture[str]):
    make_agent().learn(64, progress_bar=True)
    assert "64/64" in capsys.readouterr().out


def test_checkpoints_can_be_gone_on_from(tmp_path: pathlib.Path):
    agent = make_agent().learn(64, callback=CheckpointCallback(8, str(tmp_path), name_prefix="shac"))
    (path,) = sorted(tmp_path.glob("shac_32_steps.zip"))
    loaded = SHAC.load(path, env=make_env())
    loaded.learn(32, reset_num_timesteps=False)
    assert loaded.num_timesteps == agent.num_timesteps == 64


def test_a_learning_rate_schedule_is_followed():
    agent = make_agent(learning_rate=lambda remaining: 1e-3 * remaining).learn(64)
    assert agent.policy.actor_optimizer.param_groups[0]["lr"] < 1e-3


# Bad input


def test_envs_without_gradients_are_refused():
    for env in ("Pendulum-v1", gym.make("Pendulum-v1"), gym.make_vec("Pendulum-v1", 2)):
        with pytest.raises(TypeError, match=r"expected an env with gradients, got .* Use pwm_gym.make_differentiable"):
            SHAC("MlpPolicy", env)
    with pytest.raises(TypeError, match="expected an env with gradients"):
        make_agent().set_env(gym.make("Pendulum-v1"))


def test_a_learned_model_is_pwms(tmp_path: pathlib.Path):
    agent = PWM("MlpPolicy", "Pendulum-v1", seed=0, policy_kwargs={"world_model_kwargs": {"size": "1M"}})
    env = LatentVectorEnv(agent.world_model, np.zeros((2, 3), np.float32), 2)
    with pytest.raises(TypeError, match="expected true dynamics, got a learned model. Train in it with PWM"):
        SHAC("MlpPolicy", env)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"horizon": 0}, "`horizon` must be >= 1, got 0"),
        ({"gamma": 1.5}, r"`gamma` must be in \[0, 1\], got 1.5"),
        ({"horizon_max": 4}, "expected horizon_min <= horizon <= horizon_max, got 8, 8 and 4"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_agent(**arguments)


def test_training_needs_a_rollout():
    with pytest.raises(ValueError, match="expected a rollout to learn from, got none"):
        make_agent().train(1, 1)


def test_a_simulation_that_diverges_stops_learning_and_names_the_env():
    env = make_env()
    agent = make_agent(env)
    agent.learn(32)
    state = env.get_state()
    state[1, 1] = 1e20  # its square overflows
    env.set_state(state)
    before = weights(agent)
    with pytest.raises(ValueError, match=r"in env 1 at its step 1"):
        agent.learn(32, reset_num_timesteps=False)
    assert equal(before, weights(agent))


# Learning, for longer


@pytest.mark.expensive
@pytest.mark.parametrize(("system", "steps"), [("TorchPendulum", 100_000), ("TorchCartPole", 163_840)])
def test_it_swings_up_and_balances(system: str, steps: int):
    agent = SHAC("MlpPolicy", make_env(f"pwm_gym/{system}-v0", 64), seed=0).learn(steps)  # 12 and 30 s of one core
    env = make_env(f"pwm_gym/{system}-v0", 10)
    observations, _ = env.reset(seed=1)
    cosine = 0 if system == "TorchPendulum" else 1
    for t in range(env.horizon):
        if t >= env.horizon - 40:  # the last 2 s
            assert (observations[:, cosine] > np.cos(0.2)).all()
        actions, _ = agent.predict(observations.numpy(), deterministic=True)
        observations, *_ = env.step(torch.from_numpy(actions))
