"""SHAC's networks as an SB3 policy: actor and values on normalised observations."""

from __future__ import annotations

import copy
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from pwm_gym.agents.latent_actor import LatentActor
from pwm_gym.agents.policies import ReturnScale, SafeFile
from pwm_gym.networks import EnsembleMLP, Mish
from pwm_gym.normalization import Normalizer

__all__ = ["SHACActor", "SHACPolicy"]


class SHACActor(SafeFile):
    """The policy on observations: normalise them, then a squashed Gaussian (see `LatentActor`).

    Args:
        observation_space: A flat Box, (O,).
        action_space: A Box.
        net_arch: Widths of the hidden layers.
        activation_fn: Activation class.
        log_std_init: Initial log σ.
        log_std_min: Lower bound of log σ.
        normalize_observations: Normalise by running statistics.
    """

    use_sde = False

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        net_arch: list[int],
        activation_fn: type[nn.Module],
        log_std_init: float,
        log_std_min: float,
        normalize_observations: bool,
    ) -> None:
        super().__init__(observation_space, action_space, squash_output=True, normalize_images=False)
        self._arguments: dict[str, Any] = {
            "net_arch": net_arch,
            "activation_fn": activation_fn,
            "log_std_init": log_std_init,
            "log_std_min": log_std_min,
            "normalize_observations": normalize_observations,
        }
        width, actions = spaces.flatdim(observation_space), spaces.flatdim(action_space)
        self.normalizer = Normalizer(width, normalize_observations)
        self.latent_actor = LatentActor(width, actions, net_arch, activation_fn, log_std_init, log_std_min)
        self.generator: torch.Generator | None = None  # of exploration noise; None for torch's global one

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = super()._get_constructor_parameters()
        parameters.pop("normalize_images")
        return {**parameters, **self._arguments}

    def sample_noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ε ~ N(0, 1), (count, A)."""
        return self.latent_actor.sample_noise(count, generator)

    def forward(self, z: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Act on observations, (B, O), with noise (B, A) or without: actions in [-1, 1], and -log π, (B,)."""
        return self.latent_actor(self.normalizer(z.to(self.normalizer.mean.dtype)), noise)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        assert isinstance(observation, Tensor), "observations are a Box"
        return self(observation, None if deterministic else self.sample_noise(len(observation), self.generator))[0]


class SHACCritic(nn.Module):
    """The ensemble V_e(o) on normalised observations.

    Args:
        normalizer: The actor's.
        value: The ensemble; it holds all of this module's parameters.
    """

    def __init__(self, normalizer: Normalizer, value: EnsembleMLP) -> None:
        super().__init__()
        self.value = value
        self._normalizer = (normalizer,)  # in a tuple, so that its statistics are stored once

    def forward(self, observations: Tensor) -> Tensor:
        """Evaluate (..., O) as (E, ...)."""
        normalizer = self._normalizer[0]
        return self.value(normalizer(observations.to(normalizer.mean.dtype)))


class SHACPolicy(SafeFile):
    """Actor, critics and statistics of SHAC, for flat observations.

    Args:
        observation_space: A flat Box, (O,).
        action_space: A Box.
        lr_schedule: Learning rate of actor and critics by remaining progress; None for a policy that only acts.
        net_arch: Widths of the hidden layers of actor and critics, or {"pi": [...], "vf": [...]} to tell them apart.
        activation_fn: Activation class of actor and critics.
        n_critics: Critics in the ensemble, whose minimum counts.
        log_std_init: Initial log standard deviation of the actor.
        log_std_min: Its lower bound.
        normalize_observations: Normalise observations by running statistics.
        optimizer_class: Optimizer of actor and critics.
        optimizer_kwargs: Its arguments; None for Adam's betas (0.7, 0.95), as in SHAC.

    Raises:
        TypeError: If the observations are no flat Box.

    Example:
        >>> import numpy as np
        >>> box = spaces.Box(-1.0, 1.0, (3,), np.float32)
        >>> SHACPolicy(box, box, lambda _: 1e-3).predict(np.zeros(3, np.float32), deterministic=True)[0].shape
        (3,)
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule | None,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = Mish,
        n_critics: int = 2,
        log_std_init: float = -1.0,
        log_std_min: float = -3.0,
        normalize_observations: bool = True,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(observation_space, spaces.Box) or len(observation_space.shape) != 1:
            raise TypeError(f"expected observations in a flat Box, (O,), got {observation_space}.")
        super().__init__(observation_space, action_space, squash_output=True, normalize_images=False)
        arch = {"pi": [128, 128], "vf": [128, 128]} if net_arch is None else net_arch
        actor_arch, critic_arch = (arch["pi"], arch["vf"]) if isinstance(arch, dict) else (arch, arch)
        self._arguments = {
            "net_arch": net_arch,
            "activation_fn": activation_fn,
            "n_critics": n_critics,
            "log_std_init": log_std_init,
            "log_std_min": log_std_min,
            "normalize_observations": normalize_observations,
            "optimizer_class": optimizer_class,
            "optimizer_kwargs": optimizer_kwargs,
        }
        self.actor = SHACActor(
            observation_space,
            action_space,
            actor_arch,
            activation_fn,
            log_std_init,
            log_std_min,
            normalize_observations,
        )
        value = EnsembleMLP(n_critics, observation_space.shape[0], critic_arch, activation_fn)
        self.critic = SHACCritic(self.actor.normalizer, value)
        self.critic_target = SHACCritic(self.actor.normalizer, copy.deepcopy(value).requires_grad_(False))
        self.return_scale = ReturnScale()

        if optimizer_kwargs is None:
            optimizer_kwargs = {"betas": (0.7, 0.95)} if optimizer_class is torch.optim.Adam else {}
        lr: Any = lr_schedule(1) if lr_schedule else 0.0  # a policy read from a file only acts
        make_optimizer: Any = optimizer_class
        self.actor_optimizer = make_optimizer(self.actor.parameters(), lr=lr, **optimizer_kwargs)
        self.critic_optimizer = make_optimizer(self.critic.parameters(), lr=lr, **optimizer_kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = super()._get_constructor_parameters()
        parameters.pop("normalize_images")
        return {**parameters, **self._arguments, "lr_schedule": None}

    def forward(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        """Act on a batch of observations; returns actions in [-1, 1], (B, A)."""
        return self.actor._predict(observation, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        return self.actor._predict(observation, deterministic)
