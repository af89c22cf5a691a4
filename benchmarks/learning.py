"""How fast and how steadily PWM or TDMPC2 learns: tasks x seeds with one set of hyper-parameters, resumable.

    python benchmarks/learning.py run --tasks walker-walk cheetah-run --seeds 0 1 --jobs 2
    python benchmarks/learning.py report
    python benchmarks/learning.py run --algorithm TDMPC2 --name tdmpc2 --tasks cartpole-swingup --seeds 0 \
        --set 'policy_kwargs={"world_model_kwargs": {"size": "1M"}}'

`run` trains the default agent for 50,000 decisions (100,000 frames) on each task and seed, each in a process of its own
on one thread, and evaluates 10 deterministic episodes of the agent as it then is every 5,000 frames. A run that was
killed goes on from its last evaluation; a run that is done is left alone. Each run's curve is a CSV in
results/learning/<name>/, its last state is kept in runs/learning/. `report` makes the table and the pictures from the
CSVs that there are.
"""

import argparse
import concurrent.futures
import csv
import io
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from pwm_gym import PWM, TDMPC2
from pwm_gym.evaluation import episode_returns
from pwm_gym.serialization import atomic_write

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS, STATES = ROOT / "results" / "learning", ROOT / "runs" / "learning"
PUBLISHED = ROOT / "results" / "published" / "curves.csv"
TASKS = ("cartpole-swingup", "pendulum-swingup", "walker-walk", "cheetah-run", "reacher-easy", "hopper-stand")
FRAMES = 2  # per decision, in every pwm_gym task
ALGORITHMS: dict[str, type[PWM] | type[TDMPC2]] = {"PWM": PWM, "TDMPC2": TDMPC2}
METRICS = ("imagined_return", "imagined_reward", "value", "entropy", "actor_grad_norm", "critic_loss", "model_loss")
METRICS += ("value_loss", "prior_loss", "prior_entropy")


