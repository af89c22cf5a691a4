"""PWM: policy learning by first-order gradients through a learned world model, with SB3's API."""

from __future__ import annotations

import dataclasses
import io
import pathlib
from typing import Any, ClassVar, Self

import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, RolloutReturn, Schedule, TrainFreq
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from pwm_gym.agents.diagnosis import Diagnosis, diagnose
from pwm_gym.agents.first_order import ActorCritic, Rollout, improve_policy, rollout
from pwm_gym.agents.model_based import ModelBasedAlgorithm
from pwm_gym.agents.policies import PWMCritic, PWMPolicy
from pwm_gym.differentiable import NumpyVectorEnv
from pwm_gym.functional import frozen
from pwm_gym.latent_env import LatentVectorEnv
from pwm_gym.replay import WindowSource
from pwm_gym.training import fast_matmul, make_model_optimizer, set_learning_rate, update_world_model
from pwm_gym.world_model import WorldModel

__all__ = ["PWM"]

# The paper's settings where they differ from the defaults: PWM(..., **PWM.PAPER).
_PAPER = {
    "batch_size": 512,
    "horizon": 16,
    "tau": 1.0,
    "ent_coef": 0.0,
    "model_batch_size": 1024,
    "model_horizon": 16,
    "rho": 0.99,
    "critic_epochs": 8,
    "annealing": None,
    "detach_input": True,
    "policy_kwargs": {
        "net_arch": {"pi": [400, 200, 100], "qf": [400, 200]},
        "pink_noise": False,
        "averaged_share": 0.0,
        "world_model_kwargs": {"size": "48M", "reward_in_task_units": False},
        "model_learning_rate": 3e-4,
    },
}
# What the released code does offline beyond that: one-step targets, since every step counts as the last of its segment,
# and γ^(H+1) on the value at a rollout's end.
_RELEASED = {**_PAPER, "td_lambda": 0.0, "extra_bootstrap_discount": True}


