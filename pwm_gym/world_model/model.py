"""The world model of TD-MPC2 and PWM: encoder, latent dynamics, reward, termination, value and policy prior."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from pwm_gym.functional import two_hot_cross_entropy, two_hot_decode
from pwm_gym.networks import ACTIVATIONS, SimNorm, mlp
from pwm_gym.normalization import Normalizer
from pwm_gym.serialization import atomic_write, from_json, load_tensors, to_json
from pwm_gym.world_model.config import PRESETS, WorldModelConfig
from pwm_gym.world_model.planning_heads import PolicyPrior, PriorSample, ValueEnsemble
from pwm_gym.world_model.real_spaces import check_spaces, flatten_observations, leading, unbounded
from pwm_gym.world_model.single_task import fold_embedding, resize_spaces

__all__ = ["PRESETS", "WorldModel", "WorldModelConfig"]

_FORMAT = "pwm_gym.world_model/1"
_NORMALIZED_LIMIT = 10.0  # deviations from the mean, as in SB3's VecNormalize
_NO_HEADS = "Make one with WorldModelConfig.preset(..., planning=True)."


class WorldModel(nn.Module):
    """A latent world model: z = h(o), z' = d(z, a), r = R(z, a) and p(end) = T(z').

    TD-MPC2 (arXiv:2310.16828, eq. 1 and 2). Its value ensemble Q(z, a) and policy prior, which PWM (arXiv:2407.02466)
    does not use, are there where the config says so. The model carries the real observation and action spaces it was
    made for. Actions are in [-1, 1] here: agents and envs scale them from and to the action space.

    A multi-task model takes observations and actions padded with zeros; what stands in the padding of an action has
    no effect. `for_task` gives the single-task model of one of its tasks, without padding.

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
        self.observation_space = observation_space or unbounded((config.observation_dim,))
        self.action_space: Any = action_space or spaces.Box(-1.0, 1.0, (config.action_dim,), np.float32)
        check_spaces(config, self.observation_space, self.action_space, features_extractor)

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
        self.value = (
            ValueEnsemble(config.num_q, pair, hidden, config.num_bins, activation, config.dropout)
            if config.num_q
            else None
        )
        self.policy_prior = (
            PolicyPrior(config.latent_dim + config.conditioning_dim, hidden, config.action_dim, activation)
            if config.policy_prior
            else None
        )
        self.task_embedding = nn.Embedding(config.num_tasks, config.task_dim) if config.num_tasks else None
        self.action_masks: Tensor | None
        masks = [[float(i < own) for i in range(config.action_dim)] for own in config.action_dims]
        self.register_buffer("action_masks", torch.tensor(masks) if masks else None, persistent=False)
        self.bins: Tensor
        self.register_buffer("bins", torch.linspace(config.vmin, config.vmax, config.num_bins), persistent=False)
        # 1 once the termination head was shown the end of an episode, a float because SB3 expects floating state.
        self.seen_termination: Tensor
        self.register_buffer("seen_termination", torch.zeros(()))
        self._seen_termination = False  # the same on the host
        self.register_load_state_dict_post_hook(WorldModel._refresh)
        self._initialise()
        self.features_extractor = features_extractor  # as its class initialised it
        # Features that are learned are of one scale already.
        learned = features_extractor is not None and any(True for _ in features_extractor.parameters())
        normalizes = config.normalize_observations and not learned
        self.normalizer = Normalizer(config.observation_dim, limit=_NORMALIZED_LIMIT) if normalizes else None

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
        if self.value is not None:
            self.value.initialise()
        if self.task_embedding is not None:
            nn.init.uniform_(self.task_embedding.weight, -0.02, 0.02)

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
        return unbounded((self.config.latent_dim,))

    def preprocess(self, observations: Any, features_extractor: nn.Module | None = None) -> Tensor:
        """Turn a batch of real observations into the encoder's input.

        Dict entries are flattened and concatenated in the space's own order; discrete ones become one-hot, as in SB3.
        A features extractor gets them unflattened instead, and gradients flow into it. With
        `config.normalize_observations` the result, unless it is learned, is then brought to mean 0 and deviation 1 of
        what was given to `count` so far.

        Args:
            observations: Batch of real observations as arrays or tensors, (B, *shape), or a dict of such.
            features_extractor: One like the model's own, to be used instead of it.

        Returns:
            (B, O), on the model's device and of its dtype.

        Raises:
            ValueError: If the observations don't have the observation space's shape.
        """
        extractor = features_extractor or self.features_extractor
        features = self._features(observations, extractor)
        return features if self.normalizer is None else self.normalizer(features)

    def _features(self, observations: Any, extractor: nn.Module | None) -> Tensor:
        keep_shape = extractor is not None
        parts = flatten_observations(observations, self.observation_space, self.device, self.dtype, keep_shape)
        if extractor is not None:
            return extractor(parts)
        return torch.cat(list(parts.values()), -1) if isinstance(parts, dict) else parts

    def count(self, observations: Any) -> None:
        """Count a batch of real observations, as `preprocess` takes them, into the statistics it normalises by."""
        if self.normalizer is not None:
            self.normalizer.merge(self._features(observations, self.features_extractor))

    def _condition(self, x: Tensor, task: int | Tensor | None) -> Tensor:
        """Append the task embedding."""
        if self.task_embedding is None:
            if task is not None:
                raise ValueError("expected task=None, got a task: this world model was made for a single task.")
            return x
        if task is None and self.config.num_tasks > 1:
            raise ValueError(f"expected `task` in 0..{self.config.num_tasks - 1}: this world model is multi-task.")
        task = 0 if task is None else task
        return torch.cat([x, self.embedding(task).expand(*x.shape[:-1], -1)], -1)

    def embedding(self, task: int | Tensor) -> Tensor:
        """Look up embeddings, (..., E), scaled back to norm 1 where they are longer (TD-MPC2's max_norm)."""
        assert self.task_embedding is not None
        embedding = self.task_embedding(torch.as_tensor(task, device=self.device))
        return embedding / embedding.norm(dim=-1, keepdim=True).clamp(min=1.0)

    def action_mask(self, task: int | Tensor | None = None) -> Tensor:
        """Tell a task's own action dimensions, 1, from padding, 0.

        Args:
            task: As in `encode`.

        Returns:
            (A,), or (..., A) for several tasks.
        """
        if self.action_masks is None or task is None:
            return torch.ones(self.config.action_dim, dtype=self.dtype, device=self.device)
        return self.action_masks[torch.as_tensor(task, device=self.device)]

    def discount(self, task: int | Tensor | None = None) -> Tensor:
        """Give γ of a task's values, () or (...) for several tasks."""
        discounts = torch.tensor(self.config.all_discounts, dtype=self.dtype, device=self.device)
        return discounts[0] if task is None else discounts[torch.as_tensor(task, device=self.device)]

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
        if self.action_masks is not None:
            actions = actions * self.action_mask(task)
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

    # What TD-MPC2 plans with

    def q_logits(self, z: Tensor, actions: Tensor, task: int | Tensor | None = None, target: bool = False) -> Tensor:
        """Predict each member's categorical over symlog bins of Q(z, a), (E, ..., num_bins).

        Args:
            z: (..., Z).
            actions: (..., A), in [-1, 1].
            task: As in `encode`.
            target: Ask the slowly moving copies.

        Raises:
            ValueError: If the model has no value ensemble.
        """
        if self.value is None:
            raise ValueError(f"this model has no value ensemble. {_NO_HEADS}")
        return self.value(self._pair(z, actions, task), target)

    def q(
        self,
        z: Tensor,
        actions: Tensor,
        task: int | Tensor | None = None,
        reduce: str = "all",
        target: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Predict values Q(z, a).

        Args:
            z: (..., Z).
            actions: (..., A), in [-1, 1].
            task: As in `encode`.
            reduce: "all" for each member's, or "min" or "mean" over two members drawn at random, as TD-MPC2 does.
            target: Ask the slowly moving copies.
            generator: On the model's device; draws the two members. None for torch's global one.

        Returns:
            (E, ...) for "all", else (...), in task units.

        Raises:
            ValueError: If the model has no value ensemble, or `reduce` is unknown.
        """
        if reduce not in ("all", "min", "mean"):
            raise ValueError(f"`reduce` must be 'all', 'min' or 'mean', got {reduce!r}.")
        logits = self.q_logits(z, actions, task, target)  # (E, ..., num_bins)
        if reduce == "all":
            return two_hot_decode(logits, self.bins)
        pair = torch.randperm(len(logits), generator=generator, device=self.device)[:2]
        values = two_hot_decode(logits[pair], self.bins)  # (2, ...)
        return values.amin(0) if reduce == "min" else values.mean(0)

    def prior(
        self,
        z: Tensor,
        task: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> PriorSample:
        """Sample the policy prior at z, (..., Z): actions in [-1, 1], (..., A), with 0 in the padding, and statistics.

        Args:
            z: (..., Z).
            task: As in `encode`.
            generator: On the model's device; draws the noise. None for torch's global one.
            noise: N(0, 1), to be used instead of drawing some; of a shape that expands to (..., A).

        Raises:
            ValueError: If the model has no policy prior.
        """
        if self.policy_prior is None:
            raise ValueError(f"this model has no policy prior. {_NO_HEADS}")
        shape = (*z.shape[:-1], self.config.action_dim)
        if noise is None:
            noise = torch.randn(shape, generator=generator, dtype=z.dtype, device=z.device)
        mask = None if self.action_masks is None else self.action_mask(task)
        return self.policy_prior(self._condition(z, task), noise.expand(shape), mask)

    # One task of several

    @torch.no_grad()
    def for_task(self, task: int | str | None, share: bool = False) -> WorldModel:
        """Make the single-task model of one of the tasks, which takes that task's own observations and actions.

        The embedding of a fixed task is a constant input, and so it becomes a part of the first layers' biases; the
        weights of padding are dropped. Predictions are the same but for rounding. It is a copy: what this model
        learns later is not in it.

        Args:
            task: Name or index; None for a single-task model.
            share: Copy the first layers only, and have the others' weights in common with this model: for models that
                stay as they are.

        Returns:
            A single-task model in evaluation mode, or this very model where it is for a single task.

        Raises:
            ValueError: If there is no such task, or the model is of a kind that can't be taken apart.
        """
        index, config = self.config.task_index(task), self.config
        if index is None:
            return self
        self._check_divisible()
        single = config.for_task(index)
        observation_space, action_space = self.observation_space, self.action_space
        if config.observation_dims:
            observation_space = leading(observation_space, single.observation_dim)
        if config.action_dims:
            action_space = leading(action_space, single.action_dim)
        weights = resize_spaces(self.state_dict(), config, single.observation_dim, single.action_dim)
        folded = fold_embedding(weights, self.embedding(index), config, single.observation_dim)
        return self._with_weights(single, observation_space, action_space, folded, share)

    @torch.no_grad()
    def for_new_task(
        self, task: str, observation_dim: int, action_dim: int, discount: float | None = None, like: str | None = None
    ) -> WorldModel:
        """Make a model of a task that this one was not trained on: with its weights, and an embedding to be learned.

        The task's first observations and actions are read with the weights that the other tasks' have, which are padded
        to the same width; where it is wider than those, the weights of what is beyond begin at 0. `pwm_gym.adapt` makes
        such a model and trains it.

        Args:
            task: Its name.
            observation_dim: Its width of an observation.
            action_dim: Its width of an action.
            discount: γ of its values; None for the mean over this model's tasks.
            like: A task of this model to begin with the embedding of; None for the mean of all embeddings.

        Returns:
            A model with one task, whose embedding is its `task_embedding`, in evaluation mode. It is a copy.

        Raises:
            ValueError: If this is a single-task model, knows the task, or is of a kind that can't be taken apart.
        """
        config = self.config
        if config.num_tasks == 0 or task in config.tasks:
            raise ValueError(
                f"expected a multi-task model without {task!r} among its tasks, got one of "
                f"{config.tasks or 'a single task'}. Go on training it with pretrain(dataset, world_model=...)."
            )
        self._check_divisible()
        discounts = config.all_discounts
        new = dataclasses.replace(
            config,
            observation_dim=observation_dim,
            action_dim=action_dim,
            num_tasks=1,
            tasks=(task,),
            observation_dims=(),
            action_dims=(),
            discounts=(sum(discounts) / len(discounts) if discount is None else discount,),
        )
        known = self.embedding(torch.arange(config.num_tasks))  # (K, E)
        weights = resize_spaces(self.state_dict(), config, observation_dim, action_dim)
        begin = known.mean(0) if like is None else known[config.task_index(like)]
        weights["task_embedding.weight"] = begin.unsqueeze(0)
        action_space = spaces.Box(-1.0, 1.0, (action_dim,), np.float32)
        return self._with_weights(new, unbounded((observation_dim,)), action_space, weights)

    def _check_divisible(self) -> None:
        if self.config.regularizer == "spectral_norm" or self.features_extractor is not None:
            raise ValueError(
                "expected a model without spectral norm and features extractor to take one task out of, got one with. "
                "Fit a single-task model instead."
            )

    def _with_weights(
        self,
        config: WorldModelConfig,
        observation_space: Any,
        action_space: Any,
        weights: dict[str, Tensor],
        share: bool = False,
    ) -> WorldModel:
        with torch.device("meta"):  # its weights are given
            model = WorldModel(config, observation_space, action_space)
        model.load_state_dict({k: v if share else v.clone() for k, v in weights.items()}, assign=True)
        model.bins = self.bins
        return model.eval()

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
