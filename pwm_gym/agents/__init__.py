"""Agents with Stable-Baselines3's API."""

from pwm_gym.agents.policies import PWMPolicy
from pwm_gym.agents.pwm import PWM

__all__ = ["PWM", "PWMPolicy"]
