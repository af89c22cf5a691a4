"""A small benchmark whose CSVs are written by hand, and settings under which agents train within a second."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pwm_gym.benchmark import Cell, Study
from pwm_gym.benchmark.study import write_csv

TINY: dict[str, dict[str, Any]] = {
    "sac": {"policy_kwargs": {"net_arch": [8]}, "batch_size": 8, "learning_starts": 20, "train_freq": 20},
    "ppo": {"policy_kwargs": {"net_arch": [8]}, "n_epochs": 1},
    "shac": {"num_envs": 2, "horizon": 20, "policy_kwargs": {"net_arch": [8]}},
    "tdmpc2": {
        "learning_starts": 150,
        "seed_updates": 1,
        "train_freq": 50,
        "gradient_steps": 1,
        "batch_size": 8,
        "policy_kwargs": {
            "world_model_kwargs": {"size": "1M"},
            "planner_kwargs": {"num_samples": 8, "num_elites": 4, "num_prior": 2, "iterations": 1},
        },
    },
    "pwm": {"learning_starts": 60, "train_freq": 20, "batch_size": 8, "model_batch_size": 8, "horizon": 3},
}


@pytest.fixture
def tiny() -> dict[str, dict[str, Any]]:
    return {name: dict(arguments) for name, arguments in TINY.items()}


@pytest.fixture
def written(tmp_path: pathlib.Path) -> Callable[..., Study]:
    """Write a study with curves that are drawn from a seed: {(algorithm, task): level}, 3 seeds, 4 evaluations."""

    def write(levels: dict[tuple[str, str], float], done: int = 4, **settings: Any) -> Study:
        cells = tuple(Cell(algorithm, task, seed) for algorithm, task in levels for seed in range(3))
        frames = {algorithm: 20_000 for algorithm, _ in levels}
        study = Study(tmp_path / "study", cells, frames, 5_000, 2, **settings)
        study.save()
        rng = np.random.default_rng(0)
        for cell in cells:
            rows = []
            for i in range(done):
                returns = levels[cell[:2]] * (i + 1) / 4 + rng.normal(scale=30.0, size=2)
                row = {"algorithm": cell.algorithm, "task": cell.task, "seed": cell.seed, "evaluation": i + 1}
                row |= {"frames": 5_000 * (i + 1), "train_cpu_seconds": 60.0 * (i + 1)}
                row |= {"train_wall_seconds": 61.0 * (i + 1), "mean_return": returns.mean()}
                row |= {f"return_{k}": value for k, value in enumerate(returns)}
                if cell.algorithm == "pwm":
                    row |= {"diagnosis/imagined_reward": 0.5, "diagnosis/real_reward": 0.4}
                    row |= {"diagnosis/critic_bias": 0.1, "diagnosis/reward_correlation": "0.9 0.8 0.7"}
                    row |= {"diagnosis/latent_error": "0.1 0.2 0.3", "diagnosis/gradient_norm": "1 2 3"}
                rows.append(row | {"machine": "Some CPU", "versions": "pwm_gym 0.1.0"})
            write_csv(study.csv_path(cell), rows)
        return study

    return write
