"""Fitting the world model to windows of real experience."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor, nn

from pwm_gym import bf16
from pwm_gym.functional import clip_gradients
from pwm_gym.progress import show_progress
from pwm_gym.replay import WindowSource
from pwm_gym.training.planning_learner import PlanningLearner
from pwm_gym.training.ranks import Ranks
from pwm_gym.world_model import WorldModel

__all__ = [
    "ModelLoss",
    "fast_matmul",
    "fit_world_model",
    "make_model_optimizer",
    "set_learning_rate",
    "update_world_model",
    "world_model_loss",
]

# Loss weights of TD-MPC2 (arXiv:2310.16828, table 7).
CONSISTENCY_COEF, REWARD_COEF, TERMINATION_COEF, VALUE_COEF = 20.0, 0.1, 1.0, 0.1
ENCODER_LR_SCALE = 0.3  # TD-MPC2's encoder learns more slowly than its other parts
MAX_GRAD_NORM = 20.0


@functools.cache
def _fast_matmul_is_exact() -> bool:
    """Tell whether the "medium" float32 product keeps float32's accuracy here; processors with AMX round to bf16."""
    before = torch.get_float32_matmul_precision()
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    try:
        torch.set_float32_matmul_precision("medium")
        error = (a @ b).double() - a.double() @ b.double()
    finally:
        torch.set_float32_matmul_precision(before)
    return bool(error.abs().max() < 1e-3 * 16.0)  # products are about 16 in size; bf16 is off by 0.05 and more


@contextmanager
def fast_matmul(device: torch.device) -> Iterator[None]:
    """Take float32 matrix products on the CPU through oneDNN, where that is as accurate, and restore the setting.

    On AMD processors MKL, torch's default, runs them at half of oneDNN's speed.
    """
    if device.type != "cpu" or bf16.available() or not _fast_matmul_is_exact():  # "medium" means bf16 to `bf16`
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def make_model_optimizer(world_model: WorldModel, learning_rate: float, **kwargs: Any) -> torch.optim.Adam:
    """Make the model's Adam: encoder and features extractor learn at 0.3 of the rate of the rest, as in TD-MPC2.

    A policy prior is left out: it has a loss and an optimizer of its own (`PlanningLearner`).

    Args:
        world_model: The model.
        learning_rate: Rate of all parts but the encoder.
        **kwargs: Passed to Adam.
    """
    encoder = list(world_model.encoder.parameters())
    if world_model.features_extractor is not None:
        encoder += world_model.features_extractor.parameters()
    elsewhere: list[nn.Parameter] = []
    if world_model.value is not None:
        elsewhere += world_model.value.target.parameters()
    if world_model.policy_prior is not None:
        elsewhere += world_model.policy_prior.parameters()
    ids = {id(p) for p in [*encoder, *elsewhere]}
    rest = [p for p in world_model.parameters() if id(p) not in ids]
    groups = [{"params": encoder, "lr_scale": ENCODER_LR_SCALE}, {"params": rest, "lr_scale": 1.0}]
    optimizer = torch.optim.Adam(groups, lr=learning_rate, fused=True, **kwargs)
    set_learning_rate(optimizer, learning_rate)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set every group's rate to `learning_rate` times the group's "lr_scale", 1 where it has none."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


