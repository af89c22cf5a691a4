"""The ball and the wall: where the true gradient says nothing, and what a model makes of it."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pwm_gym.envs.torch_physics import TorchBallWall
from pwm_gym.networks import Mish, SimNorm, mlp

__all__ = ["ball_and_wall", "throw"]


def throw(actions: Tensor) -> Tensor:
    """Throw the ball at angles a, (N,): the distances, (N,), in units of 10 m, with gradients."""
    env = _balls(len(actions))
    env.reset(seed=0)
    return env.step(actions.unsqueeze(-1))[1]


@functools.lru_cache
def _balls(count: int) -> TorchBallWall:
    return TorchBallWall(count)


def _fit(model: nn.Module, actions: Tensor, distances: Tensor, updates: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(updates):
        loss = (model(actions.unsqueeze(-1)).squeeze(-1) - distances).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _slope(objective: Any, actions: Tensor) -> Tensor:
    inside = actions.detach().clone().requires_grad_()
    return torch.autograd.grad(objective(inside).sum(), inside)[0]


def _ascend(objective: Any, actions: Tensor, steps: int = 300, rate: float = 0.01) -> Tensor:
    """Climb by steps of `rate` at most, shorter where the slope is below 1."""
    for _ in range(steps):
        actions = (actions + rate * _slope(objective, actions).clamp(-1.0, 1.0)).clamp(-1.0, 1.0)
    return actions


def ball_and_wall(throws: int, updates: int, noise: float = 0.1, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Fit models of different regularisation to random throws, and climb in each and in the truth from everywhere.

    Args:
        throws: Random throws that models are fitted to.
        updates: Gradient steps of each model.
        noise: Deviation of the action's noise, for the smoothed truth: E[J(a + noise ε)].
        seed: Of everything.

    Returns:
        For "true", "true, smoothed", and each model: the return "J" and its "slope" at 201 angles "a"; and where
        climbing from 41 angles "start" ends, as the true return "end". The slope of the smoothed truth is that of its
        J by differences, with "pathwise", the mean of the true slopes under the noise, beside it.
    """
    generator = torch.Generator().manual_seed(seed)
    angles, starts = torch.linspace(-0.999, 0.999, 201), torch.linspace(-0.95, 0.95, 41)
    tried = 2.0 * torch.rand(throws, generator=generator) - 1.0
    distances = throw(tried)
    objectives: dict[str, Any] = {"true": throw}
    latents: dict[str, tuple[nn.Module, Any]] = {
        "SimNorm": (SimNorm(8), Mish),
        "Mish": (Mish(), Mish),
        "ReLU": (nn.ReLU(), nn.ReLU),
    }
    for name, (latent, activation) in latents.items():
        torch.manual_seed(seed)
        model = nn.Sequential(mlp(1, [64], 64, activation, latent), mlp(64, [64], 1, activation))
        _fit(model, tried, distances, updates)
        objectives[f"{name} model"] = lambda a, model=model: model(a.unsqueeze(-1)).squeeze(-1)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, objective in objectives.items():
        value, end = objective(angles).detach(), throw(_ascend(objective, starts))
        found[name] = {"J": value.numpy(), "slope": _slope(objective, angles).numpy(), "end": end.numpy()}
        found[name] |= {"a": angles.numpy(), "start": starts.numpy()}

    noisy = (angles.unsqueeze(-1) + noise * torch.randn(1_000, generator=generator)).clamp(-1.0, 1.0)  # (201, 1000)
    with torch.no_grad():
        smoothed = throw(noisy.flatten()).reshape(noisy.shape).mean(-1).numpy()
    pathwise = _slope(throw, noisy.flatten()).reshape(noisy.shape).mean(-1).numpy()
    slope = np.gradient(smoothed, angles.numpy())
    found["true, smoothed"] = {"a": angles.numpy(), "J": smoothed, "slope": slope, "pathwise": pathwise}
    return found
