"""Networks of first-order agents as SB3 policies: encoder and latent actor, and values of latents and of actions."""

from __future__ import annotations

import copy
import dataclasses
import os
from typing import Any, Self

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.utils import get_device
from torch import Tensor, nn

from pwm_gym.agents.averaging import WeightAverage
from pwm_gym.agents.latent_actor import LatentActor
from pwm_gym.networks import EnsembleMLP, Mish
from pwm_gym.normalization import RunningMoments
from pwm_gym.serialization import atomic_write, from_json, load_tensors, to_json
from pwm_gym.training import make_model_optimizer
from pwm_gym.world_model import WorldModel, WorldModelConfig

__all__ = [
    "PWMActor",
    "PWMCritic",
    "PWMPolicy",
    "ReturnScale",
    "SafeFile",
    "default_world_model_config",
    "make_world_model",
]

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
    fields = {**dims, **overrides}
    if size is not None:
        return WorldModelConfig.preset(size, **fields)
    latent, width = (256, 384) if fields["observation_dim"] >= _LARGE_OBSERVATION else (128, 256)
    return WorldModelConfig(**{"latent_dim": latent, "encoder_dim": width, "mlp_dim": width, **fields})


def make_world_model(
    observation_space: spaces.Space,
    action_space: spaces.Space,
    world_model_kwargs: dict[str, Any],
    features_extractor_class: type[BaseFeaturesExtractor] | None = None,
    features_extractor_kwargs: dict[str, Any] | None = None,
) -> WorldModel:
    """Make a policy's world model.

    Args:
        observation_space: Real observation space.
        action_space: Real action space.
        world_model_kwargs: {"size": a preset} and any field of `WorldModelConfig`.
        features_extractor_class: Goes in front of the encoder; None to flatten observations.
        features_extractor_kwargs: Its arguments beside the observation space.

    Raises:
        TypeError: If a space is of a kind that a world model can't take.
        ValueError: If the spaces don't fit, or `features_extractor_kwargs` come without a class.
    """
    extractor = None
    if features_extractor_class is not None:
        extractor = features_extractor_class(observation_space, **(features_extractor_kwargs or {}))
        world_model_kwargs = {"observation_dim": extractor.features_dim, **world_model_kwargs}
    config = default_world_model_config(observation_space, action_space, **world_model_kwargs)
    world_model = WorldModel(config, observation_space, action_space, extractor)
    if features_extractor_kwargs and extractor is None:  # said after what a space's kind is refused for
        raise ValueError("expected features_extractor_class beside features_extractor_kwargs, got None.")
    return world_model


class ReturnScale(RunningMoments):
    """Running standard deviation of imagined returns, which the actor's loss is divided by (PWM's `ret_rms`)."""

    def update(self, returns: Tensor) -> Tensor:
        """Merge returns (B,) into the running statistics and give the new deviation, (); (K,) from (K, B)."""
        self.merge(returns.movedim(-1, 0))
        return self.deviation()


class SafeFile(BasePolicy):
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


# Pink exploration noise is a mean of AR(1) processes, each a quarter as quick as the one before; the first is white.
_PINK_DECAYS = tuple(1.0 - 0.25**k for k in range(5))  # φ of x' = φ x + √(1 - φ²) ε


