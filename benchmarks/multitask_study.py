"""The study: one multi-task world model from whole replay buffers, a policy for each task, and what else could act.

    make multitask-study                            # everything; run it again after an interruption, and it goes on
    python benchmarks/multitask_study.py report     # the table alone

1. `data`: on each task an agent (PWM with its defaults) trains online until the last tenth of its episodes is worth
   half of SAC's published score at 1M frames, or half of them succeed; its whole replay buffer is the task's data.
   `--benchmark runs/benchmark/online` takes the buffers of the agents (seed 0) that a benchmark trained already.
2. `model`: one multi-task model is pre-trained on all of it, with values and policy prior for the planner; with
   `--separate`, a single-task model for each task instead, as wide as PWM's own for it, with results of its own.
3. `policies`: from each seed, a policy for each task (PWM) and one for all tasks; PPO and SAC (SB3's) in each task's
   latent env, for the CPU time that PWM took for it; and planning (TDMPC2, published settings) with the same model.
   Each is scored on real episodes from the same initial states. Nothing is chosen by its score: the last policy counts.
4. `report`: the table and the plot, in results/multitask_study/, or results/single_task_study/ with `--separate`.
"""

import argparse
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from tables import write_rows

from pwm_gym import (
    PWM,
    LatentObservation,
    LatentVectorEnv,
    OfflineDataset,
    WorldModel,
    as_sb3_vec_env,
    extract,
    pretrain,
)
from pwm_gym.agents.policies import default_world_model_config
from pwm_gym.benchmark import Cell, Study
from pwm_gym.benchmark.study import PRECISIONS
from pwm_gym.datasets.storage import DatasetWriter, Layout
from pwm_gym.envs.factory import make_task
from pwm_gym.evaluation import episode_outcomes
from pwm_gym.extraction import published_scores
from pwm_gym.replay import SequenceReplayBuffer
from pwm_gym.serialization import atomic_write

ROOT = pathlib.Path(__file__).resolve().parents[1]
TASKS = (
    *("cartpole-swingup", "pendulum-swingup", "reacher-easy", "walker-walk", "cheetah-run", "hopper-stand"),
    *("mw-door-close", "mw-handle-press"),
)
METHODS = ("PWM", "multi-task policy", "PPO", "SAC", "planning")
EVERY, FEWEST_EPISODES = 2_500, 60  # decisions between looks at the criterion: whole episodes; and episodes of a task
EVALUATION_SEED = 10_000  # as in `extract`
SEPARATE_SIZE = "1M"  # of a model for one task, but for its widths


