"""Pre-training on offline data: settings, exact resume, validation, bad input, and what one does with the model."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch

from pwm_gym import PWM, LatentVectorEnv, OfflineDataset, WorldModel, WorldModelConfig, pretrain
from pwm_gym.cli import main
from pwm_gym.datasets import Episode
from pwm_gym.training import PAPER
from pwm_gym.training.validation import validate

TASKS = ("glide", "turn")
SMALL: dict[str, Any] = {
    "updates": 6,
    "batch_size": 8,
    "horizon": 3,
    "checkpoint_every": 2,
    "device": "cpu",
    "world_model_kwargs": {"latent_dim": 16, "encoder_dim": 16, "mlp_dim": 16, "num_bins": 21, "task_dim": 4},
}


def make_episode(rng: np.random.Generator, task: int, length: int = 20) -> Episode:
    """A damped linear system: 3 numbers and 2 actions in the first task, 2 and 1 in the second."""
    width, count = (3, 2) if task == 0 else (2, 1)
    observations, actions = [rng.uniform(-1, 1, width)], rng.uniform(-1, 1, (length, count))
    for action in actions:
        observations.append(0.9 * observations[-1] + 0.3 * action[0])
    rewards = np.stack(observations)[1:, 0] + task
    return Episode(np.stack(observations), actions, rewards, truncated=True, task=task)


def make_dataset(tasks: tuple[str, ...] = TASKS, episodes: int = 4) -> OfflineDataset:
    rng = np.random.default_rng(0)
    return OfflineDataset([make_episode(rng, i) for i in range(len(tasks)) for _ in range(episodes)], tasks)


def assert_same_weights(a: WorldModel, b: WorldModel) -> None:
    theirs = b.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())


# What comes out


def test_model_of_several_tasks_knows_their_names_widths_and_discounts() -> None:
    dataset = make_dataset()
    config = pretrain(dataset, "1M", **SMALL).config
    assert config.num_tasks == 2
    assert (config.tasks, config.observation_dims, config.action_dims) == (TASKS, (3, 2), (2, 1))
    assert config.discounts == (0.95, 0.95)  # 20 steps: 1 - 5/20, clipped
    assert config.num_q == 2 and config.policy_prior


def test_model_of_one_task_has_its_spaces_and_no_embedding() -> None:
    dataset = make_dataset(("glide",))
    model = pretrain(dataset, "1M", planning=False, **SMALL)
    assert (model.config.num_tasks, model.config.tasks, model.config.num_q) == (0, ("glide",), 0)
    assert model.observation_space == dataset.observation_space
    assert model.action_space == dataset.action_space
    assert not model.training


def test_every_part_is_trained_and_targets_lag_behind() -> None:
    dataset = make_dataset()
    first, last = (pretrain(dataset, "1M", **{**SMALL, "updates": n}) for n in (1, 8))
    before = dict(first.named_parameters())
    still = [name for name, value in last.named_parameters() if torch.equal(value, before[name])]
    assert [name for name in still if not name.startswith("termination_head")] == []
    assert last.value is not None
    moved = [(p - before[f"value.online.{n}"]).norm() for n, p in last.value.online.named_parameters()]
    lagged = [(p - before[f"value.target.{n}"]).norm() for n, p in last.value.target.named_parameters()]
    assert sum(lagged) < 0.1 * sum(moved)


def test_equal_seeds_give_equal_models_and_leave_the_global_generator_alone() -> None:
    dataset, state = make_dataset(), torch.get_rng_state()
    models = [pretrain(dataset, "1M", **SMALL, seed=seed) for seed in (3, 3, 4)]
    assert_same_weights(models[0], models[1])
    assert not torch.equal(models[0].dynamics[0][0].weight, models[2].dynamics[0][0].weight)  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), state)


def test_given_model_is_trained_in_place() -> None:
    dataset = make_dataset()
    model = pretrain(dataset, "1M", **SMALL)
    before = model.encoder[0][0].weight.clone()  # type: ignore[index]
    assert pretrain(dataset, world_model=model, **{**SMALL, "seed": 1}) is model
    assert not torch.equal(model.encoder[0][0].weight, before)  # type: ignore[index]


def test_bfloat16_trains_and_keeps_float32_weights() -> None:
    dataset = make_dataset()
    full, half = (pretrain(dataset, "1M", **SMALL, precision=p) for p in ("float32", "bfloat16"))
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    weights = [model.dynamics[0][0].weight for model in (full, half)]  # type: ignore[index]
    assert not torch.equal(*weights)
    torch.testing.assert_close(*weights, atol=5e-3, rtol=0.0)  # 6 steps of at most 5e-4 each


def test_cosine_schedule_warms_up_and_ends_near_0() -> None:
    from pwm_gym.training.pretraining import _rate_share

    settings = {"updates": 14, "warmup": 4, "learning_rate_schedule": "cosine"}
    shares = [_rate_share(step, settings) for step in range(14)]
    assert shares[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert shares[9] == pytest.approx(0.5)
    assert shares[13] == pytest.approx(0.5 * (1 + np.cos(0.9 * np.pi)))


def test_paper_settings_are_arguments_of_pretrain() -> None:
    assert (PAPER["horizon"], PAPER["rho"], PAPER["batch_size"], PAPER["learning_rate"]) == (16, 0.99, 1024, 3e-4)
    small = {**SMALL, **PAPER, "updates": 1, "batch_size": 4}
    assert pretrain(make_dataset(), "1M", **small).config.tasks == TASKS


# The folder, and going on


def test_folder_holds_model_table_picture_and_summary(tmp_path: pathlib.Path) -> None:
    model = pretrain(make_dataset(), "1M", out=tmp_path, tensorboard=True, validate_every=4, **SMALL)
    assert_same_weights(WorldModel.load(tmp_path / "world_model.pt"), model)
    with open(tmp_path / "validation.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], int(row["step"])) for row in rows] == [(t, s) for t in TASKS for s in range(1, 17)]
    assert (tmp_path / "validation.png").read_bytes()[:4] == b"\x89PNG"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["updates"] == 6
    assert summary["samples_per_second"] > 0 and summary["peak_memory_mb"] > 50
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: pathlib.Path) -> None:
    dataset = make_dataset()
    whole = pretrain(dataset, "1M", **SMALL)
    pretrain(dataset, "1M", out=tmp_path, **{**SMALL, "updates": 3})
    assert_same_weights(pretrain(dataset, "1M", out=tmp_path, **SMALL), whole)


def test_finished_run_is_not_trained_again(tmp_path: pathlib.Path) -> None:
    first = pretrain(make_dataset(), "1M", out=tmp_path, **SMALL)
    assert_same_weights(pretrain(make_dataset(), "1M", out=tmp_path, **SMALL), first)


@pytest.mark.parametrize("change", [{"batch_size": 9}, {"seed": 1}, {"planning": False}])
def test_run_with_other_settings_is_not_continued(tmp_path: pathlib.Path, change: dict[str, Any]) -> None:
    pretrain(make_dataset(), "1M", out=tmp_path, **SMALL)
    with pytest.raises(ValueError, match="expected the settings that .* was begun with.*another `out` folder"):
        pretrain(make_dataset(), "1M", out=tmp_path, **{**SMALL, **change})


def test_damaged_checkpoint_is_refused(tmp_path: pathlib.Path) -> None:
    pretrain(make_dataset(), "1M", out=tmp_path, **SMALL)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or damaged"):
        pretrain(make_dataset(), "1M", out=tmp_path, **SMALL)


# A script that trains in a folder; it is killed in the middle, or not.
SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import test_pretraining as t
t.pretrain(t.make_dataset(), "1M", out=sys.argv[1], **{{**t.SMALL, "updates": 300, "checkpoint_every": 7}})
"""