@bf16.fixed_weights()
def world_model_loss(
    world_model: WorldModel,
    observations: Tensor,
    actions: Tensor,
    rewards: Tensor,
    terminated: Tensor,
    rho: float,
    task: int | Tensor | None = None,
    planning: PlanningLearner | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Score an open-loop unroll of the model against a batch of real windows.

        z_0 = h(o_0),  z_{t+1} = d(z_t, a_t)
        L = 1/H Σ_t ρ^t [20 |z_{t+1} - sg h(o_{t+1})|² + 0.1 CE(R(z_t, a_t), r_t) + 0.1 V_t]
            + mean_t BCE(T(z_{t+1}), end_t)

    TD-MPC2 (arXiv:2310.16828, eq. 3); |.|² is a mean over features. V_t is `PlanningLearner.value_loss`, where one is
    given. Steps after a window's last one count as 0 in the means over windows. The termination term is not discounted
    by ρ: an end is as certain at the last step as at the first.

    Args:
        world_model: The model.
        observations: Preprocessed, (H + 1, B, O).
        actions: (H, B, A), in [-1, 1].
        rewards: (H, B), in task units.
        terminated: (H, B), bool.
        rho: Weight ρ of later steps, in (0, 1].
        task: Index of the task, or one for each window, (B,).
        planning: Learner of values and policy prior; None to leave them out, as PWM does.
        lengths: Steps of each window, (B,); None where all have H.

    Returns:
        The loss, a scalar; its parts without gradient; and the unroll z_0, ..., z_H, (H + 1, B, Z).
    """
    horizon = actions.shape[0]
    weights = rho ** torch.arange(horizon, dtype=rewards.dtype, device=rewards.device) / horizon  # (H,)
    with torch.no_grad():
        targets = world_model.encode(observations[1:], task).to(rewards.dtype)  # (H, B, Z)
    z = world_model.encode(observations[0], task)  # (B, Z)
    latents = [z]
    for t in range(horizon):
        latents.append(world_model.next(latents[-1], actions[t], task))
    unrolled = torch.stack(latents).to(rewards.dtype)  # (H + 1, B, Z); not so already under autocast

    valid = None if lengths is None else torch.arange(horizon, device=lengths.device).unsqueeze(1) < lengths  # (H, B)

    def average(x: Tensor) -> Tensor:
        return (x if valid is None else x * valid).mean(1)  # (H,) from (H, B)

    consistency = average((unrolled[1:] - targets).square().mean(2))  # (H,)
    reward = average(world_model.reward_loss(unrolled[:-1], actions, rewards, task))  # (H,)
    consistency_loss, reward_loss = (weights * consistency).sum(), (weights * reward).sum()
    loss = CONSISTENCY_COEF * consistency_loss + REWARD_COEF * reward_loss
    metrics = {"consistency_loss": consistency_loss.detach(), "reward_loss": reward_loss.detach()}
    if world_model.predicts_termination:
        termination_loss = average(world_model.termination_loss(unrolled[1:], terminated, task)).mean()
        loss = loss + TERMINATION_COEF * termination_loss
        metrics["termination_loss"] = termination_loss.detach()
    if planning is not None:
        value = planning.value_loss(unrolled[:-1], actions, rewards, terminated, targets, task)  # (H, B)
        value_loss = (weights * average(value)).sum()
        loss = loss + VALUE_COEF * value_loss
        metrics["value_loss"] = value_loss.detach()
    metrics["model_loss"] = loss.detach()
    return loss, metrics, unrolled


class ModelLoss(nn.Module):
    """`world_model_loss` as a module, of the kind that several processes can train together (`Ranks.wrap`).

    Args:
        world_model: The model.
        rho: Weight ρ of later steps.
        planning: Learner of values and policy prior; None to leave them out.
    """

    def __init__(self, world_model: WorldModel, rho: float, planning: PlanningLearner | None = None) -> None:
        super().__init__()
        self.world_model, self._rho, self._planning = world_model, rho, planning

    def forward(
        self,
        observations: Tensor,
        actions: Tensor,
        rewards: Tensor,
        terminated: Tensor,
        task: Tensor | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Score windows; arguments and result are those of `world_model_loss`."""
        return world_model_loss(
            self.world_model, observations, actions, rewards, terminated, self._rho, task, self._planning, lengths
        )


def _rows_of(lengths: Tensor, count: int) -> Tensor:
    """Tell which of `count` observations of each window are no repetition of its last, (count B,), bool."""
    return (torch.arange(count, device=lengths.device).unsqueeze(1) <= lengths).flatten()


def update_world_model(
    world_model: WorldModel,
    optimizer: torch.optim.Optimizer,
    replay: WindowSource,
    batch_size: int,
    horizon: int,
    rho: float,
    rng: np.random.Generator | None = None,
    normalizer: VecNormalize | None = None,
    planning: PlanningLearner | None = None,
    ranks: Ranks | None = None,
    make_loss: Callable[[], nn.Module] | None = None,
) -> dict[str, Tensor]:
    """Take one gradient step on a batch of windows, and return the loss's parts.

    Args:
        world_model: The model.
        optimizer: Made by `make_model_optimizer`.
        replay: Where windows come from: a replay buffer or an `OfflineDataset`, with the model's number of tasks.
        batch_size: Windows in a batch.
        horizon: Steps in a window; shorter windows are used as long as no episode is that long.
        rho: Weight of later steps.
        rng: Generator to sample with.
        normalizer: The agent's `VecNormalize`, where it has one.
        planning: Learner of values and policy prior, to learn them too.
        ranks: The processes that train together; `replay` gives each its part of a batch. None alone.
        make_loss: Gives the `ModelLoss` of these that `Ranks.wrap` made; None alone.

    Raises:
        ValueError: If several processes train a model that normalises observations.
    """
    if world_model.normalizer is not None and ranks is not None and ranks.size > 1:
        raise ValueError(
            f"expected a model with normalize_observations=False where several processes train it, got one that would "
            f"count other observations in each of {ranks.size}. Train it in one process."
        )
    length = replay.longest_window(horizon) or min(horizon, 1)  # an empty replay is what the error is then about
    # Where episodes terminate, their last steps have to be seen at each depth of the unroll: a model that is shown them
    # at its end alone doesn't foresee them. Elsewhere there is nothing to learn from windows that are cut short.
    windows = replay.sample_windows(batch_size, length, rng, normalizer, partial=world_model.predicts_termination)
    world_model.train()
    seen: Any = windows.observations
    seen = {k: v.flatten(0, 1) for k, v in seen.items()} if isinstance(seen, dict) else seen.flatten(0, 1)
    if world_model.normalizer is not None:
        once = slice(None) if windows.lengths is None else _rows_of(windows.lengths, length + 1)
        world_model.count({k: v[once] for k, v in seen.items()} if isinstance(seen, dict) else seen[once])
    observations = world_model.preprocess(seen).unflatten(0, (length + 1, -1))  # (H + 1, B, O)
    if not world_model.predicts_termination and world_model.termination_head is not None:
        ended = bool(windows.terminated.any())
        if ended if ranks is None else ranks.any(ended):
            world_model.expect_termination()
    task, lengths = (x if x is None else x.to(world_model.device) for x in (windows.task, windows.lengths))  # (B,)
    loss = ModelLoss(world_model, rho, planning) if make_loss is None else make_loss()
    score, metrics, latents = loss(
        observations,
        windows.actions.to(world_model.device, world_model.dtype),
        windows.rewards.to(world_model.device, world_model.dtype),
        windows.terminated.to(world_model.device),
        task,
        lengths,
    )
    optimizer.zero_grad(set_to_none=True)
    score.backward()
    metrics["model_grad_norm"] = clip_gradients(world_model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    if planning is not None:
        metrics |= planning.update_prior(latents, rho, task, lengths)
    world_model.eval()
    return metrics


def fit_world_model(
    world_model: WorldModel,
    replay: WindowSource,
    updates: int,
    batch_size: int = 256,
    horizon: int = 5,
    rho: float = 0.5,
    learning_rate: float = 5e-4,
    seed: int | None = None,
    progress_bar: bool = False,
) -> dict[str, float]:
    """Fit a world model to stored experience, without touching an environment.

    Args:
        world_model: The model, fitted in place.
        replay: Real experience: a replay buffer or an `OfflineDataset`.
        updates: Gradient steps.
        batch_size: Windows in a batch.
        horizon: Steps in a window. The paper uses 16 on large data; on small data a short unroll extracts better.
        rho: Weight of later steps. The paper uses 0.99 with its horizon of 16.
        learning_rate: Adam's, for all parts but the encoder.
        seed: Seeds the sampling.
        progress_bar: Show rate and remaining time.

    Returns:
        The parts of the loss, averaged over the last tenth of the updates.

    Raises:
        ValueError: If the replay holds no window, or `updates` < 1.
    """
    if updates < 1:
        raise ValueError(f"`updates` must be >= 1, got {updates}.")
    optimizer = make_model_optimizer(world_model, learning_rate)
    rng = np.random.default_rng(seed)
    history: list[dict[str, Tensor]] = []
    with show_progress(updates, "world model", "update", progress_bar) as bar:
        for step in range(updates):
            with fast_matmul(world_model.device):
                metrics = update_world_model(world_model, optimizer, replay, batch_size, horizon, rho, rng)
            if step >= updates - max(1, updates // 10):
                history.append(metrics)
            bar.update()
    return {key: float(torch.stack([m[key] for m in history if key in m]).mean()) for key in history[-1]}