def write_json(path: pathlib.Path, content: Any) -> None:
    """Write JSON, atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode())


# 1. Data


def is_enough(task: str, returns: np.ndarray, successes: Sequence[float]) -> bool:
    """Tell whether a buffer has episodes enough, the last tenth of which are good enough."""
    if len(returns) < FEWEST_EPISODES:
        return False
    kind, published = published_scores(task)
    told = np.asarray(successes if kind == "success" else returns)
    wanted = 0.5 if kind == "success" else 0.5 * published["SAC 1M"]
    return bool(told[-max(1, len(told) // 10) :].mean() >= wanted)


def whole_returns(replay: SequenceReplayBuffer, task: str) -> np.ndarray:
    """Give the return of each whole episode in a buffer, in the order of time."""
    data = OfflineDataset.from_replay_buffer(replay, task)
    return data.returns()[data.terminated | data.truncated]


def note(folder: pathlib.Path, task: str, decisions: int, done: bool, told: tuple[np.ndarray, list[float]]) -> bool:
    """Write down how good a task's buffer is, and tell whether its data is complete."""
    returns, successes = told
    enough = is_enough(task, returns, successes)
    state: dict[str, Any] = {"decisions": decisions, "done": done or enough, "enough": enough}
    write_json(folder / "state.json", state | {"returns": returns.tolist(), "successes": successes})
    tenth = returns[-max(1, len(returns) // 10) :].mean()
    print(f"{task}: {decisions} decisions, last tenth {tenth:.0f}{', good enough' if enough else ''}", flush=True)
    return done or enough


def take(task: str, folder: pathlib.Path, benchmark: pathlib.Path) -> bool:
    """Take the buffer of the agent that a benchmark trained on a task, if it did and publications score returns."""
    runs = Study.open(benchmark)
    cell = Cell("pwm", task, 0)
    if cell not in runs.cells or not runs.is_done(cell) or published_scores(task)[0] == "success":
        return False
    (path,) = runs.state_path(cell).glob("agent-*.replay")
    replay = SequenceReplayBuffer.load(path, "cpu")
    with atomic_write(folder / path.name) as file:
        file.write(path.read_bytes())
    note(folder, task, replay.size(), True, (whole_returns(replay, task), []))
    return True


def collect(task: str, folder: pathlib.Path, most: int, benchmark: pathlib.Path | None) -> None:
    """Train an agent on a task until its buffer is good enough, or `most` decisions are spent."""
    state: dict[str, Any] = {"decisions": 0, "done": False}
    if (folder / "state.json").exists():
        state = json.loads((folder / "state.json").read_text())
    elif benchmark is not None and take(task, folder, benchmark):
        return
    if state["done"]:
        return
    env = make_task(task)
    if state["decisions"]:
        agent = PWM.load(folder / f"agent-{state['decisions']}.zip", env=env, device="cpu")
        agent.load_replay_buffer(folder / f"agent-{state['decisions']}.replay")
    else:
        agent = PWM("MlpPolicy", env, buffer_size=most, stats_window_size=100_000, seed=0, device="cpu")
    done = False
    while not done:
        agent.learn(min(EVERY, most), reset_num_timesteps=False)
        returns = whole_returns(agent.sequence_replay(), task)
        successes = [float(told) for told in agent.ep_success_buffer or ()]
        agent.save(folder / f"agent-{agent.num_timesteps}.zip")
        agent.save_replay_buffer(folder / f"agent-{agent.num_timesteps}.replay")
        done = note(folder, task, agent.num_timesteps, agent.num_timesteps >= most, (returns, successes))
        for old in folder.glob("agent-*"):
            if old.stem != f"agent-{agent.num_timesteps}":
                old.unlink()


def join(tasks: Sequence[str], folder: pathlib.Path) -> OfflineDataset:
    """Put the buffers of all tasks into one dataset."""
    if not (folder / "dataset").exists():
        parts = []
        for task in tasks:
            (path,) = (folder / "data" / task).glob("agent-*.replay")
            parts.append(OfflineDataset.from_replay_buffer(SequenceReplayBuffer.load(path, "cpu"), task))
        dims = (tuple(getattr(part, name) for part in parts) for name in ("observation_dim", "action_dim"))
        with DatasetWriter(folder / "dataset", Layout(tuple(tasks), *dims)) as writer:
            for index, part in enumerate(parts):
                for episode in part:
                    writer.append_episode(*episode._replace(task=index))
            writer.finish()
    return OfflineDataset.load(folder / "dataset")


# 2. Model


def widths_of_pwm(dataset: OfflineDataset) -> dict[str, int]:
    """Give the widths of the model that PWM makes itself for one task's spaces."""
    config = default_world_model_config(dataset.observation_space, dataset.action_space)
    return {name: getattr(config, name) for name in ("latent_dim", "encoder_dim", "mlp_dim")}


# 3. Policies


class TimeBudget(BaseCallback):
    """Stop after some CPU seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def _on_training_start(self) -> None:
        self.began = time.process_time()

    def _on_step(self) -> bool:
        return time.process_time() - self.began < self.seconds


def score(path: pathlib.Path, task: str, env: Any, make: Callable[[], Any], episodes: int) -> None:
    """Make an agent and score it, in one env or in several side by side, unless that is done."""
    if path.exists():
        return
    began = time.process_time()
    agent = make()
    trained = time.process_time() - began
    returns, successes = episode_outcomes(agent, env, episodes, EVALUATION_SEED)
    told = None if successes is None else successes.tolist()
    steps = getattr(agent, "num_timesteps", 0)
    write_json(path, {"returns": returns.tolist(), "successes": told, "cpu_seconds": trained, "steps": steps})
    print(f"{path.parent.name} {task}: {returns.mean():.1f}", flush=True)


def train_baseline(
    kind: Callable[..., BaseAlgorithm], model: WorldModel, dataset: OfflineDataset, task: str, seed: int, seconds: float
) -> BaseAlgorithm:
    """Train SB3's PPO or SAC in the task's latent env for some CPU seconds."""
    # With 16 envs PPO and SAC come further in the same time than with the 64 that are PWM's batch of rollouts.
    latent = LatentVectorEnv(model, dataset, num_envs=16, horizon=16, task=task)
    agent = kind("MlpPolicy", as_sb3_vec_env(latent), seed=seed, device="cpu")
    return agent.learn(10**9, callback=TimeBudget(seconds))


def make_planner(model: WorldModel, task: str, seed: int) -> Any:
    """Make an agent that plans with the model."""
    from pwm_gym import TDMPC2

    return TDMPC2("MlpPolicy", None, world_model=model.for_task(task), seed=seed, device="cpu")


def run_policies(arguments: argparse.Namespace, dataset: OfflineDataset, model: WorldModel, out: pathlib.Path) -> None:
    """Make and score what shall act, for each seed; what the budgets of others are measured by, PWM, always."""
    common = {"updates": arguments.updates, "episodes": arguments.episodes, "progress_bar": True}
    baselines = {name: kind for name, kind in {"PPO": PPO, "SAC": SAC}.items() if name in arguments.methods}
    for seed in arguments.seeds:
        folder = out / f"seed{seed}"
        results = extract(model, dataset, out=folder / "PWM", seed=seed, **common)
        if "multi-task policy" in arguments.methods and len(dataset.tasks) > 1:
            extract(model, dataset, out=folder / "multi-task policy", seed=seed, shared=True, **common)
        for task in dataset.tasks:
            latent, seconds = LatentObservation(make_task(task), model, task=task), results[task].cpu_seconds
            for name, kind in baselines.items():

                def train(kind: Any = kind, task: str = task, seconds: float = seconds, seed: int = seed) -> Any:
                    return train_baseline(kind, model, dataset, task, seed, seconds)

                score(folder / name / f"{task}.json", task, latent, train, arguments.episodes)
            if "planning" in arguments.methods:

                def plan(task: str = task, seed: int = seed) -> Any:
                    return make_planner(model, task, seed)

                envs = [make_task(task) for _ in range(arguments.planning_episodes)]  # plans for all in one batch
                score(folder / "planning" / f"{task}.json", task, envs, plan, arguments.planning_episodes)


# 4. Report


def iqm(values: np.ndarray) -> float:
    """Mean of the middle half; entries at its borders count by the part of them that is inside."""
    ordered, count = np.sort(values.ravel()), values.size
    low, high = count / 4, 3 * count / 4
    weights = np.clip(np.minimum(np.arange(count) + 1, high) - np.maximum(np.arange(count), low), 0.0, 1.0)
    return float((ordered * weights).sum() / weights.sum())


def interval(statistic: Callable[[np.ndarray, np.ndarray], float], a: np.ndarray, b: np.ndarray) -> tuple[float, ...]:
    """Compute a statistic of two score tables, (tasks, seeds) each, and its 95 % bootstrap interval over the tasks."""
    rng = np.random.default_rng(0)
    draws = [rng.integers(len(a), size=len(a)) for _ in range(2_000)]
    low, high = np.quantile([statistic(a[d], b[d]) for d in draws], [0.025, 0.975])
    return statistic(a, b), float(low), float(high)


def read_scores(out: pathlib.Path, method: str, task: str, seeds: Sequence[int]) -> list[tuple[float, float]]:
    """Read (score, mean return) of a method on a task, for each seed that there is."""
    kind, _ = published_scores(task)
    found = []
    for seed in seeds:
        path = out / f"seed{seed}" / method / f"{task}.json"
        if path.exists():
            result = json.loads(path.read_text())
            told = result["successes"] if kind == "success" else result["returns"]
            found.append((float(np.mean(told)), float(np.mean(result["returns"]))))
    return found


def make_row(data_path: pathlib.Path, out: pathlib.Path, task: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Gather what is known of a task, from the state of its data and the folder that its policies stand in."""
    kind, published = published_scores(task)
    data = json.loads(data_path.read_text())
    returns = np.sort(data["returns"])
    best_tenth = float(returns[-max(1, -(-len(returns) // 10)) :].mean())
    data_mean = float(np.mean(data["successes"] if kind == "success" else returns))
    row: dict[str, Any] = {"task": task, "kind": kind, "episodes": len(returns), "good_enough": data["enough"]}
    row |= {"data_mean": data_mean, "data_mean_return": float(returns.mean()), "data_best_tenth_return": best_tenth}
    for method in METHODS:
        scores = read_scores(out, method, task, seeds)
        row |= {method: float(np.mean([s for s, _ in scores])) if scores else None}
        row |= {f"{method} seeds": " ".join(f"{s:.4g}" for s, _ in scores)}
        row |= {f"{method} return": float(np.mean([r for _, r in scores])) if scores else None}
    row["best_published"] = max(published.values())
    row["wanted"] = min(1.5 * data_mean, 0.95 * row["best_published"])
    row["reached"] = row["PWM"] is not None and row["PWM"] >= row["wanted"] and row["PWM return"] >= best_tenth
    return row


def summarise(places: dict[str, pathlib.Path], rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> list[str]:
    """Put the aggregate numbers into sentences."""
    reached = sum(row["reached"] for row in rows)
    lines = [
        f"PWM reaches the smaller of 1.5 times the data's mean and 0.95 of the best published score, and the mean "
        f"return of the data's best tenth, on {reached} of {len(rows)} tasks."
    ]
    planned = [row for row in rows if row["planning"] is not None]
    if len(planned) < len(rows):
        return [*lines, "Planning is missing for some tasks, so that there is no comparison with it yet."]
    better = sum(row["planning"] > row["data_mean"] for row in rows)
    lines.append(f"Planning with the same model beats the data's mean on {better} of {len(rows)} tasks.")
    scale = {row["task"]: 1.0 if row["kind"] == "success" else 1_000.0 for row in rows}
    tables = []
    for method in ("PWM", "planning"):
        scores = [
            [s / scale[task] for s, _ in read_scores(place, method, task, seeds)] for task, place in places.items()
        ]
        fewest = min(map(len, scores))
        tables.append(np.array([own[:fewest] for own in scores]))
    statistics: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
        "Ratio of the IQMs": lambda a, b: iqm(a) / max(iqm(b), 1e-9),
        "Median ratio by task": lambda a, b: float(np.median(a.mean(1) / np.maximum(b.mean(1), 1e-9))),
    }
    for name, statistic in statistics.items():
        value, low, high = interval(statistic, *tables)
        lines.append(f"{name}, PWM over planning: {value:.2f} (95 % bootstrap over tasks: {low:.2f} to {high:.2f}).")
    return lines


def report(
    data: pathlib.Path, places: dict[str, pathlib.Path], title: str, seeds: Sequence[int], results: pathlib.Path
) -> None:
    """Write table.csv, table.md and scores.png, of the tasks whose policies stand in `places`."""
    from matplotlib.figure import Figure

    rows = [make_row(data / task / "state.json", place, task, seeds) for task, place in places.items()]
    rounded = [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    write_rows(results / "table.csv", rounded)

    def number(row: dict[str, Any], name: str) -> str:
        value = row[name]
        return "" if value is None else f"{value:.2f}" if row["kind"] == "success" else f"{value:.0f}"

    columns = ["data_mean", *METHODS, "best_published", "wanted"]
    lines = [
        "| task | score is | data: episodes | data: mean | data: best tenth (return) | PWM (return) | "
        + " | ".join([*METHODS, "best published", "wanted", "reached"])
        + " |",
        "|" + "---|" * (9 + len(METHODS)),
    ]
    for row in rows:
        cells = [row["task"], row["kind"], str(row["episodes"]), number(row, "data_mean")]
        cells.append(f"{row['data_best_tenth_return']:.0f}")
        cells.append("" if row["PWM return"] is None else f"{row['PWM return']:.0f}")
        cells += [number(row, name) for name in columns[1:]]
        lines.append("| " + " | ".join([*cells, "yes" if row["reached"] else "no"]) + " |")
    lines += ["", *summarise(places, rows, seeds)]
    with atomic_write(results / "table.md") as file:
        file.write(("\n".join(lines) + "\n").encode())
    print("\n".join(lines))

    figure = Figure(figsize=(max(8.0, 1.6 * len(rows) + 2.0), 4.4), dpi=110, layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(columns[:-1])
    for index, name in enumerate(columns[:-1]):
        heights = [
            np.nan if row[name] is None else row[name] / (1.0 if row["kind"] == "success" else 1_000.0) for row in rows
        ]
        axes.bar(np.arange(len(rows)) + index * width, heights, width, label=name.replace("_", " "))
    axes.set_xticks(np.arange(len(rows)) + 0.4, list(places), rotation=30, ha="right")
    axes.set(ylabel="return / 1000, or success", title=f"{title}, {len(seeds)} seed(s) of extraction")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=4, frameon=False)
    with atomic_write(results / "scores.png") as file:
        figure.savefig(file, format="png")


def main() -> None:
    """Run the stages that are asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", default="all", choices=("all", "data", "model", "policies", "report"))
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of extraction (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, help="what to make; all without")
    parser.add_argument("--most", type=int, default=100_000, help="decisions on a task (default: %(default)s)")
    parser.add_argument("--benchmark", type=pathlib.Path, help="take its buffers, on tasks scored by return")
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="of float32 products")
    parser.add_argument("--separate", action="store_true", help="a model for each task instead of one for all")
    parser.add_argument("--size", default="5M", help="of a model for all (default: %(default)s)")
    parser.add_argument("--model-updates", type=int, default=20_000, help="default: %(default)s")
    parser.add_argument("--model-batch-size", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--updates", type=int, default=3_000, help="of each policy (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=10, help="to score each on (default: %(default)s)")
    parser.add_argument("--planning-episodes", type=int, default=10, help="the same of planning (default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "multitask_study")
    parser.add_argument("--results", type=pathlib.Path, help="default: as said above")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    torch.set_float32_matmul_precision(arguments.precision)
    stage, tasks = arguments.stage, tuple(arguments.tasks)
    if stage in ("all", "data"):
        for task in tasks:
            collect(task, arguments.out / "data" / task, arguments.most, arguments.benchmark)
    data, separate = arguments.out / "data", arguments.separate
    places = {task: arguments.out / "separate" / task if separate else arguments.out for task in tasks}
    if stage in ("all", "model", "policies"):
        dataset = join(tasks, arguments.out)
        fields = {"updates": arguments.model_updates, "batch_size": arguments.model_batch_size}
        fields |= {"learning_rate_schedule": "cosine", "progress_bar": True, "device": "cpu"}
        for group in [(task,) for task in tasks] if separate else [tasks]:
            own, place = dataset.of_tasks(*group), places[group[0]]
            size, widths = (SEPARATE_SIZE, widths_of_pwm(own)) if separate else (arguments.size, {})
            model = pretrain(own, size, **fields, out=place / "model", world_model_kwargs=widths)
            if stage != "model":
                run_policies(arguments, own, model, place)
    if stage in ("all", "report"):
        name = "single_task_study" if separate else "multitask_study"
        title = "a model for each task" if separate else "one multi-task model"
        report(data, places, title, arguments.seeds, arguments.results or ROOT / "results" / name)


if __name__ == "__main__":
    main()
