"""PWM, PPO and SAC in one frozen world model, for equal CPU time, scored on the real env.

    python examples/inside_the_model.py --seeds 0 1 2

For each seed: an agent trains on the real task for a while, and all that is kept of it is its replay buffer, from
random to moderately good, as logged data are. A world model is fitted to that and frozen. Then new policies of PWM, PPO
and SAC (SB3's, unmodified, with its defaults) each train in the same `LatentVectorEnv`, never touching the real env,
until the same CPU time is spent; of each the policy that ten real evaluations liked best is kept and scored on 10 other
episodes. A table and a plot are left in runs/. A seed that is done is not run again; --fresh forgets earlier runs.
"""

import argparse
import copy
import json
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from pwm_gym import (
    PWM,
    LatentObservation,
    LatentVectorEnv,
    SequenceReplayBuffer,
    WorldModel,
    as_sb3_vec_env,
    fit_world_model,
)
from pwm_gym.agents import default_world_model_config
from pwm_gym.evaluation import episode_returns, plot_learning_curves

ENV = "pwm_gym/cartpole-swingup-v0"
PAPER: dict[str, Any] = {"horizon": 16, "tau": 1.0, "ent_coef": 0.0}  # how the paper trains a policy in a fixed model
EVALUATIONS = 10  # real evaluations along a training, not counted in its time


class TimeBudget(BaseCallback):
    """Stop after some CPU seconds of training; score the agent on the real env along the way and keep the best."""

    def __init__(self, seconds: float, score: Callable[[BaseAlgorithm], np.ndarray]) -> None:
        super().__init__()
        self.seconds, self.score = seconds, score
        self.curve: list[tuple[float, list[float]]] = []  # (CPU seconds, returns)
        self.best: dict[str, Any] = {}

    def _on_training_start(self) -> None:
        self._began = time.process_time()

    def _on_step(self) -> bool:
        spent = time.process_time() - self._began
        if spent >= self.seconds * (len(self.curve) + 1) / EVALUATIONS:
            returns = self.score(self.model)
            if returns.mean() > max((np.mean(scores) for _, scores in self.curve), default=-np.inf):
                self.best = copy.deepcopy(self.model.get_parameters())
            self.curve.append((spent, returns.tolist()))
            self._began = time.process_time() - spent
        return len(self.curve) < EVALUATIONS


def collect(seed: int, steps: int, path: pathlib.Path) -> SequenceReplayBuffer:
    """Train on the real env for the data only, or read what an earlier run left."""
    if not path.exists():
        print(f"seed {seed}: {steps:,} real decisions of an agent in training")
        agent = PWM("MlpPolicy", gym.make(ENV), buffer_size=steps, seed=seed).learn(steps, progress_bar=True)
        agent.save_replay_buffer(path)
    return SequenceReplayBuffer.load(path, device="cpu")


def fit(seed: int, data: SequenceReplayBuffer, updates: int, path: pathlib.Path) -> WorldModel:
    """Fit a world model to the data, or read what an earlier run left, and freeze it."""
    if not path.exists():
        torch.manual_seed(seed)
        config = default_world_model_config(data.observation_space, data.action_space)
        world_model = WorldModel(config, data.observation_space, data.action_space)
        fit_world_model(world_model, data, updates, seed=seed, progress_bar=True)
        world_model.save(path)
    return WorldModel.load(path).requires_grad_(False)


def run_seed(seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make data and a model, train the three agents in it, and return their curves and final scores."""
    data = collect(seed, arguments.data_steps, arguments.out / f"seed{seed}.replay")
    world_model = fit(seed, data, arguments.model_updates, arguments.out / f"seed{seed}.model")
    env = gym.make(ENV)

    def latent_env(num_envs: int) -> LatentVectorEnv:
        return LatentVectorEnv(world_model, data, num_envs=num_envs, horizon=16)

    # With 16 envs PPO and SAC come further in the same time than with the 64 that are PWM's batch of rollouts.
    agents: dict[str, BaseAlgorithm] = {
        "PWM": PWM("MlpPolicy", latent_env(64), seed=seed, **PAPER),
        "PPO": PPO("MlpPolicy", as_sb3_vec_env(latent_env(16)), seed=seed, device="cpu"),
        "SAC": SAC("MlpPolicy", as_sb3_vec_env(latent_env(16)), seed=seed, device="cpu"),
    }
    real = {"PWM": env, "PPO": LatentObservation(env, world_model), "SAC": LatentObservation(env, world_model)}
    episodes = data.rewards.ravel()[: data.size() // 500 * 500].reshape(-1, 500).sum(1)
    result: dict[str, Any] = {"seed": seed, "data_mean": episodes.mean(), "data_best": episodes.max(), "agents": {}}
    for name, agent in agents.items():
        budget = TimeBudget(arguments.seconds, lambda a, e=real[name]: episode_returns(a, e, 3, seed=1_000))  # type: ignore[misc]
        agent.learn(10**9, callback=budget)
        agent.set_parameters(budget.best)
        final = episode_returns(agent, real[name], episodes=10, seed=2_000)
        steps = agent.num_timesteps
        print(f"  {name}: {final.mean():6.1f} on the real env after {steps:,} imagined steps")
        result["agents"][name] = {"final": final.tolist(), "curve": budget.curve, "imagined_steps": steps}
    return result


def report(results: list[dict[str, Any]], out: pathlib.Path) -> None:
    """Write the table and the plot."""
    lines = [
        "| seed | data: mean episode | data: best | PWM | PPO | SAC |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['seed']} | {r['data_mean']:.0f} | {r['data_best']:.0f} | "
            + " | ".join(f"{np.mean(r['agents'][name]['final']):.0f}" for name in ("PWM", "PPO", "SAC"))
            + " |"
            for r in results
        ),
    ]
    print("\n".join(lines))
    (out / "table.md").write_text("\n".join(lines) + "\n")
    curves = {}
    for name in ("PWM", "PPO", "SAC"):
        runs = [r["agents"][name]["curve"] for r in results]
        seconds = np.mean([[point[0] for point in run] for run in runs], 0)
        means = np.array([[np.mean(point[1]) for point in run] for run in runs]).T  # (T, seeds)
        curves[name] = (seconds, means)
    title = f"{ENV}: trained in one frozen world model, {len(results)} seed(s)"
    references = {"data, mean": float(np.mean([r["data_mean"] for r in results]))}
    plot_learning_curves(curves, out / "inside_the_model.png", title, "CPU seconds of training", references)
    print(f"{out}/table.md, {out}/inside_the_model.png")


def main() -> None:
    """Run the seeds that are not done yet, then report all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds for each agent (default: %(default)s)")
    parser.add_argument("--data-steps", type=int, default=6_000, help="real decisions (default: %(default)s)")
    parser.add_argument("--model-updates", type=int, default=3_000, help="default: %(default)s")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/inside_the_model"))
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs in --out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so that CPU seconds mean the same for all three

    if arguments.fresh:
        shutil.rmtree(arguments.out, ignore_errors=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in arguments.seeds:
        path = arguments.out / f"seed{seed}.json"
        if not path.exists():
            path.write_text(json.dumps(run_seed(seed, arguments), default=float))
        results.append(json.loads(path.read_text()))
    report(results, arguments.out)


if __name__ == "__main__":
    main()
