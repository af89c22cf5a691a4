"""Learning a task that a multi-task world model was not trained on, from little data."""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3.common.utils import get_device

from pwm_gym.datasets import OfflineDataset
from pwm_gym.functional import frozen
from pwm_gym.training.fitting import fit_world_model
from pwm_gym.training.planning_learner import episode_discount
from pwm_gym.training.pretraining import pretrain
from pwm_gym.world_model import WorldModel

__all__ = ["adapt"]


def adapt(
    world_model: WorldModel,
    dataset: OfflineDataset,
    task: str | None = None,
    *,
    like: str | None = None,
    embedding_updates: int = 500,
    embedding_learning_rate: float = 1e-2,
    updates: int = 2_000,
    batch_size: int = 256,
    horizon: int = 5,
    rho: float = 0.5,
    learning_rate: float = 1e-4,
    seed: int = 0,
    device: torch.device | str = "auto",
    progress_bar: bool = False,
    **settings: Any,
) -> WorldModel:
    """Make a world model of a new task out of a multi-task one.

    First an embedding of the task is learned, with all weights held still; then, with the embedding folded into the
    first layers' biases, all weights are fine-tuned on the task's data. (TD-MPC2, arXiv:2310.16828, fine-tunes all at
    once, online, from the embedding of a similar task: `like`.)

    Args:
        world_model: A multi-task model that does not know the task; it stays as it is.
        dataset: Episodes of the task, and perhaps of others.
        task: Its name in the dataset; None for the dataset's only one.
        like: A task of the model whose embedding to begin with; None for the mean of all.
        embedding_updates: Gradient steps on the embedding alone.
        embedding_learning_rate: Of those.
        updates: Gradient steps on all weights; 0 for the embedding alone.
        batch_size: Windows in a batch.
        horizon: Steps in a window.
        rho: Weight ρ of later steps.
        learning_rate: Of all weights but the encoder's (0.3 of it).
        seed: Of the batches and all other randomness.
        device: Where to train.
        progress_bar: Show rate and remaining time.
        **settings: Further arguments of `pretrain`, such as `out`, to go on after an interruption of the fine-tuning.
            No episode is held out unless `held_out` says so.

    Returns:
        A single-task model, in evaluation mode, for `extract`, `LatentVectorEnv` or `TDMPC2`.

    Raises:
        ValueError: If an argument is out of range, the dataset doesn't have the task or holds numbers that are not
            finite, or the model is for a single task, knows the task already, or can't be taken apart.

    Example:
        >>> import numpy as np
        >>> from pwm_gym.datasets import Episode
        >>> rng = np.random.default_rng(0)
        >>> def episode(task=0):
        ...     steps = rng.normal(size=(31, 3)), rng.uniform(-1, 1, (30, 1)), np.ones(30)
        ...     return Episode(*steps, truncated=True, task=task)
        >>> known = OfflineDataset([episode(i % 2) for i in range(4)], ["stand", "walk"])
        >>> model, new = pretrain(known, "1M", updates=2, batch_size=8), OfflineDataset([episode()], ["run"])
        >>> adapt(model, new, embedding_updates=2, updates=2, batch_size=8).config.tasks
        ('run',)
    """
    for name, value in (("embedding_updates", embedding_updates), ("updates", updates)):
        if value < 0:
            raise ValueError(f"`{name}` must be >= 0, got {value}.")
    if task is None and len(dataset.tasks) != 1:
        raise ValueError(f"expected `task`, one of {dataset.tasks}, for a dataset of several tasks.")
    name = dataset.tasks[0] if task is None else task
    data = dataset.of_tasks(name)
    discount = episode_discount(int(data.lengths.max()))
    model = world_model.for_new_task(name, data.observation_dim, data.action_dim, discount, like).to(get_device(device))
    windows: dict[str, Any] = {"batch_size": batch_size, "horizon": horizon, "rho": rho}
    if embedding_updates:
        with frozen(model):
            model.task_embedding.requires_grad_(True)  # type: ignore[union-attr]
            fit_world_model(
                model,
                data,
                embedding_updates,
                learning_rate=embedding_learning_rate,
                seed=seed,
                progress_bar=progress_bar,
                **windows,
            )
    if not bool(model.embedding(0).isfinite().all()):
        raise ValueError(f"expected finite numbers in the episodes of {name!r}, got NaN or infinity, or diverged.")
    single = model.for_task(name)
    if updates == 0:
        return single
    return pretrain(
        data,
        world_model=single,
        updates=updates,
        learning_rate=learning_rate,
        seed=seed,
        device=device,
        progress_bar=progress_bar,
        **{"held_out": 0.0, **windows, **settings},
    )
