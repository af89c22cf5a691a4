"""SHAC: short-horizon actor-critic through the true dynamics of a differentiable env, with SB3's API."""

from __future__ import annotations

import io
import pathlib
from typing import Any, ClassVar, Self

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, RolloutReturn, Schedule, TrainFreq
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from pwm_gym.agents.base import ResumableAlgorithm
from pwm_gym.agents.first_order import ActorCritic, Rollout, improve_policy, rollout
from pwm_gym.agents.shac_policy import SHACPolicy
from pwm_gym.differentiable import DifferentiableVectorEnv, NumpyVectorEnv
from pwm_gym.latent_env import LatentVectorEnv
from pwm_gym.sb3 import as_sb3_vec_env

__all__ = ["SHAC"]


class SHAC(ResumableAlgorithm):
    """Short-Horizon Actor-Critic (Xu et al., ICLR 2022, arXiv:2204.07137) on any `DifferentiableVectorEnv`.

    Each update lets the policy drive all envs for `horizon` steps, back-propagates the discounted rewards and the
    value of where they led through the dynamics into the policy, and fits the critics to TD(λ) targets from the same
    steps. The next update goes on where this one ended. Observations are normalised by running statistics, which are
    held still within an update. Timesteps count env steps over all envs.

    With `horizon_max` the horizon adapts, as in AHAC (Georgiev et al., ICML 2024, arXiv:2405.17784): see
    `_adapt_horizon`.

    Args:
        policy: "MlpPolicy", or a `SHACPolicy` class.
        env: A `DifferentiableVectorEnv` in SAME_STEP mode, as `pwm_gym.make_differentiable` gives it.
        learning_rate: Of actor and critics, as a number or schedule of the remaining progress.
        horizon: Steps H of a rollout, 16 to 32 for most tasks; where it adapts, the first.
        gamma: Discount γ.
        td_lambda: λ of the critic's targets.
        tau: Polyak coefficient of the target critic, in (0, 1]; 1 for no target critic.
        ent_coef: Weight of the policy's entropy. SHAC has none (0), with which a seed got stuck on the pendulum.
        critic_epochs: Passes over each rollout for the critics.
        critic_minibatches: Minibatches in a pass.
        max_grad_norm: Gradient clip of the actor.
        horizon_max: Longest horizon of the adaptive one; None keeps H fixed.
        horizon_min: Shortest.
        horizon_rate: How fast the horizon adapts, in steps per update at full violation.
        stiffness_limit: C, the size of ‖∂s'/∂s‖, relative to that of standing still, beyond which a step counts as
            too stiff to differentiate through.
        policy_kwargs: Arguments of `SHACPolicy`: net_arch, n_critics, normalize_observations, and so on.
        stats_window_size: Episodes that reported means run over.
        tensorboard_log: Folder for TensorBoard.
        verbose: 0, 1 or 2.
        seed: Seeds everything; equal seeds give bit-equal runs on CPU.
        device: The env's; given for SB3's sake.
        _init_setup_model: Build the networks at once.

    Raises:
        TypeError: If the env has no gradients, or its observations are no flat Box.
        ValueError: If an argument is out of range, or the horizon shall adapt and the env doesn't tell its stiffness.

    Example:
        >>> import pwm_gym
        >>> env = pwm_gym.make_differentiable("pwm_gym/TorchPendulum-v0", num_envs=4)
        >>> agent = SHAC("MlpPolicy", env, seed=0).learn(total_timesteps=128)
        >>> agent.predict(agent.observation_space.sample(), deterministic=True)[0].shape
        (1,)
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": SHACPolicy}
    policy: SHACPolicy

    def __init__(
        self,
        policy: str | type[SHACPolicy],
        env: GymEnv | VectorEnv | None,
        learning_rate: float | Schedule = 2e-3,
        horizon: int = 16,
        gamma: float = 0.99,
        td_lambda: float = 0.95,
        tau: float = 0.2,
        ent_coef: float = 0.02,
        critic_epochs: int = 4,
        critic_minibatches: int = 4,
        max_grad_norm: float = 1.0,
        horizon_max: int | None = None,
        horizon_min: int = 8,
        horizon_rate: float = 1.0,
        stiffness_limit: float = 4.0,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        counts = {"horizon": horizon, "critic_epochs": critic_epochs, "critic_minibatches": critic_minibatches}
        for name, value in {**counts, "horizon_min": horizon_min}.items():
            if value < 1:
                raise ValueError(f"`{name}` must be >= 1, got {value}.")
        for name, share in {"gamma": gamma, "td_lambda": td_lambda, "tau": tau}.items():
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"`{name}` must be in [0, 1], got {share}.")
        if horizon_max is not None and not horizon_min <= horizon <= horizon_max:
            raise ValueError(
                f"expected horizon_min <= horizon <= horizon_max, got {horizon_min}, {horizon} and {horizon_max}."
            )
        torch_env = None if env is None else _differentiable(env)
        self.differentiable_env = torch_env
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate,
            learning_starts=0,
            tau=tau,
            gamma=gamma,
            train_freq=1,
            gradient_steps=1,
            policy_kwargs=dict(policy_kwargs or {}),
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device if torch_env is None else torch_env.device,
            support_multi_env=True,
            seed=seed,
            sde_support=False,
            supported_action_spaces=(spaces.Box,),
        )
        self.horizon, self.td_lambda, self.ent_coef = horizon, td_lambda, ent_coef
        self.critic_epochs, self.critic_minibatches = critic_epochs, critic_minibatches
        self.max_grad_norm = max_grad_norm
        self.horizon_max, self.horizon_min = horizon_max, horizon_min
        self.horizon_rate, self.stiffness_limit = horizon_rate, stiffness_limit
        self._adaptive_horizon = float(horizon)
        if _init_setup_model:
            self._setup_model()

    # Set-up

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        _differentiable(env)
        return env if isinstance(env, VecEnv) else as_sb3_vec_env(env)

    def _setup_model(self) -> None:
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        policy_class: Any = self.policy_class
        self.policy = policy_class(
            self.observation_space, self.action_space, self.lr_schedule, **self.policy_kwargs
        ).to(self.device)
        self._convert_train_freq()
        self.actor = self.policy.actor
        self.policy.actor.generator = self._generator
        self._window: Rollout | None = None
        self._random_states, self._metrics = [], {}
        self._begin_statistics()

    def _begin_statistics(self) -> None:
        self._episode_returns, self._episode_lengths = np.zeros(self.n_envs), np.zeros(self.n_envs, np.int64)  # (B,)

    def set_env(self, env: GymEnv | VectorEnv, force_reset: bool = True) -> None:
        """Go on with another differentiable env of the same spaces, of any number of envs.

        Args:
            env: As in the constructor.
            force_reset: Reset the env before training goes on.

        Raises:
            TypeError: If the env has no gradients.
            ValueError: If the spaces differ.
        """
        wrapped = self._wrap_env(env, self.verbose)
        check_for_correct_spaces(wrapped, self.observation_space, self.action_space)
        self.env, self.differentiable_env, self.n_envs = wrapped, _differentiable(env), wrapped.num_envs
        self._begin_statistics()
        if force_reset:
            self._last_obs = None

    def _env_random_states(self) -> list[Any]:
        return []  # a resumed run begins new episodes

    # Learning

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
        """Take one differentiable rollout, which `train` learns from; callbacks are called for each of its steps."""
        assert self.differentiable_env is not None, "learn has an env"
        self.policy.set_training_mode(True)
        callback.on_rollout_start()
        horizon = round(self._adaptive_horizon)
        torch_env = self.differentiable_env
        window = rollout(torch_env, torch_env.detach(), self.policy.actor, horizon, self._generator)
        if self.horizon_max is not None and window.stiffness is None:
            raise ValueError(
                "expected infos['jacobian_norm'] from the env, by which the horizon adapts, got none. Use a MuJoCo "
                "task, or horizon_max=None."
            )
        rewards, finished = window.rewards.detach().cpu().numpy(), window.finished.cpu().numpy()  # (H, B)
        callback.update_locals(locals())
        for t in range(horizon):
            self.num_timesteps += torch_env.num_envs
            self._count_episodes(rewards[t], finished[t])
            if not callback.on_step():
                return RolloutReturn(t * torch_env.num_envs, 0, continue_training=False)
        self._window = window
        self._end_rollout(callback, log_interval)
        return RolloutReturn(horizon * torch_env.num_envs, int(finished.sum()), continue_training=True)

    def _count_episodes(self, rewards: np.ndarray, finished: np.ndarray) -> None:
        self._episode_returns += rewards
        self._episode_lengths += 1
        infos: list[dict[str, Any]] = [{} for _ in finished]
        for i in np.flatnonzero(finished):
            infos[i]["episode"] = {"r": float(self._episode_returns[i]), "l": int(self._episode_lengths[i])}
        self._episode_num += int(finished.sum())
        self._update_info_buffer(infos, finished)
        self._episode_returns[finished], self._episode_lengths[finished] = 0.0, 0

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """Update actor and critics once, from the latest rollout (SHAC, algorithm 1).

        Raises:
            ValueError: If there is no rollout to learn from, or the gradient isn't finite.
        """
        window, policy = self._window, self.policy
        if window is None:
            raise ValueError("expected a rollout to learn from, got none. Call learn(...).")
        self._window = None  # its graph can be used only once
        self._update_learning_rate([policy.actor_optimizer, policy.critic_optimizer])
        coefficient = torch.tensor(self.ent_coef, device=self.device)
        nets = ActorCritic(
            policy.actor,
            policy.critic,
            policy.critic_target,
            policy.actor_optimizer,
            policy.critic_optimizer,
            policy.return_scale.update,
            lambda _: coefficient,
            self._generator,
        )
        metrics = improve_policy(
            window,
            nets,
            gamma=self.gamma,
            td_lambda=self.td_lambda,
            tau=self.tau,
            critic_epochs=self.critic_epochs,
            critic_minibatches=self.critic_minibatches,
            max_grad_norm=self.max_grad_norm,
        )
        policy.actor.normalizer.merge(window.observations.flatten(0, 1))
        if self.horizon_max is not None and window.stiffness is not None:
            metrics |= self._adapt_horizon(window.stiffness.detach())
        metrics |= {"horizon": torch.tensor(float(len(window.rewards)))}
        self._metrics = metrics
        self._n_updates += 1
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _adapt_horizon(self, stiffness: Tensor) -> dict[str, Tensor]:
        """Move the horizon towards the longest at which steps are soft enough (AHAC, sec. 4).

            H ← clip(H + α (1 - 2 s), H_min, H_max),    s: share of rollouts with a step of ‖∂s'/∂s‖ > C

        AHAC bounds ‖∂s'/∂s‖ by C at every step and moves H with the multipliers of that bound; here the share of
        rollouts that violate it takes their place, so that H settles where every second rollout meets a stiff step.

        Args:
            stiffness: ‖∂s'/∂s‖ / ‖I‖, (H, B).
        """
        share = (stiffness > self.stiffness_limit).any(0).float().mean()
        moved = self._adaptive_horizon + self.horizon_rate * float(1.0 - 2.0 * share)
        self._adaptive_horizon = min(max(moved, float(self.horizon_min)), float(self.horizon_max or self.horizon))
        return {"stiff_rollouts": share, "stiffness": stiffness.mean()}

    # Files

    def _excluded_save_params(self) -> list[str]:
        own = ["differentiable_env", "_window", "_episode_returns", "_episode_lengths"]
        return [*super()._excluded_save_params(), *own]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.actor_optimizer", "policy.critic_optimizer"], []

    @classmethod
    def load(  # type: ignore[override]
        cls,
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | VectorEnv | None = None,
        device: torch.device | str = "auto",
        **kwargs: Any,
    ) -> Self:
        """Read an agent that `save` wrote, as `ResumableAlgorithm.load`, to go on with an env or to predict only."""
        torch_env = None if env is None else _differentiable(env)
        agent = super().load(path, None, device if torch_env is None else torch_env.device, **kwargs)
        if env is not None:
            agent.set_env(env, kwargs.get("force_reset", True))
        return agent


def _differentiable(env: Any) -> DifferentiableVectorEnv:
    """Find the differentiable env itself, its NumPy face or its SB3 adapter; raise TypeError where there is none."""
    if isinstance(env, NumpyVectorEnv):
        return _differentiable(env.env)
    if isinstance(env, VecEnv) and hasattr(env, "vector_env"):
        return _differentiable(env.vector_env)
    if isinstance(env, LatentVectorEnv):
        raise TypeError("expected true dynamics, got a learned model. Train in it with PWM instead.")
    if isinstance(env, DifferentiableVectorEnv):
        return env
    name = repr(env) if isinstance(env, str) else type(env).__name__
    raise TypeError(
        f"expected an env with gradients, got {name}. Use pwm_gym.make_differentiable('Hopper-v5', num_envs=32), which "
        f"takes dm_control's and Gymnasium's MuJoCo tasks and torch physics; for other envs, PWM learns a model."
    )
