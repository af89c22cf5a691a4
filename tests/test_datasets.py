"""Offline data in its one form: what windows hold, views, files, and what is refused."""

import json
import pathlib

import numpy as np
import pytest
import torch
from gymnasium import spaces

from pwm_gym import LatentVectorEnv, WorldModel, WorldModelConfig, fit_world_model
from pwm_gym.datasets import Episode, OfflineDataset
from pwm_gym.datasets.storage import DatasetWriter, Layout

TASKS = ("walk", "turn", "spin")
DIMS = {0: (4, 2), 1: (3, 1), 2: (6, 3)}


def make_episode(number, length, task=0, terminated=False, truncated=True):
    """An episode whose entries tell their number, step and column."""
    o_dim, a_dim = DIMS[task]
    columns = 1.0 + np.arange(o_dim)
    observations = 1000.0 * number + np.arange(length + 1)[:, None] + columns / 16
    actions = (np.arange(length)[:, None] + np.arange(a_dim) + 1) / 1000 + number / 100
    return Episode(
        observations.astype(np.float32),
        actions.astype(np.float32),
        (1000 * number + np.arange(length)).astype(np.float32),
        terminated,
        truncated,
        task,
    )


def make_episodes():
    lengths = [7, 12, 1, 5, 9, 12]
    ends = [(False, True), (True, False), (True, True), (False, False), (True, False), (False, True)]
    return [make_episode(i, n, i % 3, *end) for i, (n, end) in enumerate(zip(lengths, ends, strict=True))]


