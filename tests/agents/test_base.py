"""What every agent adds to SB3's: exact resume, clear errors on bad data, replay buffers without pickles."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.save_util import save_to_pkl
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor, VecNormalize

from pwm_gym import PWM, SequenceReplayBuffer, UnsafeFileError

# Processes are forked; from Python 3.12 on, that warns in a process with threads.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

NAN, INF = float("nan"), float("inf")


def pendulum() -> gym.Env:
    return gym.make("Pendulum-v1", max_episode_steps=10)


def cartpole() -> gym.Env:
    return gym.make("pwm_gym/cartpole-swingup-v0", max_episode_steps=10)


def pendulums(vectorization: str, n: int) -> gym.vector.VectorEnv:
    same_step = {"autoreset_mode": AutoresetMode.SAME_STEP}
    return gym.make_vec(
        "Pendulum-v1", n, vectorization_mode=vectorization, vector_kwargs=same_step, max_episode_steps=10
    )


# Resume


@forks
@pytest.mark.parametrize(
    ("n", "make"),
    [
        (1, pendulum),
        (1, cartpole),
        (1, lambda: gym.make("Hopper-v5", max_episode_steps=5)),
        (2, lambda: DummyVecEnv([pendulum, pendulum])),
        (2, lambda: VecMonitor(DummyVecEnv([pendulum, pendulum]))),
        (2, lambda: SubprocVecEnv([pendulum, pendulum], start_method="fork")),
        (2, lambda: pendulums("sync", 2)),
        (1, lambda: pendulums("async", 1)),
    ],
    ids=["Pendulum", "cartpole", "Hopper", "Dummy", "VecMonitor", "Subproc", "sync VectorEnv", "async VectorEnv"],
)
def test_half_a_run_saved_loaded_and_gone_on_with_is_bit_equal_to_a_whole_one(
    n: int, make: Callable[[], Any], make_agent: Any, differences: Any, tmp_path: Any
):
    whole = make_agent(make()).learn(80 * n)
    half = make_agent(make()).learn(40 * n)
    half.save(tmp_path / "agent")
    half.save_replay_buffer(tmp_path / "replay")
    assert differences(whole, half) != []

    resumed = PWM.load(tmp_path / "agent", env=make(), device="cpu")
    resumed.load_replay_buffer(tmp_path / "replay")
    resumed.learn(40 * n, reset_num_timesteps=False)
    assert (resumed.num_timesteps, resumed._n_updates) == (80 * n, whole._n_updates)
    assert differences(whole, resumed) == []
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "episode"):
        ours, theirs = getattr(whole.replay_buffer, name)[:80], getattr(resumed.replay_buffer, name)[:80]
        np.testing.assert_array_equal(ours, theirs)

    # Without env at first
    resumed = PWM.load(tmp_path / "agent", device="cpu")
    resumed.set_env(make())
    resumed.load_replay_buffer(tmp_path / "replay")
    assert differences(whole, resumed.learn(40 * n, reset_num_timesteps=False)) == []

    # Without a file
    assert differences(whole, half.learn(40 * n, reset_num_timesteps=False)) == []


@pytest.mark.parametrize("use_sde", [False, True])
def test_a_run_is_resumed_exactly_again_and_again(use_sde: bool, make_agent: Any, differences: Any, tmp_path: Any):
    whole = make_agent(pendulum(), ent_coef="auto", use_sde=use_sde).learn(80)
    agent = make_agent(pendulum(), ent_coef="auto", use_sde=use_sde).learn(20)
    for _ in range(3):
        agent.save(tmp_path / "agent.zip")
        agent.save_replay_buffer(tmp_path / "replay")
        agent = PWM.load(tmp_path / "agent.zip", env=pendulum(), device="cpu")
        agent.load_replay_buffer(tmp_path / "replay")
        agent.learn(20, reset_num_timesteps=False)
    assert differences(whole, agent) == []
    assert torch.equal(whole.log_ent_coef, agent.log_ent_coef)


def test_a_file_saved_before_training_starts_the_same_run(make_agent: Any, differences: Any, tmp_path: Any):
    agent = make_agent(pendulum())
    agent.save(tmp_path / "agent")
    loaded = PWM.load(tmp_path / "agent", env=pendulum(), device="cpu")
    assert differences(agent.learn(40), loaded.learn(40)) == []


def test_an_env_that_is_gone_on_with_keeps_its_random_state(make_agent: Any, tmp_path: Any):
    env = DummyVecEnv([pendulum])
    agent = make_agent(env).learn(15)
    agent.save(tmp_path / "agent")
    before = env.get_attr("np_random")[0].bit_generator.state
    loaded = PWM.load(tmp_path / "agent", env=env, device="cpu", force_reset=False)
    assert env.get_attr("np_random")[0].bit_generator.state == before
    np.testing.assert_array_equal(loaded._last_obs, agent._last_obs)


def test_another_seed_starts_another_run(make_agent: Any, differences: Any, tmp_path: Any):
    agent = make_agent(pendulum()).learn(20)
    agent.save(tmp_path / "agent")
    runs = [PWM.load(tmp_path / "agent", env=pendulum(), device="cpu", seed=seed) for seed in (5, 5, 6)]
    for run in runs:
        run.learn(30)
    assert differences(runs[0], runs[1]) == []
    assert differences(runs[0], runs[2]) != []


@forks
def test_envs_that_cannot_be_told_apart_are_resumed_without_their_random_states(make_agent: Any, tmp_path: Any):
    agent = make_agent(pendulums("async", 2)).learn(40)
    agent.save(tmp_path / "agent")
    loaded = PWM.load(tmp_path / "agent", env=pendulums("async", 2), device="cpu")
    assert loaded.learn(20, reset_num_timesteps=False).num_timesteps == 60
    agent.env.close()
    loaded.env.close()


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError])
def test_envs_that_hide_their_generators_are_trained_on_all_the_same(error: Any, make_agent: Any, tmp_path: Any):
    class Hiding(DummyVecEnv):
        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            if attr_name == "np_random":
                raise error(attr_name)
            return super().get_attr(attr_name, indices)

    agent = make_agent(Hiding([pendulum, pendulum])).learn(60)
    agent.save(tmp_path / "agent")
    loaded = PWM.load(tmp_path / "agent", env=Hiding([pendulum, pendulum]), device="cpu")
    assert loaded.learn(20, reset_num_timesteps=False).num_timesteps == 80


@pytest.mark.expensive
def test_ten_thousand_steps_are_five_thousand_twice(differences: Any, tmp_path: Any):
    """On dm_control with the default networks; 5,000 decisions are ten whole episodes."""
    task, arguments = "pwm_gym/cartpole-swingup-v0", {"train_freq": 10, "seed": 0, "device": "cpu"}
    whole = PWM("MlpPolicy", gym.make(task), **arguments).learn(10_000)
    half = PWM("MlpPolicy", gym.make(task), **arguments).learn(5_000)
    half.save(tmp_path / "agent")
    half.save_replay_buffer(tmp_path / "replay")
    resumed = PWM.load(tmp_path / "agent", env=gym.make(task), device="cpu")
    resumed.load_replay_buffer(tmp_path / "replay")
    resumed.learn(5_000, reset_num_timesteps=False)
    assert whole.num_timesteps == resumed.num_timesteps == 10_000
    assert differences(whole, resumed) == []


# Numbers that are not finite


@pytest.mark.parametrize(
    ("fault", "culprit"),
    [
        (("reward", NAN), r"got nan in the reward of env 1, at step 34"),
        (("reward", -INF), r"got -inf in the reward of env 1, at step 34"),
        (("observation", NAN), r"got nan in the observation of env 1 at index \[2\], at step 34"),
        (("observation", INF), r"got inf in the observation of env 1 at index \[2\], at step 34"),
    ],
    ids=str,
)
def test_numbers_that_are_not_finite_stop_the_run_and_name_the_culprit(
    fault: tuple[str, float], culprit: str, make_agent: Any, toy: Any, differences: Any, tmp_path: Any
):
    class Save(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 30:
                self.model.save(tmp_path / "checkpoint")
            return True

    env = DummyVecEnv([toy, lambda: toy(faults={17: fault})])
    agent = make_agent(env)
    with pytest.raises(ValueError, match=rf"expected finite numbers.*{culprit}\..*mend the env, and go on with"):
        agent.learn(60, callback=Save())
    assert agent.replay_buffer.size() == 16
    assert np.isfinite(agent.replay_buffer.observations[:16]).all()
    assert np.isfinite(agent.replay_buffer.rewards[:16]).all()
    assert np.isfinite(agent.predict(agent.observation_space.sample())[0]).all()

    checkpoint = PWM.load(tmp_path / "checkpoint", env=DummyVecEnv([toy, toy]), device="cpu")
    assert checkpoint.learn(20, reset_num_timesteps=False).num_timesteps == 50
    agent.save(tmp_path / "agent")
    assert differences(agent, PWM.load(tmp_path / "agent", device="cpu")) == []
    agent.learn(20, reset_num_timesteps=False)  # the fault is over
    assert all(torch.isfinite(p).all() for p in agent.policy.parameters())
    observations, led_to = agent.replay_buffer.observations[15:17, 1], agent.replay_buffer.next_observations[15, 1]
    assert not np.array_equal(observations[1], led_to)  # an episode of its own, after a reset
    assert agent.replay_buffer.episode[15, 1] != agent.replay_buffer.episode[16, 1]


@pytest.mark.parametrize(
    ("kind", "step", "when"), [("last observation", 16, 32), ("reset", 16, 32), ("reset", 0, 0)], ids=str
)
def test_bad_observations_at_an_episodes_end_and_beginning_are_found(
    kind: str, step: int, when: int, make_agent: Any, toy: Any
):
    env = DummyVecEnv([toy, lambda: toy(faults={step: (kind, NAN)})])
    agent = make_agent(env)
    with pytest.raises(ValueError, match=rf"got nan in the observation of env 1 at index \[2\], at step {when}\."):
        agent.learn(60)
    assert agent.replay_buffer.size() == max(0, when // 2 - 1)
    agent.learn(20, reset_num_timesteps=False)
    assert np.isfinite(agent.replay_buffer.observations[: agent.replay_buffer.size()]).all()
    assert np.isfinite(agent.replay_buffer.next_observations[: agent.replay_buffer.size()]).all()


@pytest.mark.parametrize("kind", ["observation", "last observation"])
def test_entries_of_dict_observations_are_named(kind: str, make_agent: Any, toy: Any):
    box = spaces.Box(-1.0, 1.0, (2, 3), np.float64)
    env = toy(spaces.Dict({"angle": spaces.Box(-1.0, 1.0, (1,), np.float32), "box": box}), faults={16: (kind, INF)})
    env.length = 8 if kind == "last observation" else 9
    with pytest.raises(ValueError, match=r"got inf in the observation 'box' of env 0 at index \[0, 2\], at step 16\."):
        make_agent(env).learn(60)


@pytest.mark.parametrize("kind", ["reward", "observation"])
def test_normalised_envs_are_checked_before_normalisation(kind: str, make_agent: Any, toy: Any):
    env = VecNormalize(DummyVecEnv([toy, lambda: toy(faults={17: (kind, NAN)})]))
    with pytest.raises(ValueError, match=rf"the {kind} of env 1.*statistics of its VecNormalize from a file"):
        make_agent(env).learn(60)


# Replay


def test_training_with_nothing_says_so(make_agent: Any, toy: Any):
    agent = make_agent(toy())
    with pytest.raises(ValueError, match=r"expected transitions in the replay buffer, got an empty one. Collect some"):
        agent.train(gradient_steps=1, batch_size=8)
    with pytest.raises(ValueError, match=r"expected transitions in the replay buffer, got an empty one. Collect"):
        agent.make_latent_env(num_envs=2).reset()


def test_a_replay_buffer_from_a_file_is_enough_to_train_on(make_agent: Any, toy: Any, tmp_path: Any):
    make_agent(toy()).learn(20).save_replay_buffer(tmp_path / "replay")
    agent = make_agent(toy())
    agent.load_replay_buffer(tmp_path / "replay")
    agent.train(gradient_steps=2, batch_size=8)
    assert (agent._n_updates, agent.num_timesteps) == (2, 0)


def test_a_replay_shorter_than_a_window_is_trained_on_with_shorter_ones(make_agent: Any, toy: Any):
    agent = make_agent(toy(length=2), learning_starts=0, train_freq=1, model_horizon=5, horizon=4).learn(6)
    assert agent._n_updates == 6
    assert all(torch.isfinite(value) for value in agent._metrics.values())


def test_replay_buffers_survive_a_file(make_agent: Any, toy: Any, tmp_path: Any):
    agent = make_agent(DummyVecEnv([toy, toy])).learn(40)
    agent.save_replay_buffer(tmp_path / "replay")
    assert [path.name for path in tmp_path.iterdir()] == ["replay.replay"]
    other = make_agent(DummyVecEnv([toy, toy]))
    for name in ("replay", "replay.replay"):
        other.load_replay_buffer(tmp_path / name, trust_pickle=name == "replay")
        assert other.replay_buffer.size() == 20
    with open(tmp_path / "open", "wb") as file:
        agent.save_replay_buffer(file)
    with open(tmp_path / "open", "rb") as file:
        other.load_replay_buffer(file)
    np.testing.assert_array_equal(agent.replay_buffer.observations, other.replay_buffer.observations)
    with pytest.raises(FileNotFoundError):
        other.load_replay_buffer(tmp_path / "nothing")


def test_new_experience_is_what_imagination_starts_from(make_agent: Any, toy: Any, tmp_path: Any):
    """The env that updates imagine in follows the replay buffer that is loaded later."""
    make_agent(toy(spaces.Box(5.0, 6.0, (3,), np.float32))).learn(30).save_replay_buffer(tmp_path / "replay")
    agent = make_agent(toy(spaces.Box(5.0, 6.0, (3,), np.float32))).learn(20)
    agent.load_replay_buffer(tmp_path / "replay")
    sampled = []
    agent.replay_buffer.sample_starts = _spy(agent.replay_buffer.sample_starts, sampled)
    agent.train(1, 8)
    assert len(sampled) == 1


def _spy(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return function(*args, **kwargs)

    return call


def test_a_replay_buffer_of_another_env_is_refused(make_agent: Any, toy: Any, tmp_path: Any):
    make_agent(toy()).learn(20).save_replay_buffer(tmp_path / "replay")
    others = {
        r"got one of .*Box\(-1.0, 1.0, \(3,\).*collected in another env": toy(spaces.Box(-2.0, 2.0, (4,), np.float32)),
        r"expected a replay buffer of 2 envs, got one of 1. Load the agent with": DummyVecEnv([toy, toy]),
    }
    for message, env in others.items():
        agent = make_agent(env)
        before = agent.replay_buffer
        with pytest.raises(ValueError, match=message):
            agent.load_replay_buffer(tmp_path / "replay")
        assert agent.replay_buffer is before


def test_truncated_replay_buffers_are_refused(make_agent: Any, toy: Any, tmp_path: Any):
    agent = make_agent(toy()).learn(20)
    agent.save_replay_buffer(tmp_path / "replay")
    content = (tmp_path / "replay.replay").read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(ValueError, match="truncated or damaged"):
            agent.load_replay_buffer(tmp_path / "cut")
    assert agent.replay_buffer.size() == 20


class Malicious:
    """What would create a file when it is unpickled."""

    def __init__(self, path: Any) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (open, (str(self.path), "w"))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_pickled_replay_buffers_are_only_executed_on_request(make_agent: Any, toy: Any, tmp_path: Any):
    agent = make_agent(toy())
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))
    torch.save({"meta": Malicious(tmp_path / "executed")}, tmp_path / "bad.replay")
    for name in ("bad.pkl", "bad.replay"):
        with pytest.raises(UnsafeFileError, match=r"nothing was executed.*pass trust_pickle=True"):
            agent.load_replay_buffer(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_sb3s_own_replay_files_are_read_on_request(make_agent: Any, toy: Any, tmp_path: Any):
    agent = make_agent(toy()).learn(20)
    save_to_pkl(tmp_path / "ours.pkl", agent.replay_buffer)
    other = make_agent(toy())
    with pytest.raises(UnsafeFileError, match="trust_pickle=True"):
        other.load_replay_buffer(tmp_path / "ours.pkl")
    other.load_replay_buffer(tmp_path / "ours", trust_pickle=True)  # SB3 finds the suffix
    assert isinstance(other.replay_buffer, SequenceReplayBuffer)
    assert other.learn(20).replay_buffer.size() == 40

    sac = SAC("MlpPolicy", toy(), device="cpu", policy_kwargs={"net_arch": [8]}, buffer_size=100).learn(20)
    sac.save_replay_buffer(tmp_path / "sac.pkl")
    other.load_replay_buffer(tmp_path / "sac.pkl", trust_pickle=True)
    with pytest.raises(TypeError, match="expected a SequenceReplayBuffer to train from, got ReplayBuffer"):
        other.learn(20)


def test_a_kill_while_saving_keeps_the_old_replay_buffer(
    make_agent: Any, toy: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
):
    agent = make_agent(toy()).learn(20)
    agent.save_replay_buffer(tmp_path / "replay")
    before = (tmp_path / "replay.replay").read_bytes()

    def half(_content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        agent.save_replay_buffer(tmp_path / "replay")
    assert [path.name for path in tmp_path.iterdir()] == ["replay.replay"]
    assert (tmp_path / "replay.replay").read_bytes() == before
