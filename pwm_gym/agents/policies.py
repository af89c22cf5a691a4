"""Networks of first-order agents as SB3 policies: real observation -> encoder -> latent actor, and a latent critic."""

from __future__ import annotations

import copy
import dataclasses
import os
from typing import Any, Self

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.utils import get_device
from torch import Tensor, nn

from pwm_gym.networks import EnsembleMLP, Mish
from pwm_gym.serialization import atomic_write, from_json, load_tensors, to_json
from pwm_gym.training import make_model_optimizer
from pwm_gym.world_model import WorldModel, WorldModelConfig

__all__ = ["LatentActor", "PWMActor", "PWMPolicy", "ReturnScale", "default_world_model_config"]

_LARGE_OBSERVATION = 17  # from this width on the default world model is the wider one


def default_world_model_config(
    observation_space: spaces.Space, action_space: spaces.Space, size: str | None = None, **overrides: Any
) -> WorldModelConfig:
    """Choose a world model for an env: TD-MPC2's preset `size`, or one that is small enough to learn on a laptop.

    Args:
        observation_space: Real observation space.
        action_space: Real action space.
        size: A preset of `WorldModelConfig`; None for latent 128 and width 256, or 256 and 384 from 17 inputs up.
        **overrides: Any other field of `WorldModelConfig`.
    """
    dims = {"observation_dim": spaces.flatdim(observation_space), "action_dim": spaces.flatdim(action_space)}
    if size is not None:
        return WorldModelConfig.preset(size, **{**dims, **overrides})
    latent, width = (256, 384) if dims["observation_dim"] >= _LARGE_OBSERVATION else (128, 256)
    return WorldModelConfig(**{**dims, "latent_dim": latent, "encoder_dim": width, "mlp_dim": width, **overrides})


class LatentActor(nn.Module):
    """A squashed Gaussian over actions given a latent: a = tanh(μ(z) + σ ε), σ independent of z.

    PWM's actor (arXiv:2407.02466): an MLP of Linear, activation, LayerNorm blocks, and a log standard deviation that
    is a parameter with a lower bound.

    Args:
        latent_dim: Width of a latent Z.
        action_dim: Width of an action A.
        net_arch: Widths of the hidden layers.
        activation_fn: Activation class.
        log_std_init: Initial log σ.
        log_std_min: Lower bound of log σ.
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        net_arch: list[int],
        activation_fn: type[nn.Module],
        log_std_init: float,
        log_std_min: float,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = latent_dim
        for features in net_arch:
            layers += [nn.Linear(width, features), activation_fn(), nn.LayerNorm(features)]
            width = features
        self.mean = nn.Sequential(*layers, nn.Linear(width, action_dim))
        self.log_std = nn.Parameter(torch.full((action_dim,), log_std_init))
        self.log_std_min = log_std_min

    def forward(self, z: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Act on latents.

        Args:
            z: (..., Z).
            noise: ε ~ N(0, 1), (..., A); None for the deterministic action tanh(μ).

        Returns:
            Actions in [-1, 1], (..., A), and the entropy estimate -log π(a|z), (...). Both are differentiable;
            for the deterministic action the second is that of ε = 0.
        """
        mean = self.mean(z)
        log_std = self.log_std.clamp(min=self.log_std_min)
        noise = torch.zeros_like(mean) if noise is None else noise
        pre_tanh = mean + log_std.exp() * noise
        # -log N(ε) + log σ + log(1 - tanh²(u)), and log(1 - tanh²(u)) = 2 (log 2 - u - softplus(-2u))
        squash = 2.0 * (np.log(2.0) - pre_tanh - nn.functional.softplus(-2.0 * pre_tanh))
        entropy = (0.5 * noise.square() + 0.5 * np.log(2.0 * np.pi) + log_std + squash).sum(-1)
        return torch.tanh(pre_tanh), entropy


