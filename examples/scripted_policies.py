"""Run Meta-World's own scripted policies in the registered envs: is each task solvable under TD-MPC2's protocol?

    python examples/scripted_policies.py --episodes 10 --out results/tasks/scripted_policies.csv

A policy chooses one action per env step, which the env repeats for two control steps. An episode counts as solved if
its last step is (`success_last`), as TD-MPC2 counts; `success_ever` is Meta-World's own measure, for which these
policies were written: it stops at the first success, and what they would do after it was nobody's concern. So each is
run twice: `script`, as it is to the end, and `hold`, where the hand stays in place, with the same grip, while the task
is solved. With --action-repeat 1 they choose at every control step.
"""

import argparse
import csv
import pathlib
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
from tqdm import tqdm

import pwm_gym


def run(task: str, hold: bool, action_repeat: int, episodes: int, seed: int) -> dict[str, float]:
    """Run a task's scripted policy.

    Args:
        task: One of `pwm_gym.tasks("MT50")`.
        hold: Whether to stay in place while the task is solved.
        action_repeat: Control steps per action.
        episodes: How many episodes to run.
        seed: Seed of the first episode; the others follow from it.

    Returns:
        The share of episodes solved at the last step, at any step, and the mean return.
    """
    env = gym.make(f"pwm_gym/{task}-v0", action_repeat=action_repeat)

    from metaworld.policies import ENV_POLICY_MAP  # after the env has chosen MuJoCo's OpenGL backend

    policy_class: Any = ENV_POLICY_MAP[f"{task.removeprefix('mw-')}-v3"]
    last, ever, returns = [], [], []
    for episode in range(episodes):
        policy = policy_class()
        observation, _ = env.reset(seed=seed if episode == 0 else None)
        action, successes, rewards, truncated = np.zeros(4, np.float32), [False], [], False
        while not truncated:
            if hold and successes[-1]:
                action[:3] = 0  # displacement; action[3] is the grip
            else:
                action = np.clip(policy.get_action(observation.astype(np.float64)), -1, 1).astype(np.float32)
            observation, reward, _, truncated, infos = env.step(action)
            successes.append(infos["is_success"])
            rewards.append(float(reward))
        last.append(successes[-1])
        ever.append(any(successes))
        returns.append(sum(rewards))
    env.close()
    return {
        "success_last": float(np.mean(last)),
        "success_ever": float(np.mean(ever)),
        "mean_return": round(float(np.mean(returns)), 1),
    }


def main() -> None:
    """Run all 50 policies in both manners and write one row for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--action-repeat", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/tasks/scripted_policies.csv"))
    args = parser.parse_args()

    warnings.filterwarnings("ignore", message="Constant")  # the policies ask for more than the action's bounds
    rows: list[dict[str, Any]] = []
    for task in tqdm(pwm_gym.tasks("MT50")):
        for manner in ("script", "hold"):
            figures = run(task, manner == "hold", args.action_repeat, args.episodes, args.seed)
            rows.append({"task": task, "manner": manner, "episodes": args.episodes, **figures})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for manner in ("script", "hold"):
        for measure in ("success_last", "success_ever"):
            mean = np.mean([row[measure] for row in rows if row["manner"] == manner])
            print(f"{manner}: mean {measure} over {len(rows) // 2} tasks = {mean:.3f}")


if __name__ == "__main__":
    main()
