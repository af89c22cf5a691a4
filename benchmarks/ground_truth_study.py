"""The claim, measured: are gradients through a learned model better than those through the true dynamics?

    python benchmarks/ground_truth_study.py                       # every part that is not done yet
    python benchmarks/ground_truth_study.py ball-wall hopper      # these parts
    python benchmarks/ground_truth_study.py learning --seeds 0 1  # long: goes on where it was stopped

Parts: `ball-wall` and `double-pendulum`, the two pedagogical figures of PWM (arXiv:2407.02466); `hopper`, the
same measurements on Hopper-v5; `learning`, PWM in a learned model and SHAC in the true dynamics with the same actor,
critics and horizon, SAC and PPO beside them. Numbers and pictures are put into --out; a part whose numbers are there is
only drawn again, and computed again with --again. docs/ground_truth_study.md says what they show.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

import numpy as np
import torch
from ground_truth_gradients import VARIANTS, LearnedDynamics, TrueDynamics, along_horizon, fit, landscape
from ground_truth_toys import ball_and_wall
from matplotlib.figure import Figure

from pwm_gym.serialization import atomic_write

OUT = pathlib.Path("results/ground_truth_study")
# What PWM and SHAC have in common in `learning`.
SHARED: dict[str, Any] = {
    "horizon": 16,
    "gamma": 0.99,
    "td_lambda": 0.95,
    "ent_coef": 0.02,
    "policy_kwargs": {"net_arch": [256, 128], "n_critics": 2, "log_std_init": -1.0, "log_std_min": -3.0},
}
LEARNING_TASKS = ("Hopper-v5", "HalfCheetah-v5", "cheetah-run")
ALGORITHMS = ("pwm", "shac", "sac", "ppo")
# Task, random steps to the start, plans at once, steps of experience, model width, updates, horizons, landscapes.
GRADIENT_PARTS: dict[str, dict[str, Any]] = {
    "double-pendulum": {
        "task": "pwm_gym/TorchDoublePendulum-v0",
        "warm_up": 20,
        "batch": 441,
        "steps": 32_000,
        "width": 64,
        "updates": 500,
        "horizons": [1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 35, 40, 45, 50],
        "landscapes": [5, 20, 50],
        "reach": 0.4,
    },
    "hopper": {
        "task": "Hopper-v5",
        "warm_up": 10,
        "batch": 16,
        "steps": 16_000,
        "width": 128,
        "updates": 500,
        "horizons": [1, 2, 3, 4, 6, 8, 12, 16, 24, 32],
        "landscapes": [4, 16, 32],
        "reach": 0.4,
    },
}
COLORS = {"true": "black", "SimNorm": "C0", "Mish": "C1", "ReLU": "C2"}


def _save(figure: Figure, path: pathlib.Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


# Ball and wall


def compute_ball_wall(path: pathlib.Path, tiny: bool) -> None:
    """Compute the ball's numbers."""
    found = ball_and_wall(throws=256, updates=20 if tiny else 2_000)
    arrays: dict[str, Any] = {f"{name}|{key}": v for name, part in found.items() for key, v in part.items()}
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)


