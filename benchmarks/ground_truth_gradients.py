"""Gradients and landscapes of one plan of actions, in the true dynamics and in models of them.

A plan is an open-loop sequence of actions from one state, so the same numbers can be varied everywhere: in a model the
state is encoded once and the model goes on alone. `ground_truth_study.py` draws what this module computes.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pwm_gym import (
    LatentVectorEnv,
    OfflineDataset,
    WorldModel,
    WorldModelConfig,
    fit_world_model,
    make_differentiable,
)
from pwm_gym.datasets.storage import Episode

__all__ = ["LearnedDynamics", "TrueDynamics", "VARIANTS", "along_horizon", "collect", "fit", "landscape"]

# What a model regularises its latent by (PWM, arXiv:2407.02466): SimNorm, or an activation only.
VARIANTS: dict[str, dict[str, Any]] = {
    "SimNorm": {"regularizer": "simnorm", "activation": "mish"},
    "Mish": {"regularizer": "none", "activation": "mish"},
    "ReLU": {"regularizer": "none", "activation": "relu"},
}


class Dynamics(Protocol):
    """What plans are played in."""

    def rewards(self, plans: Tensor) -> Tensor:
        """Play N plans, (H, N, A), from the same state: rewards (H, N), 0 after an episode's end, with gradients."""


