"""pwm_gym: learned world models as differentiable Gymnasium envs, and first-order agents with SB3's API."""

from importlib.metadata import PackageNotFoundError, version

from pwm_gym import envs
from pwm_gym.agents import PWM, SHAC, TDMPC2, load_pwm_agent, plan_with
from pwm_gym.checkpoints import export_tdmpc2, load_pwm, load_tdmpc2
from pwm_gym.datasets import OfflineDataset
from pwm_gym.envs.factory import make_differentiable
from pwm_gym.extraction import extract
from pwm_gym.her import HerSequenceReplayBuffer
from pwm_gym.latent_env import LatentVectorEnv
from pwm_gym.planning import Planner
from pwm_gym.replay import DictSequenceReplayBuffer, SequenceReplayBuffer
from pwm_gym.sb3 import LatentObservation, as_sb3_vec_env
from pwm_gym.serialization import UnsafeFileError
from pwm_gym.task_sets import tasks
from pwm_gym.training import adapt, fit_world_model, pretrain
from pwm_gym.world_model import WorldModel, WorldModelConfig

__all__ = [
    "PWM",
    "SHAC",
    "TDMPC2",
    "DictSequenceReplayBuffer",
    "HerSequenceReplayBuffer",
    "LatentObservation",
    "LatentVectorEnv",
    "OfflineDataset",
    "Planner",
    "SequenceReplayBuffer",
    "UnsafeFileError",
    "WorldModel",
    "WorldModelConfig",
    "adapt",
    "as_sb3_vec_env",
    "export_tdmpc2",
    "extract",
    "fit_world_model",
    "load_pwm",
    "load_pwm_agent",
    "load_tdmpc2",
    "make_differentiable",
    "plan_with",
    "pretrain",
    "tasks",
]

try:
    __version__ = version("pwm-gym")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

envs.register()