def assert_same_episodes(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for field in ("observations", "actions", "rewards"):
            got, expected = np.asarray(getattr(x, field)), np.asarray(getattr(y, field))
            assert got.dtype == expected.dtype and np.array_equal(got, expected), field
        assert x[3:] == y[3:]


def padded(episode, observation_dim=6, action_dim=3):
    o, a = episode.observations, episode.actions
    o = np.pad(o, ((0, 0), (0, observation_dim - o.shape[1])))
    return episode._replace(observations=o, actions=np.pad(a, ((0, 0), (0, action_dim - a.shape[1]))))


@pytest.fixture(params=["memory", "mapped", "loaded"])
def dataset(request, tmp_path):
    dataset = OfflineDataset(make_episodes(), TASKS)
    if request.param == "memory":
        return dataset
    dataset.save(tmp_path / "data")
    return OfflineDataset.load(tmp_path / "data", in_memory=request.param == "loaded")


# Contents and views


def test_episodes_come_back_zero_padded_to_the_widest_task(dataset):
    assert (dataset.num_episodes, dataset.num_steps, len(dataset)) == (6, 46, 6)
    assert dataset.tasks == TASKS
    assert dataset.observation_dims == (4, 3, 6) and dataset.action_dims == (2, 1, 3)
    assert (dataset.observation_dim, dataset.action_dim) == (6, 3)
    assert_same_episodes(dataset, [padded(e) for e in make_episodes()])
    assert_same_episodes([dataset[-1]], [padded(make_episodes()[-1])])
    with pytest.raises(IndexError):
        dataset[6]


def test_a_view_of_one_task_has_no_padding_and_no_ids(dataset):
    turn = dataset.of_tasks("turn")
    assert turn.tasks == ("turn",) and (turn.observation_dim, turn.action_dim) == (3, 1)
    assert_same_episodes(turn, [make_episodes()[i]._replace(task=0) for i in (1, 4)])
    assert turn.observation_space == spaces.Box(-np.inf, np.inf, (3,))
    assert turn.action_space == spaces.Box(-1, 1, (1,))
    windows = turn.sample_windows(16, 3, np.random.default_rng(0))
    assert windows.task is None and windows.observations.shape == (4, 16, 3) and windows.actions.shape == (3, 16, 1)


def test_views_of_views_keep_names_and_renumber_tasks(dataset):
    view = dataset.of_tasks("spin", "walk")
    assert view.tasks == ("spin", "walk") and view.observation_dims == (6, 4)
    assert [e.task for e in view] == [1, 0, 1, 0]  # episodes keep their order
    assert_same_episodes(view.of_tasks("walk"), dataset.of_tasks("walk"))
    with pytest.raises(ValueError, match="expected distinct tasks of spin, walk"):
        view.of_tasks("turn")
    with pytest.raises(ValueError, match="expected distinct tasks"):
        view.of_tasks()


def test_split_holds_out_episodes_of_every_task_and_repeats_with_its_seed(dataset):
    train, held_out = dataset.split(0.5, seed=1)
    assert len(train) == len(held_out) == 3
    assert sorted(e.task for e in held_out) == [0, 1, 2]
    marks = {float(e.rewards[0]) for e in train} | {float(e.rewards[0]) for e in held_out}
    assert len(marks) == 6
    assert_same_episodes(dataset.split(0.5, seed=1)[1], held_out)
    with pytest.raises(ValueError, match="`held_out` must be in"):
        dataset.split(1.0)
    with pytest.raises(ValueError, match="two episodes of a task"):
        OfflineDataset([make_episode(0, 3)]).split()


def test_returns_are_the_sums_of_rewards_whatever_is_read_at_once(dataset, monkeypatch):
    expected = [e.rewards.sum() for e in make_episodes()]
    assert dataset.returns().tolist() == expected
    monkeypatch.setattr("pwm_gym.datasets.offline._CHUNK_STEPS", 8)
    assert dataset.returns().tolist() == expected
    assert dataset.of_tasks("turn").returns().tolist() == [expected[1], expected[4]]


# Sampling


def test_windows_are_consecutive_steps_of_one_episode_and_uniform(dataset):
    episodes, horizon = [padded(e) for e in make_episodes()], 5
    windows = dataset.sample_windows(6000, horizon, np.random.default_rng(0))
    assert windows.observations.shape == (6, 6000, 6) and windows.actions.shape == (5, 6000, 3)
    assert windows.rewards.shape == windows.terminated.shape == (5, 6000)
    assert windows.task.dtype == torch.int64 and windows.terminated.dtype == torch.bool
    assert windows.observations.dtype == windows.rewards.dtype == windows.actions.dtype == torch.float32
    seen: dict[tuple[int, int], int] = {}
    for b in range(6000):
        number, step = divmod(int(windows.rewards[0, b]), 1000)
        episode, part = episodes[number], slice(step, step + horizon)
        seen[number, step] = seen.get((number, step), 0) + 1
        if seen[number, step] > 1:
            continue
        assert np.array_equal(windows.observations[:, b], episode.observations[step : step + horizon + 1])
        assert np.array_equal(windows.actions[:, b], episode.actions[part])
        assert np.array_equal(windows.rewards[:, b], episode.rewards[part])
        ends = episode.terminated and step + horizon == len(episode.rewards)
        assert windows.terminated[:, b].tolist() == [False] * 4 + [ends]
        assert windows.task[b] == episode.task
    # 3 + 8 + 0 + 1 + 5 + 8 windows, each expected 240 times with a deviation of 15
    assert len(seen) == 25 and min(seen.values()) > 170 and max(seen.values()) < 310


def test_partial_windows_begin_at_every_step_and_go_as_far_as_the_episode(dataset):
    episodes, horizon, seen = [padded(e) for e in make_episodes()], 5, set()
    windows = dataset.sample_windows(2000, horizon, np.random.default_rng(0), partial=True)
    for b, length in enumerate(windows.lengths.tolist()):
        number, step = divmod(int(windows.rewards[0, b]), 1000)
        episode = episodes[number]
        assert length == min(horizon, len(episode.rewards) - step)
        last = [*range(step, step + length), *[step + length] * (horizon - length + 1)]
        assert np.array_equal(windows.observations[:, b], episode.observations[last])
        assert np.array_equal(windows.actions[:length, b], episode.actions[step : step + length])
        assert np.array_equal(windows.rewards[:length, b], episode.rewards[step : step + length])
        ends = episode.terminated and step + length == len(episode.rewards)
        assert windows.terminated[:, b].tolist() == [ends and t == length - 1 for t in range(horizon)]
        seen.add((number, step))
    assert len(seen) == dataset.num_steps


def test_longest_window_is_the_longest_episode_up_to_the_limit(dataset):
    assert [dataset.longest_window(n) for n in (1, 5, 12, 50)] == [1, 5, 12, 12]
    assert dataset.of_tasks("turn").longest_window(50) == 12
    assert dataset.sample_windows(3, 12, np.random.default_rng(0)).rewards.shape == (12, 3)
    with pytest.raises(ValueError, match="episode of at least 13 steps"):
        dataset.sample_windows(3, 13)
    with pytest.raises(ValueError, match="must be >= 1"):
        dataset.sample_windows(0, 3)


def test_equal_generators_draw_equal_windows_from_memory_and_disk(tmp_path):
    dataset = OfflineDataset(make_episodes(), TASKS)
    dataset.save(tmp_path / "data")
    mapped = OfflineDataset.load(tmp_path / "data")
    pair = (d.sample_windows(50, 4, np.random.default_rng(3), partial=True) for d in (dataset, mapped))
    for a, b in zip(*pair, strict=True):
        assert torch.equal(a, b)


def test_starts_are_observations_that_a_step_begins_from(dataset):
    walk = dataset.of_tasks("walk")
    starts = walk.sample_starts(500, np.random.default_rng(0)).observations
    stored = np.concatenate([make_episodes()[i].observations[:-1] for i in (0, 3)])
    assert {tuple(row) for row in starts} == {tuple(row) for row in stored}
    with pytest.raises(ValueError, match="of one task, got 3"):
        dataset.sample_starts(5)
    with pytest.raises(ValueError, match="no physics states"):
        walk.sample_starts(5, physics=True)


def test_episodes_stay_readable_when_mapped_pages_are_given_back(tmp_path, monkeypatch):
    OfflineDataset(make_episodes(), TASKS).save(tmp_path / "data")
    mapped = OfflineDataset.load(tmp_path / "data")
    monkeypatch.setattr("pwm_gym.datasets.storage._MAPPED_BUDGET", 0)
    assert_same_episodes(list(mapped), [padded(e) for e in make_episodes()])


def test_files_that_shrink_after_loading_are_noticed(tmp_path):
    OfflineDataset(make_episodes(), TASKS).save(tmp_path / "data")
    mapped = OfflineDataset.load(tmp_path / "data")
    file = tmp_path / "data" / "rewards.npy"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="Was the file changed"):
        mapped.sample_windows(64, 5, np.random.default_rng(0))


