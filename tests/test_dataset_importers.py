"""Data of others: TD-MPC2's shards, SB3's buffers, Minari; round trips and bad input."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import time

import gymnasium as gym
import numpy as np
import pytest
import rich
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer

from pwm_gym import SequenceReplayBuffer, UnsafeFileError
from pwm_gym.datasets import Episode, OfflineDataset
from pwm_gym.datasets import tdmpc2 as tdmpc2_module
from pwm_gym.task_sets import TASK_DIMS, tasks

STEPS = 500
TWO = {"reach": (4, 2), "turn": (3, 1)}


def make_shard(seed, episodes, task_set=TWO, steps=20, dtype=torch.float32):
    """A shard in TD-MPC2's padded layout, with rubbish in row 0 as its first release has."""
    generator = torch.Generator().manual_seed(seed)
    dims = np.array(list(task_set.values()))
    task = torch.randint(len(dims), (episodes,), generator=generator)
    width = dims.max(0)
    obs = torch.randn(episodes, steps + 1, int(width[0]), generator=generator)
    action = torch.rand(episodes, steps + 1, int(width[1]), generator=generator) * 2 - 1
    reward = torch.rand(episodes, steps + 1, generator=generator)
    for i, t in enumerate(task):
        obs[i, :, dims[t][0] :] = 0
        action[i, :, dims[t][1] :] = 0
    action[:, 0], reward[:, 0] = 1e30, torch.nan
    shard = {"obs": obs.to(dtype), "action": action.to(dtype), "reward": reward.to(dtype)}
    return shard | {"task": task.to(torch.int32)[:, None].repeat(1, steps + 1)}


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    made = [make_shard(i, 6) for i in range(3)]
    for i, shard in enumerate(made):
        torch.save(shard, folder / f"chunk_{i}.pt")
    return folder, made


def convert(folder, out, task_set=TWO, **kwargs):
    return OfflineDataset.from_tdmpc2(folder, out, task_set, progress_bar=False, **kwargs)


