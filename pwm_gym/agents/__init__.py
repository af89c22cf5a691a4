"""Agents with Stable-Baselines3's API."""

from pwm_gym.agents.policies import PWMPolicy, default_world_model_config
from pwm_gym.agents.pwm import PWM

__all__ = ["PWM", "PWMPolicy", "default_world_model_config"]