class ReturnScale(nn.Module):
    """Running standard deviation of imagined returns, which the actor's loss is divided by (PWM's `ret_rms`)."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.var: Tensor
        self.count: Tensor
        for name, value in (("mean", 0.0), ("var", 1.0), ("count", 1e-4)):
            self.register_buffer(name, torch.tensor(value))

    @torch.no_grad()
    def update(self, returns: Tensor) -> Tensor:
        """Merge a batch of returns (B,) into the running statistics, and give the new standard deviation, ()."""
        batch_mean, batch_var, batch_count = returns.mean(), returns.var(correction=0), returns.numel()
        total = self.count + batch_count
        delta = batch_mean - self.mean
        moment = self.var * self.count + batch_var * batch_count + delta.square() * self.count * batch_count / total
        self.mean += delta * batch_count / total
        self.var.copy_(moment / total)
        self.count.copy_(total)
        return (self.var + 1e-5).sqrt()


class _SafeFile(BasePolicy):
    """SB3's policy `save` and `load` without pickled objects in the file."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and constructor arguments to one file, atomically."""
        data = to_json(self._get_constructor_parameters())
        with atomic_write(path) as file:
            torch.save({"state_dict": dict(self.state_dict()), "data": data}, file)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "auto") -> Self:
        """Read what `save` wrote.

        Raises:
            UnsafeFileError: If the file holds pickled code; it is not executed.
            ValueError: If the file is truncated, damaged, or of another kind.
        """
        content = load_tensors(path, get_device(device))
        try:
            policy = cls(**from_json(content["data"]))
            policy.load_state_dict(content["state_dict"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"expected a {cls.__name__} in {os.fspath(path)!r}, got something else: {error}"
            ) from error
        return policy.to(get_device(device))


class PWMActor(_SafeFile):
    """The part that acts: world model (for its encoder) and latent actor, from real observations to actions.

    Args:
        observation_space: Real observation space.
        action_space: Real action space.
        world_model: Fields of the world model's config.
        net_arch: Widths of the actor's hidden layers.
        activation_fn: Activation class of the actor.
        log_std_init: Initial log σ.
        log_std_min: Lower bound of log σ.
        normalize_images: Not used; SB3 passes it.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        world_model: dict[str, Any],
        net_arch: list[int],
        activation_fn: type[nn.Module],
        log_std_init: float,
        log_std_min: float,
        normalize_images: bool = False,
    ) -> None:
        super().__init__(observation_space, action_space, squash_output=True, normalize_images=False)
        config = WorldModelConfig(**world_model)
        self.world_model = WorldModel(config, observation_space, action_space)
        self.latent_actor = LatentActor(
            config.latent_dim, config.action_dim, net_arch, activation_fn, log_std_init, log_std_min
        )
        self._arguments = {
            "net_arch": net_arch,
            "activation_fn": activation_fn,
            "log_std_init": log_std_init,
            "log_std_min": log_std_min,
        }
        self.generator: torch.Generator | None = None  # of exploration noise; None for torch's global one

    def _get_constructor_parameters(self) -> dict[str, Any]:
        config = dataclasses.asdict(self.world_model.config)
        return {**super()._get_constructor_parameters(), "world_model": config, **self._arguments}

    def forward(self, observation: PyTorchObs, deterministic: bool = True) -> Tensor:
        """Act on a batch of real observations; returns actions in [-1, 1], (B, A)."""
        z = self.world_model.encode(self.world_model.preprocess(observation))
        noise = None
        if not deterministic:
            shape = (z.shape[0], self.world_model.config.action_dim)
            noise = torch.randn(shape, generator=self.generator, device=z.device, dtype=z.dtype)
        return self.latent_actor(z, noise)[0]

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        return self(observation, deterministic)


class PWMPolicy(_SafeFile):
    """World model, actor and critics of PWM, for every observation space that a world model takes.

    Args:
        observation_space: Real observation space.
        action_space: Real action space.
        lr_schedule: Learning rate of actor and critics by remaining progress; None for a policy that only acts.
        net_arch: Widths of the hidden layers of actor and critics, or {"pi": [...], "qf": [...]} to tell them apart.
        activation_fn: Activation class of actor and critics.
        n_critics: Critics in the ensemble.
        log_std_init: Initial log standard deviation of the actor.
        log_std_min: Its lower bound.
        world_model_kwargs: {"size": a preset} and any field of `WorldModelConfig`.
        model_learning_rate: Learning rate of the world model.
        optimizer_class: Optimizer of actor and critics.
        optimizer_kwargs: Its arguments; None for Adam's betas (0.7, 0.95), as in PWM.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule | None,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = Mish,
        n_critics: int = 3,
        log_std_init: float = -1.0,
        log_std_min: float = -1.427,
        world_model_kwargs: dict[str, Any] | None = None,
        model_learning_rate: float = 5e-4,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(observation_space, action_space, squash_output=True, normalize_images=False)
        config = default_world_model_config(observation_space, action_space, **(world_model_kwargs or {}))
        arch = {"pi": [256, 128], "qf": [256, 128]} if net_arch is None else net_arch
        actor_arch, critic_arch = (arch["pi"], arch["qf"]) if isinstance(arch, dict) else (arch, arch)
        self._arguments = {
            "net_arch": net_arch,
            "activation_fn": activation_fn,
            "n_critics": n_critics,
            "log_std_init": log_std_init,
            "log_std_min": log_std_min,
            "world_model_kwargs": world_model_kwargs,
            "model_learning_rate": model_learning_rate,
            "optimizer_class": optimizer_class,
            "optimizer_kwargs": optimizer_kwargs,
        }
        self.actor = PWMActor(
            observation_space,
            action_space,
            dataclasses.asdict(config),
            actor_arch,
            activation_fn,
            log_std_init,
            log_std_min,
        )
        self.critic = EnsembleMLP(n_critics, config.latent_dim, critic_arch, activation_fn)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.return_scale = ReturnScale()

        if optimizer_kwargs is None:
            is_adam = optimizer_class is torch.optim.Adam
            optimizer_kwargs = {"betas": (0.7, 0.95), "fused": True} if is_adam else {}
        lr: Any = lr_schedule(1) if lr_schedule else 0.0  # a policy read from a file only acts
        make_optimizer: Any = optimizer_class
        self.actor_optimizer = make_optimizer(self.actor.latent_actor.parameters(), lr=lr, **optimizer_kwargs)
        self.critic_optimizer = make_optimizer(self.critic.parameters(), lr=lr, **optimizer_kwargs)
        self.model_optimizer = make_model_optimizer(self.actor.world_model, model_learning_rate)

    @property
    def world_model(self) -> WorldModel:
        """The world model; the actor owns it, for its encoder."""
        return self.actor.world_model

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = super()._get_constructor_parameters()
        parameters.pop("normalize_images")
        return {**parameters, **self._arguments, "lr_schedule": None}

    def forward(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        """Act on a batch of real observations; returns actions in [-1, 1], (B, A)."""
        return self.actor(observation, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        return self.actor(observation, deterministic)
