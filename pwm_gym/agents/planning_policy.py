"""Policies that act by planning in a world model: TD-MPC2's, and PWM's with a plan on top."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor

from pwm_gym.agents.policies import SafeFile, make_world_model
from pwm_gym.agents.pwm import PWM
from pwm_gym.planning import Plan, Planner
from pwm_gym.training import fast_matmul, make_model_optimizer

__all__ = ["PlannedPWM", "PlanningPolicy", "TDMPC2Policy", "plan_with"]


class PlanningPolicy(BasePolicy):
    """Acts on real observations by a plan for each env; `predict`'s state is what the next plan begins with."""

    generator: torch.Generator | None = None  # of all randomness but that of deterministic plans; None: torch's global

    @property
    @abstractmethod
    def planner(self) -> Planner:
        """The planner."""

    def plan(
        self,
        observation: PyTorchObs,
        previous: Tensor | None = None,
        episode_start: Tensor | None = None,
        deterministic: bool = False,
    ) -> Plan:
        """Plan for a batch of real observations.

        Args:
            observation: As `obs_to_tensor` gives them.
            previous: As in `Planner.plan`.
            episode_start: As in `Planner.plan`.
            deterministic: Leave exploration noise out, and plan with the same random numbers at every call and for
                every env, so that the plan depends on nothing but the other arguments.
        """
        planner, model = self.planner, self.planner.world_model
        with fast_matmul(model.device), torch.no_grad():
            z = model.encode(model.preprocess(observation))  # (B, Z)
            if deterministic:
                noise = planner.draw(1, torch.Generator(model.device).manual_seed(0))
            else:
                noise = planner.draw(len(z), self.generator)
            return planner.plan(z, noise, previous, episode_start, deterministic)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Act as SB3's recurrent policies do: hand the state back at the next call, and each plan begins with the last.

        Args:
            observation: One observation, or a batch, (B, ...).
            state: What the last call for the same envs gave; None to begin at 0.
            episode_start: Envs whose episode has just begun, (B,): they begin at 0 again.
            deterministic: As in `plan`. Two calls with the same arguments then answer the same.

        Returns:
            Actions in the real action space, and the means of the plans, ((B, H, A),).

        Raises:
            ValueError: If `state` is of another number of envs, or of another horizon.
        """
        self.set_training_mode(False)
        tensor, is_batch = self.obs_to_tensor(observation)
        device = self.planner.world_model.device
        previous = None if state is None else torch.as_tensor(state[0], device=device).transpose(0, 1)  # (H, B, A)
        start = None if episode_start is None else torch.tensor(np.atleast_1d(episode_start), device=device).bool()
        plan = self.plan(tensor, previous, start, deterministic)
        actions = self.unscale_action(plan.actions.cpu().numpy().reshape(-1, *self.action_space.shape))  # type: ignore[misc]
        return actions if is_batch else actions[0], (plan.mean.transpose(0, 1).cpu().numpy(),)

    def forward(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        """Act on a batch of real observations, each plan begun at 0; returns actions in [-1, 1], (B, A)."""
        return self.plan(observation, deterministic=deterministic).actions

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        return self(observation, deterministic)


class TDMPC2Policy(PlanningPolicy, SafeFile):
    """TD-MPC2's world model, with value ensemble and policy prior, and the planner that acts with it.

    Args:
        observation_space: Real observation space.
        action_space: Real action space.
        lr_schedule: Learning rate by remaining progress; None for a policy that only acts.
        world_model_kwargs: {"size": a preset, "5M" by default} and any field of `WorldModelConfig`.
        planner_kwargs: Settings of `Planner`, from `horizon` on.
        features_extractor_class: An SB3 features extractor in front of the world model's encoder, trained by the
            model's loss; None to flatten observations.
        features_extractor_kwargs: Its arguments beside the observation space.

    Raises:
        TypeError: If a space is of a kind that a world model can't take.
        ValueError: If the model lacks what a planner needs, or does not fit the spaces.

    Example:
        >>> box = spaces.Box(-1.0, 1.0, (3,), np.float32)
        >>> policy = TDMPC2Policy(box, box, lambda _: 3e-4, {"size": "1M"}, {"num_samples": 64, "num_elites": 8})
        >>> action, state = policy.predict(np.zeros((2, 3), np.float32), deterministic=True)
        >>> action.shape, state[0].shape
        ((2, 3), (2, 3, 3))
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule | None,
        world_model_kwargs: dict[str, Any] | None = None,
        planner_kwargs: dict[str, Any] | None = None,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(observation_space, action_space, squash_output=True, normalize_images=False)
        self._arguments = {
            "planner_kwargs": planner_kwargs,
            "features_extractor_class": features_extractor_class,
            "features_extractor_kwargs": features_extractor_kwargs,
        }
        self.world_model = make_world_model(
            observation_space,
            action_space,
            {"size": "5M", "planning": True, **(world_model_kwargs or {})},
            features_extractor_class,
            features_extractor_kwargs,
        )
        self._planner = Planner(self.world_model, **(planner_kwargs or {}))
        self.model_optimizer = make_model_optimizer(self.world_model, lr_schedule(1) if lr_schedule else 0.0)

    @property
    def planner(self) -> Planner:
        """The planner; its settings can be changed at any time."""
        return self._planner

    @property  # type: ignore[override]
    def features_extractor(self) -> BaseFeaturesExtractor | None:
        """The features extractor; the world model owns it."""
        return self.world_model.features_extractor

    @features_extractor.setter
    def features_extractor(self, _: BaseFeaturesExtractor | None) -> None:
        """Let SB3's constructor set its default."""

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = super()._get_constructor_parameters()
        parameters.pop("normalize_images")
        config = dataclasses.asdict(self.world_model.config)
        return {**parameters, **self._arguments, "world_model_kwargs": config, "lr_schedule": None}


