"""pwm_gym: learned world models as differentiable Gymnasium envs, and first-order agents with SB3's API."""

from importlib.metadata import PackageNotFoundError, version

from pwm_gym import envs
from pwm_gym.agents import PWM, SHAC
from pwm_gym.envs.factory import make_differentiable
from pwm_gym.her import HerSequenceReplayBuffer
from pwm_gym.latent_env import LatentVectorEnv
from pwm_gym.replay import DictSequenceReplayBuffer, SequenceReplayBuffer
from pwm_gym.sb3 import LatentObservation, as_sb3_vec_env
from pwm_gym.serialization import UnsafeFileError
from pwm_gym.training import fit_world_model
from pwm_gym.world_model import WorldModel, WorldModelConfig

__all__ = [
    "PWM",
    "SHAC",
    "DictSequenceReplayBuffer",
    "HerSequenceReplayBuffer",
    "LatentObservation",
    "LatentVectorEnv",
    "SequenceReplayBuffer",
    "UnsafeFileError",
    "WorldModel",
    "WorldModelConfig",
    "as_sb3_vec_env",
    "fit_world_model",
    "make_differentiable",
]

try:
    __version__ = version("pwm-gym")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

envs.register()