class PWM(ModelBasedAlgorithm):
    """Policy learning with world models (Georgiev et al., ICLR 2025, arXiv:2407.02466).

    On a real env, `PWM("MlpPolicy", env)` collects experience, fits a TD-MPC2-style world model to it, and improves the
    policy by back-propagating through short rollouts in that model. On a `LatentVectorEnv`, it leaves the model as it
    is and only trains the policy; timesteps then count imagined steps. Either way `predict` takes real observations
    and costs one forward pass, and the spaces are the real ones.

    The defaults learn online from little data. They differ from the paper's, which `PWM.PAPER` holds, in the short
    horizon, the slow target critic, the gradient through the policy's input, the entropy bonus and, on a real env, the
    averaged weights that deterministic actions come from. `PWM.RELEASED` adds
    what the released code does differently from the paper when it learns offline.

    Args:
        policy: "MlpPolicy", "MultiInputPolicy" (Dict observations), or a `PWMPolicy` class.
        env: A Gymnasium env, a registered id, an SB3 `VecEnv`, a Gymnasium `VectorEnv`, or a `LatentVectorEnv`.
        learning_rate: Of actor and critics, as a number or schedule of the remaining progress; see `annealing`.
        buffer_size: Capacity of the replay buffer, in steps over all envs.
        learning_starts: Steps with random actions before training begins.
        batch_size: Imagined rollouts B in an update. On a `LatentVectorEnv` its `num_envs` counts instead.
        tau: Polyak coefficient of the target critic, in (0, 1]; 1 for no target critic.
        gamma: Discount γ.
        train_freq: Train every so many steps of the env, or ("episode"-wise) as in SB3.
        gradient_steps: Updates (of model, actor and critics) each time; -1 for as many as steps were collected.
        action_noise: Added to the policy's own exploration noise.
        replay_buffer_class: A `SequenceReplayBuffer` by default; training needs one. SB3's `HerReplayBuffer`, for
            hindsight in goal-conditioned envs, stands for `HerSequenceReplayBuffer`.
        replay_buffer_kwargs: Its arguments, such as {"store_physics_state": True} for rendering imagined rollouts.
        optimize_memory_usage: As in SB3; the last step of each episode is then not learned from.
        n_steps: As in SB3, of the returns that `replay_buffer.sample` gives; PWM's own targets are imagined.
        horizon: Steps of an imagined rollout H.
        td_lambda: λ of the critic's targets.
        ent_coef: Weight of the policy's entropy; "auto" or "auto_<initial>" learns it as SAC does.
        target_entropy: Entropy that "auto" aims at; "auto" for minus the number of action dimensions.
        use_sde: Explore with gSDE, noise that is a function of the state (see `LatentActor`).
        sde_sample_freq: Draw new exploration matrices every so many steps; -1 at the start of each collection only.
        use_sde_at_warmup: Explore with gSDE before `learning_starts` too, instead of uniformly.
        model_batch_size: Windows in a batch of the world model.
        model_horizon: Steps in such a window.
        rho: Weight of a window's later steps, in (0, 1].
        critic_epochs: Passes over each rollout for the critics.
        critic_minibatches: Minibatches in a pass.
        max_grad_norm: Gradient clip of the actor.
        annealing: On a real env, the learning rates of actor, critics and world model and a fixed `ent_coef` fall as
            1/√(1 + n/annealing) with the updates n, so that the policy settles. That needs no horizon: training in
            parts is training at once. None to keep them.
        detach_input: Hide the latents' gradient from the policy's input, as the reference does.
        extra_bootstrap_discount: Weight the value at a rollout's end by γ^(H+1), as the released code does, not γ^H.
        policy_kwargs: Arguments of `PWMPolicy`: net_arch, n_critics, world_model_kwargs={"size": "5M"}, and so on.
        stats_window_size: Episodes that reported means run over.
        tensorboard_log: Folder for TensorBoard.
        verbose: 0, 1 or 2.
        seed: Seeds everything; equal seeds give bit-equal runs on CPU.
        device: "auto", "cpu", "cuda", ...
        _init_setup_model: Build the networks at once.

    Raises:
        AssertionError: If the action space is no Box.
        TypeError: If the observations are images or of another kind that a world model can't take.
        ValueError: If an argument is out of range.

    Example:
        >>> from pwm_gym import PWM
        >>> agent = PWM("MlpPolicy", "Pendulum-v1", seed=0).learn(total_timesteps=32)
        >>> observation = agent.observation_space.sample()
        >>> agent.predict(observation, deterministic=True)[0].shape
        (1,)
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": PWMPolicy, "MultiInputPolicy": PWMPolicy}
    PAPER: ClassVar[dict[str, Any]] = _PAPER
    RELEASED: ClassVar[dict[str, Any]] = _RELEASED
    policy: PWMPolicy
    target_entropy: Any  # a float once set up

    def __init__(
        self,
        policy: str | type[PWMPolicy],
        env: GymEnv | VectorEnv | str | None,
        learning_rate: float | Schedule = 5e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 500,
        batch_size: int = 128,
        tau: float = 0.05,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 2,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        horizon: int = 10,
        td_lambda: float = 0.95,
        ent_coef: float | str = 0.03,
        target_entropy: float | str = "auto",
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        use_sde_at_warmup: bool = False,
        model_batch_size: int = 128,
        model_horizon: int = 5,
        rho: float = 0.5,
        critic_epochs: int = 1,
        critic_minibatches: int = 4,
        max_grad_norm: float = 1.0,
        annealing: int | None = 2_500,
        detach_input: bool = False,
        extra_bootstrap_discount: bool = False,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        for name, value in {
            "horizon": horizon,
            "model_horizon": model_horizon,
            "batch_size": batch_size,
            "model_batch_size": model_batch_size,
            "critic_epochs": critic_epochs,
            "critic_minibatches": critic_minibatches,
        }.items():
            if value < 1:
                raise ValueError(f"`{name}` must be >= 1, got {value}.")
        for name, share in {"gamma": gamma, "td_lambda": td_lambda, "tau": tau, "rho": rho}.items():
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"`{name}` must be in [0, 1], got {share}.")
        if annealing is not None and annealing < 1:
            raise ValueError(f"`annealing` must be >= 1 update, or None, got {annealing}.")
        latent_env = _latent_env_of(env)
        self.latent_env = latent_env
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate,
            buffer_size,
            learning_starts if latent_env is None else 0,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class,
            dict(replay_buffer_kwargs or {}),  # SB3 writes into it
            optimize_memory_usage,
            n_steps,
            dict(policy_kwargs or {}),
            stats_window_size,
            tensorboard_log,
            verbose,
            device if latent_env is None else latent_env.device,
            support_multi_env=True,
            seed=seed,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            use_sde_at_warmup=use_sde_at_warmup,
            supported_action_spaces=(spaces.Box,),
        )
        self.horizon, self.td_lambda = horizon, td_lambda
        self.ent_coef, self.target_entropy = ent_coef, target_entropy
        self.model_batch_size, self.model_horizon, self.rho = model_batch_size, model_horizon, rho
        self.critic_epochs, self.critic_minibatches = critic_epochs, critic_minibatches
        self.max_grad_norm, self.annealing, self.detach_input = max_grad_norm, annealing, detach_input
        self.extra_bootstrap_discount = extra_bootstrap_discount
        if latent_env is not None:  # the agent's spaces are the real ones; only its training env is latent
            self.observation_space = latent_env.world_model.observation_space
            self.action_space = latent_env.world_model.action_space
            config = dataclasses.asdict(latent_env.world_model.config)
            self.policy_kwargs = {**self.policy_kwargs, "world_model_kwargs": config}
        if _init_setup_model:
            self._setup_model()

    # Set-up

    def _setup_model(self) -> None:
        if self.latent_env is None:
            super()._setup_model()
        else:  # a frozen model needs no replay buffer
            self._random_states = []
            self._setup_lr_schedule()
            self.set_random_seed(self.seed)
            policy_class: Any = self.policy_class
            self.policy = policy_class(
                self.observation_space, self.action_space, self.lr_schedule, **self.policy_kwargs
            ).to(self.device)
            self._adopt(self.latent_env.world_model)
            self._convert_train_freq()
        self.actor = self.policy.actor
        self.policy.actor.generator = self._generator
        self.policy.critic.gamma = self.policy.critic_target.gamma = self.gamma
        self._setup_entropy()
        self._imagination: LatentVectorEnv | None = None
        self._metrics = {}

    def _adopt(self, world_model: WorldModel) -> None:
        """Let policy and optimizer work on this very model instead of on an equal one."""
        before = self.policy.model_optimizer
        self.policy.actor.adopt(world_model)
        self.policy.model_optimizer = make_model_optimizer(world_model, self.policy.model_learning_rate)
        if before.state:
            self.policy.model_optimizer.load_state_dict(before.state_dict())

    def _setup_entropy(self) -> None:
        """As in SAC: a fixed coefficient, or one that is learned so that the entropy meets its target."""
        self.log_ent_coef: Tensor | None = None
        self.ent_coef_optimizer: torch.optim.Optimizer | None = None
        if self.target_entropy == "auto":
            self.target_entropy = -float(spaces.flatdim(self.action_space))
        if isinstance(self.ent_coef, str) and self.ent_coef.startswith("auto"):
            initial = float(self.ent_coef.partition("_")[2] or 1.0)
            if initial <= 0.0:
                raise ValueError(f"the initial value in ent_coef='auto_<initial>' must be > 0, got {initial}.")
            self.log_ent_coef = torch.log(torch.ones(1, device=self.device) * initial).requires_grad_(True)
            self.ent_coef_optimizer = torch.optim.Adam([self.log_ent_coef], lr=self.lr_schedule(1))
        else:
            self.ent_coef_tensor = torch.tensor(float(self.ent_coef), device=self.device)

    def set_env(self, env: GymEnv | VectorEnv, force_reset: bool = True) -> None:
        """Go on with another env, real or latent, of the same spaces.

        Args:
            env: As in the constructor. A `LatentVectorEnv` must have the agent's own world model, or an equal one.
            force_reset: Reset the env before training goes on.

        Raises:
            AssertionError: If a real env has another number of envs than the agent was made for.
            ValueError: If the spaces or the world models differ, or the replay buffer holds another number of envs.
        """
        latent_env = _latent_env_of(env)
        if latent_env is None:
            if self.latent_env is not None or self.env is None:
                env = self._first_env(env)
            super().set_env(env, force_reset)  # type: ignore[arg-type]
            self.latent_env = None
            return
        ours, theirs = self.world_model, latent_env.world_model
        same = ours is theirs or (
            ours.config == theirs.config
            and ours.action_space == theirs.action_space
            and all(
                torch.equal(a.to(b.device), b)
                for a, b in zip(*(m.state_dict().values() for m in (ours, theirs)), strict=True)
            )
        )
        if not same:
            raise ValueError(
                "expected a LatentVectorEnv of the agent's own world model, got another model: this policy's latents "
                "mean nothing there. Use agent.make_latent_env(...), or make a new PWM on that env."
            )
        self.env, self.latent_env = self._wrap_env(latent_env, self.verbose), latent_env
        self.n_envs, self._vec_normalize_env, self.learning_starts = latent_env.num_envs, None, 0
        if theirs is not ours:
            self._adopt(theirs)
        if force_reset:
            self._last_obs = None

    @property
    def critic(self) -> PWMCritic:
        """The critic: `critic(observation, actions)` as in SB3, `critic.value` for the ensemble V(z)."""
        return self.policy.critic

    @property
    def critic_target(self) -> PWMCritic:
        """The slowly moving copy of the critic, which the targets come from."""
        return self.policy.critic_target

    def diagnose(self, data: WindowSource | None = None, batch_size: int = 256, seed: int = 0) -> Diagnosis:
        """Measure agent and model against real experience and name known failures: see `diagnosis.diagnose`."""
        return diagnose(self, data, batch_size, seed)

    # Learning

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """Update world model, actor and critics `gradient_steps` times (PWM, algorithm 1).

        Raises:
            ValueError: If there is nothing to learn from.
        """
        self._begin_training(from_replay=self.latent_env is None)
        with fast_matmul(self.device):
            self._train(gradient_steps, batch_size)

    def _train(self, gradient_steps: int, batch_size: int) -> None:
        policy, env = self.policy, self._training_env(batch_size)
        policy.set_training_mode(True)
        self.world_model.eval()  # the power iterations of spectral norm belong to the model's own updates
        self._set_learning_rates()
        nets = ActorCritic(
            policy.actor.latent_actor,
            policy.critic.value,
            policy.critic_target.value,
            policy.actor_optimizer,
            policy.critic_optimizer,
            policy.return_scale.update,
            self._entropy_coefficient,
            self._generator,
        )

        for _ in range(gradient_steps):
            metrics: dict[str, Tensor] = {}
            # World model
            if self.latent_env is None:
                metrics |= update_world_model(
                    self.world_model,
                    policy.model_optimizer,
                    self.sequence_replay(),
                    self.model_batch_size,
                    self.model_horizon,
                    self.rho,
                    self._rng,
                    self._vec_normalize_env,
                )
            # Actor and critics, from a differentiable rollout
            with frozen(self.world_model):
                z = self._begin_rollout(env)
                horizon = min(self.horizon, env.horizon)
                window = rollout(env, z, policy.actor.latent_actor, horizon, self._generator, self.detach_input)
            metrics |= self.update_policy(window, nets)
            if self.latent_env is None:
                policy.actor.update_average()
            else:  # where nothing else moves, the latest weights act best
                policy.actor.reset_average()
        for name in ("return", "reward"):
            metrics[f"imagined_{name}"] = metrics.pop(name)
        self._n_updates += gradient_steps
        self._metrics = metrics
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _annealed(self) -> float:
        """Give the share of learning rates and entropy weight that is left: 1/√(1 + n/annealing)."""
        if self.annealing is None or self.latent_env is not None:
            return 1.0
        return (1.0 + self._n_updates / self.annealing) ** -0.5

    def _set_learning_rates(self) -> None:
        policy, share = self.policy, self._annealed()
        rate = share * self.lr_schedule(self._current_progress_remaining)
        self.logger.record("train/learning_rate", rate)
        for optimizer in (policy.actor_optimizer, policy.critic_optimizer, self.ent_coef_optimizer):
            if optimizer is not None:
                set_learning_rate(optimizer, rate)
        set_learning_rate(policy.model_optimizer, share * policy.model_learning_rate)

    def update_policy(self, window: Rollout, nets: ActorCritic) -> dict[str, Tensor]:
        """Improve networks, this agent's or those of several like it, from a rollout with this agent's settings."""
        return improve_policy(
            window,
            nets,
            gamma=self.gamma,
            td_lambda=self.td_lambda,
            tau=self.tau,
            critic_epochs=self.critic_epochs,
            critic_minibatches=self.critic_minibatches,
            max_grad_norm=self.max_grad_norm,
            bootstrap_discount=self.gamma if self.extra_bootstrap_discount else 1.0,
        )

    def _training_env(self, num_envs: int) -> LatentVectorEnv:
        if self.latent_env is not None:
            return self.latent_env
        env = self._imagination
        if env is None or (env.num_envs, env.horizon, env.world_model) != (num_envs, self.horizon, self.world_model):
            env = LatentVectorEnv(
                self.world_model, None, num_envs, self.horizon, AutoresetMode.DISABLED, termination="none"
            )
            self._imagination = env
        return env

    def _begin_rollout(self, env: LatentVectorEnv) -> Tensor:
        """Start at replayed states; in a frozen model's own env, go on where the last rollout ended."""
        if env is self.latent_env:
            return env.detach() if env.has_started else env.reset()[0]
        starts = self.sequence_replay().sample_starts(env.num_envs, self._rng, env=self._vec_normalize_env)
        return env.reset(options={"observations": starts.observations})[0]

    def _entropy_coefficient(self, entropy: Tensor) -> Tensor:
        if self.log_ent_coef is None or self.ent_coef_optimizer is None:
            return self.ent_coef_tensor * self._annealed()
        coefficient = self.log_ent_coef.detach().exp()
        loss = (self.log_ent_coef * (entropy.detach() - self.target_entropy)).mean()
        self.ent_coef_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.ent_coef_optimizer.step()
        return coefficient

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
        """Collect real experience as SB3 does; on a `LatentVectorEnv`, count the steps that `train` will imagine."""
        if self.latent_env is None:
            return super().collect_rollouts(
                env, callback, train_freq, replay_buffer, action_noise, learning_starts, log_interval
            )
        callback.on_rollout_start()
        updates = max(self.gradient_steps, 1)  # each imagines anew; for -1, "as many as collected", it is one
        callback.update_locals(locals())
        for _ in range(updates * min(self.horizon, self.latent_env.horizon)):
            self.num_timesteps += self.latent_env.num_envs
            if not callback.on_step():  # once for each step of all envs, as SB3's callbacks expect
                return RolloutReturn(updates, 0, continue_training=False)
        self._end_rollout(callback, log_interval)
        return RolloutReturn(updates, 0, continue_training=True)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        if self.latent_env is None:
            self.sequence_replay()  # complain before the first step, not after learning_starts
        return super()._setup_learn(*args, **kwargs)

    def _env_random_states(self) -> list[Any]:
        return [] if self.latent_env is not None else super()._env_random_states()

    # Files

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "latent_env", "ent_coef_optimizer", "_imagination"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules = ["policy", "policy.actor_optimizer", "policy.critic_optimizer", "policy.model_optimizer"]
        if self.ent_coef_optimizer is None:
            return modules, ["ent_coef_tensor"]
        return [*modules, "ent_coef_optimizer"], ["log_ent_coef"]

    @classmethod
    def load(  # type: ignore[override]
        cls,
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | VectorEnv | None = None,
        device: torch.device | str = "auto",
        **kwargs: Any,
    ) -> Self:
        """Read an agent that `save` wrote, as `ResumableAlgorithm.load`, to go on with a real or a latent env."""
        latent_env = _latent_env_of(env)
        if latent_env is None:
            return super().load(path, env, device, **kwargs)  # type: ignore[arg-type]
        agent = super().load(path, None, latent_env.device, **kwargs)
        agent.set_env(latent_env, kwargs.get("force_reset", True))
        return agent


def _latent_env_of(env: Any) -> LatentVectorEnv | None:
    """Find the `LatentVectorEnv` behind an env, its NumPy face or its SB3 adapter; None for a real env."""
    if isinstance(env, LatentVectorEnv):
        return env
    if isinstance(env, NumpyVectorEnv):
        return _latent_env_of(env.env)
    return _latent_env_of(env.vector_env) if isinstance(env, VecEnv) and hasattr(env, "vector_env") else None