class PlannedPWM(PlanningPolicy):
    """PWM's policy with a plan on top: see `plan_with`.

    Args:
        agent: The agent, as it is at the time of each plan.
        planner_kwargs: Settings of `Planner`, from `horizon` on.
    """

    def __init__(self, agent: PWM, planner_kwargs: dict[str, Any]) -> None:
        super().__init__(agent.observation_space, agent.action_space, squash_output=True, normalize_images=False)
        if agent.use_sde:
            raise ValueError("expected a PWM that explores without gSDE to plan with, got one with use_sde=True.")
        self._agent, self.generator = agent, agent._generator
        self._planner = Planner(agent.world_model, self._prior, self._values, agent.gamma, **planner_kwargs)

    @property
    def planner(self) -> Planner:
        """The planner, on the agent's present world model."""
        self._planner.world_model = self._agent.world_model
        return self._planner

    def save(self, path: str) -> None:
        """Refuse: save the agent instead.

        Raises:
            NotImplementedError: Always: a plan on top has no weights of its own.
        """
        raise NotImplementedError("a plan on top has no weights of its own: save the agent, and call plan_with again.")

    def _prior(self, z: Tensor, noise: Tensor, _: Any) -> Tensor:
        return self._agent.policy.actor.latent_actor(z, noise)[0]

    def _values(self, z: Tensor, _: Tensor, __: Any) -> Tensor:
        return self._agent.critic.value(z).amin(0, keepdim=True)  # (1, ...): the least counts, as in PWM's updates


def plan_with(agent: PWM, **planner_kwargs: Any) -> PlannedPWM:
    """Let PWM plan on top of its policy, which becomes the planner's prior, with its critics as terminal value.

    PWM acts without planning; this measures what a plan would add. The agent itself is left as it is.

    Args:
        agent: The agent.
        **planner_kwargs: Settings of `Planner`, from `horizon` on.

    Returns:
        A policy with SB3's `predict`, for `evaluate_policy` and the like.

    Raises:
        ValueError: If the agent explores with gSDE, or a setting is out of range.

    Example:
        >>> agent = PWM("MlpPolicy", "Pendulum-v1", seed=0)
        >>> planned = plan_with(agent, num_samples=32, num_elites=8, num_prior=4)
        >>> planned.predict(agent.observation_space.sample(), deterministic=True)[0].shape
        (1,)
    """
    return PlannedPWM(agent, planner_kwargs)
