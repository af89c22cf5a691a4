"""What every agent here adds to SB3's off-policy algorithms: safe files, exact resume, and clear errors on bad data."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import torch
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from torch import Tensor

from pwm_gym.agents.files import clear_load_errors, read_agent, with_suffix, write_agent
from pwm_gym.her import HerSequenceReplayBuffer
from pwm_gym.replay import SequenceReplayBuffer
from pwm_gym.serialization import UnsafeFileError, from_json, to_json

__all__ = ["ResumableAlgorithm"]


class ResumableAlgorithm(OffPolicyAlgorithm):
    """SB3's `OffPolicyAlgorithm` on a `SequenceReplayBuffer`, with randomness of its own and files without pickles.

    Subclasses draw from `_rng` (NumPy) and `_generator` (torch), and put detached tensors into `_metrics`, which are
    logged, and read from the device, only when logs are written.
    """

    _rng: np.random.Generator
    _generator: torch.Generator
    _metrics: dict[str, Tensor]
    _random_states: list[Any]  # of each env: the state of its generator before and after its latest reset
    _resumes = False  # whether those states come from a file and no env has them yet

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed the agent's own generators, the env and, as SB3 does, the global ones."""
        super().set_random_seed(seed)
        entropy = int(torch.randint(2**63 - 1, (1,))) if seed is None else seed
        if not hasattr(self, "_rng"):  # the policy holds the generator too, so it is made only once
            self._rng, self._generator = np.random.default_rng(), torch.Generator(self.device)
        self._rng.bit_generator.state = np.random.default_rng(entropy).bit_generator.state
        self._generator.manual_seed(entropy)
        if getattr(self, "actor", None) is not None and hasattr(self.actor, "noise"):
            self.actor.noise = None  # type: ignore[assignment]  # drawn anew at the next step

    def sequence_replay(self) -> SequenceReplayBuffer:
        """Give the replay buffer.

        Raises:
            TypeError: If it is of a class that windows can't be sampled from.
        """
        replay = self.replay_buffer
        if not hasattr(replay, "sample_windows"):
            raise TypeError(
                f"expected a SequenceReplayBuffer to train from, got {type(replay).__name__}. Leave "
                f"replay_buffer_class and n_steps at their defaults, or use HerReplayBuffer."
            )
        return replay  # type: ignore[return-value]

    def dump_logs(self) -> None:
        """Write log data; the latest update's metrics are read from the device here and not before."""
        for name, value in self._metrics.items():
            self.logger.record(f"train/{name}", float(value))
        super().dump_logs()

    def _end_rollout(self, callback: BaseCallback, log_interval: int | None) -> None:
        """End a rollout that was not collected by SB3's code: progress, logs every 25 updates times the interval."""
        self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
        if log_interval is not None and self._n_updates % (25 * log_interval) == 0 and self._n_updates > 0:
            self.dump_logs()
        callback.on_rollout_end()

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        normalizer = self._vec_normalize_env
        self._check_finite("reward", reward if normalizer is None else normalizer.get_original_reward())
        self._check_finite("observation", new_obs if normalizer is None else normalizer.get_original_obs())
        for i in np.flatnonzero(dones):
            last = infos[i].get("terminal_observation")
            if last is not None:
                row = (
                    {k: np.asarray(v)[None] for k, v in last.items()}
                    if isinstance(last, dict)
                    else np.asarray(last)[None]
                )
                self._check_finite("observation", row, int(i))
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def _check_finite(self, name: str, values: Any, first_env: int = 0) -> None:
        """Check rows (B, ...) of envs `first_env`, `first_env` + 1, ..., or a dict of such."""
        for key, array in values.items() if isinstance(values, dict) else [("", values)]:
            finite = np.isfinite(array)
            if finite.all():
                continue
            index = np.argwhere(~finite)[0].tolist()
            self._last_obs = None  # the next `learn` begins with a reset
            spoiled = "" if self._vec_normalize_env is None else ", and the statistics of its VecNormalize from a file"
            raise ValueError(
                f"expected finite numbers from the env, got {array[tuple(index)]} in the "
                f"{f'{name} {key!r}' if key else name} of env {index[0] + first_env}"
                f"{f' at index {index[1:]}' if index[1:] else ''}, at step {self.num_timesteps}. It was not stored and "
                f"the agent learned nothing from it: save it, mend the env{spoiled}, and go on with "
                f"learn(reset_num_timesteps=False)."
            )

    # Random states. A resumed run must reset its env to the episode that the uninterrupted run was about to begin, so
    # for each env the state of its generator before and after its latest reset is kept.

    def _env_random_states(self) -> list[Any]:
        """Read the state of each env's generator; [] where envs don't show one."""
        if self.env is None:
            return []
        try:
            return [to_json(generator.bit_generator.state) for generator in self.env.get_attr("np_random")]
        except (AttributeError, NotImplementedError):  # not Gymnasium's envs
            return []

    def _restore_env_random_states(self) -> None:
        states = [before for before, _ in self._random_states]
        if self.env is None or not states or len(self._env_random_states()) != len(states):
            return
        self._resumes = False
        env: Any = self.env
        while env is not None:  # the next reset goes on with the saved states and not with a seed
            env._reset_seeds()
            env = getattr(env, "venv", None)
        generators = self.env.get_attr("np_random")
        for state, generator in zip(states, generators, strict=True):
            generator.bit_generator.state = from_json(state)
        try:
            for i, generator in enumerate(generators):
                self.env.set_attr("np_random", generator, indices=i)
        except ValueError:  # envs of a VectorEnv that can't be told apart
            if all(state == states[0] for state in states):
                self.env.set_attr("np_random", generators[0])

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        super()._update_info_buffer(infos, dones)
        if dones is not None and dones.any() and self._random_states:
            now = self._env_random_states()
            for i in np.flatnonzero(dones):
                self._random_states[i] = [self._random_states[i][1], now[i]]

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Learn for `total_timesteps`: steps over all envs, imagined ones on a `LatentVectorEnv`.

        Args:
            total_timesteps: Steps to take; with reset_num_timesteps=False in addition to those already taken. Agents
                that learn from whole rollouts end with one.
            callback: As in SB3.
            log_interval: Episodes between two log entries; where whole rollouts are learned from, 25 updates count as
                an episode.
            tb_log_name: Name of the run for TensorBoard; None for the class's.
            reset_num_timesteps: Count from 0; False goes on.
            progress_bar: Show progress, rate and remaining time.

        Raises:
            TypeError: If the replay buffer can't be trained from.
            ValueError: If the env returns numbers that are not finite.
        """
        name = type(self).__name__ if tb_log_name is None else tb_log_name
        return super().learn(total_timesteps, callback, log_interval, name, reset_num_timesteps, progress_bar)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        before = self._env_random_states()
        result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        after = self._env_random_states()
        if len(self._random_states) != len(after):
            self._random_states = [[state, state] for state in before]
        for i, (then, now) in enumerate(zip(before, after, strict=True)):
            if then != now:  # a reset
                self._random_states[i] = [then, now]
        self._resumes = False
        raw = self._last_obs if self._vec_normalize_env is None else self._last_original_obs
        self._check_finite("observation", raw)
        return result

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """Go on with another env of the same spaces, and as many envs.

        Args:
            env: The env.
            force_reset: Reset the env before training goes on.
        """
        super().set_env(env, force_reset)
        if isinstance(self.replay_buffer, HerSequenceReplayBuffer):
            self.replay_buffer.set_env(self.env)  # type: ignore[arg-type]
        if self._resumes and force_reset:
            self._restore_env_random_states()
        else:
            self._random_states = []

    # Files

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "actor",
            "lr_schedule",
            "_generator",
            "_metrics",
            "_random_states",
            "_resumes",
            "_rng",
            "random_state",
        ]

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """Write the agent to SB3's zip format, atomically: weights, plain JSON, and the state of all its randomness.

        What has no plain form (a schedule, a noise object, a class of yours) is pickled as SB3 does, and then
        `load` asks for trust_pickle=True.

        Args:
            path: The file; ".zip" is appended where it has no suffix. Or a file that is open.
            exclude: Attributes to leave out beside the default ones.
            include: Attributes to keep that would be left out.
        """
        modules, variables = self._get_torch_save_params()
        excluded = {*(exclude or ()), *self._excluded_save_params()} - {*(include or ())}
        excluded |= {name.split(".")[0] for name in [*modules, *variables]}
        data = {name: value for name, value in self.__dict__.items() if name not in excluded}
        data["random_state"] = {
            "numpy": self._rng.bit_generator.state,
            "torch": self._generator.get_state().cpu().numpy(),
            "action_space": self.action_space.np_random.bit_generator.state,
            "envs": [from_json(before) for before, _ in self._random_states],
        }
        exploration: Any = getattr(self.actor, "noise", None)  # gSDE's, in use until its next reset
        if exploration is not None:
            data["random_state"]["exploration"] = exploration.cpu().numpy()
        write_agent(path, data, self.get_parameters(), {name: getattr(self, name) for name in variables})

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: torch.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        trust_pickle: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Read an agent that `save` wrote. Nothing in the file is executed unless you say so.

        With `learn(reset_num_timesteps=False)` it goes on exactly where it was saved if that was at the end of an
        episode, the replay buffer is loaded too, and the env is of the same kind and draws its random numbers at
        resets only. (What else holds a state, a `VecNormalize` or action noise, doesn't travel in this file.)

        Args:
            path: The file, or one that is open.
            env: Env to go on with; None to predict only.
            device: Where the agent goes.
            custom_objects: Entries to use instead of the file's.
            print_system_info: Print versions, the saved ones and the present ones.
            force_reset: Reset the env before training goes on.
            trust_pickle: Unpickle entries that have no plain form, which can run any code.
            **kwargs: Attributes to change.

        Raises:
            FileNotFoundError: If there is no such file.
            UnsafeFileError: If something would have to be unpickled and `trust_pickle` is False.
            ValueError: If the file is truncated, damaged, of another agent, or made for another env.
        """
        content, data = read_agent(path, {*(custom_objects or {})}, {*kwargs}, trust_pickle)
        random_state = data.pop("random_state", None)
        # Nothing that stands here is looked at in the file, so what it holds instead isn't unpickled.
        plain = {**kwargs, **data, "random_state": None, **(custom_objects or {})}
        if env is not None:
            env = cls._wrap_env(env, data.get("verbose", 0))
        with clear_load_errors(path):
            agent = super().load(content, env, device, plain, print_system_info, force_reset, **kwargs)
            if random_state is not None and "seed" not in kwargs:
                agent._restore_random_state(random_state, force_reset)
        return agent

    def _restore_random_state(self, state: dict[str, Any], force_reset: bool) -> None:
        self._rng.bit_generator.state = state["numpy"]
        self.action_space.np_random.bit_generator.state = state["action_space"]
        if self.device.type == "cpu":  # states of other devices' generators don't carry over
            self._generator.set_state(torch.from_numpy(state["torch"]))
        if "exploration" in state:
            self.actor.noise = torch.from_numpy(state["exploration"]).to(self.device)
        if force_reset:  # else the env goes on as it is
            self._random_states = [[to_json(saved), to_json(saved)] for saved in state["envs"]]
            self._resumes = True
            self._restore_env_random_states()

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """Write the replay buffer as plain arrays, atomically; unlike SB3's, the file holds no pickle.

        Args:
            path: The file; ".replay" is appended where it has no suffix. Or a file that is open.
        """
        target = with_suffix(path, "replay") if isinstance(path, str | pathlib.Path) else path
        self.sequence_replay().save(target)  # type: ignore[arg-type]

    def load_replay_buffer(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        truncate_last_traj: bool = True,
        trust_pickle: bool = False,
    ) -> None:
        """Read a replay buffer that `save_replay_buffer` wrote.

        Args:
            path: The file, or one that is open.
            truncate_last_traj: As in SB3, for HER buffers only: take an unfinished episode for one that was cut short
                there, which can be relabelled; False where the env goes on in it.
            trust_pickle: Read SB3's own pickled format too, which can run any code.

        Raises:
            FileNotFoundError: If there is no such file.
            UnsafeFileError: If the file is a pickle and `trust_pickle` is False; nothing is executed.
            ValueError: If the file is truncated or damaged, or the buffer is of another env.
        """
        source = path
        if isinstance(path, str | pathlib.Path) and not pathlib.Path(path).exists():
            source = with_suffix(path, "replay")
        try:
            buffer = SequenceReplayBuffer.load(source)  # type: ignore[arg-type]
        except (UnsafeFileError, FileNotFoundError) as error:
            if trust_pickle:
                super().load_replay_buffer(path, truncate_last_traj)
                return
            if isinstance(error, FileNotFoundError):
                raise
            raise UnsafeFileError(
                f"{error} If it is one of SB3's pickled replay buffers and you trust its author, pass "
                f"trust_pickle=True."
            ) from error
        if buffer.observation_space != self.observation_space or buffer.action_space != self.action_space:
            raise ValueError(
                f"expected a replay buffer of {self.observation_space} and {self.action_space}, got one of "
                f"{buffer.observation_space} and {buffer.action_space}: it was collected in another env."
            )
        collects = self.env is not None and self.env.observation_space == self.observation_space  # the env is real
        if collects and buffer.n_envs != self.n_envs:
            raise ValueError(
                f"expected a replay buffer of {self.n_envs} envs, got one of {buffer.n_envs}. Load the agent with as "
                f"many envs as it was trained on."
            )
        buffer.device = self.device
        self.replay_buffer = buffer
        if isinstance(buffer, HerSequenceReplayBuffer):
            if collects:
                buffer.set_env(self.env)  # type: ignore[arg-type]
            if truncate_last_traj:
                buffer.truncate_last_trajectory()
