"""TD-MPC2: planning in a world model that is learned along with values and a policy prior, with SB3's API."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, RolloutReturn, Schedule, TrainFreq
from stable_baselines3.common.vec_env import VecEnv

from pwm_gym.agents.model_based import ModelBasedAlgorithm
from pwm_gym.agents.planning_policy import TDMPC2Policy
from pwm_gym.training import fast_matmul, set_learning_rate, update_world_model
from pwm_gym.training.planning_learner import PlanningLearner, episode_discount
from pwm_gym.world_model import WorldModel

__all__ = ["TDMPC2"]

_SEED_EPISODES, _FEWEST_SEED_STEPS = 5, 1_000  # of random actions, as published


class TDMPC2(ModelBasedAlgorithm):
    """TD-MPC2 (Hansen et al., ICLR 2024, arXiv:2310.16828), online on one task, or planning with a given model.

    Each action is planned by MPPI (`pwm_gym.planning.Planner`) in a world model that is learned from replayed windows
    together with an ensemble of values and a policy prior. `predict` plans too: hand the state that it returns back at
    the next call, as `evaluate_policy` does, so that a plan begins with the last one.

    With `world_model`, it plans with a copy of that model, at once and without learning; `learn` would go on training
    the copy.

    The defaults are the published settings.

    Args:
        policy: "MlpPolicy", "MultiInputPolicy" (Dict observations), or a `TDMPC2Policy` class.
        env: A Gymnasium env, a registered id, an SB3 `VecEnv`, or a Gymnasium `VectorEnv`. None for an agent that
            only plans with `world_model`, on that model's spaces.
        world_model: A single-task model with value ensemble and policy prior, from `load_tdmpc2`, `pretrain` or
            `WorldModel.for_task`; None to make a new one.
        learning_rate: As a number or schedule of the remaining progress; the encoder learns at 0.3 of it.
        buffer_size: Capacity of the replay buffer, in steps over all envs.
        learning_starts: Steps with random actions before training begins; None for five episodes, at least 1,000.
        batch_size: Windows in a batch.
        tau: Polyak coefficient of the target values, and of the scale that values are divided by for the prior.
        gamma: Discount γ; None for that of `world_model`, or by the episodes' length L: 1 - 5/L, in [0.95, 0.995], and
            0.99 where the env doesn't tell it.
        train_freq: Train every so many steps of the env, or ("episode"-wise) as in SB3.
        gradient_steps: Updates each time; -1 for as many as steps were collected, over all envs.
        seed_updates: Updates in addition when training begins; None for as many as `learning_starts`.
        action_noise: Added to the planned actions.
        replay_buffer_class: As in `PWM`.
        replay_buffer_kwargs: Its arguments.
        optimize_memory_usage: As in SB3; the last step of each episode is then not learned from.
        horizon: Steps of a plan, and of a window that the model is fitted to.
        rho: Weight of a window's later steps, in (0, 1].
        ent_coef: Weight of the prior's entropy.
        policy_kwargs: Arguments of `TDMPC2Policy`: world_model_kwargs={"size": "1M"}, planner_kwargs, and so on.
        stats_window_size: Episodes that reported means run over.
        tensorboard_log: Folder for TensorBoard.
        verbose: 0, 1 or 2.
        seed: Seeds everything; equal seeds give bit-equal runs on CPU.
        device: "auto", "cpu", "cuda", ...
        _init_setup_model: Build the networks at once.

    Raises:
        AssertionError: If the action space is no Box.
        TypeError: If the observations are images or of another kind that a world model can't take.
        ValueError: If an argument is out of range, or `world_model` is multi-task, has nothing to plan with, or doesn't
            fit the env.

    Example:
        >>> small = {"world_model_kwargs": {"size": "1M"}, "planner_kwargs": {"num_samples": 32, "num_elites": 8}}
        >>> agent = TDMPC2("MlpPolicy", "Pendulum-v1", learning_starts=30, seed_updates=1, policy_kwargs=small, seed=0)
        >>> agent = agent.learn(total_timesteps=32)
        >>> action, state = agent.predict(agent.observation_space.sample(), deterministic=True)
        >>> action.shape
        (1,)
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": TDMPC2Policy,
        "MultiInputPolicy": TDMPC2Policy,
    }
    policy: TDMPC2Policy

    def __init__(
        self,
        policy: str | type[TDMPC2Policy],
        env: GymEnv | VectorEnv | str | None,
        world_model: WorldModel | None = None,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int | None = None,
        batch_size: int = 256,
        tau: float = 0.01,
        gamma: float | None = None,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = -1,
        seed_updates: int | None = None,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        horizon: int = 3,
        rho: float = 0.5,
        ent_coef: float = 1e-4,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        for name, value in {"horizon": horizon, "batch_size": batch_size}.items():
            if value < 1:
                raise ValueError(f"`{name}` must be >= 1, got {value}.")
        for name, share in {"gamma": gamma, "tau": tau, "rho": rho}.items():
            if share is not None and not 0.0 <= share <= 1.0:
                raise ValueError(f"`{name}` must be in [0, 1], got {share}.")
        if world_model is not None:
            _check_given(world_model)
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate,
            buffer_size,
            0 if learning_starts is None else learning_starts,
            batch_size,
            tau,
            1.0 if gamma is None else gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class,
            dict(replay_buffer_kwargs or {}),  # SB3 writes into it
            optimize_memory_usage,
            policy_kwargs=dict(policy_kwargs or {}),
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            support_multi_env=True,
            seed=seed,
            sde_support=False,
            supported_action_spaces=(spaces.Box,),
        )
        self.horizon, self.rho, self.ent_coef = horizon, rho, ent_coef
        self._settle(env is None, world_model, gamma, learning_starts, seed_updates)
        if _init_setup_model:
            self._setup_model()
            if world_model is not None:
                self.policy.world_model.load_state_dict(world_model.state_dict())

    # Set-up

    def _settle(
        self,
        only_plans: bool,
        world_model: WorldModel | None,
        gamma: float | None,
        learning_starts: int | None,
        seed_updates: int | None,
    ) -> None:
        """Settle what was left open by what env and world model tell."""
        model_kwargs = dict(self.policy_kwargs.get("world_model_kwargs") or {})
        if world_model is not None:
            model_kwargs = {**dataclasses.asdict(world_model.config), "discounts": world_model.config.all_discounts}
            if only_plans:
                self.observation_space, self.action_space = world_model.observation_space, world_model.action_space
                self.n_envs = 1
        length = _episode_length(self.env)
        if gamma is None:
            known = tuple(model_kwargs.get("discounts") or ())
            self.gamma = known[0] if known else 0.99 if length is None else episode_discount(length)
        self.policy_kwargs |= {
            "world_model_kwargs": {**model_kwargs, "discounts": (self.gamma,)},
            "planner_kwargs": {"horizon": self.horizon, **(self.policy_kwargs.get("planner_kwargs") or {})},
        }
        if learning_starts is None:
            self.learning_starts = max(_FEWEST_SEED_STEPS, _SEED_EPISODES * (length or 0))
        self.seed_updates = self.learning_starts if seed_updates is None else seed_updates

    def _setup_model(self) -> None:
        super()._setup_model()
        self.actor = self.policy
        self.policy.generator = self._generator
        self.planning = PlanningLearner(
            self.world_model, self.lr_schedule(1), self.ent_coef, self.tau, seed=self._generator
        )
        self._plan_state: tuple[np.ndarray, ...] | None = None  # of the envs that experience is collected in
        self._metrics = {}

    def set_env(self, env: GymEnv | VectorEnv, force_reset: bool = True) -> None:
        """Go on with another env of the same spaces.

        Args:
            env: As in the constructor.
            force_reset: Reset the env before training goes on.

        Raises:
            AssertionError: If it has another number of envs than the agent was made for.
            ValueError: If the spaces differ, or the replay buffer holds another number of envs.
        """
        super().set_env(self._first_env(env) if self.env is None else env, force_reset)  # type: ignore[arg-type]
        self._plan_state = None

    # Learning

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """Update world model, values and policy prior `gradient_steps` times (TD-MPC2, eq. 3 and 4).

        Raises:
            ValueError: If there is nothing to learn from.
        """
        self._begin_training()
        rate = self.lr_schedule(self._current_progress_remaining)
        self.logger.record("train/learning_rate", rate)
        for optimizer in (self.policy.model_optimizer, self.planning.optimizer):
            set_learning_rate(optimizer, rate)
        cuda = [self.device] if self.device.type == "cuda" else []
        with fast_matmul(self.device), torch.random.fork_rng(devices=cuda):
            torch.manual_seed(int(self._rng.integers(2**63)))  # dropout draws from torch's global generator
            for _ in range(gradient_steps):
                self._metrics = update_world_model(
                    self.world_model,
                    self.policy.model_optimizer,
                    self.sequence_replay(),
                    batch_size,
                    self.horizon,
                    self.rho,
                    self._rng,
                    self._vec_normalize_env,
                    self.planning,
                )
        self._n_updates += gradient_steps
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        train_freq: TrainFreq,
        replay_buffer: ReplayBuffer,
        action_noise: ActionNoise | None = None,
        learning_starts: int = 0,
        log_interval: int | None = None,
    ) -> RolloutReturn:
        """Collect experience as SB3 does; when the seed episodes are over, learn from them."""
        rollout = super().collect_rollouts(
            env, callback, train_freq, replay_buffer, action_noise, learning_starts, log_interval
        )
        begins = self._n_updates == 0 and self.num_timesteps > self.learning_starts and self.gradient_steps != 0
        if begins and rollout.continue_training and self.seed_updates:
            self.train(self.seed_updates, self.batch_size)
        return rollout

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.num_timesteps < learning_starts:
            return super()._sample_action(learning_starts, action_noise, n_envs)
        assert self._last_obs is not None, "an env was reset"
        actions, self._plan_state = self.predict(self._last_obs, self._plan_state, self._last_episode_starts)
        scaled = self.policy.scale_action(actions)
        if action_noise is not None:
            scaled = np.clip(scaled + action_noise(), -1.0, 1.0)
        return self.policy.unscale_action(scaled), scaled

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        self._last_episode_starts = dones  # SB3 keeps it up to date in on-policy algorithms only

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        self.sequence_replay()  # complain before the first step, not after learning_starts
        return super()._setup_learn(*args, **kwargs)

    # Files

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_plan_state"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.model_optimizer", "planning"], []


def _check_given(world_model: WorldModel) -> None:
    """Check that a world model is one that can be planned with here; the planner checks the rest."""
    if world_model.config.num_tasks:
        names = world_model.config.tasks or range(world_model.config.num_tasks)
        raise ValueError(
            f"expected a single-task world model, got one of {world_model.config.num_tasks} tasks. Take one out with "
            f"world_model.for_task({names[0]!r})."
        )
    if world_model.features_extractor is not None:
        raise ValueError("expected a world model without features extractor, got one with.")


def _episode_length(env: VecEnv | None) -> int | None:
    """Read the time limit of an env's episodes, in decisions; None where it doesn't tell."""
    try:
        spec = None if env is None else env.get_attr("spec")[0]
    except (AttributeError, NotImplementedError):  # not Gymnasium's envs
        return None
    return getattr(spec, "max_episode_steps", None)
