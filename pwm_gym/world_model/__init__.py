"""The world model of TD-MPC2 and PWM: its shapes, its parts, and one task's share of it."""

from pwm_gym.world_model.config import PRESETS, WorldModelConfig
from pwm_gym.world_model.model import WorldModel

__all__ = ["PRESETS", "WorldModel", "WorldModelConfig"]
