"""Other people's checkpoints, from a file or the Hugging Face hub, without executing their pickles."""

from pwm_gym.checkpoints.pwm import load_pwm
from pwm_gym.checkpoints.tdmpc2 import export_tdmpc2, load_tdmpc2

__all__ = ["export_tdmpc2", "load_pwm", "load_tdmpc2"]
