"""The study of gradients: its measurements on toys with known answers, and its parts at a tiny scale."""

from __future__ import annotations

import importlib
import pathlib
import sys
from typing import Any

import numpy as np
import pytest
import torch

from pwm_gym.benchmark import Cell, Study
from pwm_gym.benchmark.algorithms import check_arguments
from pwm_gym.benchmark.study import write_csv

BENCHMARKS = str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks")
PENDULUM = "pwm_gym/TorchPendulum-v0"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


class Squares:
    """Rewards -a², so that the gradient with respect to an action is -2a."""

    def rewards(self, plans: torch.Tensor) -> torch.Tensor:
        return -plans.square().sum(-1)


def test_esnr_is_mean_squared_over_variance(module: Any):
    along_horizon = module("ground_truth_gradients").along_horizon
    plan = torch.tensor([[1.0], [0.5]], dtype=torch.float64)
    found = along_horizon(Squares(), plan, [1, 2], samples=20_000, noise=0.1)
    # g = -2 (a + 0.1 ε): E[g]² = 4 a², Var[g] = 0.04
    assert found["esnr"] == pytest.approx([4 / 0.04, (4 + 1) / 0.08], rel=0.05)
    assert found["norm"][1] == pytest.approx(5**0.5, rel=0.01)
    assert found["mean"][1].tolist() == pytest.approx([-2.0, -1.0], abs=0.01)


def test_a_landscape_has_the_plan_in_its_middle(module: Any):
    plan = torch.full((3, 2), 0.1, dtype=torch.float64)
    values = module("ground_truth_gradients").landscape(Squares(), plan, [1, 3], points=5, reach=0.5)
    assert values.shape == (2, 5, 5)
    assert values[:, 2, 2] == pytest.approx([-0.02, -0.06])
    assert (values[1] <= values[0]).all()


def test_plans_in_the_truth_start_from_one_state_however_many_there_are(module: Any):
    truth = module("ground_truth_gradients").TrueDynamics(PENDULUM, warm_up=3, batch=4)
    plans = torch.rand(5, 1, 1, dtype=torch.float64).expand(-1, 7, -1).clone().requires_grad_()
    rewards = truth.rewards(plans)
    assert rewards.shape == (5, 7) and torch.equal(rewards, rewards[:, :1].expand(-1, 7))
    (gradient,) = torch.autograd.grad(rewards[:, 6].sum(), plans)
    assert gradient[:, 6].abs().sum() > 0 and not gradient[:, :6].any()


def test_nothing_is_earned_after_a_fall(module: Any):
    truth = module("ground_truth_gradients").TrueDynamics("Hopper-v5", warm_up=0, batch=1)
    rewards = truth.rewards(torch.ones(80, 1, 3, dtype=torch.float64))[:, 0]
    last = int(rewards.nonzero()[-1])
    assert 5 < last < 79 and not rewards[last + 1 :].any()


def test_experience_is_cut_into_episodes_that_lead_to_where_their_last_step_led(module: Any):
    experience = module("ground_truth_gradients").collect("Hopper-v5", steps=60, num_envs=2, seed=0)
    assert experience.num_steps == 120 and (experience.observation_dim, experience.action_dim) == (11, 3)
    assert experience.terminated.sum() == len(experience) - 2, "the last of each env was still running"
    for episode in experience:
        heights, angles = episode.observations[:, 0], np.abs(episode.observations[:, 1])
        fallen = (heights < 0.7) | (angles > 0.2)
        assert not fallen[:-1].any() and fallen[-1] == episode.terminated, "of the fall, not of the reset after it"


def test_the_wall_has_no_slope_and_the_smoothed_truth_has_one(module: Any):
    found = module("ground_truth_toys").ball_and_wall(throws=32, updates=2)
    at = int(np.abs(45.0 * (1.0 + found["true"]["a"]) - 40.0).argmin())
    assert found["true"]["slope"][at] == 0.0
    assert found["true, smoothed"]["slope"][at] > 0.5 > abs(found["true, smoothed"]["pathwise"][at])
    assert set(found) == {"true", "true, smoothed", "SimNorm model", "Mish model", "ReLU model"}


def test_parts_write_numbers_and_pictures_and_are_not_computed_twice(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
    study = module("ground_truth_study")
    command = ["study", "ball-wall", "double-pendulum", "--tiny", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert study.main() == 0
    names = {path.name for path in tmp_path.iterdir()}
    pictures = {"ball_wall.png", "double-pendulum_gradients.png", "double-pendulum_landscape.png"}
    assert names == {"ball-wall.npz", "double-pendulum.json", *pictures}
    for name in ("compute_ball_wall", "fit", "landscape"):
        monkeypatch.setattr(study, name, lambda *_, **__: pytest.fail("computed again"))
    assert study.main() == 0


def test_pwm_and_shac_learn_with_the_same_actor_critics_and_horizon(module: Any, monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}

    def run(folder: Any, algorithms: Any, tasks: Any, seeds: Any, **settings: Any) -> list[Any]:
        asked.update(settings, algorithms=algorithms)
        return []

    monkeypatch.setattr("pwm_gym.benchmark.run", run)
    monkeypatch.setattr(sys, "argv", ["study", "learning"])
    study = module("ground_truth_study")
    monkeypatch.setattr(study, "draw_learning", lambda out: None)
    assert study.main() == 0
    assert asked["algorithms"] == ("pwm", "shac", "sac", "ppo")
    pwm, shac = asked["arguments"]["pwm"], dict(asked["arguments"]["shac"])
    del shac["num_envs"]
    assert pwm == shac and {"horizon", "policy_kwargs"} <= set(pwm)
    for name, arguments in asked["arguments"].items():
        check_arguments(name, arguments)


def test_learning_is_drawn_as_far_as_it_has_come(module: Any, tmp_path: pathlib.Path):
    cells = tuple(Cell(algorithm, "Hopper-v5", 0) for algorithm in ("pwm", "shac"))
    study = Study(tmp_path / "learning", cells, {"pwm": 10_000, "shac": 10_000}, 5_000, 1)
    study.save()
    write_csv(study.csv_path(cells[0]), [{"frames": 5_000, "train_wall_seconds": 3.0, "mean_return": 1.0}])
    module("ground_truth_study").draw_learning(tmp_path)
    assert (tmp_path / "learning.png").read_bytes().startswith(b"\x89PNG")