def test_a_world_model_is_fitted_to_a_dataset_and_imagines_from_it(dataset):
    walk = dataset.of_tasks("walk")
    torch.manual_seed(0)
    sizes = {"latent_dim": 16, "mlp_dim": 16, "encoder_dim": 16}
    config = WorldModelConfig(walk.observation_dim, walk.action_dim, **sizes)
    model = WorldModel(config, walk.observation_space, walk.action_space)
    metrics = fit_world_model(model, walk, updates=3, batch_size=8, horizon=16, seed=0)
    assert np.isfinite(metrics["model_loss"])
    env = LatentVectorEnv(model, walk, num_envs=4, horizon=5)
    observations, _ = env.reset(seed=0)
    assert observations.shape == (4, 16)


# Files


def test_saving_views_keeps_only_what_they_show(tmp_path):
    dataset = OfflineDataset(make_episodes(), TASKS)
    dataset.of_tasks("turn").save(tmp_path / "turn")
    loaded = OfflineDataset.load(tmp_path / "turn")
    assert loaded.tasks == ("turn",) and loaded.observation_dim == 3
    assert np.load(tmp_path / "turn" / "observations.npy").shape == (23, 3)
    assert_same_episodes(loaded, dataset.of_tasks("turn"))


def test_saving_refuses_an_existing_folder_and_leaves_no_other(tmp_path):
    dataset = OfflineDataset(make_episodes(), TASKS)
    dataset.save(tmp_path / "data")
    with pytest.raises(FileExistsError, match="Remove it"):
        dataset.save(tmp_path / "data")
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    assert "progress.json" not in {p.name for p in (tmp_path / "data").iterdir()}