class TrueDynamics:
    """A task's own dynamics from one state.

    Args:
        task: Id of a task that `make_differentiable` takes.
        warm_up: Random steps to the state that plans start from.
        batch: Plans that are played at once.
        seed: Of the state.
    """

    def __init__(self, task: str, warm_up: int, batch: int, seed: int = 0) -> None:
        env: Any = make_differentiable(task, batch, horizon=10_000, dtype=torch.float64)
        self._env = env
        self.action_dim: int = env.single_action_space.shape[0]
        env.reset(seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(warm_up):
            env.step(0.6 * torch.rand(batch, self.action_dim, generator=generator, dtype=torch.float64) - 0.3)
        self._state = np.repeat(env.get_state()[:1], batch, 0)  # (batch, P)
        self.observation = env.set_state(self._state)[:1].float()  # (1, O)

    def rewards(self, plans: Tensor) -> Tensor:
        """Play N plans, (H, N, A), a batch at a time."""
        return torch.cat([self._play(part) for part in plans.split(len(self._state), 1)], 1)

    def _play(self, plans: Tensor) -> Tensor:
        count = plans.shape[1]
        self._env.set_state(self._state)
        spare = plans.detach()[:, :1].expand(-1, len(self._state) - count, -1)
        return _play(self._env, torch.cat([plans, spare], 1).double())[:, :count]


class LearnedDynamics:
    """A world model from the encoding of one observation, (1, O)."""

    def __init__(self, world_model: WorldModel, observation: Tensor) -> None:
        self._model, self._observation = world_model.requires_grad_(False), observation

    def rewards(self, plans: Tensor) -> Tensor:
        """Play N plans, (H, N, A)."""
        horizon, count = plans.shape[:2]
        env = LatentVectorEnv(self._model, self._observation, count, horizon + 1, termination="none")
        env.reset(seed=0)
        return _play(env, plans.float()).double()


def _play(env: Any, plans: Tensor) -> Tensor:
    alive, rewards = torch.ones(plans.shape[1], dtype=plans.dtype), []  # (N,)
    for actions in plans:
        _, reward, *_, infos = env.step(actions)
        rewards.append(alive * reward)
        alive = alive * infos["continue_prob"]
    return torch.stack(rewards)  # (H, N)


# Models


@functools.lru_cache
def collect(task: str, steps: int, num_envs: int, seed: int) -> OfflineDataset:
    """Collect `steps` steps of each of B envs with uniformly random actions, each held for one to four steps."""
    env: Any = make_differentiable(task, num_envs)
    rng = np.random.default_rng(seed)
    observations, _ = env.reset(seed=seed)
    actions = torch.zeros(env.action_space.shape)
    columns: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for _ in range(steps):
            fresh = torch.from_numpy(rng.random(num_envs) < 0.4).unsqueeze(-1)
            drawn = torch.from_numpy(rng.uniform(-1.0, 1.0, env.action_space.shape).astype(np.float32))
            actions = torch.where(fresh, drawn, actions)
            following, rewards, terminated, truncated, infos = env.step(actions)
            led_to = following
            if "final_obs" in infos:
                led_to = torch.where(infos["_final_obs"].unsqueeze(-1), infos["final_obs"], following)
            columns.append((observations, led_to, actions, rewards, terminated, truncated))
            observations = following
    seen, led, acted, earned, ended, cut = (torch.stack(column).numpy() for column in zip(*columns, strict=True))
    episodes = []
    for b in range(num_envs):
        last = np.union1d(np.flatnonzero(ended[:, b] | cut[:, b]), [steps - 1])
        for first, end in zip([0, *(last[:-1] + 1)], last, strict=True):
            own = slice(first, end + 1), b
            whole = np.concatenate([seen[own], led[end : end + 1, b]])  # (T + 1, O)
            episodes.append(Episode(whole, acted[own], earned[own], bool(ended[end, b]), bool(cut[end, b])))
    return OfflineDataset(episodes, [task])


def fit(task: str, steps: int, updates: int, width: int, seed: int = 0, **arguments: Any) -> WorldModel:
    """Fit a model to random experience.

    Args:
        task: Id of the task.
        steps: Steps of experience, over 16 envs.
        updates: Gradient steps.
        width: Latent features, and hidden ones.
        seed: Of experience, weights and batches.
        **arguments: Of `WorldModelConfig`, such as those in `VARIANTS`.
    """
    experience = collect(task, steps // 16, 16, seed)
    torch.manual_seed(seed)
    dims = experience.observation_dim, experience.action_dim
    arguments |= {"latent_dim": width, "encoder_dim": width, "mlp_dim": width}
    model = WorldModel(WorldModelConfig(*dims, **arguments))
    fit_world_model(model, experience, updates, 128, 8, 0.9, seed=seed)
    return model


# What is measured


def along_horizon(
    dynamics: Dynamics, plan: Tensor, horizons: list[int], samples: int, noise: float, seed: int = 0
) -> dict[str, list[Any]]:
    """Measure the gradient of the return of the first h steps with respect to a noisy plan, for each h.

    With g_i the gradient at the plan with the i-th noise,

        ESNR = Σ_j E[g_j]² / Σ_j Var[g_j]

    (Parmas et al., ICML 2023; PWM, arXiv:2407.02466): large where gradients agree.

    Args:
        dynamics: Where plans are played.
        plan: (H, A).
        horizons: Each h, at most H.
        samples: Noises.
        noise: Their standard deviation.
        seed: Of the noises.

    Returns:
        "norm", the mean of ‖g_i‖; "esnr"; and "mean", E[g], (h A,).
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (len(plan), samples, plan.shape[-1])
    plans = plan.unsqueeze(1) + noise * torch.randn(shape, generator=generator, dtype=plan.dtype)  # (H, N, A)
    plans.requires_grad_()
    returns = dynamics.rewards(plans).cumsum(0)  # (H, N)
    found: dict[str, list[Any]] = {"norm": [], "esnr": [], "mean": []}
    for h in horizons:
        (gradient,) = torch.autograd.grad(returns[h - 1].sum(), plans, retain_graph=True)
        each = gradient[:h].transpose(0, 1).flatten(1).double()  # (N, h A)
        mean = each.mean(0)
        found["norm"].append(float(each.norm(dim=1).mean()))
        found["esnr"].append(float(mean.square().sum() / each.var(0).sum()))
        found["mean"].append(mean)
    return found


@torch.no_grad()
def landscape(
    dynamics: Dynamics, plan: Tensor, horizons: list[int], points: int, reach: float, seed: int = 0
) -> np.ndarray:
    """Evaluate the return along two random directions of the plan.

    Args:
        dynamics: Where plans are played.
        plan: (H, A).
        horizons: Returns of the first h steps, for each h.
        points: Points along each direction.
        reach: How far they go to either side; directions have entries of deviation 1.
        seed: Of the directions.

    Returns:
        (len(horizons), points, points).
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, *plan.shape, generator=generator, dtype=plan.dtype)
    along = torch.linspace(-reach, reach, points, dtype=plan.dtype)
    u, v = torch.meshgrid(along, along, indexing="ij")
    moved = plan.unsqueeze(1) + u.reshape(1, -1, 1) * first.unsqueeze(1) + v.reshape(1, -1, 1) * second.unsqueeze(1)
    returns = dynamics.rewards(moved).cumsum(0)  # (H, points²)
    return returns[[h - 1 for h in horizons]].reshape(-1, points, points).numpy()
