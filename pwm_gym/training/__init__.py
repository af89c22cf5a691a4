"""Fitting world models: online and offline, with or without what planners need."""

from pwm_gym.training.adaptation import adapt
from pwm_gym.training.fitting import (
    fast_matmul,
    fit_world_model,
    make_model_optimizer,
    set_learning_rate,
    update_world_model,
    world_model_loss,
)
from pwm_gym.training.pretraining import PAPER, pretrain
from pwm_gym.training.ranks import Ranks
from pwm_gym.training.validation import validate

__all__ = [
    "PAPER",
    "Ranks",
    "adapt",
    "fast_matmul",
    "fit_world_model",
    "make_model_optimizer",
    "pretrain",
    "set_learning_rate",
    "update_world_model",
    "validate",
    "world_model_loss",
]
