"""Shapes and arithmetic of a world model, its published sizes, and the tasks that it was made for."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from pwm_gym.networks import ACTIVATIONS

__all__ = ["PRESETS", "WorldModelConfig"]

# Sizes of TD-MPC2 (arXiv:2310.16828, table 8), named after its total parameter count at 80 tasks.
PRESETS: dict[str, dict[str, int]] = {
    "1M": {"latent_dim": 128, "encoder_dim": 256, "encoder_layers": 1, "mlp_dim": 384},
    "5M": {"latent_dim": 512, "encoder_dim": 256, "encoder_layers": 1, "mlp_dim": 512},
    "19M": {"latent_dim": 768, "encoder_dim": 1024, "encoder_layers": 2, "mlp_dim": 1024},
    "48M": {"latent_dim": 768, "encoder_dim": 1792, "encoder_layers": 3, "mlp_dim": 1792},
    "317M": {"latent_dim": 1376, "encoder_dim": 4096, "encoder_layers": 4, "mlp_dim": 4096},
}
_PRESET_NUM_Q = {"1M": 2, "317M": 8}  # and 5 for the others
_REGULARIZERS = ("simnorm", "none", "spectral_norm")
_DEFAULT_DISCOUNT = 0.99


@dataclasses.dataclass(frozen=True)
class WorldModelConfig:
    """Everything that fixes a world model's shape and arithmetic; it travels in every checkpoint.

    A multi-task model (num_tasks >= 1) reads observations and actions padded with zeros on the right to the widest
    task's, and an embedding of the task. `tasks`, `observation_dims` and `action_dims` say what is not padding; one
    name with num_tasks 0 is that of a single-task model's task.

    Example:
        >>> WorldModelConfig.preset("5M", observation_dim=24, action_dim=6).latent_dim
        512
        >>> WorldModelConfig(24, 6, tasks=("walker-walk", "cup-catch"), action_dims=(6, 2)).num_tasks
        2
    """

    observation_dim: int  # O, width of a preprocessed observation, with padding
    action_dim: int  # A, with padding
    latent_dim: int = 512  # Z
    encoder_dim: int = 256  # width of the encoder's hidden layers
    encoder_layers: int = 1  # hidden layers of the encoder
    mlp_dim: int = 512  # width of the two hidden layers of dynamics, reward, termination, value and policy prior
    num_tasks: int = 0  # 0: one task and no task embedding
    task_dim: int = 96  # width of the task embedding where there is one
    regularizer: str = "simnorm"  # of the latent: "simnorm", "none", or "spectral_norm" on encoder and dynamics
    simnorm_dim: int = 8  # features in a SimNorm group
    normalize_observations: bool = False  # by running statistics, in front of the encoder; of a single task only
    activation: str = "mish"  # of hidden layers, and of the latent without SimNorm: "mish" or "relu"
    num_bins: int = 101  # bins of the categoricals over rewards and values; 1 for scalars in task units
    vmin: float = -10.0  # lowest bin, in symlog units
    vmax: float = 10.0  # highest bin, in symlog units
    reward_in_task_units: bool = True  # False: PWM's released code, which maximises the expectation in bin space
    termination_head: bool = True  # predict the end of episodes
    num_q: int = 0  # members of TD-MPC2's value ensemble, at least 2; 0 for none
    dropout: float = 0.01  # in the first layer of the value ensemble, while it is trained
    policy_prior: bool = False  # have TD-MPC2's policy prior
    tasks: tuple[str, ...] = ()  # names, in the order of the task index
    observation_dims: tuple[int, ...] = ()  # each task's own width of an observation; () where nothing is padded
    action_dims: tuple[int, ...] = ()  # each task's own width of an action; () where nothing is padded
    discounts: tuple[float, ...] = ()  # γ of each task's values, one without tasks; () for 0.99

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
        if self.num_bins < 1 or self.vmin >= self.vmax:
            raise ValueError(f"expected num_bins >= 1 and vmin < vmax, got {self.num_bins}, {self.vmin}, {self.vmax}.")
        if self.num_q < 0 or self.num_q == 1 or not 0.0 <= self.dropout < 1.0:
            raise ValueError(
                f"`num_q` must be 0 or >= 2, because two members are compared, and `dropout` in [0, 1), got "
                f"{self.num_q} and {self.dropout}."
            )
        self._check_tasks()
        if self.normalize_observations and self.num_tasks:
            raise ValueError(
                f"`normalize_observations` is for a single task, whose observations have one scale, got it with "
                f"{self.num_tasks} tasks. Leave it False."
            )

    def _check_tasks(self) -> None:
        if len(self.tasks) > 1 and self.num_tasks == 0:
            object.__setattr__(self, "num_tasks", len(self.tasks))
        if len(self.tasks) not in (0, self.num_tasks or 1) or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(
                f"expected one name in `tasks` for each of {self.num_tasks or 1} tasks, all different, got "
                f"{self.tasks}."
            )
        for name, count in (
            ("observation_dims", self.num_tasks),
            ("action_dims", self.num_tasks),
            ("discounts", self.num_tasks or 1),
        ):
            if len(getattr(self, name)) not in (0, count):
                raise ValueError(f"`{name}` must have {count} entries, one for each task, got {getattr(self, name)}.")
        for name, width in (("observation_dims", self.observation_dim), ("action_dims", self.action_dim)):
            if any(not 1 <= own <= width for own in getattr(self, name)):
                raise ValueError(f"`{name}` must be in 1..{width}, the padded width, got {getattr(self, name)}.")
        if any(not 0.0 <= discount <= 1.0 for discount in self.discounts):
            raise ValueError(f"`discounts` must be in [0, 1], got {self.discounts}.")

    @classmethod
    def preset(
        cls, size: str, *, observation_dim: int, action_dim: int, planning: bool = False, **overrides: Any
    ) -> Self:
        """Make the configuration of a published size.

        Args:
            size: "1M", "5M", "19M", "48M" or "317M".
            observation_dim: Width of a preprocessed observation.
            action_dim: Width of an action.
            planning: Have TD-MPC2's value ensemble, of this size's number of members, and its policy prior.
            **overrides: Any other field of this class.

        Raises:
            ValueError: If the size is unknown.
        """
        if size not in PRESETS:
            raise ValueError(f"`size` must be one of {tuple(PRESETS)}, got {size!r}.")
        fields: dict[str, Any] = {"observation_dim": observation_dim, "action_dim": action_dim, **PRESETS[size]}
        if planning:
            fields |= {"num_q": _PRESET_NUM_Q.get(size, 5), "policy_prior": True}
        return cls(**{**fields, **overrides})

    @property
    def conditioning_dim(self) -> int:
        """Width of what every part is conditioned on beside its input: the task embedding, or 0."""
        return self.task_dim if self.num_tasks else 0

    def task_index(self, task: int | str | None) -> int | None:
        """Find a task by name or index.

        Args:
            task: A name in `tasks` or an index; None, or its own name, for a single-task model; None for the only one.

        Returns:
            The index, or None for a single-task model.

        Raises:
            ValueError: If the model has no such task.
        """
        if isinstance(task, str) and task in self.tasks:
            return self.tasks.index(task) if self.num_tasks else None
        if task is None and self.num_tasks == 1:
            return 0
        known = isinstance(task, int) and 0 <= task < self.num_tasks
        if (task is None) != (self.num_tasks == 0) or not (task is None or known):
            expected = f"in 0..{self.num_tasks - 1}: this world model is multi-task" if self.num_tasks else "None"
            names = f" or one of {self.tasks}" if self.tasks else ""
            raise ValueError(f"`task` must be {expected}{names}, got {task!r}.")
        return task  # type: ignore[return-value]

    def for_task(self, task: int | str) -> Self:
        """Make the configuration of a single-task model of one of the tasks, without padding.

        Raises:
            ValueError: If there is no such task.
        """
        index = self.task_index(task)
        if index is None:
            return self
        return dataclasses.replace(
            self,
            observation_dim=self.observation_dims[index] if self.observation_dims else self.observation_dim,
            action_dim=self.action_dims[index] if self.action_dims else self.action_dim,
            num_tasks=0,
            tasks=self.tasks[index : index + 1],
            observation_dims=(),
            action_dims=(),
            discounts=self.discounts[index : index + 1],
        )

    @property
    def all_discounts(self) -> tuple[float, ...]:
        """γ of each task's values; of one without tasks."""
        return self.discounts or (_DEFAULT_DISCOUNT,) * max(self.num_tasks, 1)