class PWMActor(SafeFile):
    """The part that acts: world model (for its encoder) and latent actor, from real observations to actions.

    Deterministic actions come from the average of recent weights, of encoder and latent actor alike, once
    `update_average` was called; exploring ones from the latest.

    Args:
        observation_space: Real observation space.
        action_space: Real action space.
        world_model_kwargs: {"size": a preset} and any field of `WorldModelConfig`.
        net_arch: Widths of the actor's hidden layers.
        activation_fn: Activation class of the actor.
        log_std_init: Initial log σ.
        log_std_min: Lower bound of log σ.
        use_sde: Explore with gSDE; see `LatentActor` and `reset_noise`.
        pink_noise: Without gSDE, explore with noise of spectrum 1/f from step to step instead of white noise; at each
            step its distribution is the policy's. (Eberhard et al., ICLR 2023, "Pink Noise Is All You Need")
        features_extractor_class: Goes in front of the world model's encoder; None to flatten observations.
        features_extractor_kwargs: Its arguments beside the observation space.
        averaged_share: Share of the updates that the average runs over, in [0, 1]; 0 for the latest weights alone.
        normalize_images: Not used; SB3 passes it.

    Raises:
        TypeError: If a space is of a kind that a world model can't take.
        ValueError: If `features_extractor_kwargs` come without a class, or `averaged_share` is out of range.
    """

    noise: Tensor | None

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        world_model_kwargs: dict[str, Any],
        net_arch: list[int],
        activation_fn: type[nn.Module],
        log_std_init: float,
        log_std_min: float,
        use_sde: bool = False,
        pink_noise: bool = True,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        averaged_share: float = 0.0,
        normalize_images: bool = False,
    ) -> None:
        super().__init__(observation_space, action_space, squash_output=True, normalize_images=False)
        self.world_model = make_world_model(
            observation_space, action_space, world_model_kwargs, features_extractor_class, features_extractor_kwargs
        )
        config = self.world_model.config
        self.latent_actor = LatentActor(
            config.latent_dim, config.action_dim, net_arch, activation_fn, log_std_init, log_std_min, use_sde
        )
        self._arguments = {
            "net_arch": net_arch,
            "activation_fn": activation_fn,
            "log_std_init": log_std_init,
            "log_std_min": log_std_min,
            "use_sde": use_sde,
            "pink_noise": pink_noise,
            "features_extractor_class": features_extractor_class,
            "features_extractor_kwargs": features_extractor_kwargs,
            "averaged_share": averaged_share,
        }
        self._pink_noise = pink_noise
        self._averaged_share = averaged_share
        self._make_average()
        self.generator: torch.Generator | None = None  # of exploration noise; None for torch's global one
        self.register_buffer(
            "noise", None, persistent=False
        )  # gSDE's ε in use, (n_envs, F, A), or the last pink noise's parts, (n_envs, K, A)

    @property  # type: ignore[override]
    def features_extractor(self) -> BaseFeaturesExtractor | None:
        """The features extractor; the world model owns it."""
        return self.world_model.features_extractor

    @features_extractor.setter
    def features_extractor(self, _: BaseFeaturesExtractor | None) -> None:
        """Let SB3's constructor set its default."""

    def _get_constructor_parameters(self) -> dict[str, Any]:
        config = dataclasses.asdict(self.world_model.config)
        return {**super()._get_constructor_parameters(), "world_model_kwargs": config, **self._arguments}

    def get_std(self) -> Tensor:
        """Give σ, (A,), or with gSDE the σ_ij of the exploration matrices, (F, A)."""
        return self.latent_actor.get_std()

    def reset_noise(self, n_envs: int = 1) -> None:
        """Draw new exploration matrices for gSDE, one for each of `n_envs`; without gSDE there is nothing to draw.

        A batch of another size than `n_envs` explores with the first of them, as in SB3.
        """
        if self.latent_actor.use_sde:
            self.noise = self.latent_actor.sample_noise(n_envs, self.generator)

    def _exploration_noise(self, count: int) -> Tensor:
        if not self.latent_actor.use_sde:
            return self._pink(count) if self._pink_noise else self.latent_actor.sample_noise(count, self.generator)
        if self.noise is None:
            self.reset_noise(count)
        assert self.noise is not None
        return self.noise if len(self.noise) == count else self.noise[:1]

    def _pink(self, count: int) -> Tensor:
        """Go on with the noise of `count` envs: ε_t = Σ_k x_k,t / √K of unit variance, (count, A)."""
        parts = len(_PINK_DECAYS)
        fresh = self.latent_actor.sample_noise(count * parts, self.generator).unflatten(0, (count, parts))  # (B, K, A)
        if self.noise is not None and len(self.noise) == count:
            decay = fresh.new_tensor(_PINK_DECAYS).unsqueeze(-1)  # (K, 1)
            fresh = decay * self.noise + (1.0 - decay.square()).sqrt() * fresh
        self.noise = fresh
        return fresh.sum(1) / parts**0.5

    def _acting_modules(self) -> dict[str, nn.Module]:
        modules = {"encoder": self.world_model.encoder, "latent_actor": self.latent_actor}
        extractor = self.world_model.features_extractor
        return modules if extractor is None else {**modules, "features_extractor": extractor}

    def _make_average(self) -> None:
        share = self._averaged_share
        self.average = WeightAverage(self._acting_modules(), share) if share else None

    def adopt(self, world_model: WorldModel) -> None:
        """Take this very model from now on, of the same widths as the own."""
        self.world_model = world_model
        self._make_average()

    def update_average(self) -> None:
        """Count the weights as they are now into the average that acts deterministically."""
        if self.average is not None:
            self.average.update(self._acting_modules())

    def reset_average(self) -> None:
        """Let the latest weights act until the next `update_average`: for when they were set from outside."""
        if self.average is not None:
            self.average.reset()

    def forward(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        """Act on a batch of real observations; returns actions in [-1, 1], (B, A)."""
        model = self.world_model
        if deterministic and self.average is not None and self.average.started:
            modules = dict(self.average.copies.items())
            z = modules["encoder"](model.preprocess(observation, modules.get("features_extractor")))
            return modules["latent_actor"](z)[0]
        z = model.encode(model.preprocess(observation))
        return self.latent_actor(z, None if deterministic else self._exploration_noise(len(z)))[0]

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        return self(observation, deterministic)


class PWMCritic(nn.Module):
    """The ensemble V_e(z) that PWM learns, and what it makes of an action: Q(o, a), as SB3's critics answer.

    Args:
        actor: Has the world model, which stays its own.
        value: V, on latents. It alone is learned, and holds all of this module's parameters.
    """

    def __init__(self, actor: PWMActor, value: EnsembleMLP) -> None:
        super().__init__()
        self.value = value
        self.gamma = 0.99  # γ of the values; the agent puts its own here
        self._actor = (actor,)  # in a tuple, so that its weights are not listed as the critic's too

    @property
    def features_extractor(self) -> BaseFeaturesExtractor | None:
        """The features extractor; the world model owns it."""
        return self._actor[0].features_extractor

    def forward(self, observation: PyTorchObs, actions: Tensor) -> tuple[Tensor, ...]:
        """Estimate how good actions are, by one step of the world model and the value of where it leads.

            Q_e(o, a) = R(z, a) + γ (1 - T(z')) V_e(z'),    z = h(o),  z' = d(z, a)

        Args:
            observation: Batch of real observations, as `policy.obs_to_tensor` gives them.
            actions: (B, A) or (B, *action_shape), in [-1, 1], as `policy.actor` answers and replay buffers store them.

        Returns:
            Q_e, (B, 1) for each member e of the ensemble, in task units, differentiable in the actions.
        """
        world_model = self._actor[0].world_model
        z = world_model.encode(world_model.preprocess(observation))  # (B, Z)
        next_z, reward = world_model(z, actions.flatten(1))  # (B, Z), (B,)
        q = reward + self.gamma * (1.0 - world_model.termination(next_z)) * self.value(next_z)  # (E, B)
        return tuple(q.unsqueeze(-1))  # E times (B, 1)


class PWMPolicy(SafeFile):
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
        use_sde: Explore with gSDE (see `LatentActor`); the agent's argument of that name puts it here.
        pink_noise: Without gSDE, explore with pink noise instead of white noise (see `PWMActor`).
        features_extractor_class: An SB3 features extractor in front of the world model's encoder, trained by the
            model's loss; None to flatten observations.
        features_extractor_kwargs: Its arguments beside the observation space.
        averaged_share: Deterministic actions come from the average of the weights over about this share of the
            updates (see `WeightAverage`); 0 for the latest weights.
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
        use_sde: bool = False,
        pink_noise: bool = True,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        averaged_share: float = 0.03,
        world_model_kwargs: dict[str, Any] | None = None,
        model_learning_rate: float = 5e-4,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(observation_space, action_space, squash_output=True, normalize_images=False)
        arch = {"pi": [256, 128], "qf": [256, 128]} if net_arch is None else net_arch
        actor_arch, critic_arch = (arch["pi"], arch["qf"]) if isinstance(arch, dict) else (arch, arch)
        self._arguments = {
            "net_arch": net_arch,
            "activation_fn": activation_fn,
            "n_critics": n_critics,
            "log_std_init": log_std_init,
            "log_std_min": log_std_min,
            "use_sde": use_sde,
            "pink_noise": pink_noise,
            "features_extractor_class": features_extractor_class,
            "features_extractor_kwargs": features_extractor_kwargs,
            "averaged_share": averaged_share,
            "world_model_kwargs": world_model_kwargs,
            "model_learning_rate": model_learning_rate,
            "optimizer_class": optimizer_class,
            "optimizer_kwargs": optimizer_kwargs,
        }
        self.actor = PWMActor(
            observation_space,
            action_space,
            world_model_kwargs or {},
            actor_arch,
            activation_fn,
            log_std_init,
            log_std_min,
            use_sde,
            pink_noise,
            features_extractor_class,
            features_extractor_kwargs,
            averaged_share,
        )
        value = EnsembleMLP(n_critics, self.world_model.config.latent_dim, critic_arch, activation_fn)
        self.critic = PWMCritic(self.actor, value)
        self.critic_target = PWMCritic(self.actor, copy.deepcopy(value).requires_grad_(False))
        self.return_scale = ReturnScale()

        if optimizer_kwargs is None:
            is_adam = optimizer_class is torch.optim.Adam
            optimizer_kwargs = {"betas": (0.7, 0.95), "fused": True} if is_adam else {}
        lr: Any = lr_schedule(1) if lr_schedule else 0.0  # a policy read from a file only acts
        make_optimizer: Any = optimizer_class
        self.actor_optimizer = make_optimizer(self.actor.latent_actor.parameters(), lr=lr, **optimizer_kwargs)
        self.critic_optimizer = make_optimizer(self.critic.parameters(), lr=lr, **optimizer_kwargs)
        self.model_learning_rate = model_learning_rate
        self.model_optimizer = make_model_optimizer(self.actor.world_model, model_learning_rate)

    @property
    def world_model(self) -> WorldModel:
        """The world model; the actor owns it, for its encoder."""
        return self.actor.world_model

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = super()._get_constructor_parameters()
        parameters.pop("normalize_images")
        return {**parameters, **self._arguments, "lr_schedule": None}

    def reset_noise(self, n_envs: int = 1) -> None:
        """Draw new exploration matrices for gSDE; see `PWMActor.reset_noise`."""
        self.actor.reset_noise(n_envs)

    def forward(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        """Act on a batch of real observations; returns actions in [-1, 1], (B, A)."""
        return self.actor(observation, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        return self.actor(observation, deterministic)
