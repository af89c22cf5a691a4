"""A task that pre-training left out, learned from few of its episodes: adapted from the others' model, or from scratch.

    python benchmarks/unseen_task.py            # after `make multitask-study ARGS=data`; run it again and it goes on
    python benchmarks/unseen_task.py --tasks walker-walk --episodes 5 20 --seeds 0 1

1. One multi-task model is pre-trained on the data of the multi-task study without the tasks given here.
2. From so many episodes of a task, drawn at random from its replay buffer, three models are made: with a new embedding
   alone, with that and fine-tuning (`pwm_gym.adapt`), and from scratch with as many updates in all.
3. From each a policy is extracted, and scored on real episodes. Table and plot go to results/unseen_task/.
"""

import argparse
import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tables import write_rows

from pwm_gym import OfflineDataset, WorldModel, adapt, extract, pretrain
from pwm_gym.benchmark.study import PRECISIONS
from pwm_gym.extraction import published_scores
from pwm_gym.serialization import atomic_write

ROOT = pathlib.Path(__file__).resolve().parents[1]
TASKS = ("walker-walk", "pendulum-swingup")
EMBEDDING_UPDATES, UPDATES = 500, 2_000
METHODS = ("embedding", "embedding and fine-tuning", "from scratch")


def draw_episodes(dataset: OfflineDataset, task: str, count: int, seed: int) -> OfflineDataset:
    """Draw episodes of a task, fewer ones a part of more."""
    episodes = list(dataset.of_tasks(task))
    order = np.random.default_rng(seed).permutation(len(episodes))[:count]
    return OfflineDataset([episodes[i]._replace(task=0) for i in order], [task])


def make_model(method: str, known: WorldModel, data: OfflineDataset, size: str, seed: int) -> WorldModel:
    """Make a model of the task from its episodes."""
    common: dict[str, Any] = {"seed": seed, "device": "cpu"}
    if method == "from scratch":
        return pretrain(data, size, updates=EMBEDDING_UPDATES + UPDATES, held_out=0.0, **common)
    updates = 0 if method == "embedding" else UPDATES
    return adapt(known, data, embedding_updates=EMBEDDING_UPDATES, updates=updates, **common)


def learn(
    known: WorldModel, data: OfflineDataset, method: str, folder: pathlib.Path, arguments: Any, seed: int
) -> None:
    """Make a model and a policy and score it, unless that is done."""
    (task,), result = data.tasks, folder / "result.json"
    if result.exists():
        return
    began = time.process_time()
    model = make_model(method, known, data, arguments.size, seed)
    seconds = time.process_time() - began
    done = extract(model, data, out=folder, updates=arguments.updates, seed=seed)[task]
    returns = data.returns()
    told = {"returns": list(done.returns), "data_mean": float(returns.mean()), "data_best": float(returns.max())}
    with atomic_write(result) as file:
        file.write(json.dumps(told | {"model_seconds": seconds, "policy_seconds": done.cpu_seconds}).encode())
    print(f"{task}, {len(data)} episodes, {method}, seed {seed}: {np.mean(done.returns):.0f}", flush=True)


def folder_of(out: pathlib.Path, task: str, count: int, seed: int, method: str) -> pathlib.Path:
    """Tell where a result stands."""
    return out / f"{task}-{count}-seed{seed}" / method.replace(" ", "_")


def gather(
    out: pathlib.Path, tasks: Sequence[str], counts: Sequence[int], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Make a row for each task, number of episodes and method, of the seeds that there are."""
    rows = []
    for task in tasks:
        for count in counts:
            for method in METHODS:
                paths = [folder_of(out, task, count, seed, method) / "result.json" for seed in seeds]
                found = [json.loads(path.read_text()) for path in paths if path.exists()]
                if found:
                    scores = [float(np.mean(one["returns"])) for one in found]
                    row: dict[str, Any] = {"task": task, "episodes": count, "method": method, "seeds": len(found)}
                    row |= {"return": np.mean(scores), "by seed": " ".join(f"{score:.0f}" for score in scores)}
                    row |= {k: np.mean([one[k] for one in found]) for k in ("data_mean", "data_best")}
                    row |= {k: np.mean([one[k] for one in found]) for k in ("model_seconds", "policy_seconds")}
                    rows.append({k: round(float(v), 1) if isinstance(v, float) else v for k, v in row.items()})
    return rows


def report(rows: Sequence[dict[str, Any]], tasks: Sequence[str], results: pathlib.Path) -> None:
    """Write table.csv and returns.png."""
    write_rows(results / "table.csv", rows)
    figure = Figure(figsize=(4.2 * len(tasks) + 0.6, 3.8), dpi=110, layout="constrained")
    for axes, task in zip(np.atleast_1d(figure.subplots(1, len(tasks))), tasks, strict=True):
        for method in METHODS:
            own = [row for row in rows if (row["task"], row["method"]) == (task, method)]
            axes.plot([row["episodes"] for row in own], [row["return"] for row in own], "o-", label=method)
        data = [row for row in rows if row["task"] == task and row["method"] == METHODS[0]]
        axes.plot([row["episodes"] for row in data], [row["data_mean"] for row in data], "k:", label="mean of the data")
        axes.plot(
            [row["episodes"] for row in data], [row["data_best"] for row in data], "k--", label="best of the data"
        )
        axes.axhline(published_scores(task)[1]["SAC 1M"], color="0.7", label="SAC, 1M frames (published)")
        axes.set_xscale("log")
        axes.set_xticks([row["episodes"] for row in data], [str(row["episodes"]) for row in data])
        axes.minorticks_off()
        axes.set(title=f"{task}, left out of pre-training", xlabel="its episodes", ylabel="return", ylim=(0, 1000))
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    with atomic_write(results / "returns.png") as file:
        figure.savefig(file, format="png")


def main() -> None:
    """Run all that is missing, and write the report of what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", default="all", choices=("all", "model", "report"))
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="to leave out (default: %(default)s)")
    parser.add_argument("--episodes", type=int, nargs="+", default=[5, 20, 100], help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: %(default)s")
    parser.add_argument("--size", default="1M", help="of the model (default: %(default)s)")
    parser.add_argument("--model-updates", type=int, default=20_000, help="default: %(default)s")
    parser.add_argument("--updates", type=int, default=3_000, help="of each policy (default: %(default)s)")
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="of float32 products")
    parser.add_argument("--data", type=pathlib.Path, default=ROOT / "runs" / "multitask_study" / "dataset")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "unseen_task")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "results" / "unseen_task")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    torch.set_float32_matmul_precision(arguments.precision)
    if arguments.stage != "report":
        dataset = OfflineDataset.load(arguments.data)
        others = dataset.of_tasks(*(task for task in dataset.tasks if task not in arguments.tasks))
        folder = arguments.out / "model"
        known = pretrain(
            others, arguments.size, updates=arguments.model_updates, out=folder, progress_bar=True, device="cpu"
        )
    if arguments.stage == "all":
        for seed in arguments.seeds:
            for task in arguments.tasks:
                for count in arguments.episodes:
                    data = draw_episodes(dataset, task, count, seed)
                    for method in METHODS:
                        learn(known, data, method, folder_of(arguments.out, task, count, seed, method), arguments, seed)
    if arguments.stage != "model":
        rows = gather(arguments.out, arguments.tasks, arguments.episodes, arguments.seeds)
        report(rows, arguments.tasks, arguments.results)
        for row in rows:
            print(row)


if __name__ == "__main__":
    main()
