"""Agents with Stable-Baselines3's API."""

from pwm_gym.agents.planning_policy import TDMPC2Policy, plan_with
from pwm_gym.agents.policies import PWMPolicy, default_world_model_config
from pwm_gym.agents.policy_bank import PolicyBank
from pwm_gym.agents.pwm import PWM
from pwm_gym.agents.pwm_files import load_pwm_agent
from pwm_gym.agents.shac import SHAC
from pwm_gym.agents.shac_policy import SHACPolicy
from pwm_gym.agents.tdmpc2 import TDMPC2

__all__ = [
    "PWM",
    "SHAC",
    "TDMPC2",
    "PWMPolicy",
    "PolicyBank",
    "SHACPolicy",
    "TDMPC2Policy",
    "default_world_model_config",
    "load_pwm_agent",
    "plan_with",
]
