"""The world model of TD-MPC2 and PWM: encoder, latent dynamics, reward and termination."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from pwm_gym.functional import two_hot_cross_entropy, two_hot_decode
from pwm_gym.networks import ACTIVATIONS, SimNorm, mlp
from pwm_gym.serialization import atomic_write, from_json, load_tensors, to_json

__all__ = ["PRESETS", "WorldModel", "WorldModelConfig"]

# Sizes of TD-MPC2 (arXiv:2310.16828, table 8), named after its total parameter count at 80 tasks.
PRESETS: dict[str, dict[str, int]] = {
    "1M": {"latent_dim": 128, "encoder_dim": 256, "encoder_layers": 1, "mlp_dim": 384},
    "5M": {"latent_dim": 512, "encoder_dim": 256, "encoder_layers": 1, "mlp_dim": 512},
    "19M": {"latent_dim": 768, "encoder_dim": 1024, "encoder_layers": 2, "mlp_dim": 1024},
    "48M": {"latent_dim": 768, "encoder_dim": 1792, "encoder_layers": 3, "mlp_dim": 1792},
    "317M": {"latent_dim": 1376, "encoder_dim": 4096, "encoder_layers": 4, "mlp_dim": 4096},
}
_REGULARIZERS = ("simnorm", "none", "spectral_norm")
_FORMAT = "pwm_gym.world_model/1"


@dataclasses.dataclass(frozen=True)
class WorldModelConfig:
    """Everything that fixes a world model's shape and arithmetic; it travels in every checkpoint.

    Example:
        >>> WorldModelConfig.preset("5M", observation_dim=24, action_dim=6).latent_dim
        512
    """

    observation_dim: int  # O, width of a preprocessed observation
    action_dim: int  # A
    latent_dim: int = 512  # Z
    encoder_dim: int = 256  # width of the encoder's hidden layers
    encoder_layers: int = 1  # hidden layers of the encoder
    mlp_dim: int = 512  # width of the two hidden layers of dynamics, reward and termination
    num_tasks: int = 0  # 0: one task and no task embedding
    task_dim: int = 96  # width of the task embedding where there is one
    regularizer: str = "simnorm"  # of the latent: "simnorm", "none", or "spectral_norm" on encoder and dynamics
    simnorm_dim: int = 8  # features in a SimNorm group
    activation: str = "mish"  # of hidden layers, and of the latent without SimNorm: "mish" or "relu"
    num_bins: int = 101  # bins of the reward's categorical
    vmin: float = -10.0  # lowest bin, in symlog units
    vmax: float = 10.0  # highest bin, in symlog units
    reward_in_task_units: bool = True  # False: PWM's released code, which maximises the expectation in bin space
    termination_head: bool = True  # predict the end of episodes

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: If a field is outside its range.
        """
        for name in ("observation_dim", "action_dim", "latent_dim", "encoder_dim", "mlp_dim", "simnorm_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, got {getattr(self, name)}.")
        if self.encoder_layers < 0 or self.num_tasks < 0 or self.task_dim < 1:
            raise ValueError("`encoder_layers` and `num_tasks` must be >= 0 and `task_dim` >= 1.")
        if self.regularizer not in _REGULARIZERS:
            raise ValueError(f"`regularizer` must be one of {_REGULARIZERS}, got {self.regularizer!r}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"`activation` must be one of {tuple(ACTIVATIONS)}, got {self.activation!r}.")
        if self.regularizer == "simnorm" and self.latent_dim % self.simnorm_dim:
            raise ValueError(
                f"`latent_dim` must be a multiple of `simnorm_dim`, got {self.latent_dim} and {self.simnorm_dim}."
            )
        if self.num_bins < 2 or self.vmin >= self.vmax:
            raise ValueError(f"expected num_bins >= 2 and vmin < vmax, got {self.num_bins}, {self.vmin}, {self.vmax}.")

    @classmethod
    def preset(cls, size: str, *, observation_dim: int, action_dim: int, **overrides: Any) -> Self:
        """Make the configuration of a published size.

        Args:
            size: "1M", "5M", "19M", "48M" or "317M".
            observation_dim: Width of a preprocessed observation.
            action_dim: Width of an action.
            **overrides: Any other field of this class.

        Raises:
            ValueError: If the size is unknown.
        """
        if size not in PRESETS:
            raise ValueError(f"`size` must be one of {tuple(PRESETS)}, got {size!r}.")
        return cls(**{"observation_dim": observation_dim, "action_dim": action_dim, **PRESETS[size], **overrides})

    @property
    def conditioning_dim(self) -> int:
        """Width of what every part is conditioned on beside its input: the task embedding, or 0."""
        return self.task_dim if self.num_tasks else 0


def _unbounded(shape: tuple[int, ...]) -> spaces.Box:
    limit = float(np.finfo(np.float32).max)
    return spaces.Box(-limit, limit, shape, np.float32)


class WorldModel(nn.Module):
    """A latent world model: z = h(o), z' = d(z, a), r = R(z, a) and p(end) = T(z').

    TD-MPC2 (arXiv:2310.16828, eq. 1 and 2) without its value and policy prior, which PWM (arXiv:2407.02466) does not
    use. It carries the real observation and action spaces it was made for. Actions are in [-1, 1] here: agents and
    envs scale them from and to the action space.

    Args:
        config: Shapes and arithmetic.
        observation_space: Real observation space; None for an unbounded Box of `config.observation_dim`.
        action_space: Real action space; None for [-1, 1]^A.
        features_extractor: SB3's, to go in front of the encoder and to be fitted with it; its `features_dim` is
            `config.observation_dim`. None to flatten observations.

    Raises:
        TypeError: If a space is of a kind that a world model can't take.
        ValueError: If a space doesn't fit the config.

    Example:
        >>> model = WorldModel(WorldModelConfig.preset("1M", observation_dim=5, action_dim=1))
        >>> z = model.encode(torch.zeros(64, 5))
        >>> model.next(z, torch.zeros(64, 1)).shape, model.reward(z, torch.zeros(64, 1)).shape
        (torch.Size([64, 128]), torch.Size([64]))
    """

    def __init__(
        self,
        config: WorldModelConfig,
        observation_space: spaces.Space | None = None,
        action_space: spaces.Space | None = None,
        features_extractor: BaseFeaturesExtractor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.observation_space = observation_space or _unbounded((config.observation_dim,))
        self.action_space: Any = action_space or spaces.Box(-1.0, 1.0, (config.action_dim,), np.float32)
        self._check_spaces(features_extractor)

        activation = ACTIVATIONS[config.activation]
        spectral = config.regularizer == "spectral_norm"
        latent_activation = SimNorm(config.simnorm_dim) if config.regularizer == "simnorm" else activation()
        hidden = [config.mlp_dim, config.mlp_dim]
        pair = config.latent_dim + config.conditioning_dim + config.action_dim  # (z, embedding, a), in this order

        self.encoder = mlp(
            config.observation_dim + config.conditioning_dim,
            [config.encoder_dim] * config.encoder_layers,
            config.latent_dim,
            activation,
            latent_activation,
            spectral,
        )
        self.dynamics = mlp(pair, hidden, config.latent_dim, activation, latent_activation, spectral)
        self.reward_head = mlp(pair, hidden, config.num_bins, activation)
        self.termination_head = (
            mlp(config.latent_dim + config.conditioning_dim, hidden, 1, activation) if config.termination_head else None
        )
        self.task_embedding = nn.Embedding(config.num_tasks, config.task_dim) if config.num_tasks else None
        self.bins: Tensor
        self.register_buffer("bins", torch.linspace(config.vmin, config.vmax, config.num_bins), persistent=False)
        # 1 once the termination head was shown the end of an episode, a float because SB3 expects floating state.
        self.seen_termination: Tensor
        self.register_buffer("seen_termination", torch.zeros(()))
        self._seen_termination = False  # the same on the host
        self.register_load_state_dict_post_hook(WorldModel._refresh)
        self._initialise()
        self.features_extractor = features_extractor  # as its class initialised it

    def _refresh(self, _incompatible_keys: Any = None) -> None:
        self._seen_termination = bool(self.seen_termination > 0)

    def _initialise(self) -> None:
        """Initialise as TD-MPC2 does: truncated normal of std 0.02, zero biases, a zero last reward layer."""
        linears: list[Any] = [module for module in self.modules() if isinstance(module, nn.Linear)]
        for module in linears:
            # A spectral-normed weight is re-derived from its original, so the original is what is set.
            weight = module.parametrizations.weight.original if hasattr(module, "parametrizations") else module.weight
            nn.init.trunc_normal_(weight, std=0.02)
            nn.init.zeros_(module.bias)
        last: Any = self.reward_head[-1]
        nn.init.zeros_(last.weight)
        if self.task_embedding is not None:
            nn.init.uniform_(self.task_embedding.weight, -0.02, 0.02)

    def _check_spaces(self, features_extractor: BaseFeaturesExtractor | None) -> None:
        for space in (
            self.observation_space.spaces.values()
            if isinstance(self.observation_space, spaces.Dict)
            else [self.observation_space]
        ):
            if is_image_space(space, check_channels=False):
                raise TypeError(
                    f"expected vector observations, got an image space {space}. World models of pixels are not "
                    f"supported: give proprioceptive observations or a vector of features."
                )
            vector = not isinstance(space, spaces.MultiDiscrete) or space.nvec.ndim == 1
            if not vector or not isinstance(
                space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary
            ):
                raise TypeError(
                    f"expected Box, Discrete, MultiDiscrete, MultiBinary or a flat Dict of them, got {space}."
                )
        if not isinstance(self.action_space, spaces.Box):
            raise TypeError(
                f"expected a Box action space, got {self.action_space}. First-order gradients need continuous actions."
            )
        if not np.all(np.isfinite([self.action_space.low, self.action_space.high])):
            raise ValueError(
                f"expected finite action bounds, got {self.action_space}. Wrap the env in RescaleAction(env, -1, 1)."
            )
        width = features_extractor.features_dim if features_extractor else spaces.flatdim(self.observation_space)
        if self.config.observation_dim != width:
            raise ValueError(
                f"expected a space, or a features_extractor, of observation_dim {self.config.observation_dim} as in "
                f"the config, got one of {width}."
            )
        if self.config.action_dim != spaces.flatdim(self.action_space):
            raise ValueError(
                f"expected a space of action_dim {self.config.action_dim} as in the config, got one of "
                f"{spaces.flatdim(self.action_space)}."
            )

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.bins.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters."""
        return self.bins.dtype

    @property
    def latent_space(self) -> spaces.Box:
        """Space of one latent, (Z,): [0, 1] with SimNorm, the finite float32 range without."""
        if self.config.regularizer == "simnorm":
            return spaces.Box(0.0, 1.0, (self.config.latent_dim,), np.float32)
        return _unbounded((self.config.latent_dim,))

    def preprocess(self, observations: Any) -> Tensor:
        """Turn a batch of real observations into the encoder's input.

        Dict entries are flattened and concatenated in the space's own order; discrete ones become one-hot, as in SB3.
        A features extractor gets them unflattened, and gradients flow into it.

        Args:
            observations: Batch of real observations as arrays or tensors, (B, *shape), or a dict of such.

        Returns:
            (B, O), on the model's device and of its dtype.

        Raises:
            ValueError: If the observations don't have the observation space's shape.
        """
        space = self.observation_space
        if isinstance(observations, dict) != isinstance(space, spaces.Dict):
            raise ValueError(f"expected observations of {space}, got {type(observations).__name__}.")
        if isinstance(space, spaces.Dict):
            missing = [key for key in space.spaces if key not in observations]
            if missing:
                raise ValueError(f"expected observations with the keys of {space}, got none for {missing}.")
            parts: Any = {key: self._entry(observations[key], part) for key, part in space.spaces.items()}
        else:
            parts = self._entry(observations, space)
        if self.features_extractor is not None:
            return self.features_extractor(parts)
        return torch.cat(list(parts.values()), -1) if isinstance(parts, dict) else parts

    def _entry(self, observations: Any, space: spaces.Space) -> Tensor:
        """Turn one entry into numbers and flatten it, unless a features extractor wants its shape: (B, ...)."""
        if isinstance(observations, np.ndarray) and not observations.flags.writeable:
            observations = observations.copy()  # torch warns of read-only arrays
        tensor = torch.as_tensor(observations, device=self.device)
        column = isinstance(space, spaces.Discrete) and tensor.shape[1:] == (1,)  # as SB3 stores them
        if tensor.ndim == 0 or not (column or tuple(tensor.shape[1:]) == space.shape):
            shape = ", ".join(["B", *map(str, space.shape or ())])
            raise ValueError(
                f"expected observations of shape ({shape}), got {tuple(tensor.shape)}. The model was fitted on "
                f"{self.observation_space}."
            )
        if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            first = torch.as_tensor(space.start, device=self.device)
            tensor = preprocess_obs(tensor - first, space, normalize_images=False)  # type: ignore[assignment]
        has_shape = self.features_extractor is not None and isinstance(space, spaces.Box | spaces.MultiBinary)
        shape_out = tensor.shape[1:] if has_shape else (spaces.flatdim(space),)
        return tensor.reshape(len(tensor), *shape_out).to(self.dtype)

    def _condition(self, x: Tensor, task: int | Tensor | None) -> Tensor:
        """Append the task embedding, scaled back to norm 1 where it is longer (TD-MPC2's max_norm)."""
        if self.task_embedding is None:
            if task is not None:
                raise ValueError("expected task=None, got a task: this world model was made for a single task.")
            return x
        if task is None:
            raise ValueError(f"expected `task` in 0..{self.config.num_tasks - 1}: this world model is multi-task.")
        index = torch.as_tensor(task, device=self.device)
        embedding = self.task_embedding(index)
        embedding = embedding / embedding.norm(dim=-1, keepdim=True).clamp(min=1.0)
        return torch.cat([x, embedding.expand(*x.shape[:-1], -1)], -1)

    def encode(self, observations: Tensor, task: int | Tensor | None = None) -> Tensor:
        """Encode preprocessed observations, z = h(o).

        Args:
            observations: (..., O), as `preprocess` returns them.
            task: Index of the task, or one for each element; None for a single-task model.

        Returns:
            Latents, (..., Z).
        """
        return self.encoder(self._condition(observations, task))

    def _pair(self, z: Tensor, actions: Tensor, task: int | Tensor | None) -> Tensor:
        return torch.cat([self._condition(z, task), actions], -1)  # (..., Z + E + A)

    def next(self, z: Tensor, actions: Tensor, task: int | Tensor | None = None) -> Tensor:
        """Predict the next latents, z' = d(z, a).

        Args:
            z: (..., Z).
            actions: (..., A), in [-1, 1].
            task: As in `encode`.

        Returns:
            Next latents, (..., Z).
        """
        return self.dynamics(self._pair(z, actions, task))

    def reward_logits(self, z: Tensor, actions: Tensor, task: int | Tensor | None = None) -> Tensor:
        """Predict the reward's categorical over symlog bins, (..., num_bins), for z (..., Z) and actions (..., A)."""
        return self.reward_head(self._pair(z, actions, task))

    def reward(self, z: Tensor, actions: Tensor, task: int | Tensor | None = None) -> Tensor:
        """Predict rewards R(z, a).

        Args:
            z: (..., Z).
            actions: (..., A), in [-1, 1].
            task: As in `encode`.

        Returns:
            (...), in task units, or in symlog units where `config.reward_in_task_units` is False.
        """
        return two_hot_decode(self.reward_logits(z, actions, task), self.bins, self.config.reward_in_task_units)

    def forward(self, z: Tensor, actions: Tensor, task: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predict one step, (`next`, `reward`), from one concatenated input: ((..., Z), (...))."""
        pair = self._pair(z, actions, task)
        reward = two_hot_decode(self.reward_head(pair), self.bins, self.config.reward_in_task_units)
        return self.dynamics(pair), reward

    def termination_logits(self, z: Tensor, task: int | Tensor | None = None) -> Tensor:
        """Predict the log-odds that an episode terminated on arriving at z (..., Z); returns (...).

        Raises:
            ValueError: If the model has no termination head.
        """
        if self.termination_head is None:
            raise ValueError("this model has no termination head. Make it with termination_head=True.")
        return self.termination_head(self._condition(z, task)).squeeze(-1)

    def termination(self, z: Tensor, task: int | Tensor | None = None) -> Tensor:
        """Predict the probability that an episode terminated on arriving at z.

        It is exactly 0 for a model without termination head and for one that never saw an episode terminate.

        Args:
            z: (..., Z).
            task: As in `encode`.

        Returns:
            (...), in [0, 1].
        """
        if not self.predicts_termination:
            return torch.zeros(z.shape[:-1], dtype=z.dtype, device=z.device)
        return torch.sigmoid(self.termination_logits(z, task))

    @property
    def predicts_termination(self) -> bool:
        """Whether `termination` can be other than 0."""
        return self._seen_termination and self.termination_head is not None

    def expect_termination(self) -> None:
        """Switch the termination head on: from now on it is trained and `termination` tells what it predicts."""
        self.seen_termination.fill_(1.0)
        self._refresh()

    def reward_loss(self, z: Tensor, actions: Tensor, rewards: Tensor, task: int | Tensor | None = None) -> Tensor:
        """Score predicted rewards: two-hot cross-entropy, (...), of targets (...) in task units."""
        logits = self.reward_logits(z, actions, task)
        return two_hot_cross_entropy(logits, rewards, self.config.vmin, self.config.vmax)

    def termination_loss(self, z: Tensor, terminated: Tensor, task: int | Tensor | None = None) -> Tensor:
        """Score predicted terminations: binary cross-entropy, (...), of flags (...)."""
        logits = self.termination_logits(z, task)
        return F.binary_cross_entropy_with_logits(logits, terminated.to(logits.dtype), reduction="none")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write config, spaces and weights to one file, atomically. It holds no pickled objects."""
        content = {
            "format": _FORMAT,
            "config": to_json(dataclasses.asdict(self.config)),
            "observation_space": to_json(self.observation_space),
            "action_space": to_json(self.action_space),
            "features_extractor": type(self.features_extractor).__name__ if self.features_extractor else None,
            "state_dict": dict(self.state_dict()),
        }
        with atomic_write(path) as file:
            torch.save(content, file)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        features_extractor: BaseFeaturesExtractor | None = None,
    ) -> Self:
        """Read a model written by `save`.

        Args:
            path: The file.
            device: Where the model goes.
            features_extractor: One like the model's own, where it has one; its weights are then read too.

        Raises:
            FileNotFoundError: If there is no such file.
            UnsafeFileError: If the file holds pickled code; it is not executed.
            ValueError: If the file is truncated, damaged, no world model of ours, or `features_extractor` is missing.
        """
        content = load_tensors(path, device)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(
                f"expected a world model of format {_FORMAT!r} in {os.fspath(path)!r}, got something else."
            )
        extractor_name = content.get("features_extractor")
        if extractor_name is not None and features_extractor is None:
            raise ValueError(f"expected features_extractor={extractor_name}(...): the model was saved with one.")
        try:
            model = cls(
                WorldModelConfig(**from_json(content["config"])),
                from_json(content["observation_space"]),
                from_json(content["action_space"]),
                features_extractor,
            )
            model.load_state_dict(content["state_dict"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"expected a complete world model in {os.fspath(path)!r}, got a damaged one: {error}"
            ) from error
        return model.to(device).eval()