def train(arguments: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Train one agent, from where it was left, writing a row of the CSV at each evaluation."""
    torch.set_num_threads(1)
    task, seed, algorithm = arguments.task, arguments.seed, ALGORITHMS[arguments.algorithm]
    path = RESULTS / arguments.name / f"{task}-seed{seed}.csv"
    state = STATES / arguments.name / f"{task}-seed{seed}"
    env = gym.make(task if "/" in task or "-v" in task else f"pwm_gym/{task}-v0")
    rows: list[dict[str, Any]] = []
    if (state / "rows.json").exists():
        rows = json.loads((state / "rows.json").read_text())
        at = rows[-1]["decisions"]
        agent = algorithm.load(state / f"agent-{at}", env=env, device=arguments.device)
        agent.load_replay_buffer(state / f"agent-{at}")
    else:
        agent = algorithm("MlpPolicy", env, seed=seed, device=arguments.device, **overrides)
    eval_env = gym.make(env.spec.id)  # type: ignore[union-attr]
    while not rows or rows[-1]["decisions"] < arguments.steps:
        cpu, wall = time.process_time(), time.perf_counter()
        agent.learn(arguments.every, reset_num_timesteps=False)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        returns = episode_returns(agent, eval_env, arguments.episodes, seed=10_000)
        before = rows[-1] if rows else {"train_cpu_seconds": 0.0, "train_wall_seconds": 0.0}
        rows.append(
            {
                "task": task,
                "seed": seed,
                "decisions": agent.num_timesteps,
                "frames": agent.num_timesteps * FRAMES,
                "train_cpu_seconds": round(before["train_cpu_seconds"] + cpu, 1),
                "train_wall_seconds": round(before["train_wall_seconds"] + wall, 1),
                "mean_return": round(float(returns.mean()), 1),
                **{f"return_{i}": round(float(r), 1) for i, r in enumerate(returns)},
                **{key: round(float(agent._metrics[key]), 5) for key in METRICS if key in agent._metrics},
            }
        )
        _save(agent, rows, state)
        _write_csv(path, rows)
        print(f"{task} seed {seed}: {rows[-1]['frames']} frames, {rows[-1]['mean_return']}", flush=True)


def _save(agent: PWM | TDMPC2, rows: list[dict[str, Any]], state: pathlib.Path) -> None:
    """Keep agent, replay and rows; `rows.json` comes last and says which agent belongs to it."""
    at = rows[-1]["decisions"]
    agent.save(state / f"agent-{at}")
    agent.save_replay_buffer(state / f"agent-{at}")
    with atomic_write(state / "rows.json") as file:
        file.write(json.dumps(rows).encode())
    for old in state.glob("agent-*"):
        if old.stem != f"agent-{at}":
            old.unlink()


def _write_csv(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[-1].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def run_all(arguments: argparse.Namespace) -> int:
    """Run every task and seed that is not done, `jobs` at a time; tell of each that failed."""
    cells = [(task, seed) for seed in arguments.seeds for task in arguments.tasks]

    def start(cell: tuple[str, int]) -> int:
        command = [sys.executable, __file__, "one", cell[0], str(cell[1])]
        for option in ("algorithm", "steps", "every", "episodes", "name", "device"):
            command += [f"--{option}", str(getattr(arguments, option))]
        command += [f"--set={pair}" for pair in arguments.set]
        code = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode
        if code:
            print(f"{cell[0]} seed {cell[1]} stopped with status {code}; run the same command again to go on")
        return code

    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        return max(pool.map(start, cells))


def _curves(name: str) -> dict[str, dict[int, np.ndarray]]:
    """Read the CSVs: {task: {seed: (T, 2 + episodes): frames, CPU seconds of training, returns}}."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for path in sorted((RESULTS / name).glob("*-seed*.csv")):
        with path.open() as file:
            rows = [
                [float(row["frames"]), float(row["train_cpu_seconds"])]
                + [float(value) for column, value in row.items() if column.startswith("return_")]
                for row in csv.DictReader(file)
            ]
        task, _, seed = path.stem.rpartition("-seed")
        found.setdefault(task, {})[int(seed)] = np.asarray(rows)
    return found


def _published(task: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read published curves: {algorithm: (frames, mean return)}."""
    points: dict[str, list[tuple[float, float]]] = {}
    with PUBLISHED.open() as file:
        for row in csv.DictReader(file):
            if row["task"] == task:
                points.setdefault(row["algorithm"], []).append((float(row["env_steps"]), float(row["mean_return"])))
    return {name: tuple(np.asarray(sorted(p)).T) for name, p in points.items()}


def report(name: str) -> None:
    """Write results/learning/<name>/table.md and curves.png from the CSVs."""
    from matplotlib.figure import Figure

    curves = _curves(name)
    if not curves:
        raise SystemExit(f"no CSVs in {RESULTS / name}: start with `python benchmarks/learning.py run`")
    lines = [
        "| task | seed | frames | final (mean) | lowest and highest episode "
        "| worst evaluation of the last fifth / best of all | train CPU min | TD-MPC2 | SAC | DreamerV3 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    columns = 3
    figure = Figure(figsize=(5 * columns, 3.6 * -(-len(curves) // columns)), dpi=100, layout="constrained")
    panels = figure.subplots(-(-len(curves) // columns), columns, squeeze=False).ravel()
    for axes, task in zip(panels, curves, strict=False):
        published = _published(task)
        for index, (seed, rows) in enumerate(sorted(curves[task].items())):
            frames, returns = rows[:, 0], rows[:, 2:]
            mean = returns.mean(1)
            last = mean[frames >= 0.8 * frames[-1]]
            theirs = [
                f"{np.interp(frames[-1], *published[a]):.0f}"
                if a in published and frames[-1] >= published[a][0][0]
                else "-"
                for a in ("TD-MPC2", "SAC", "DreamerV3")
            ]
            lines.append(
                f"| {task} | {seed} | {frames[-1]:.0f} | {mean[-1]:.0f} | {returns[-1].min():.0f} to "
                f"{returns[-1].max():.0f} | {last.min():.0f} / {mean.max():.0f} | {rows[-1, 1] / 60:.0f} | "
                + " | ".join(theirs)
                + " |"
            )
            axes.plot(frames, mean, color=f"C{index}", marker="o", markersize=3, label=f"seed {seed}")
            axes.fill_between(frames, returns.min(1), returns.max(1), color=f"C{index}", alpha=0.15, linewidth=0)
        limit = max(rows[-1, 0] for rows in curves[task].values())
        for style, (algorithm, (x, y)) in zip(("--", "-.", ":"), published.items(), strict=False):
            axes.plot(x, y, style, color="0.35", linewidth=1, marker="x", markersize=4, label=f"{algorithm}, published")
        axes.set(title=task, xlabel="frames", ylabel="return", xlim=(0, max(limit * 1.05, 105_000)), ylim=(0, 1_000))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, frameon=False)
    for axes in panels[len(curves) :]:
        axes.set_visible(False)
    with atomic_write(RESULTS / name / "curves.png") as picture:
        figure.savefig(picture, format="png")
    with atomic_write(RESULTS / name / "table.md") as file:
        file.write(("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    settings = argparse.ArgumentParser(add_help=False)
    settings.add_argument("--algorithm", choices=ALGORITHMS, default="PWM", help="(default: %(default)s)")
    settings.add_argument("--steps", type=int, default=50_000, help="decisions (default: %(default)s)")
    # Whole episodes, so that a resumed run is the same run.
    settings.add_argument("--every", type=int, default=2_500, help="decisions to an evaluation (default: %(default)s)")
    settings.add_argument("--episodes", type=int, default=10, help="of an evaluation (default: %(default)s)")
    settings.add_argument("--device", default="cpu", help="(default: %(default)s)")
    settings.add_argument("--name", default="default", help="of the study, a folder (default: %(default)s)")
    settings.add_argument(
        "--set", action="append", default=[], metavar="ARG=JSON", help="an argument of the agent to change"
    )
    several = commands.add_parser("run", parents=[settings], help="train what is not done yet")
    several.add_argument("--tasks", nargs="+", default=list(TASKS))
    several.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    several.add_argument("--jobs", type=int, default=1, help="runs at the same time (default: %(default)s)")
    one = commands.add_parser("one", parents=[settings], help="train one task and seed in this process")
    one.add_argument("task")
    one.add_argument("seed", type=int)
    commands.add_parser("report", help="table and pictures").add_argument("--name", default="default")
    arguments = parser.parse_args()
    if arguments.command == "report":
        report(arguments.name)
    elif arguments.command == "run":
        return run_all(arguments)
    else:
        overrides = {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in arguments.set)}
        train(arguments, overrides)
    return 0


if __name__ == "__main__":
    sys.exit(main())
