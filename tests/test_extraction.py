"""A policy for each task of one world model: files, scores, resuming, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.utils import LinearSchedule

from pwm_gym import PWM, OfflineDataset, WorldModel, WorldModelConfig, cli, extract
from pwm_gym.agents.policy_bank import PolicyBank
from pwm_gym.datasets import Episode
from pwm_gym.extraction import published_scores

# Gymnasium's envs, with episodes that take no time.
gym.register("ShortPendulum-v0", "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=20)
gym.register("ShortCar-v0", "gymnasium.envs.classic_control:Continuous_MountainCarEnv", max_episode_steps=20)
DIMS = {"ShortPendulum-v0": (3, 1), "ShortCar-v0": (2, 1)}  # observations and actions
TASKS = tuple(DIMS)
TINY = {"updates": 4, "num_envs": 4, "checkpoint_every": 2, "horizon": 3, "policy_kwargs": {"net_arch": [8]}}


def make_dataset(tasks=TASKS, dims=None, length=20) -> OfflineDataset:
    rng = np.random.default_rng(0)
    episodes = []
    for index, name in enumerate(tasks):
        observation, action = (dims or DIMS)[name]
        for scale in range(1, 4):
            actions = rng.uniform(-1, 1, (length, action))
            observations = rng.normal(size=(length + 1, observation))
            episodes.append(Episode(observations, actions, np.full(length, float(scale)), truncated=True, task=index))
    return OfflineDataset(episodes, tasks)


def make_model(tasks=TASKS, seed=0) -> WorldModel:
    torch.manual_seed(seed)
    dims = {"observation_dim": 3, "action_dim": 1, "observation_dims": (3, 2), "action_dims": (1, 1)}
    if len(tasks) == 1:
        dims = dict(zip(("observation_dim", "action_dim"), DIMS[tasks[0]], strict=True))
    small = {"latent_dim": 16, "encoder_dim": 16, "mlp_dim": 16, "num_bins": 11, "task_dim": 4}
    return WorldModel(WorldModelConfig(**dims, tasks=tasks, **small)).eval()


def weights(path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in PWM.load(path).policy.state_dict().items() if k.startswith(("actor.latent", "critic"))}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, extract(make_model(), make_dataset(), out=folder, episodes=2, **TINY)


def test_each_task_gets_an_agent_that_acts_in_its_real_env(run):
    _, results = run
    assert tuple(results) == TASKS
    for task, result in results.items():
        env = gym.make(task)
        agent = PWM.load(result.agent, env=env)
        observation, _ = env.reset(seed=0)
        action, _ = agent.predict(observation, deterministic=True)
        assert env.action_space.contains(action)
        assert agent.num_timesteps == 4 * 4 * 3  # updates, envs, horizon
        assert len(result.returns) == 2
        assert (result.data_mean, result.data_best_tenth) == (40.0, 60.0)


def test_an_agents_score_is_what_it_earns_in_the_real_env(run):
    from pwm_gym.evaluation import episode_returns

    _, results = run
    result = results["ShortPendulum-v0"]
    again = episode_returns(PWM.load(result.agent), gym.make("ShortPendulum-v0"), 2, seed=10_000)
    assert result.returns == pytest.approx(again)
    assert result.score == pytest.approx(again.mean())


def test_report_has_a_row_for_each_task(run):
    folder, results = run
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == list(TASKS)
    assert [float(row["score"]) for row in rows] == pytest.approx([r.score for r in results.values()], abs=1e-3)
    assert (folder / "table.md").read_text().count("\n") == 2 + len(TASKS)
    assert (folder / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("checkpoint-*"))


def test_one_after_another_gives_the_same_policies(run, tmp_path):
    folder, _ = run
    extract(make_model(), make_dataset(), out=tmp_path, episodes=0, together=1, **TINY)
    for task in TASKS:
        expected, got = weights(folder / f"{task}.zip"), weights(tmp_path / f"{task}.zip")
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)


def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(run, tmp_path, monkeypatch):
    folder, _ = run
    train, seen = PolicyBank.train, []

    def cut_off(bank, updates, remaining=1.0):
        if bank.updates == 2 and not seen:
            seen.append(bank.updates)
            raise KeyboardInterrupt
        return train(bank, updates, remaining)

    monkeypatch.setattr(PolicyBank, "train", cut_off)
    arguments = {"out": tmp_path, "episodes": 2, **TINY}
    with pytest.raises(KeyboardInterrupt):
        extract(make_model(), make_dataset(), **arguments)
    assert list(tmp_path.glob("checkpoint-*.pt"))
    results = extract(make_model(), make_dataset(), **arguments)
    for task in TASKS:
        expected, got = weights(folder / f"{task}.zip"), weights(tmp_path / f"{task}.zip")
        assert all(torch.equal(got[name], value) for name, value in expected.items())
    monkeypatch.setattr(PolicyBank, "train", None)  # a finished run trains nothing
    assert extract(make_model(), make_dataset(), **arguments) == results


@pytest.mark.expensive
def test_a_run_that_was_killed_goes_on(tmp_path):
    make_model().save(tmp_path / "model.pt")
    make_dataset().save(tmp_path / "data")
    command = [sys.executable, "-m", "pwm_gym", "extract", str(tmp_path / "model.pt"), str(tmp_path / "data")]
    command += ["--out", str(tmp_path / "run"), "--updates", "60", "--num-envs", "4", "--checkpoint-every", "1"]
    command += ["--horizon", "3", "--episodes", "0"]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while not list((tmp_path / "run").glob("checkpoint-*.pt")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "run").glob("*.zip")), "it was over before it was killed"
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    extract(make_model(), make_dataset(), out=tmp_path / "whole", updates=60, num_envs=4, horizon=3, episodes=0)
    for task in TASKS:
        expected, got = weights(tmp_path / "whole" / f"{task}.zip"), weights(tmp_path / "run" / f"{task}.zip")
        assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_another_call_in_the_same_folder_is_refused(run):
    folder, _ = run
    with pytest.raises(ValueError, match="updates"):
        extract(make_model(), make_dataset(), out=folder, episodes=2, **{**TINY, "updates": 5})
    with pytest.raises(ValueError, match="'model'"):
        extract(make_model(seed=1), make_dataset(), out=folder, episodes=2, **TINY)


def test_a_learning_rate_schedule_is_followed_to_its_end(tmp_path):
    schedule = LinearSchedule(1e-3, 0.0, 1.0)
    results = extract(make_model(), make_dataset(), out=tmp_path, episodes=1, learning_rate=schedule, **TINY)
    agent = PWM.load(results[TASKS[0]].agent)
    assert repr(agent.learning_rate) == repr(schedule)
    constant = extract(make_model(), make_dataset(), out=tmp_path / "constant", episodes=0, learning_rate=1e-3, **TINY)
    first, second = weights(constant[TASKS[0]].agent), agent.policy.state_dict()
    assert not any(torch.equal(value, second[name]) for name, value in first.items() if "features.0" in name)
    with pytest.raises(ValueError, match="'settings'"):
        extract(
            make_model(), make_dataset(), out=tmp_path, episodes=1, learning_rate=LinearSchedule(1e-3, 0.1, 1.0), **TINY
        )


def test_finetuning_fits_the_model_of_the_agents_and_leaves_the_callers(tmp_path):
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sizes = {"model_batch_size": 8, "model_horizon": 3}
    extract(model, make_dataset(), out=tmp_path, episodes=0, finetune=True, **sizes, **TINY)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for task in TASKS:
        fitted, given = PWM.load(tmp_path / f"{task}.zip").world_model, model.for_task(task)
        assert not torch.equal(fitted.reward_head[-1].weight, given.reward_head[-1].weight)


def test_real_steps_go_on_from_the_data_and_the_offline_policy(tmp_path):
    model, data = make_model(("ShortPendulum-v0",)), make_dataset(("ShortPendulum-v0",))
    sizes = {"model_batch_size": 8, "model_horizon": 3, "batch_size": 8, "train_freq": 50}
    results = extract(model, data, out=tmp_path, episodes=1, real_steps=200, **sizes, **TINY)
    agent = PWM.load(results["ShortPendulum-v0"].agent)
    assert agent.num_timesteps == 200
    assert results["ShortPendulum-v0"].real_steps == 200
    assert agent._n_updates == TINY["updates"] + 200 // 50
    assert not (tmp_path / "real-ShortPendulum-v0").exists()


def test_one_policy_for_all_tasks_becomes_an_agent_for_each(tmp_path):
    extract(make_model(), make_dataset(), out=tmp_path, episodes=0, shared=True, **TINY)
    first, second = (weights(tmp_path / f"{task}.zip") for task in TASKS)
    linear = "actor.latent_actor.features.0"
    assert torch.equal(first[f"{linear}.weight"], second[f"{linear}.weight"])
    assert not torch.equal(first[f"{linear}.bias"], second[f"{linear}.bias"])  # the embeddings differ


# What is refused, before anything is written


def refuse(message, tmp_path, model=None, data=None, **arguments):
    with pytest.raises(ValueError, match=message):
        extract(model or make_model(), data or make_dataset(), out=tmp_path, **{"episodes": 0, **TINY, **arguments})
    assert not list(tmp_path.iterdir())


def test_a_task_without_data_is_refused(tmp_path):
    refuse("no episode of 'ShortCar-v0'", tmp_path, data=make_dataset(("ShortPendulum-v0",)))


def test_a_task_that_the_model_was_never_trained_on_is_refused(tmp_path):
    model = make_model(("ShortPendulum-v0",))
    refuse("trained on, ShortPendulum-v0; got 'ShortCar-v0'", tmp_path, model, tasks=TASKS)


def test_mismatched_padding_is_refused(tmp_path):
    data = make_dataset(dims={"ShortPendulum-v0": (3, 1), "ShortCar-v0": (3, 1)})
    refuse("2 observations and 1 actions beside its padding", tmp_path, data=data)


def test_a_dataset_too_short_for_the_horizon_is_refused(tmp_path):
    refuse("horizon of 3 steps, got 2", tmp_path, data=make_dataset(length=2))
    refuse("horizon of 9 steps, got 5", tmp_path, data=make_dataset(length=5), finetune=True, model_horizon=9)


def test_a_task_without_a_registered_env_is_refused(tmp_path):
    refuse("env_ids", tmp_path, env_ids={"ShortPendulum-v0": "NoSuchEnv-v0"}, episodes=1)
    refuse("shapes", tmp_path, env_ids={"ShortPendulum-v0": "ShortCar-v0"}, episodes=1)


@pytest.mark.parametrize("argument", ["updates", "num_envs", "checkpoint_every", "together"])
def test_arguments_out_of_range_are_refused(argument, tmp_path):
    refuse(f"`{argument}` must be >= 1", tmp_path, **{argument: 0})


# Published scores


def test_every_task_of_mt80_has_published_scores():
    import pwm_gym

    for task in pwm_gym.tasks("MT80"):
        kind, scores = published_scores(task)
        assert kind == ("success" if task.startswith("mw-") else "return")
        assert {"PWM MT80", "TD-MPC2 multi-task MT80"} <= scores.keys()
        assert max(scores.values()) <= (1.0 if kind == "success" else 1000.0)


def test_command_line_extracts(tmp_path, capsys):
    make_model(("ShortPendulum-v0",)).save(tmp_path / "model.pt")
    make_dataset(("ShortPendulum-v0",)).save(tmp_path / "data")
    arguments = ["extract", str(tmp_path / "model.pt"), str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    cli.main([*arguments, "--updates", "2", "--num-envs", "2", "--horizon", "3", "--episodes", "1", "--released"])
    assert "ShortPendulum-v0" in capsys.readouterr().out
    agent = PWM.load(tmp_path / "run" / "ShortPendulum-v0.zip")
    assert (agent.td_lambda, agent.detach_input, agent.extra_bootstrap_discount) == (0.0, True, True)
    assert not agent.world_model.config.reward_in_task_units
    assert json.loads((tmp_path / "run" / "ShortPendulum-v0.json").read_text())["updates"] == 2
