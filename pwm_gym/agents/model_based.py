"""What agents share that fit a world model to a real env: its envs, its replay, and the model as an env."""

from __future__ import annotations

from typing import Any

from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from pwm_gym.agents.base import ResumableAlgorithm
from pwm_gym.her import HerSequenceReplayBuffer
from pwm_gym.latent_env import LatentVectorEnv
from pwm_gym.replay import DictSequenceReplayBuffer, NStepSequenceReplayBuffer, SequenceReplayBuffer
from pwm_gym.sb3 import as_sb3_vec_env
from pwm_gym.world_model import WorldModel

__all__ = ["ModelBasedAlgorithm"]


class ModelBasedAlgorithm(ResumableAlgorithm):
    """An agent whose policy has a world model, which is fitted to windows of a `SequenceReplayBuffer`."""

    policy: Any  # has a `world_model`
    horizon: int  # steps that the agent looks ahead in its model

    @property
    def world_model(self) -> WorldModel:
        """The world model that the policy's encoder belongs to."""
        return self.policy.world_model

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        if isinstance(env, VectorEnv):
            env = as_sb3_vec_env(env)
        return BaseAlgorithm._wrap_env(env, verbose, monitor_wrapper)

    def _setup_model(self) -> None:
        """Set up as SB3 does, with a replay buffer that windows can be sampled from."""
        self._random_states = []
        if self.replay_buffer_class is HerReplayBuffer:
            self.replay_buffer_class = HerSequenceReplayBuffer
        is_dict = isinstance(self.observation_space, spaces.Dict)
        if self.replay_buffer_class is None and self.n_steps == 1:
            self.replay_buffer_class = self._default_replay_buffer_class()
        elif self.replay_buffer_class in (None, NStepSequenceReplayBuffer) and not is_dict:
            self.replay_buffer_class = None  # SB3 warns of any other and puts its own there
            self.replay_buffer = NStepSequenceReplayBuffer(
                self.buffer_size,
                self.observation_space,
                self.action_space,
                self.device,
                self.n_envs,
                self.optimize_memory_usage,
                **{"n_steps": self.n_steps, "gamma": self.gamma, **self.replay_buffer_kwargs},
            )
        elif self.replay_buffer_class is HerSequenceReplayBuffer:  # SB3 refuses to make one without an env
            self._fit_replay_buffer(self.n_envs)
            if self.env is not None:
                self.replay_buffer.set_env(self.env)  # type: ignore[union-attr]
        super()._setup_model()
        if isinstance(self.replay_buffer, NStepSequenceReplayBuffer):
            self.replay_buffer_class = NStepSequenceReplayBuffer

    def _default_replay_buffer_class(self) -> type[ReplayBuffer]:
        return DictSequenceReplayBuffer if isinstance(self.observation_space, spaces.Dict) else SequenceReplayBuffer

    def _fit_replay_buffer(self, n_envs: int) -> None:
        """Make a replay buffer for `n_envs` real envs where there is none yet."""
        if self.replay_buffer is not None and self.replay_buffer.n_envs == n_envs:
            return
        if self.replay_buffer is not None and self.replay_buffer.size() > 0:
            raise ValueError(
                f"expected {self.replay_buffer.n_envs} envs, as many as the replay buffer holds, got {n_envs}. Give "
                f"as many, or drop the data with agent.replay_buffer = None."
            )
        self.replay_buffer_class = self.replay_buffer_class or self._default_replay_buffer_class()
        self.replay_buffer = self.replay_buffer_class(
            self.buffer_size,
            self.observation_space,
            self.action_space,
            device=self.device,
            n_envs=n_envs,
            optimize_memory_usage=self.optimize_memory_usage,
            **self.replay_buffer_kwargs,
        )

    def _first_env(self, env: Any) -> VecEnv:
        """Take the first real env of an agent that had none, of any number of envs."""
        wrapped = self._wrap_env(env, self.verbose)
        check_for_correct_spaces(wrapped, self.observation_space, self.action_space)
        self._fit_replay_buffer(wrapped.num_envs)
        self.n_envs = wrapped.num_envs
        return wrapped

    def make_latent_env(self, num_envs: int = 64, horizon: int | None = None, **kwargs: Any) -> LatentVectorEnv:
        """Make the agent's world model into an env that starts from its replayed experience.

        Args:
            num_envs: Number of envs.
            horizon: Steps until truncation; None for the agent's own.
            **kwargs: Other arguments of `LatentVectorEnv`; `start` or `latents` to start elsewhere.
        """
        if "start" not in kwargs and "latents" not in kwargs:
            kwargs["start"] = self._replayed_starts()
        return LatentVectorEnv(self.world_model, num_envs=num_envs, horizon=horizon or self.horizon, **kwargs)

    def _replayed_starts(self) -> Any:
        replay = self.sequence_replay()
        if self._vec_normalize_env is None:
            return replay
        return lambda count, rng: replay.sample_starts(count, rng, env=self._vec_normalize_env)

    def _begin_training(self, from_replay: bool = True) -> None:
        """Check that there is something to learn from, and somewhere to log to.

        Args:
            from_replay: Whether training needs the replay buffer.

        Raises:
            ValueError: If there is nothing to learn from.
        """
        if from_replay and self.sequence_replay().size() == 0:
            raise ValueError(
                "expected transitions in the replay buffer, got an empty one. Collect some with learn(...), or give "
                "them with load_replay_buffer(...)."
            )
        if not hasattr(self, "_logger"):  # `learn` was never called
            self._logger = Logger(None, [])
