"""One run in a process of its own: python -m pwm_gym.benchmark.worker FOLDER ALGORITHM TASK SEED.

A run is a row of segments, one between each two evaluations. A segment begins from files alone (the agent and its
replay buffer), with seeds of its own and a new env, and ends with the evaluation and new files. So a run that was
killed goes on from the last evaluation exactly as if it had not been, whatever the algorithm and whatever state it has
beyond its files.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import platform
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from pwm_gym.benchmark.algorithms import (
    algorithm_of,
    env_id_of,
    load_agent,
    make_agent,
    real_env,
    save_agent,
    training_env,
)
from pwm_gym.benchmark.study import EVALUATION_SEED, Cell, Study, write_csv
from pwm_gym.datasets import OfflineDataset
from pwm_gym.evaluation import episode_returns, record_video
from pwm_gym.serialization import atomic_write
from pwm_gym.versions import versions

__all__ = ["attempt", "segment_seed", "train"]

_PROGRESS_EVERY = 1.0  # seconds


def segment_seed(seed: int, segment: int) -> int:
    """Give the seed of a run's segment: the first has the run's own.

    Example:
        >>> segment_seed(3, 0), segment_seed(3, 1)
        (3, 457190280)
    """
    return int(np.random.SeedSequence([seed, segment]).generate_state(1)[0]) if segment else seed


def train(study: Study, cell: Cell, device: str = "cpu") -> None:
    """Train and score one run from where it was left until its budget is spent.

    Args:
        study: The folder.
        cell: The run.
        device: Of the agent.

    Raises:
        ValueError: If the run has evaluations but its state is gone.
    """
    torch.set_float32_matmul_precision(study.precision)
    algorithm, env_id = algorithm_of(cell.algorithm), env_id_of(cell.task)
    state, rows = study.state_path(cell), study.rows(cell)
    state.mkdir(parents=True, exist_ok=True)
    scored = [_LastSuccess(real_env(algorithm, env_id, study.world_model)) for _ in range(study.episodes)]
    repeat = getattr(scored[0].unwrapped, "action_repeat", 1) if study.world_model is None else 1
    every = max(study.every // repeat, 1)
    arguments = study.arguments.get(cell.algorithm, {})
    while not study.is_done(cell, rows):
        env = training_env(algorithm, env_id, every, arguments.get("num_envs"), study.world_model, study.data)
        if rows:
            agent: Any = _agent_left(study, cell, rows, env, device)
            agent.set_random_seed(segment_seed(cell.seed, len(rows)))
        else:
            agent = make_agent(cell.algorithm, env, every, arguments, cell.seed, device)
        logged = _Latest()
        agent.set_logger(Logger(None, [logged]))
        steps = every * (len(rows) + 1) - agent.num_timesteps
        cpu, wall = time.process_time(), time.perf_counter()
        if steps > 0:  # else the last segment's final rollout has taken them already
            agent.learn(steps, callback=_Progress(state, repeat), log_interval=1, reset_num_timesteps=False)
            _flush(agent)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        returns = episode_returns(agent, scored, study.episodes, seed=EVALUATION_SEED)
        successes = [one.success for one in scored if one.success is not None]
        rows.append(_row(study, cell, rows, agent.num_timesteps * repeat, (cpu, wall), returns, successes, device))
        rows[-1] |= {key: f"{value:.6g}" for key, value in logged.values.items()} | _diagnosis(agent, study.data)
        save_agent(agent, str(state / f"agent-{len(rows)}"))
        write_csv(study.csv_path(cell), rows)
        for old in state.glob("agent-*"):
            if old.stem != f"agent-{len(rows)}":
                old.unlink()
    if study.lacks_film(cell):
        _film(study, cell, len(rows), device)


def _flush(agent: Any) -> None:
    """Have the agent write what it logged since its last entry."""
    if isinstance(agent, OffPolicyAlgorithm):
        agent.dump_logs()
    else:
        agent.logger.dump(agent.num_timesteps)


def _agent_left(study: Study, cell: Cell, rows: Sequence[Any], env: Any, device: str) -> Any:
    path = study.state_path(cell) / f"agent-{len(rows)}"
    if not path.with_name(f"{path.name}.zip").exists():
        raise ValueError(
            f"expected the agent of evaluation {len(rows)} to go on from, got no {path.name}.zip. Restore the folder's "
            f"`state`, or begin the run anew by deleting {study.csv_path(cell).name}."
        )
    return load_agent(cell.algorithm, str(path), env, device)


def _row(
    study: Study,
    cell: Cell,
    before: Sequence[Mapping[str, Any]],
    frames: int,
    spent: tuple[float, float],
    returns: np.ndarray,
    successes: list[bool],
    device: str,
) -> dict[str, Any]:
    last: Mapping[str, Any] = before[-1] if before else {"train_cpu_seconds": 0.0, "train_wall_seconds": 0.0}
    row: dict[str, Any] = {"algorithm": cell.algorithm, "task": cell.task, "seed": cell.seed}
    row |= {"evaluation": len(before) + 1, "frames": frames}
    for name, seconds in zip(("train_cpu_seconds", "train_wall_seconds"), spent, strict=True):
        row[name] = round(float(last[name]) + seconds, 2)
    row["mean_return"] = round(float(returns.mean()), 4)
    row |= {f"return_{i}": round(float(value), 4) for i, value in enumerate(returns)}
    if successes:
        row["success_rate"] = float(np.mean(successes))
    row |= {"command": study.command(cell), "machine": _machine(device), "threads": torch.get_num_threads()}
    row |= {"precision": study.precision, "device": device}
    return row | {"versions": "; ".join(f"{name} {number}" for name, number in versions().items())}


def _diagnosis(agent: Any, data: str | None) -> dict[str, str]:
    """Measure an agent with a world model against its own experience; along the horizon, figures in one cell."""
    if not hasattr(agent, "diagnose"):
        return {}
    scalars, along = agent.diagnose(None if data is None else OfflineDataset.load(data))[1:]
    values = {f"diagnosis/{key}": f"{value:.5g}" for key, value in scalars.items()}
    return values | {f"diagnosis/{key}": " ".join(f"{one:.4g}" for one in row) for key, row in along.items()}


def _film(study: Study, cell: Cell, evaluations: int, device: str) -> None:
    """Film an episode of the final agent; where nothing can be drawn, leave the reason in the film's place."""
    algorithm, path = algorithm_of(cell.algorithm), study.film_path(cell)
    try:
        env = real_env(algorithm, env_id_of(cell.task), study.world_model, render_mode="rgb_array")
        agent = algorithm.load_class().load(path.with_name(f"agent-{evaluations}.zip"), device=device)
        record_video(agent, env, path, seed=EVALUATION_SEED, max_steps=500)
    except Exception as error:  # simulators raise what they like where there is no OpenGL
        with atomic_write(path.with_suffix(".txt")) as file:
            file.write(f"{type(error).__name__}: {error}".encode())


