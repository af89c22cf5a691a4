"""Measure the gradients of MuJoCo rollouts against central differences, and what they cost.

For each task: from states that random actions led to, the gradient of the sum of all rewards and of a random direction
of all observations over h steps, with respect to all h actions, is compared with central differences of whole rollouts
of the same simulation. Then: env steps per second forward, and forward with backward, for 1 and 2 threads.

    python benchmarks/gradient_accuracy.py                       # all tasks, results/ground_truth/gradients.{csv,md}
    python benchmarks/gradient_accuracy.py --tasks Hopper-v5     # one, printed only
"""

from __future__ import annotations

import argparse
import pathlib
import time
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from tables import write_rows
from torch import Tensor

import pwm_gym
from pwm_gym.differentiable import DifferentiableVectorEnv

TASKS = (
    "pwm_gym/cartpole-swingup-v0",
    "pwm_gym/pendulum-swingup-v0",
    "pwm_gym/reacher-easy-v0",
    "pwm_gym/cheetah-run-v0",
    "pwm_gym/walker-walk-v0",
    "pwm_gym/hopper-hop-v0",
    "Hopper-v5",
    "Humanoid-v5",
)
SMALLEST_DIFFERENCE = 1e-7  # of an action, in units of its range: of the central differences


def make(task: str, num_envs: int, integrator: str | None, num_threads: int = 1) -> Any:
    """Make the task in float64 that ends no episode by itself."""
    kwargs: dict[str, Any] = {} if task.startswith("pwm_gym/") else {"terminate_when_unhealthy": False}
    return pwm_gym.make_differentiable(
        task,
        num_envs,
        horizon=10**6,
        autoreset_mode=AutoresetMode.DISABLED,
        integrator=integrator,
        num_threads=num_threads,
        dtype=torch.float64,
        **kwargs,
    )


def random_actions(env: DifferentiableVectorEnv, steps: int, share: float, generator: torch.Generator) -> Tensor:
    """Draw actions, (steps, B, A), uniform in this share of their range."""
    space: Any = env.single_action_space
    low, high = torch.as_tensor(space.low).double(), torch.as_tensor(space.high).double()
    unit = 2.0 * torch.rand(steps, env.num_envs, len(low), generator=generator, dtype=torch.float64) - 1.0
    return (low + high) / 2 + share * unit * (high - low) / 2


def objective(env: Any, state: np.ndarray, actions: Tensor, direction: Tensor) -> Tensor:
    """Sum rewards and one direction of the observations along a rollout, (B,)."""
    env.set_state(state)
    total = torch.zeros(env.num_envs, dtype=torch.float64)
    for action in actions:
        observations, rewards, *_ = env.step(action)
        total = total + rewards + observations @ direction
    return total


def errors(env: Any, horizon: int, warm_up: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Compare gradients at h = `horizon`: relative errors (B,), and the gradients' norms (B,)."""
    env.reset(seed=0)
    with torch.no_grad():
        for action in random_actions(env, warm_up, 0.4, generator):
            env.step(action)
    state = env.get_state()
    direction = torch.randn(env.single_observation_space.shape[0], generator=generator, dtype=torch.float64)
    direction /= direction.norm()
    actions = random_actions(env, horizon, 0.8, generator).requires_grad_()
    objective(env, state, actions, direction).sum().backward()
    gradient: Any = actions.grad
    central = torch.zeros_like(actions)
    with torch.no_grad():
        for t in range(horizon):
            for j in range(actions.shape[-1]):
                shift = torch.zeros_like(actions)
                shift[t, :, j] = SMALLEST_DIFFERENCE
                ahead, behind = (objective(env, state, actions + sign * shift, direction) for sign in (1.0, -1.0))
                central[t, :, j] = (ahead - behind) / (2.0 * SMALLEST_DIFFERENCE)
    norm = central.square().sum((0, 2)).sqrt()
    return (gradient - central).square().sum((0, 2)).sqrt() / norm, norm


def speed(task: str, integrator: str | None, num_threads: int, seconds: float) -> tuple[float, float]:
    """Measure env steps per second, forward and forward with backward over 16 steps.

    One thread is timed by the processor, so that other processes don't count; two are timed by the clock on the wall.
    """
    env = make(task, 8, integrator, num_threads)
    generator = torch.Generator().manual_seed(0)
    rates = []
    for gradients in (False, True):
        env.reset(seed=0)
        steps, clock = 0, time.process_time if num_threads == 1 else time.perf_counter
        start = clock()
        while clock() - start < seconds:
            env.detach()
            actions = random_actions(env, 16, 0.4, generator).requires_grad_(gradients)
            total = torch.zeros(8, dtype=torch.float64)
            for action in actions:
                observations, rewards, *_ = env.step(action)
                total = total + rewards + observations.sum(-1)
            if gradients:
                total.sum().backward()
            steps += 16 * 8
        rates.append(steps / (clock() - start))
    env.close()
    return rates[0], rates[1]


def measure(task: str, integrator: str | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one task."""
    env = make(task, arguments.num_envs, integrator)
    row: dict[str, Any] = {"task": task.removeprefix("pwm_gym/"), "integrator": integrator or "its own"}
    for horizon in arguments.horizons:
        relative, norm = errors(env, horizon, arguments.warm_up, torch.Generator().manual_seed(horizon))
        row |= {f"median h={horizon}": f"{relative.median():.1e}", f"worst h={horizon}": f"{relative.max():.1e}"}
        row[f"gradient norm h={horizon}"] = f"{norm.median():.2g}"
    env.close()
    for threads in (1, 2):
        forward, both = speed(task, integrator, threads, arguments.seconds)
        row |= {f"forward/s, {threads} thread(s)": round(forward), f"with backward/s, {threads} thread(s)": round(both)}
    return row


def write(rows: list[dict[str, Any]], out: pathlib.Path) -> None:
    """Write the table, as csv and as Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / "gradients.csv", rows)
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    (out / "gradients.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=None, help="ids; all of the table, which is then written")
    parser.add_argument("--integrator", default=None, help="MuJoCo's name of one to use instead of the task's own")
    parser.add_argument("--num-envs", type=int, default=8)
    parser.add_argument("--horizons", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--warm-up", type=int, default=20, help="steps of random actions before")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each speed measurement")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/ground_truth"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    jobs = [(task, arguments.integrator) for task in arguments.tasks or TASKS]
    if arguments.tasks is None:
        jobs += [("Hopper-v5", "implicitfast")]
    rows = []
    for task, integrator in jobs:
        rows.append(measure(task, integrator, arguments))
        print(rows[-1], flush=True)
    if arguments.tasks is None:
        write(rows, arguments.out)


if __name__ == "__main__":
    main()
