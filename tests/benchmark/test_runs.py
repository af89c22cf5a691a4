"""Runs: what a killed one gives, what is said of one that died, and what is refused before anything runs."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from rich.console import Console

import pwm_gym
from pwm_gym import OfflineDataset, WorldModel, WorldModelConfig
from pwm_gym.benchmark import Cell, Outcome, Study, run
from pwm_gym.benchmark.__main__ import main
from pwm_gym.benchmark.algorithms import default_arguments
from pwm_gym.benchmark.runner import _table
from pwm_gym.benchmark.worker import train
from pwm_gym.datasets.storage import Episode

TASK = "Pendulum-v1"
TIMES = ("train_cpu_seconds", "train_wall_seconds")


def study_of(folder: pathlib.Path, cell: Cell, arguments: dict[str, Any], frames: int) -> Study:
    study = Study(folder, (cell,), {cell.algorithm: frames}, 200, 2, {cell.algorithm: arguments})
    study.save()
    return study


def scores(study: Study, cell: Cell) -> list[dict[str, str]]:
    """The rows of a run without what differs from time to time."""
    return [{k: v for k, v in row.items() if k not in TIMES and not k.startswith("train/")} for row in study.rows(cell)]


# Resuming


@pytest.mark.filterwarnings("ignore:You are loading an agent:UserWarning")
@pytest.mark.parametrize(
    "algorithm, task",
    [
        ("sac", TASK),
        ("ppo", TASK),
        ("pwm", TASK),
        ("shac", "InvertedPendulum-v5"),
        pytest.param("tdmpc2", TASK, marks=pytest.mark.expensive),
    ],
)
def test_a_run_that_was_cut_off_goes_on_to_the_same_curve(
    algorithm: str, task: str, tiny: dict[str, dict[str, Any]], tmp_path: pathlib.Path
):
    cell = Cell(algorithm, task, 3)
    whole = study_of(tmp_path / "whole", cell, tiny[algorithm], 400)
    train(whole, cell)
    parts = study_of(tmp_path / "parts", cell, tiny[algorithm], 400)
    train(dataclasses.replace(parts, frames={algorithm: 200}), cell)
    assert len(parts.rows(cell)) == 1
    train(parts, cell)
    assert [row["frames"] for row in parts.rows(cell)] == ["200", "400"]
    without_command = [{k: v for k, v in row.items() if k != "command"} for row in scores(parts, cell)]
    assert without_command == [{k: v for k, v in row.items() if k != "command"} for row in scores(whole, cell)]


def test_a_killed_process_is_reported_and_its_run_goes_on(tiny: dict[str, dict[str, Any]], tmp_path: pathlib.Path):
    cell = Cell("ppo", TASK, 0)
    study = study_of(tmp_path, cell, tiny["ppo"], 2_000)
    command = [sys.executable, "-m", "pwm_gym.benchmark.worker", str(tmp_path), *map(str, cell)]
    root = str(pathlib.Path(pwm_gym.__file__).parents[1])
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | {"PYTHONPATH": root})
    deadline = time.monotonic() + 120.0
    while not study.rows(cell) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdin is not None
    process.stdin.close()
    reached = len(study.rows(cell))
    assert 1 <= reached < 10
    train(study, cell)
    whole = study_of(tmp_path / "whole", cell, tiny["ppo"], 2_000)
    train(whole, cell)
    assert scores(study, cell) == scores(whole, cell)


def test_a_run_that_dies_leaves_its_reason_and_the_others_alone(
    tiny: dict[str, dict[str, Any]], tmp_path: pathlib.Path
):
    arguments = {"sac": {**tiny["sac"], "gamma": "high"}, "ppo": tiny["ppo"]}
    with (tmp_path / "out.txt").open("w") as out:
        outcomes = run(
            tmp_path / "study",
            ["sac", "ppo"],
            [TASK],
            [0],
            frames=200,
            every=200,
            episodes=1,
            arguments=arguments,
            console=Console(file=out),
        )
    failed, fine = outcomes
    assert fine == Outcome(Cell("ppo", TASK, 0), None)
    assert failed.failure is not None and failed.failure.startswith("TypeError: ")
    shown = (tmp_path / "out.txt").read_text()
    assert f"SAC on {TASK}, seed 0: died, TypeError" in shown and "PPO on Pendulum-v1, seed 0: 200 frames" in shown
    study = Study.open(tmp_path / "study")
    assert "Traceback" in (study.state_path(failed.cell) / "log.txt").read_text()
    assert study.is_done(fine.cell) and not study.is_done(failed.cell)


def test_a_terminal_shows_all_runs_and_first_those_that_are_open(written: Callable[..., Study]):
    study = written({(name, "walker-walk"): 900.0 for name in ("pwm", "sac", "ppo")})
    late = study.cells[-1]
    study.csv_path(late).unlink()
    state = study.state_path(late)
    state.mkdir(parents=True)
    (state / "failure.txt").write_text("killed by SIGKILL [9]")
    out = io.StringIO()
    Console(file=out, width=120).print(_table(study, study.cells, [], height=12))
    text = out.getvalue()
    assert "study: 8 of 9 runs done, 1 died" in text and "and 3 more" in text
    assert "PPO on walker-walk, seed 2" in text and "died: killed by SIGKILL [9]" in text
    assert "20,000 of 20,000" in text and "done" in text


def test_a_finished_benchmark_starts_nothing(written: Callable[..., Study]):
    study, out = written({("ppo", "walker-walk"): 900.0}), io.StringIO()
    outcomes = run(study.folder, console=Console(file=out, force_terminal=True, width=120, height=20))
    assert [outcome.failure for outcome in outcomes] == [None] * 3
    assert "3 of 3 runs done, 0 died" in out.getvalue()


def test_a_csv_without_its_state_is_not_overwritten(written: Callable[..., Study]):
    study = written({("ppo", TASK): -100.0}, done=2)
    before = study.rows(study.cells[0])
    with pytest.raises(ValueError, match=r"expected the agent of evaluation 2 to go on from, got no agent-2\.zip"):
        train(study, study.cells[0])
    assert study.rows(study.cells[0]) == before


def test_git_ignores_the_state_and_nothing_else(tmp_path: pathlib.Path):
    study = study_of(tmp_path, Cell("ppo", TASK, 0), {}, 200)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    ignored = [
        subprocess.run(["git", "-C", str(tmp_path), "check-ignore", "-q", path], check=False).returncode == 0
        for path in (study.state_path(study.cells[0]) / "agent-1.zip", study.csv_path(study.cells[0]))
    ]
    assert ignored == [True, False]


# Rows


def test_rows_say_how_they_were_made(tiny: dict[str, dict[str, Any]], tmp_path: pathlib.Path):
    cell = Cell("pwm", TASK, 5)
    study = study_of(tmp_path, cell, tiny["pwm"], 200)
    train(study, cell)
    (row,) = study.rows(cell)
    assert (row["algorithm"], row["task"], row["seed"], row["frames"]) == ("pwm", TASK, "5", "200")
    assert row["command"].startswith("python -m pwm_gym.benchmark run --algorithms pwm --tasks Pendulum-v1 --seeds 5")
    assert "--set pwm.horizon=3" in row["command"]
    assert f"pwm_gym {pwm_gym.__version__}; python 3." in row["versions"] and "torch" in row["versions"]
    assert "CPUs" in row["machine"]
    returns = [float(row["return_0"]), float(row["return_1"])]
    assert float(row["mean_return"]) == pytest.approx(np.mean(returns), abs=1e-3)
    assert len(row["diagnosis/gradient_norm"].split()) == 3  # the horizon
    assert float(row["train/critic_loss"]) > 0.0


def test_ppo_is_scored_where_its_rollouts_end():
    assert default_arguments("ppo", every=5_000, num_envs=1) == {"n_steps": 1_250, "batch_size": 50}
    assert default_arguments("ppo@wide", every=2_048, num_envs=1) == {"n_steps": 2_048, "batch_size": 64}
    assert default_arguments("ppo", every=160, num_envs=16) == {"n_steps": 10, "batch_size": 40}
    assert default_arguments("sac", every=5_000, num_envs=1) == {}


def test_a_policy_that_was_trained_in_a_model_is_scored_in_the_task(
    tiny: dict[str, dict[str, Any]], tmp_path: pathlib.Path
):
    model, data = frozen_model(tmp_path, observation_dim=3)
    cell = Cell("ppo", TASK, 0)
    study = Study(tmp_path / "study", (cell,), {"ppo": 320}, 160, 2, {"ppo": tiny["ppo"]}, model, data)
    study.save()
    train(study, cell)
    rows = study.rows(cell)
    assert [row["frames"] for row in rows] == ["160", "320"]  # imagined steps
    assert all(float(row["mean_return"]) < -100.0 for row in rows)  # the task's own returns


def frozen_model(folder: pathlib.Path, observation_dim: int) -> tuple[str, str]:
    config = WorldModelConfig.preset("1M", observation_dim=observation_dim, action_dim=1)
    WorldModel(config, action_space=spaces.Box(-2.0, 2.0, (1,), np.float32)).save(folder / "model")
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(21, observation_dim)).astype(np.float32)
    actions, rewards = rng.uniform(-1, 1, (20, 1)).astype(np.float32), np.ones(20, np.float32)
    dataset = OfflineDataset([Episode(observations, actions, rewards, truncated=True)], [TASK])
    dataset.save(folder / "data")
    return str(folder / "model"), str(folder / "data")


# What is refused


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"algorithms": ["pmw"]}, r"unknown algorithm 'pmw': did you mean 'pwm'"),
        ({"tasks": ["cartpole-swing"]}, r"unknown task 'cartpole-swing': did you mean 'cartpole-swingup'"),
        ({"tasks": ["pendulum-v1"]}, r"unknown task 'pendulum-v1': did you mean .*'Pendulum-v1'"),
        ({"tasks": ["pwm_gym/TorchPendulum-v0"]}, r"also a single env"),
        ({"seeds": []}, r"expected at least one seed, got none"),
        ({"frames": 12_345}, r"whole number of evaluations, one every 5,000 frames, got 12,345"),
        ({"episodes": 0}, r"`episodes` must be >= 1, got 0"),
        ({"frames": {"sac": 5_000}}, r"expected `frames` for each algorithm, got none for PWM"),
        ({"arguments": {"pwm": {"horizn": 3}}}, r"PWM has no argument 'horizn': did you mean 'horizon'"),
        ({"arguments": {"sac": {"gamma": 0.9}}}, r"arguments of algorithms that are run, got some of 'sac'"),
        ({"algorithms": ["shac"], "tasks": [TASK]}, r"has no gradients"),
        ({"world_model": "model"}, r"expected a world model and the data"),
        ({"precision": "low"}, r"`precision` must be one of highest, high, medium, got 'low'"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(changes: dict[str, Any], message: str, tmp_path: pathlib.Path):
    asked = {"algorithms": ["pwm"], "tasks": ["walker-walk"], "seeds": [0], **changes}
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "study", **asked)
    assert not (tmp_path / "study").exists()


def test_a_model_that_does_not_fit_is_refused(tmp_path: pathlib.Path):
    model, data = frozen_model(tmp_path, observation_dim=4)
    with pytest.raises(ValueError, match=r"`env.observation_space` must be the world model's"):
        run(tmp_path / "study", ["pwm"], [TASK], [0], world_model=model, data=data)


def test_a_run_has_the_precision_that_was_asked_for(tiny: dict[str, dict[str, Any]], tmp_path: pathlib.Path):
    cell = Cell("ppo", TASK, 0)
    study = Study(tmp_path / "study", (cell,), {"ppo": 200}, 200, 1, {"ppo": tiny["ppo"]}, precision="medium")
    study.save()
    try:
        train(Study.open(study.folder), cell)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    (row,) = study.rows(cell)
    assert row["precision"] == "medium" and "--precision medium" in row["command"]


def test_a_folder_keeps_to_one_protocol_and_one_version(written: Callable[..., Study]):
    study = written({("ppo", TASK): -100.0})
    with pytest.raises(ValueError, match=r"expected every=5000 as in .*, got 10000"):
        run(study.folder, ["ppo"], [TASK], [0], frames=20_000, every=10_000, episodes=2)
    with pytest.raises(
        ValueError, match=r"expected 'ppo' with \{\} .* got \{'gamma': 0.9\}. Call the variant 'ppo@lab"
    ):
        run(study.folder, ["ppo"], [TASK], [0], frames=20_000, episodes=2, arguments={"ppo": {"gamma": 0.9}})
    path = study.folder / "benchmark.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"version": "0.0.1"}))
    with pytest.raises(ValueError, match=rf"expected runs of pwm_gym {pwm_gym.__version__}, got .* of 0\.0\.1"):
        run(study.folder, ["ppo"], [TASK], [0], frames=20_000, episodes=2)
    path.write_text(json.dumps(content | {"format": "pwm_gym.benchmark/0"}))
    with pytest.raises(ValueError, match="of another version of pwm_gym"):
        run(study.folder)


def test_a_folder_grows_by_what_is_asked_for(written: Callable[..., Study]):
    study = written({("ppo", TASK): -100.0})
    more = Study(study.folder, (Cell("sac", TASK, 0),), {"sac": 5_000, "ppo": 5_000}, 5_000, 2)
    joined = study.join(more)
    assert joined.cells == (*study.cells, Cell("sac", TASK, 0))
    assert joined.frames == {"ppo": 20_000, "sac": 5_000}  # a budget only grows
    joined.save()
    assert Study.open(study.folder) == joined


# Command line


def test_the_command_line_names_what_is_wrong(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    place = ["--out", str(tmp_path), "--name", "study"]
    assert main(["run", "--algorithms", "pmw", "--tasks", TASK, "--seeds", "0", *place]) == 1
    assert "error: unknown algorithm 'pmw'" in capsys.readouterr().out
    assert main(["run", "--algorithms", "pwm", "--tasks", TASK, "--seeds", "0", "--set", "horizon=3", *place]) == 1
    assert "expected NAME.ARG=JSON such as pwm.horizon=16" in capsys.readouterr().out
    assert main(["report", *place]) == 1
    assert "expected benchmark.json in" in capsys.readouterr().out


@pytest.mark.expensive
def test_a_benchmark_that_was_killed_makes_the_report_of_one_that_was_not(
    tiny: dict[str, dict[str, Any]], tmp_path: pathlib.Path
):
    config = tmp_path / "tiny.toml"
    lines = ["[sac]", "batch_size = 8", "train_freq = 20", "policy_kwargs = {net_arch = [8]}", "[ppo]", "n_epochs = 1"]
    config.write_text("\n".join(lines))
    words = ["run", "--algorithms", "sac", "ppo", "--tasks", TASK, "--seeds", "0", "1", "--frames", "1000"]
    words += ["--every", "200", "--episodes", "2", "--config", str(config), "--out", str(tmp_path)]
    assert main([*words, "--name", "whole"]) == 0
    command = [sys.executable, "-m", "pwm_gym.benchmark", *words, "--name", "killed"]
    for _ in range(2):
        process = subprocess.Popen(command)
        time.sleep(15.0)
        process.kill()
        process.wait()
    assert main([*words, "--name", "killed"]) == 0
    whole, killed = (Study.open(tmp_path / name) for name in ("whole", "killed"))
    assert [scores(killed, cell) for cell in killed.cells] == [scores(whole, cell) for cell in whole.cells]
    tables = [
        [line for line in (s.folder / "report.md").read_text().splitlines() if " > " in line] for s in (whole, killed)
    ]
    assert tables[0] and tables[0] == tables[1]
