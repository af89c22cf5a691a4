"""Agents that PWM's own code saved."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import torch
from gymnasium.vector import VectorEnv
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from pwm_gym.agents.policies import PWMPolicy
from pwm_gym.agents.pwm import PWM
from pwm_gym.checkpoints.layers import latent_order, layers_of, put_layers, read_layers, reorder
from pwm_gym.checkpoints.pwm import moments, pwm_world_model, read_pwm
from pwm_gym.latent_env import LatentVectorEnv
from pwm_gym.world_model import WorldModel

__all__ = ["load_pwm_agent"]


@torch.no_grad()
def load_pwm_agent(
    source: str | os.PathLike[str],
    env: gym.Env | VectorEnv | VecEnv | None = None,
    *,
    tasks: str | Sequence[str] | None = None,
    task: int | str | None = None,
    device: torch.device | str = "cpu",
    gamma: float = 0.99,
    **kwargs: Any,
) -> PWM:
    """Read an agent that PWM's code saved: world model, actor, critics and the scale of returns, without optimizers.

    Of a multi-task file, the agent gets the single-task model of its task, and acts in that task's own dimensions.
    Where the file normalises rewards, the values are turned into task units too: V = σ V' + μ / (1 - γ).

    Args:
        source: As in `load_tdmpc2`.
        env: Real env to go on with, which gives the spaces; None for an agent that acts, and learns in its model.
        tasks: As in `load_tdmpc2`.
        task: Name or index of the task that the agent was trained on; None for a single-task file.
        device: Where the agent goes.
        gamma: Discount that the critics were trained with, below 1.
        **kwargs: Arguments of `PWM` other than policy and env. What is not given is as in PWM.PAPER.

    Raises:
        FileNotFoundError: As in `load_tdmpc2`.
        ImportError: As in `load_tdmpc2`.
        UnsafeFileError: If the file holds other pickled objects than PWM's statistics; nothing is executed.
        ValueError: If the file is damaged or no such agent, or task or spaces don't fit it.
    """
    content = read_pwm(source)
    fields: dict[str, Any] = {"observation_space": None, "action_space": None, "reward_in_task_units": False}
    model = pwm_world_model(content, tasks, **fields).for_task(task)
    if env is not None:
        observation_space, action_space = (
            getattr(env, f"single_{name}", None) or getattr(env, name) for name in ("observation_space", "action_space")
        )
        weights = model.state_dict()
        model = WorldModel(model.config, observation_space, action_space).eval()
        model.load_state_dict(weights)
    order = latent_order(model.config.latent_dim, model.config.simnorm_dim)
    actor = reorder(read_layers(content["actor"], "mu_net."), order, None)
    critic = reorder(read_layers(content["critic"], "params.", ensemble=True), order, None)
    if "logstd" not in content["actor"] or not actor or not critic:
        raise ValueError("expected 'mu_net.*' and 'logstd' of an actor and 'params.*' of critics, got some missing.")

    # What else a multi-task actor answers is padding.
    own = torch.arange(min(model.config.action_dim, actor[-1].out_features))
    policy_kwargs = {
        "net_arch": {name: [layer.out_features for layer in net[:-1]] for name, net in (("pi", actor), ("qf", critic))},
        "n_critics": len(critic[0].weight),
        "model_learning_rate": PWM.PAPER["policy_kwargs"]["model_learning_rate"],
        **kwargs.pop("policy_kwargs", {}),
    }
    settings = {**PWM.PAPER, **kwargs, "policy_kwargs": policy_kwargs}
    agent = PWM("MlpPolicy", LatentVectorEnv(model.to(device)), gamma=gamma, **settings)
    policy = agent.policy
    latent_actor = policy.actor.latent_actor
    put_layers(reorder(actor, None, own), nn.Sequential(latent_actor.features, latent_actor.mean))
    latent_actor.log_std.copy_(content["actor"]["logstd"][own])
    put_layers(critic, policy.critic.value)
    _restore_scale(policy, content, gamma)
    policy.critic_target.value.load_state_dict(policy.critic.value.state_dict())
    if env is not None:
        agent.set_env(env)
    return agent


def _restore_scale(policy: PWMPolicy, content: Mapping[str, Any], gamma: float) -> None:
    """Bring values and the statistics of returns into task units, where the file's rewards are normalised."""
    rewards, returns = moments(content.get("rew_rms")), moments(content.get("ret_rms"))
    std, shift = torch.ones(()), torch.zeros(())
    if rewards is not None and policy.world_model.config.num_bins == 1:
        std, shift = rewards[1].squeeze().cpu(), rewards[0].squeeze().cpu() / (1.0 - gamma)
        last = layers_of(policy.critic.value)[-1]
        last.weight.mul_(std)
        last.bias.mul_(std).add_(shift)
    if returns is not None:  # of losses there, of returns here
        mean, deviation, count = returns
        policy.return_scale.mean.copy_(-std * mean.squeeze() + shift)
        policy.return_scale.var.copy_(std.square() * (deviation.square() - 1e-5).squeeze())
        policy.return_scale.count.fill_(count)
