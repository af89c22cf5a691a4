"""Collecting offline data: what is stored, who acts, processes, kills, and the command line."""

import pathlib
import random
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import torch

from pwm_gym import PWM, OfflineDataset, SequenceReplayBuffer
from pwm_gym.cli import main
from pwm_gym.collection import collect


def contents(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


def gather(out, env_ids="Pendulum-v1", agent=None, episodes=2, **kwargs):
    return collect(env_ids, agent, episodes, out, progress_bar=False, **kwargs)


def rest(observation):
    """Push always to the left, at half of Pendulum's torque."""
    return np.array([-1.0], np.float32)


class Pushes:
    """An agent as SB3's are."""

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        assert deterministic
        return np.array([0.5 * observation[0]], np.float32), None


def replay(dataset, env_id, **kwargs):
    """Play a dataset's actions again, each episode from its first observation's seed on, and compare."""
    env = gym.make(env_id, **kwargs)
    middle, radius = (
        (env.action_space.high + env.action_space.low) / 2,
        (env.action_space.high - env.action_space.low) / 2,
    )
    for episode in dataset:
        env.reset()
        env.unwrapped.state = np.array([np.arctan2(*episode.observations[0][1::-1]), episode.observations[0][2]])
        for action, reward, after in zip(episode.actions, episode.rewards, episode.observations[1:], strict=True):
            observation, r, *_ = env.step(middle + radius * action)
            np.testing.assert_allclose(r, reward, atol=1e-3)
            np.testing.assert_allclose(observation, after, atol=1e-3)


def test_stored_steps_are_those_of_the_env(tmp_path):
    dataset = gather(tmp_path / "out", agent=Pushes(), noise=0.3, episodes=2, env_kwargs={"max_episode_steps": 30})
    assert dataset.tasks == ("Pendulum-v1",) and dataset.lengths.tolist() == [30, 30]
    assert dataset.truncated.all() and not dataset.terminated.any()
    replay(dataset, "Pendulum-v1")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_actions_are_stored_scaled_whoever_acts(tmp_path):
    short = {"env_kwargs": {"max_episode_steps": 20}}
    (by_function,) = gather(tmp_path / "a", agent=rest, episodes=1, **short)
    assert np.array_equal(by_function.actions, np.full((20, 1), -0.5))
    (by_agent,) = gather(tmp_path / "b", agent=Pushes(), episodes=1, **short)
    np.testing.assert_allclose(by_agent.actions, 0.25 * by_agent.observations[:-1, :1], rtol=1e-6)
    (at_random,) = gather(tmp_path / "c", episodes=1, **short)
    assert len(np.unique(at_random.actions)) == 20 and np.abs(at_random.actions).max() <= 1
    mapped = gather(tmp_path / "d", agent={"Pendulum-v1": rest}, episodes=1, **short)
    assert np.array_equal(mapped[0].actions, by_function.actions)


def test_mixed_quality_draws_agent_noise_and_randomness_for_each_episode(tmp_path):
    short = {"env_kwargs": {"max_episode_steps": 8}, "episodes": 120}
    kwargs = {"noise": [0.0, 0.01], "random_share": 0.5}
    dataset = gather(tmp_path / "out", agent=[rest, lambda _: np.array([1.0])], **kwargs, **short)
    kinds = {"left": 0, "right": 0, "left, noisy": 0, "right, noisy": 0, "random": 0}
    for episode in dataset:
        spread, side = np.ptp(episode.actions), "left" if episode.actions.mean() < 0 else "right"
        kinds["random" if spread > 0.2 else side + (", noisy" if spread else "")] += 1
    # Expected are 60 random ones, with a deviation of 5.5, and 15 of each other kind, with one of 3.6.
    assert 40 <= kinds.pop("random") <= 80 and min(kinds.values()) >= 3


def test_tasks_of_different_sizes_and_workers_give_the_same_bytes(tmp_path):
    envs = ["Pendulum-v1", "MountainCarContinuous-v0"]
    kwargs = {"agent": [None, rest], "episodes": 5, "chunk_episodes": 2, "env_kwargs": {"max_episode_steps": 15}}
    one = gather(tmp_path / "one", envs, **kwargs)
    assert one.tasks == tuple(envs) and one.observation_dims == (3, 2) and one.action_dims == (1, 1)
    assert one.task_ids.tolist() == [0] * 5 + [1] * 5
    gather(tmp_path / "two", envs, num_workers=2, **kwargs)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    gather(tmp_path / "other", envs, seed=1, **kwargs)
    assert contents(tmp_path / "one") != contents(tmp_path / "other")


def test_a_collection_that_failed_goes_on_to_equal_bytes(tmp_path):
    class Fails:
        episodes = 0

        def __call__(self, observation):
            if observation[2] == self.first:
                raise RuntimeError("stopped")
            return rest(observation)

    whole = gather(tmp_path / "whole", agent=rest, episodes=6, chunk_episodes=1)
    first = Fails()
    first.first = whole[3].observations[0, 2]
    with pytest.raises(RuntimeError, match="stopped"):
        gather(tmp_path / "out", agent=first, episodes=6, chunk_episodes=1)
    assert len(list((tmp_path / ".out.chunks").iterdir())) == 4  # three chunks and the call
    with pytest.raises(ValueError, match="begun with other arguments"):
        gather(tmp_path / "out", agent=first, episodes=7, chunk_episodes=1)
    again = Fails()
    again.first = np.inf
    gather(tmp_path / "out", agent=again, episodes=6, chunk_episodes=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / ".out.chunks").exists()


def test_a_saved_agent_acts_from_its_file(tmp_path):
    torch.manual_seed(0)
    agent = PWM("MlpPolicy", "Pendulum-v1", learning_starts=10, seed=0, policy_kwargs={"net_arch": [8]})
    agent.save(tmp_path / "agent.zip")
    short = {"env_kwargs": {"max_episode_steps": 5}, "episodes": 1}
    (episode,) = gather(tmp_path / "a", agent=tmp_path / "agent.zip", **short)
    expected = agent.predict(episode.observations[0], deterministic=True)[0] / 2
    np.testing.assert_allclose(episode.actions[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"episodes": 0}, ">= 1"),
        ({"random_share": 1.5}, "in \\[0, 1\\]"),
        ({"env_ids": ["Pendulum-v1", "Pendulum-v1"]}, "distinct envs"),
        ({"env_ids": "CartPole-v1"}, "bounded Box actions"),
    ],
)
def test_what_cannot_be_collected_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        gather(tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


@pytest.mark.expensive
@pytest.mark.parametrize("workers", [1, 2])
def test_a_collection_killed_three_times_ends_in_equal_bytes(tmp_path, workers):
    command = [
        sys.executable,
        "-m",
        "pwm_gym",
        "collect",
        "Pendulum-v1",
        "MountainCarContinuous-v0",
        "--episodes",
        "60",
    ]
    command += ["--workers", str(workers)]
    subprocess.run([*command, "--out", tmp_path / "whole"], check=True, capture_output=True)
    draw = random.Random(workers)
    for kill in range(3):
        chunks = 1 + 3 * kill + draw.randrange(3)  # of 12
        with subprocess.Popen([*command, "--out", tmp_path / "out"], stdout=subprocess.DEVNULL) as process:
            while len(list((tmp_path / ".out.chunks").glob("[0-9]*"))) < chunks and process.poll() is None:
                time.sleep(0.01)
            time.sleep(draw.uniform(0.0, 0.05))
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    subprocess.run([*command, "--out", tmp_path / "out"], check=True, capture_output=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# Command line


def test_the_command_line_collects_and_summarises(tmp_path, capsys):
    out = str(tmp_path / "out")
    main(["collect", "Pendulum-v1", "--episodes", "3", "--out", out, "--noise", "0.1", "0.2", "--random-share", "0.5"])
    capsys.readouterr()
    main(["summary", out, "--plot", str(tmp_path / "returns.png")])
    assert "Pendulum-v1" in capsys.readouterr().out
    assert (tmp_path / "returns.png").exists()
    with pytest.raises(SystemExit) as exit_info:
        main(["summary", str(tmp_path / "nothing")])
    assert exit_info.value.code == 1 and "expected a dataset" in capsys.readouterr().err


def test_the_command_line_imports_shards_and_replays(tmp_path):
    dataset = gather(tmp_path / "ours", "MountainCarContinuous-v0", env_kwargs={"max_episode_steps": 9})
    buffer = SequenceReplayBuffer(100, dataset.observation_space, dataset.action_space, "cpu")
    for episode in dataset:
        for t in range(9):
            step = episode.observations[t : t + 1], episode.observations[t + 1 : t + 2], episode.actions[t : t + 1]
            buffer.add(*step, episode.rewards[t : t + 1], np.array([t == 8]), [{"TimeLimit.truncated": t == 8}])
    buffer.save(tmp_path / "buffer.pt")
    main(["import-replay", str(tmp_path / "buffer.pt"), "--out", str(tmp_path / "a"), "--task", dataset.tasks[0]])
    assert contents(tmp_path / "a") == contents(tmp_path / "ours")
    shard = {"obs": torch.zeros(2, 501, 24), "action": torch.zeros(2, 501, 6), "reward": torch.ones(2, 501)}
    torch.save(shard | {"task": torch.zeros(2, 501, dtype=torch.int32)}, tmp_path / "chunk_0.pt")
    main(["import-tdmpc2", str(tmp_path / "chunk_0.pt"), "--out", str(tmp_path / "b"), "--only", "walker-stand"])
    imported = OfflineDataset.load(tmp_path / "b")
    assert imported.tasks == ("walker-stand",) and imported.returns().tolist() == [500.0, 500.0]


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "pwm_gym", "--help"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in ("collect", "import-tdmpc2", "summary"))
