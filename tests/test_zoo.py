"""rl_zoo3 with this package's agents, in the documented form and tiny."""

from __future__ import annotations

import argparse
import pathlib
import sys

import numpy as np
import optuna
import pytest
import yaml
from rl_zoo3 import ALGOS
from rl_zoo3.exp_manager import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

from pwm_gym import PWM, SHAC
from pwm_gym.zoo import _with_hyperparameters, install, main

CHEETAH = "pwm_gym/cheetah-run-v0"
FEW = ["--eval-freq", "-1", "--seed", "1", "--device", "cpu", "--verbose", "0"]


def test_train_and_enjoy_pwm(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    small = ["-params", "learning_starts:30", "batch_size:8", "model_batch_size:8", "train_freq:10"]
    main(["train", "--algo", "pwm", "--env", CHEETAH, "-n", "60", "-f", str(tmp_path), *FEW, *small])
    run = tmp_path / "pwm" / "pwm_gym-cheetah-run-v0_1"
    agent = PWM.load(run / "pwm_gym-cheetah-run-v0.zip")
    assert (agent.num_timesteps, agent.batch_size, agent.seed) == (60, 8, 1)
    config = (run / "pwm_gym-cheetah-run-v0" / "config.yml").read_text()
    assert "learning_starts" in config and "MlpPolicy" in config
    before = list(sys.argv)
    main(["enjoy", "--algo", "pwm", "--env", CHEETAH, "-n", "501", "-f", str(tmp_path), "--no-render"])
    assert sys.argv == before
    assert "1 Episodes" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Training and eval env are not of the same type:UserWarning")
def test_shac_trains_in_differentiable_envs(tmp_path: pathlib.Path):
    small = ["-params", "n_envs:2", "horizon:4"]
    words = ["train", "--algo", "shac", "--env", "pwm_gym/pendulum-swingup-v0", "-n", "16", "-f", str(tmp_path)]
    main([*words, *FEW[2:], *small, "--eval-freq", "8", "--eval-episodes", "1"])
    (path,) = (tmp_path / "shac").glob("*/pwm_gym-pendulum-swingup-v0.zip")
    assert SHAC.load(path).num_timesteps == 16
    assert (path.parent / "best_model.zip").exists()


def test_optuna_searches_pwm(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    words = ["train", "--algo", "pwm", "--env", "Pendulum-v1", "-n", "40", "-f", str(tmp_path), "--n-trials", "1"]
    words += ["-optimize", "--no-optim-plots", "--n-evaluations", "1", "--eval-episodes", "1"]
    main([*words, *FEW[2:], "-params", "learning_starts:30", "train_freq:10"])
    assert "Best trial" in capsys.readouterr().out


@pytest.mark.parametrize("algorithm", ["pwm", "shac", "tdmpc2"])
def test_sampled_settings_are_arguments_and_come_back_from_a_study(algorithm: str):
    assert algorithm in install()
    trial = optuna.create_study().ask()
    sampled = HYPERPARAMS_SAMPLER[algorithm](trial, 1, 1, {})
    assert sampled == HYPERPARAMS_CONVERTER[algorithm](trial.params)
    if algorithm != "shac":
        agent = ALGOS[algorithm]("MlpPolicy", "Pendulum-v1", **sampled)
        assert all(np.isclose(getattr(agent, name), value) for name, value in sampled.items() if name != "train_freq")


@pytest.mark.parametrize("algorithm", ["pwm", "shac", "tdmpc2"])
def test_shipped_hyperparameters_are_in_the_zoos_format(algorithm: str):
    words = ["--algo", algorithm, "--env", CHEETAH]
    *before, option, path = _with_hyperparameters(words, install())
    assert before == words and option == "--conf-file"
    content = yaml.safe_load(pathlib.Path(path).read_text())
    assert content["default"]["policy"] == "MlpPolicy"
    assert all(settings["n_timesteps"] > 0 for settings in content.values())


def test_other_algorithms_and_other_files_are_left_as_they_are():
    for words in (["--algo", "sac"], ["--algo", "pwm", "-conf", "my.yml"], ["--algo", "pwm", "--conf-file=my.yml"], []):
        assert _with_hyperparameters(words, install()) == words


def test_installing_twice_changes_nothing():
    assert install() == install()
    assert ALGOS["pwm"] is PWM
    assert "sac" in ALGOS


def test_unknown_commands_and_envs_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["tune"])
    assert "usage: python -m pwm_gym.zoo {train,enjoy}" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"you maybe meant {CHEETAH}"):
        main(["train", "--algo", "pwm", "--env", "pwm_gym/cheetah-ran-v0"])
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        main(["train", "--algo", "pmw"])


def test_a_missing_zoo_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "rl_zoo3.train", None)
    with pytest.raises(ImportError, match=r'pip install "pwm-gym\[zoo\]"'):
        install()