def contents(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


def assert_same_episodes(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for field in ("observations", "actions", "rewards"):
            got, expected = np.asarray(getattr(x, field)), np.asarray(getattr(y, field))
            assert got.dtype == expected.dtype == np.float32 and np.array_equal(got, expected), field
        assert x[3:] == y[3:]


# TD-MPC2's shards


def test_rows_of_shards_become_steps_and_row_0_is_never_read(shards, tmp_path):
    folder, made = shards
    dataset = convert(folder, tmp_path / "out")
    assert dataset.tasks == ("reach", "turn") and dataset.observation_dims == (4, 3) and dataset.action_dims == (2, 1)
    assert (dataset.num_episodes, dataset.num_steps) == (18, 360)
    for number, episode in enumerate(dataset):
        shard, i = made[number // 6], number % 6
        assert np.array_equal(episode.observations, shard["obs"][i])
        assert np.array_equal(episode.actions, shard["action"][i, 1:])
        assert np.array_equal(episode.rewards, shard["reward"][i, 1:])
        assert (episode.terminated, episode.truncated) == (False, True)
        assert episode.task == shard["task"][i, 0]


def test_importing_block_by_block_gives_equal_bytes(shards, tmp_path, monkeypatch):
    convert(shards[0], tmp_path / "whole")
    monkeypatch.setattr(tdmpc2_module, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(tdmpc2_module, "_CHECKPOINT_BYTES", 1)
    convert(shards[0], tmp_path / "blocks")
    assert contents(tmp_path / "blocks") == contents(tmp_path / "whole")


def test_half_precision_shards_are_widened(tmp_path):
    shard = make_shard(0, 3, dtype=torch.float16)
    torch.save(shard, tmp_path / "chunk_0.pt")
    dataset = convert(tmp_path / "chunk_0.pt", tmp_path / "out")
    assert np.array_equal(dataset[1].observations, shard["obs"][1].float())


def test_only_some_tasks_are_kept_without_padding(shards, tmp_path):
    whole = convert(shards[0], tmp_path / "whole")
    turn = convert(shards[0], tmp_path / "turn", only=["turn"])
    assert turn.tasks == ("turn",) and turn.observation_dim == 3
    assert np.load(tmp_path / "turn" / "observations.npy").shape[1] == 3
    assert_same_episodes(turn, whole.of_tasks("turn"))
    with pytest.raises(ValueError, match="`only` to name tasks"):
        convert(shards[0], tmp_path / "x", only=["jump"])


@pytest.mark.parametrize("name, widths, steps", [("MT30", (24, 6), 500), ("MT80", (39, 6), 100)])
def test_published_sets_have_their_names_widths_and_lengths(tmp_path, name, widths, steps):
    dims = {task: TASK_DIMS[task] for task in tasks(name)}
    torch.save(make_shard(0, 8, dims, steps), tmp_path / "chunk_0.pt")
    dataset = convert(tmp_path / "chunk_0.pt", tmp_path / "out", name)
    assert dataset.tasks == tasks(name) and (dataset.observation_dim, dataset.action_dim) == widths
    assert set(dataset.lengths.tolist()) == {steps}
    torch.save(make_shard(0, 2, dims, steps - 1), tmp_path / "chunk_1.pt")
    with pytest.raises(ValueError, match=f"episodes of {steps} steps.*got {steps - 1}.*chunk_1.pt"):
        convert(tmp_path / "chunk_1.pt", tmp_path / "other", name)


def test_ours_to_tdmpc2_and_back_is_equal(shards, tmp_path):
    ours = convert(shards[0], tmp_path / "ours")
    ours.to_tdmpc2(tmp_path / "chunk_0.pt")
    shard = torch.load(tmp_path / "chunk_0.pt", weights_only=True)
    assert {k: tuple(v.shape) for k, v in shard.items()} == {
        "obs": (18, 21, 4),
        "action": (18, 21, 2),
        "reward": (18, 21),
        "task": (18, 21),
    }
    assert shard["reward"][:, 0].isnan().all() and shard["action"][:, 0].isnan().all()
    convert(tmp_path / "chunk_0.pt", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "ours")


def test_what_tdmpc2s_layout_cannot_hold_is_not_exported(tmp_path):
    episode = Episode(np.zeros((4, 2)), np.zeros((3, 1)), np.zeros(3), terminated=True)
    with pytest.raises(ValueError, match="cannot tell terminations"):
        OfflineDataset([episode]).to_tdmpc2(tmp_path / "a.pt")
    longer = Episode(np.zeros((5, 2)), np.zeros((4, 1)), np.zeros(4))
    with pytest.raises(ValueError, match="of one length"):
        OfflineDataset([episode, longer]).to_tdmpc2(tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


# Bad shards


def test_missing_shards_are_named(shards, tmp_path):
    folder, _ = shards
    (folder / "chunk_1.pt").unlink()
    with pytest.raises(FileNotFoundError, match="expected shards 0 to 2.*number \\[1\\]"):
        convert(folder, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="chunk_1.pt"):
        convert([folder / "chunk_0.pt", folder / "chunk_1.pt"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="expected shards"):
        convert(tmp_path / "empty", tmp_path / "out")


def test_chunks_of_a_folder_come_in_the_order_of_their_numbers(tmp_path):
    for i in range(11):
        torch.save(make_shard(i, 1), tmp_path / f"chunk_{i}.pt")
    dataset = convert(tmp_path, tmp_path / "out")
    assert np.array_equal(dataset[2].observations, make_shard(2, 1)["obs"][0])  # and not chunk_10


def test_shards_out_of_order_are_refused(shards, tmp_path):
    folder, _ = shards
    with pytest.raises(ValueError, match="ascending order.*\\[1, 0\\]"):
        convert([folder / "chunk_1.pt", folder / "chunk_0.pt"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_truncated_shards_are_refused(shards, tmp_path):
    file = shards[0] / "chunk_1.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="chunk_1.pt.*truncated or damaged"):
        convert(shards[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _swap(shard):
    shard["task"][3, 7:] = 1 - shard["task"][3, 0]


def _put(key, index, value):
    def change(shard):
        shard[key][index] = value

    return change


def _drop(shard):
    del shard["task"]


def _transpose(shard):
    for key in shard:
        shard[key] = shard[key].transpose(0, 1).contiguous()


def _cut(shard):
    for key in shard:
        shard[key] = shard[key][:, :-1].clone()


@pytest.mark.parametrize(
    "change, message",
    [
        (_put("obs", (2, 9, 1), torch.nan), "NaN or infinite 'obs' in chunk_1.pt, episode 2"),
        (_put("reward", (2, 1), torch.nan), "NaN or infinite 'reward' in chunk_1.pt, episode 2"),
        (_put("action", (4, 20, 0), torch.inf), "NaN or infinite 'action' in chunk_1.pt, episode 4"),
        (_put("action", (4, 20, 0), 1.5), "actions in \\[-1, 1\\].*chunk_1.pt, episode 4"),
        (_put("task", (5, slice(None)), 2), "task ids from 0 to 1.*chunk_1.pt, episode 5"),
        (_put("task", (5, slice(None)), -1), "task ids from 0 to 1.*chunk_1.pt, episode 5"),
        (_swap, "out of order in chunk_1.pt, episode 3"),
        (_drop, "tensors obs, action, reward, task in chunk_1.pt"),
        (_transpose, "episodes of 20 steps.*got 5 steps.*chunk_1.pt"),
        (_cut, "episodes of 20 steps.*got 19 steps.*chunk_1.pt"),
    ],
)
def test_bad_shards_are_refused_and_leave_no_dataset(shards, tmp_path, change, message):
    folder, made = shards
    change(made[1])
    torch.save(made[1], folder / "chunk_1.pt")
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_of_another_task_set_are_told_by_their_padding(shards, tmp_path):
    with pytest.raises(ValueError, match="zeros beyond the task's own dimensions, got other 'obs'"):
        convert(shards[0], tmp_path / "out", {"turn": (3, 1), "reach": (4, 2)})


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_shard_that_runs_code_is_refused_and_runs_nothing(shards, tmp_path):
    folder, made = shards
    torch.save(made[1] | {"extra": RunsCode(tmp_path / "ran")}, folder / "chunk_1.pt")
    with pytest.raises(UnsafeFileError, match="nothing was imported or executed"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


# Kills


def test_an_import_that_failed_goes_on_to_equal_bytes(shards, tmp_path, monkeypatch):
    folder, made = shards
    convert(folder, tmp_path / "whole")
    good = (folder / "chunk_2.pt").read_bytes()
    monkeypatch.setattr(tdmpc2_module, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(tdmpc2_module, "_CHECKPOINT_BYTES", 1)
    made[2]["obs"][4, 3, 0] = torch.nan
    torch.save(made[2], folder / "chunk_2.pt")
    with pytest.raises(ValueError, match="chunk_2.pt, episode 4"):
        convert(folder, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="unfinished one"):
        OfflineDataset.load(tmp_path / "out")
    with pytest.raises(ValueError, match="made from other files or settings"):
        convert([folder / "chunk_0.pt"], tmp_path / "out")
    (folder / "chunk_2.pt").write_bytes(good)
    convert(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


IMPORT = """
    import sys
    from pwm_gym.datasets import OfflineDataset, tdmpc2
    tdmpc2._BLOCK_BYTES, tdmpc2._CHECKPOINT_BYTES = 200_000, 400_000
    OfflineDataset.from_tdmpc2(sys.argv[1], sys.argv[2], {"reach": (4, 2), "turn": (3, 1)}, progress_bar=False)
"""


@pytest.mark.expensive
def test_an_import_killed_three_times_ends_in_equal_bytes(tmp_path):
    for i in range(2):
        torch.save(make_shard(i, 5_000), tmp_path / f"chunk_{i}.pt")
    command = [sys.executable, "-c", textwrap.dedent(IMPORT), str(tmp_path)]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    size, draw = (tmp_path / "whole" / "observations.npy").stat().st_size, random.Random(0)
    growing = tmp_path / ".out.partial" / "observations.npy"
    for kill in range(3):
        until = size * (kill + draw.uniform(0.1, 0.9)) / 3.5
        with subprocess.Popen([*command, str(tmp_path / "out")]) as process:
            while process.poll() is None and (not growing.exists() or growing.stat().st_size < until):
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    subprocess.run([*command, str(tmp_path / "out")], check=True, capture_output=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# SB3's buffers


class Counter(gym.Env):
    """Observations tell the episode and the step; episodes end at random, in one way or the other."""

    observation_space = spaces.Box(-1e6, 1e6, (3,), np.float32)
    action_space = spaces.Box(-2.0, 2.0, (2,), np.float32)

    def __init__(self, number):
        self.number, self.episode, self.rng = number, -1, np.random.default_rng(number)

    def reset(self, **_):
        self.episode, self.t = self.episode + 1, 0
        return np.array([self.number, self.episode, 0], np.float32)

    def step(self):
        self.t += 1
        end = "terminated" * (self.rng.random() < 0.1) or "truncated" * (self.t == 8)
        return np.array([self.number, self.episode, self.t], np.float32), end


def fill(buffer, steps):
    """Fill a buffer, and list the episodes of each env as they were: (Episode, number of its first step)."""
    envs, rng = [Counter(i) for i in range(buffer.n_envs)], np.random.default_rng(0)
    now = np.stack([env.reset() for env in envs])
    record = [[{"o": [o], "a": [], "r": [], "end": ""}] for o in now]
    for _ in range(steps):
        actions = rng.uniform(-1, 1, (len(envs), 2)).astype(np.float32)
        rewards = rng.normal(size=len(envs)).astype(np.float32)
        outcomes = [env.step() for env in envs]
        after = np.stack([o for o, _ in outcomes])
        infos = [{"TimeLimit.truncated": end == "truncated"} for _, end in outcomes]
        buffer.add(now, after, actions, rewards, np.array([bool(end) for _, end in outcomes]), infos)
        now = after.copy()
        for i, (o, end) in enumerate(outcomes):
            episode = record[i][-1]
            episode["o"].append(o), episode["a"].append(actions[i]), episode["r"].append(rewards[i])
            if end:
                episode["end"] = end
                now[i] = envs[i].reset()
                record[i].append({"o": [now[i].copy()], "a": [], "r": [], "end": ""})
    return record


def expected_episodes(record, kept, drop_last=False):
    """The episodes of the newest `kept` steps of each env."""
    episodes = []
    for of_env in record:
        skip = sum(len(e["r"]) for e in of_env) - kept
        for number, e in enumerate(of_env):
            cut, skip = min(skip, len(e["r"])), max(0, skip - len(e["r"]))
            last = len(e["r"]) - (drop_last and number < len(of_env) - 1)
            end = "" if drop_last else e["end"]
            o, a, r = np.array(e["o"][cut : last + 1]), np.array(e["a"][cut:last]), np.array(e["r"][cut:last])
            if len(r):
                episodes.append(Episode(o, a, r, end == "terminated", end == "truncated"))
    return episodes


@pytest.mark.parametrize("kind", [ReplayBuffer, SequenceReplayBuffer])
@pytest.mark.parametrize("n_envs, steps", [(1, 30), (3, 30), (3, 40), (3, 107)])
def test_sb3_buffers_come_back_as_the_episodes_that_filled_them(kind, n_envs, steps):
    buffer = kind(40 * n_envs, Counter.observation_space, Counter.action_space, "cpu", n_envs)
    record = fill(buffer, steps)
    dataset = OfflineDataset.from_replay_buffer(buffer, "count")
    assert dataset.tasks == ("count",)
    assert_same_episodes(dataset, expected_episodes(record, min(steps, 40)))
    assert {(e.terminated, e.truncated) for e in dataset} == {(True, False), (False, True), (False, False)}


@pytest.mark.parametrize("kind", [ReplayBuffer, SequenceReplayBuffer])
@pytest.mark.parametrize("steps", [30, 107])
def test_memory_efficient_buffers_lack_only_the_last_step_of_each_episode(kind, steps):
    compact = {"optimize_memory_usage": True, "handle_timeout_termination": False}
    buffer = kind(80, Counter.observation_space, Counter.action_space, "cpu", 2, **compact)
    record = fill(buffer, steps)
    assert_same_episodes(
        OfflineDataset.from_replay_buffer(buffer), expected_episodes(record, min(steps, 39), drop_last=True)
    )


def test_buffers_without_vectors_or_steps_are_refused():
    actions = spaces.Box(-1, 1, (1,))
    buffer = ReplayBuffer(10, spaces.Box(-1, 1, (3,)), actions, "cpu")
    with pytest.raises(ValueError, match="empty one"):
        OfflineDataset.from_replay_buffer(buffer)
    keys = spaces.Dict({"a": spaces.Box(-1, 1, (3,))})
    with pytest.raises(ValueError, match="FlattenObservation"):
        OfflineDataset.from_replay_buffer(DictReplayBuffer(10, keys, actions, "cpu"))
    with pytest.raises(ValueError, match="Box action space"):
        OfflineDataset.from_replay_buffer(ReplayBuffer(10, spaces.Box(-1, 1, (3,)), spaces.Discrete(2), "cpu"))


@pytest.mark.parametrize("kind", [ReplayBuffer, SequenceReplayBuffer])
def test_episodes_go_into_a_buffer_and_come_back(kind):
    rng = np.random.default_rng(0)
    ends = [(True, False), (False, True), (False, True)]
    made = [random_episode(rng, n, (3, 2), 0, *end) for n, end in zip((4, 7, 5), ends, strict=True)]
    dataset = OfflineDataset(made, ["task"])
    buffer = kind(20, spaces.Box(-9, 9, (3,)), spaces.Box(-1, 1, (2,)), "cpu")
    dataset.add_to(buffer)
    assert buffer.size() == 16
    back = OfflineDataset.from_replay_buffer(buffer, "task")
    for expected, got in zip(dataset, back, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(expected, got, strict=True))


def test_episodes_of_other_widths_or_for_several_envs_go_into_no_buffer():
    dataset = OfflineDataset([random_episode(np.random.default_rng(0), 4, (3, 2))])
    with pytest.raises(ValueError, match="one of 2"):
        dataset.add_to(ReplayBuffer(10, spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)), "cpu", 2))
    with pytest.raises(ValueError, match="2 actions"):
        dataset.add_to(ReplayBuffer(10, spaces.Box(-1, 1, (4,)), spaces.Box(-1, 1, (2,)), "cpu"))


# Minari


@pytest.fixture
def minari(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return pytest.importorskip("minari")


def random_episode(rng, length, dims, task=0, terminated=False, truncated=True):
    o, a = rng.normal(size=(length + 1, dims[0])), rng.uniform(-1, 1, (length, dims[1]))
    o, a, r = (x.astype(np.float32) for x in (o, a, rng.normal(size=length)))
    return Episode(o, a, r, terminated, truncated, task)


def test_ours_to_minari_and_back_is_equal(minari, tmp_path):
    rng = np.random.default_rng(0)
    flags = [(True, False), (False, True), (False, False), (True, True)]
    episodes = [random_episode(rng, 5 + i, TWO[("reach", "turn")[i % 2]], i % 2, *flags[i]) for i in range(4)]
    ours = OfflineDataset(episodes, list(TWO))
    written = ours.to_minari("pwm/two-v0", author="someone", description="two tasks")
    assert written.total_steps == ours.num_steps
    back = OfflineDataset.from_minari("pwm/two-v0")
    assert back.tasks == ours.tasks and back.observation_dims == ours.observation_dims
    assert_same_episodes(back, ours)
    ours.save(tmp_path / "ours")
    back.save(tmp_path / "back")
    assert contents(tmp_path / "ours") == contents(tmp_path / "back")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_minari_data_of_others_is_scaled_and_flattened(minari):
    from minari.data_collector import EpisodeBuffer

    rng = np.random.default_rng(0)
    keys = spaces.Dict({"b": spaces.Box(-9, 9, (2, 2)), "a": spaces.Box(-9, 9, (1,))})
    low, high = np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32)
    observations = {"a": rng.normal(size=(6, 1)).astype(np.float32), "b": rng.normal(size=(6, 2, 2)).astype(np.float32)}
    buffer = EpisodeBuffer(
        observations=observations,
        actions=np.array([[-2, 0], [2, 10], [0, 5], [1, 7.5], [0, 0]], np.float32),
        rewards=np.arange(5.0),
        terminations=np.array([False] * 4 + [True]),
        truncations=np.zeros(5, bool),
        infos={},
    )
    written = minari.create_dataset_from_buffers(
        "other/dict-v0", [buffer], action_space=spaces.Box(low, high), observation_space=keys
    )
    (episode,) = OfflineDataset.from_minari(written, task="door")
    expected = np.concatenate([observations["a"], observations["b"].reshape(6, 4)], 1)
    assert np.array_equal(episode.observations, expected)
    assert episode.actions.tolist() == [[-1, -1], [1, 1], [0, 0], [0.5, 0.5], [0, -1]]
    assert (episode.terminated, episode.truncated) == (True, False)
    assert OfflineDataset.from_minari(written).tasks == ("other/dict-v0",)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_minari_data_without_action_bounds_is_refused(minari):
    from minari.data_collector import EpisodeBuffer

    buffer = EpisodeBuffer(
        observations=np.zeros((3, 1), np.float32),
        actions=np.array([0, 1]),
        rewards=np.zeros(2),
        terminations=np.zeros(2, bool),
        truncations=np.zeros(2, bool),
        infos={},
    )
    written = minari.create_dataset_from_buffers(
        "other/discrete-v0", [buffer], action_space=spaces.Discrete(2), observation_space=spaces.Box(-1, 1, (1,))
    )
    with pytest.raises(ValueError, match="bounded Box actions"):
        OfflineDataset.from_minari(written)


# Reports


def test_the_summary_counts_and_ranks_returns_by_task(capsys):
    episodes = [Episode(np.zeros((n + 1, 2)), np.zeros((n, 1)), np.full(n, 2.0)) for n in (1, 2, 3, 4, 5)]
    episodes.append(Episode(np.zeros((3, 3)), np.zeros((2, 2)), np.ones(2), task=1))
    rich.print(OfflineDataset(episodes, ["reach", "turn"]).summary())
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.split()}
    assert rows["reach"] == ["5", "15", "2", "1", "2", "4", "6", "8", "10"]
    assert rows["turn"] == ["1", "2", "3", "2", "2", "2", "2", "2", "2"]


def test_returns_are_drawn_by_task(tmp_path):
    rng = np.random.default_rng(0)
    episodes = [random_episode(rng, 9, TWO[("reach", "turn")[i % 2]], i % 2) for i in range(8)]
    OfflineDataset(episodes, list(TWO)).plot_returns(tmp_path / "returns.png")
    assert (tmp_path / "returns.png").read_bytes().startswith(b"\x89PNG")