def _machine(device: str) -> str:
    """Name the processor, and the GPU where it was used."""
    name = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    used = f"{name}, {os.cpu_count()} CPUs"
    return f"{used}, {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else used


class _LastSuccess(gym.Wrapper):
    """Keeps whether the latest episode had succeeded at its last step; None where the task doesn't say."""

    success: bool | None = None

    def step(self, action: Any) -> Any:
        result = self.env.step(action)
        if "is_success" in result[-1]:
            self.success = bool(result[-1]["is_success"])
        return result


class _Latest(KVWriter):
    """Keeps the latest value of what an agent logs about its training."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        numbers = {key: value for key, value in key_values.items() if key.startswith("train/") and np.isscalar(value)}
        self.values |= {key: float(value) for key, value in numbers.items()}  # type: ignore[arg-type]

    def close(self) -> None:
        pass


class _Progress(BaseCallback):
    """Writes down the frames so far, for the display over all runs."""

    def __init__(self, state: pathlib.Path, repeat: int) -> None:
        super().__init__()
        self.path, self.repeat, self._next = state / "progress.txt", repeat, 0.0

    def _on_step(self) -> bool:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _PROGRESS_EVERY
            self.path.write_text(str(self.model.num_timesteps * self.repeat), encoding="utf-8")
        return True


def _end_with_parent() -> None:
    """End when the process that started this one is gone, and with it the other end of standard input."""
    sys.stdin.read()
    os._exit(1)


def attempt(study: Study, device: str, cell: Cell) -> bool:
    """Train a run as far as it goes; where it dies, leave the reason in its state.

    Args:
        study: The folder.
        device: Of the agent.
        cell: The run.

    Returns:
        Whether it is done.
    """
    try:
        train(study, cell, device)
    except Exception as error:
        traceback.print_exc()  # into the run's log
        with atomic_write(study.state_path(cell) / "failure.txt") as file:
            file.write(f"{type(error).__name__}: {error}".encode())
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Train one run in this process."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("algorithm")
    parser.add_argument("task")
    parser.add_argument("seed", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parsed = parser.parse_args(arguments)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(parsed.threads)
    cell = Cell(parsed.algorithm, parsed.task, parsed.seed)
    if not attempt(Study.open(parsed.folder), parsed.device, cell):
        sys.exit(1)


if __name__ == "__main__":
    main()