@pytest.mark.parametrize("name", ["observations.npy", "lengths.npy", "manifest.json"])
def test_truncated_files_are_refused(tmp_path, name):
    OfflineDataset(make_episodes(), TASKS).save(tmp_path / "data")
    file = tmp_path / "data" / name
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match="expected a whole dataset"):
        OfflineDataset.load(tmp_path / "data")


def test_manifests_that_do_not_fit_are_refused(tmp_path):
    OfflineDataset(make_episodes(), TASKS).save(tmp_path / "data")
    file = tmp_path / "data" / "manifest.json"
    manifest = json.loads(file.read_text())
    for change in ({"format": "other/1"}, {"tasks": ["walk"]}, {"action_dims": [2, 1, 4]}, {"arrays": {}}):
        file.write_text(json.dumps(manifest | change))
        with pytest.raises(ValueError, match="expected a whole dataset"):
            OfflineDataset.load(tmp_path / "data")


def test_a_missing_dataset_is_told_from_an_unfinished_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="manifest.json"):
        OfflineDataset.load(tmp_path / "data")
    writer = DatasetWriter(tmp_path / "data", Layout(("walk",), (4,), (2,)), "a source")
    writer.close()
    with pytest.raises(FileNotFoundError, match="unfinished one"):
        OfflineDataset.load(tmp_path / "data")


def _contents(folder: pathlib.Path):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_writer_goes_on_after_its_last_checkpoint_to_an_equal_folder(tmp_path):
    layout, episodes = Layout(("walk",), (4,), (2,)), [make_episode(i, 5 + i) for i in range(4)]
    OfflineDataset(episodes, ["walk"]).save(tmp_path / "whole")
    writer = DatasetWriter(tmp_path / "cut", layout, {"files": 4})
    for episode in episodes[:2]:
        writer.append_episode(*episode)
    writer.checkpoint(2)
    writer.append_episode(*episodes[3])  # written, but not noted
    writer.close()
    with pytest.raises(ValueError, match="made from other files or settings"):
        DatasetWriter(tmp_path / "cut", layout, {"files": 5})
    writer = DatasetWriter(tmp_path / "cut", layout, {"files": 4})
    assert writer.note == 2 and writer.num_episodes == 2
    for episode in episodes[2:]:
        writer.append_episode(*episode)
    writer.finish()
    assert _contents(tmp_path / "cut") == _contents(tmp_path / "whole")


# Bad input


@pytest.mark.parametrize(
    "change, message",
    [
        ({"actions": np.zeros((4, 2))}, "with T >= 1"),
        ({"rewards": np.zeros(6)}, "with T >= 1"),
        ({"observations": np.zeros((6, 2, 2))}, "with T >= 1"),
        ({"task": 1}, "expected a task below 1"),
        ({"observations": np.zeros((6, 5))}, "of \\(4, 2\\) entries"),
    ],
)
def test_episodes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        OfflineDataset([make_episode(0, 5), make_episode(1, 5)._replace(**change)])


def test_a_dataset_needs_episodes_of_every_task():
    with pytest.raises(ValueError, match="at least one episode"):
        OfflineDataset([])
    with pytest.raises(ValueError, match="none of turn"):
        OfflineDataset([make_episode(0, 5)], ["walk", "turn"])