def draw_ball_wall(path: pathlib.Path, out: pathlib.Path) -> None:
    """Draw landscapes, slopes, and where climbing ends."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(path) as file:
        for key in file.files:
            name, _, column = key.partition("|")
            found.setdefault(name, {})[column] = file[key]
    figure = Figure(figsize=(13.0, 3.6), dpi=110, layout="constrained")
    values, slopes, ends = figure.subplots(1, 3)
    for name, part in found.items():
        color = {"true, smoothed": "0.55"}.get(name, COLORS.get(name.removesuffix(" model"), "C3"))
        degrees = 45.0 * (1.0 + part["a"])
        values.plot(degrees, part["J"], color=color, label=name, linewidth=2.5 if name == "true" else 1.4)
        slopes.plot(degrees, part["slope"], color=color, linewidth=2.5 if name == "true" else 1.4)
        if "pathwise" in part:
            slopes.plot(degrees, part["pathwise"], "--", color=color, label="mean of the true slope under noise")
        if "end" in part:
            ends.plot(45.0 * (1.0 + part["start"]), part["end"], "o-", markersize=3, color=color)
    values.set(title="return of a throw", xlabel="angle in degrees", ylabel="distance / 10 m")
    slopes.set(title="its slope", xlabel="angle in degrees", ylim=(-4.0, 6.0))
    ends.set(title="true return where climbing ends", xlabel="angle it began at, in degrees")
    values.legend(frameon=False, fontsize=8)
    slopes.legend(frameon=False, fontsize=8)
    for axes in (values, slopes, ends):
        axes.grid(alpha=0.3)
    _save(figure, out / "ball_wall.png")


# Gradients along the horizon, landscapes


def compute_gradients(path: pathlib.Path, name: str, tiny: bool, again: bool) -> dict[str, Any]:
    """Measure gradients and landscapes in the truth and in each model, as far as they are not in the file yet."""
    part = GRADIENT_PARTS[name]
    horizons, landscapes = (part["horizons"], part["landscapes"]) if not tiny else ([1, 2], [2])
    samples, points, batch = (64, 21, part["batch"]) if not tiny else (4, 3, 9)
    steps, updates = (part["steps"], part["updates"]) if not tiny else (640, 5)
    numbers: dict[str, Any] = {"horizons": horizons, "landscapes": landscapes, "kinds": {}}
    if path.exists() and not again:
        numbers = json.loads(path.read_text(encoding="utf-8"))
    for kind in ("true", *VARIANTS):
        if kind in numbers["kinds"]:
            continue
        truth = TrueDynamics(part["task"], part["warm_up"], batch)
        dynamics: Any = truth
        if kind != "true":
            model = fit(part["task"], steps, updates, part["width"], **VARIANTS[kind])
            dynamics = LearnedDynamics(model, truth.observation)
        generator = torch.Generator().manual_seed(1)
        plan = 0.3 * torch.randn(max(horizons + landscapes), truth.action_dim, generator=generator, dtype=torch.float64)
        found = along_horizon(dynamics, plan, horizons, samples, noise=0.1)
        found["mean"] = [mean.tolist() for mean in found["mean"]]
        found["landscape"] = landscape(dynamics, plan, landscapes, points, part["reach"]).tolist()
        numbers["kinds"][kind] = found
        with atomic_write(path) as file:
            file.write(json.dumps(numbers).encode())
        print(f"{name}: {kind}", flush=True)
    return numbers


def draw_gradients(numbers: dict[str, Any], out: pathlib.Path, name: str) -> None:
    """Draw norm, ESNR and direction along the horizon, and the landscapes."""
    kinds, horizons, rows = numbers["kinds"], numbers["horizons"], numbers["landscapes"]
    true_means = kinds["true"]["mean"]
    for found in kinds.values():
        pairs = zip(found["mean"], true_means, strict=True)
        found["cosine"] = [np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs]
    title = GRADIENT_PARTS[name]["task"].removeprefix("pwm_gym/")
    figure = Figure(figsize=(13.0, 3.4), dpi=110, layout="constrained")
    panels = figure.subplots(1, 3)
    labels = {"norm": "norm of the gradient", "esnr": "gradient's signal-to-noise (ESNR)"}
    labels["cosine"] = "cosine with the true mean gradient"
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        for kind, found in kinds.items():
            axes.plot(horizons, found[key], "o-", markersize=3, color=COLORS[kind], label=kind)
        axes.set(title=label, xlabel="horizon in steps")
        if key != "cosine":
            axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    panels[0].legend(frameon=False)
    figure.suptitle(title)
    _save(figure, out / f"{name}_gradients.png")

    figure = Figure(figsize=(3.0 * len(kinds), 2.8 * len(rows)), dpi=100, layout="constrained")
    reach = GRADIENT_PARTS[name]["reach"]
    for i, panels in enumerate(figure.subplots(len(rows), len(kinds), squeeze=False)):
        for axes, kind in zip(panels, kinds, strict=True):
            values = np.array(kinds[kind]["landscape"][i])
            image = axes.imshow(values.T, origin="lower", extent=(-reach, reach, -reach, reach), cmap="viridis")
            axes.contour(values.T, 10, extent=(-reach, reach, -reach, reach), colors="white", linewidths=0.4)
            axes.set_title(f"{kind}, {rows[i]} steps", fontsize=9)
            figure.colorbar(image, ax=axes, shrink=0.8)
    figure.suptitle(f"return along two random directions of the actions, {title}")
    _save(figure, out / f"{name}_landscape.png")


# Learning


def learn(arguments: argparse.Namespace) -> bool:
    """Train everything as far as it is not trained yet; tell whether all is done."""
    from pwm_gym.benchmark import run

    settings = {"pwm": SHARED, "shac": {**SHARED, "num_envs": 16}}
    outcomes = run(
        arguments.out / "learning",
        ALGORITHMS,
        arguments.tasks,
        arguments.seeds,
        frames=arguments.frames,
        every=arguments.every,
        episodes=arguments.episodes,
        arguments=settings,
        jobs=arguments.jobs,
    )
    for outcome in outcomes:
        if outcome.failure is not None:
            print(f"{outcome.cell}: {outcome.failure}")
    return all(outcome.failure is None for outcome in outcomes)


def draw_learning(out: pathlib.Path) -> None:
    """Draw returns against env steps and against hours of training, which for PWM holds fitting its model."""
    from pwm_gym.benchmark import ALGORITHMS as KNOWN
    from pwm_gym.benchmark import Study

    study = Study.open(out / "learning")
    tasks = list(dict.fromkeys(cell.task for cell in study.cells))
    figure = Figure(figsize=(4.6 * len(tasks), 6.4), dpi=110, layout="constrained")
    grid = figure.subplots(2, len(tasks), squeeze=False)
    for cell in study.cells:
        rows = study.rows(cell)
        if not rows:
            continue
        color, label = f"C{ALGORITHMS.index(cell.algorithm)}", KNOWN[cell.algorithm].label
        returns = [float(row["mean_return"]) for row in rows]
        steps = [int(row["frames"]) for row in rows]
        hours = [float(row["train_wall_seconds"]) / 3600 for row in rows]
        for axes, spent in zip(grid[:, tasks.index(cell.task)], (steps, hours), strict=True):
            axes.plot(spent, returns, color=color, alpha=0.8, label=label)
            axes.set(title=cell.task, xlabel="env steps" if spent is steps else "hours of training", ylabel="return")
    for axes in grid.flat:
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.legend(handles.values(), handles.keys(), frameon=False, fontsize=8)
        axes.grid(alpha=0.3)
    _save(figure, out / "learning.png")


def main() -> int:
    """Compute and draw what is asked for."""
    parts = ("ball-wall", *GRADIENT_PARTS, "learning")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)}; all without")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    parser.add_argument("--again", action="store_true", help="compute what is there already, but for learning")
    parser.add_argument("--tiny", action="store_true", help="a few numbers of each part, to try it out")
    parser.add_argument("--tasks", nargs="+", default=list(LEARNING_TASKS), help="of learning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of learning")
    parser.add_argument("--frames", type=int, default=100_000, help="of each run of learning")
    parser.add_argument("--every", type=int, default=5_000, help="frames between evaluations")
    parser.add_argument("--episodes", type=int, default=5, help="of an evaluation")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(parts)
    if unknown:
        parser.error(f"expected parts among {', '.join(parts)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    done = True
    for part in arguments.parts or parts:
        if part == "learning":
            done = learn(arguments)
            draw_learning(arguments.out)
        elif part == "ball-wall":
            path = arguments.out / "ball-wall.npz"
            if arguments.again or not path.exists():
                compute_ball_wall(path, arguments.tiny)
            draw_ball_wall(path, arguments.out)
        else:
            numbers = compute_gradients(arguments.out / f"{part}.json", part, arguments.tiny, arguments.again)
            draw_gradients(numbers, arguments.out, part)
        print(f"{part}: in {arguments.out}", flush=True)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
