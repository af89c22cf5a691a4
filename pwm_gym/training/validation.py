"""How well a world model predicts held-out experience open loop: errors and reward correlation along the horizon."""

from __future__ import annotations

import csv
import io
import os
from typing import NamedTuple

import numpy as np
import torch

from pwm_gym.datasets import OfflineDataset
from pwm_gym.serialization import atomic_write
from pwm_gym.world_model import WorldModel

__all__ = ["TaskValidation", "plot_validation", "validate", "write_validation"]

_LEGEND = 12  # tasks up to which a plot names each


class TaskValidation(NamedTuple):
    """Open-loop predictions of one task, over N windows of H steps."""

    latent_error: np.ndarray  # (H,), |z_t - h(o_t)|² over |h(o_0) - h(o_t)|²: 1 is no better than standing still
    reward_error: np.ndarray  # (H,), mean |R(z_t, a_t) - r_t|, in task units
    reward_correlation: np.ndarray  # (H,), Pearson's, over the windows; NaN where all rewards are the same
    imagined_returns: np.ndarray  # (N,), sums of predicted rewards over a window
    real_returns: np.ndarray  # (N,), the same of real ones


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    spread = a.std() * b.std()
    return float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread > 1e-12 else float("nan")


@torch.no_grad()
def validate(
    world_model: WorldModel, dataset: OfflineDataset, horizon: int = 16, windows: int = 256, seed: int = 0
) -> dict[str, TaskValidation]:
    """Predict windows of real experience from their first observation and their actions alone.

    Args:
        world_model: Of the dataset's tasks.
        dataset: Episodes that the model was not trained on.
        horizon: Steps H; fewer where a task's episodes are shorter.
        windows: Windows N of each task.
        seed: Of their draw.

    Returns:
        {task: what came out}.

    Raises:
        ValueError: If the model lacks one of the tasks, or the dataset is empty.
    """
    results = {}
    for name in dataset.tasks:
        own = dataset.of_tasks(name)
        if own.num_episodes == 0:
            continue
        model = world_model.for_task(name if world_model.config.num_tasks else None).eval()
        rng = np.random.default_rng(seed)
        batch = own.sample_windows(windows, own.longest_window(horizon), rng)
        observations, actions = batch.observations.flatten(0, 1), batch.actions.to(model.device, model.dtype)
        encoded = model.encode(model.preprocess(observations)).unflatten(0, (len(actions) + 1, windows))  # (H+1, N, Z)
        z, latents, predicted = encoded[0], [], []
        for action in actions:
            z, reward = model(z, action)
            latents.append(z)
            predicted.append(reward)
        missed = (torch.stack(latents) - encoded[1:]).square().mean((1, 2))  # (H,)
        moved = (encoded[0] - encoded[1:]).square().mean((1, 2))  # (H,)
        imagined, real = torch.stack(predicted).double().cpu().numpy(), batch.rewards.double().cpu().numpy()  # (H, N)
        results[name] = TaskValidation(
            (missed / moved).double().cpu().numpy(),
            np.abs(imagined - real).mean(1),
            np.array([_correlation(a, b) for a, b in zip(imagined, real, strict=True)]),
            imagined.sum(0),
            real.sum(0),
        )
    if not results:
        raise ValueError("expected episodes to validate on, got an empty dataset. Hold some out.")
    return results


def write_validation(results: dict[str, TaskValidation], path: str | os.PathLike[str]) -> None:
    """Write a table, one row for each task and step, atomically.

    Args:
        results: From `validate`.
        path: The file, .csv.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "step", "latent_error", "reward_error", "reward_correlation"])
    for name, result in results.items():
        columns = result.latent_error, result.reward_error, result.reward_correlation
        for step, values in enumerate(zip(*columns, strict=True), 1):
            writer.writerow([name, step, *(f"{value:.6g}" for value in values)])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def plot_validation(results: dict[str, TaskValidation], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw reward correlation and latent error along the horizon, and imagined against real returns, by task.

    Args:
        results: From `validate`.
        path: The picture, .png; written atomically.
        title: Its title.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('a plot needs matplotlib: pip install "pwm-gym[examples]"') from error
    figure = Figure(figsize=(14.0, 4.2), dpi=110, layout="constrained")
    correlation, latent, returns = figure.subplots(1, 3)
    for index, (name, result) in enumerate(results.items()):
        steps, style = np.arange(1, len(result.latent_error) + 1), {"color": f"C{index % 10}", "label": name}
        correlation.plot(steps, result.reward_correlation, marker="o", markersize=3, **style)
        latent.plot(steps, result.latent_error, marker="o", markersize=3, **style)
        returns.scatter(result.real_returns, result.imagined_returns, s=8, alpha=0.5, **style)
    lowest = min(min(r.real_returns.min(), r.imagined_returns.min()) for r in results.values())
    highest = max(max(r.real_returns.max(), r.imagined_returns.max()) for r in results.values())
    returns.plot([lowest, highest], [lowest, highest], color="black", linewidth=1, linestyle="--")
    correlation.set(
        title="reward correlation", xlabel="open-loop step", ylim=(min(0.0, correlation.get_ylim()[0]), 1.02)
    )
    latent.set(title="latent error (1: no better than standing still)", xlabel="open-loop step")
    latent.set_ylim(bottom=0.0)
    returns.set(title="return of a window", xlabel="real", ylabel="imagined")
    for axes in (correlation, latent, returns):
        axes.grid(alpha=0.3)
    if len(results) <= _LEGEND:
        correlation.legend(loc="best", frameon=False)
    figure.suptitle(title)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