def start(folder: pathlib.Path) -> subprocess.Popen:
    script = SCRIPT.format(tests=str(pathlib.Path(__file__).parent))
    root = str(pathlib.Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", script, str(folder)], env=environment, cwd=root)


@pytest.mark.expensive
def test_killed_run_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path: pathlib.Path) -> None:
    settings = {**SMALL, "updates": 300, "checkpoint_every": 7}
    whole = pretrain(make_dataset(), "1M", out=tmp_path / "whole", **settings)
    rng, folder, steps = np.random.default_rng(), tmp_path / "killed", []
    checkpoint = folder / "checkpoint.pt"
    for _ in range(3):
        seen = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = start(folder)
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == seen:  # it goes on from where it was
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was done before it was killed"
        steps.append(torch.load(checkpoint, weights_only=True)["step"])
        assert not (folder / "world_model.pt").exists()
    assert 0 < steps[0] < steps[1] < steps[2] < 300
    assert start(folder).wait() == 0
    assert_same_weights(WorldModel.load(folder / "world_model.pt"), whole)


def test_command_trains_chosen_tasks_of_a_saved_dataset(tmp_path: pathlib.Path) -> None:
    make_dataset().save(tmp_path / "data")
    arguments = ["--tasks", "turn", "--size", "1M", "--paper", "--updates", "2", "--batch-size", "4", "--no-planning"]
    main(["pretrain", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *arguments, "--device", "cpu"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["updates"] == 2
    config = WorldModel.load(tmp_path / "run" / "world_model.pt").config
    assert (config.tasks, config.observation_dim, config.latent_dim, config.num_q) == (("turn",), 2, 128, 0)
    settings = json.loads(torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["settings"])
    assert (settings["horizon"], settings["rho"], settings["batch_size"]) == (16, 0.99, 4)


# Validation


def test_validation_of_a_perfect_and_of_an_ignorant_model() -> None:
    dataset = make_dataset(("glide",))
    model = WorldModel(WorldModelConfig(3, 2, latent_dim=16, encoder_dim=8, mlp_dim=8))

    def perfect(z: torch.Tensor, actions: torch.Tensor, task: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        following = 0.9 * z + 0.3 * actions[:, :1]
        return following, following[:, 0]

    ignorant = validate(model, dataset, horizon=4, windows=20)["glide"]
    assert np.isnan(ignorant.reward_correlation).all()  # it says 0 everywhere
    assert ignorant.imagined_returns == pytest.approx(np.zeros(20), abs=1e-5)
    model.encode = lambda observations, task=None: observations  # type: ignore[method-assign, assignment]
    model.forward = perfect  # type: ignore[method-assign, assignment]
    result = validate(model, dataset, horizon=4, windows=20)["glide"]
    assert result.latent_error == pytest.approx(np.zeros(4), abs=1e-10)
    assert result.reward_error == pytest.approx(np.zeros(4), abs=1e-6)
    assert result.reward_correlation == pytest.approx(np.ones(4))
    assert result.imagined_returns == pytest.approx(result.real_returns, abs=1e-5)


def test_training_makes_held_out_predictions_better() -> None:
    dataset = make_dataset(episodes=20)
    train, held = dataset.split(0.2, seed=0)
    results = []
    for updates in (1, 250):
        settings = {**SMALL, "updates": updates, "batch_size": 64, "learning_rate": 3e-3, "held_out": 0.0}
        results.append(validate(pretrain(train, "1M", planning=False, **settings), held, horizon=5))
    for task in TASKS:
        before, after = results[0][task], results[1][task]
        assert after.reward_error.mean() < 0.5 * before.reward_error.mean()
        assert after.reward_correlation.min() > 0.6


# A policy for one task of a pre-trained model


@pytest.mark.parametrize("task", ["turn", 1])
def test_pwm_trains_for_one_task_and_acts_on_its_own_observations(task: Any, tmp_path: pathlib.Path) -> None:
    dataset = make_dataset()
    env = LatentVectorEnv(pretrain(dataset, "1M", **SMALL), dataset, num_envs=4, horizon=3, task=task)
    assert env.single_action_space.shape == (1,)
    agent = PWM("MlpPolicy", env, batch_size=4, seed=0, policy_kwargs={"net_arch": [8]})
    before = agent.policy.actor.latent_actor.mean.weight.clone()
    agent.learn(48)
    assert not torch.equal(agent.policy.actor.latent_actor.mean.weight, before)
    assert agent.observation_space.shape == (2,)
    action, _ = agent.predict(np.zeros(2, np.float32), deterministic=True)
    assert action.shape == (1,)
    agent.save(tmp_path / "agent")
    assert np.array_equal(PWM.load(tmp_path / "agent").predict(np.zeros(2, np.float32), deterministic=True)[0], action)


# Bad input


def test_wrong_arguments_are_refused() -> None:
    dataset = make_dataset()
    for change, message in [
        ({"updates": 0}, "`updates` must be >= 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be >= 1"),
        ({"checkpoint_every": 0}, "`checkpoint_every` must be >= 1"),
        ({"held_out": 1.0}, r"`held_out` must be in \[0, 1\), got 1.0"),
        ({"warmup": -1}, "`warmup` must be >= 0"),
        ({"learning_rate_schedule": "step"}, "`learning_rate_schedule` must be one of .*'cosine'.* got 'step'"),
        ({"precision": "int8"}, "`precision` must be one of .*'bfloat16'.* got 'int8'"),
        ({"tensorboard": True}, "expected `out` beside tensorboard=True"),
    ]:
        with pytest.raises(ValueError, match=message):
            pretrain(dataset, "1M", **{**SMALL, **change})


def test_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match="`size` must be one of .*'317M'.*, got '2M'"):
        pretrain(make_dataset(), "2M", **SMALL)


def test_empty_dataset_is_refused() -> None:
    dataset = make_dataset()
    with pytest.raises(ValueError, match="got an empty dataset"):
        pretrain(dataset._subset(np.zeros(len(dataset), bool)), "1M", **SMALL)


@pytest.mark.parametrize("field", ["observations", "actions", "rewards"])
def test_number_that_is_not_finite_stops_training_before_it_is_learned(field: str) -> None:
    rng = np.random.default_rng(0)
    episodes = [make_episode(rng, i % 2) for i in range(6)]
    getattr(episodes[3], field)[10] = np.nan
    with pytest.raises(ValueError, match=f"got NaN or infinity in the {field} of task 'turn'"):
        pretrain(OfflineDataset(episodes, TASKS), "1M", **{**SMALL, "batch_size": 64, "held_out": 0.0})


def test_diverging_run_is_stopped(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="expected a finite loss, got nan .* Lower learning_rate"):
        pretrain(make_dataset(), "1M", out=tmp_path, **{**SMALL, "learning_rate": 1e38})
    assert not (tmp_path / "checkpoint.pt").exists()


def test_dataset_that_does_not_fit_a_given_model_is_refused() -> None:
    dataset = make_dataset()
    fits = {"tasks": TASKS, "observation_dims": (3, 2), "action_dims": (2, 1), "latent_dim": 16}
    for change, message in [
        ({"tasks": ("glide", "turn", "spin"), "observation_dims": (), "action_dims": ()}, "got 2: .*'glide', 'turn'"),
        ({"tasks": ("turn", "glide")}, "in this order"),
        ({"tasks": (), "observation_dims": (), "action_dims": ()}, "expected a dataset of the world model's 1 tasks"),
        ({"observation_dim": 4}, "expected observations of width 4"),
        ({"action_dims": (2, 2)}, "expected actions of width 2 .by task .2, 2.. .* got a dataset of 2 ..2, 1.."),
    ]:
        config = WorldModelConfig(**{"observation_dim": 3, "action_dim": 2, **fits, **change})
        with pytest.raises(ValueError, match=message):
            pretrain(dataset, world_model=WorldModel(config), **SMALL)
