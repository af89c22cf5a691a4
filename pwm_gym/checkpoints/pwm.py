"""PWM's agents: their world model, actor and critics, read without executing the file's pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from pwm_gym.agents import PWM, PWMPolicy
from pwm_gym.checkpoints.tdmpc2 import make_model, pick_tensors
from pwm_gym.foreign import read_torch_file
from pwm_gym.hub import local_file
from pwm_gym.latent_env import LatentVectorEnv
from pwm_gym.layers import latent_order, layers_of, put_layers, read_layers, reorder
from pwm_gym.world_model import WorldModel

__all__ = ["load_pwm", "load_pwm_agent"]

_STATISTICS = "pwm.utils.running_mean_std.RunningMeanStd"  # pickled in the files


def _read_pwm(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what PWM's code saved: state dictionaries by name, and running statistics as `ForeignObject`s."""
    path = local_file(source)
    content = read_torch_file(path, objects=[_STATISTICS])
    missing = {"actor", "critic", "world_model"}.difference(content if isinstance(content, dict) else ())
    if missing:
        raise ValueError(
            f"expected an agent that PWM's code saved in {os.fspath(path)!r}, got no {sorted(missing)}. A world model "
            f"of TD-MPC2 is read by load_tdmpc2."
        )
    return content


def _moments(statistics: Any) -> tuple[Tensor, Tensor, float] | None:
    """Read mean, standard deviation, as PWM divides by it, and count; None where there are none."""
    if statistics is None:
        return None
    try:
        mean, var, count = (statistics.state[name] for name in ("mean", "var", "count"))
        return mean.float(), (var.float() + 1e-5).sqrt(), float(count)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected running statistics with mean, var and count, got {statistics!r}.") from error


@torch.no_grad()
def _pwm_world_model(content: Mapping[str, Any], tasks: str | Sequence[str] | None, **fields: Any) -> WorldModel:
    """Make the world model of an agent's file, with the file's normalisation as a part of its weights."""
    entries = pick_tensors(content["world_model"], "under 'world_model'")
    model = make_model(entries, tasks, fields.pop("observation_space"), fields.pop("action_space"), **fields)
    observations, rewards = _moments(content.get("obs_rms")), _moments(content.get("rew_rms"))
    if observations is not None:
        first, (mean, std, _) = layers_of(model.encoder)[0], observations
        columns = first.weight[:, : model.config.observation_dim].div_(std)
        first.bias.sub_(columns @ mean)
    if rewards is not None and model.config.num_bins == 1:
        last, (mean, std, _) = layers_of(model.reward_head)[-1], rewards
        last.weight.mul_(std)
        last.bias.mul_(std).add_(mean)
    elif rewards is not None and rewards[2] > 1.0:
        raise ValueError(
            "expected rewards that were not normalised ('rew_rms' None or unused) from a model that predicts a "
            "categorical, got normalised ones, which can't be turned back."
        )
    return model


def load_pwm(
    source: str | os.PathLike[str],
    tasks: str | Sequence[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    observation_space: spaces.Space | None = None,
    action_space: spaces.Space | None = None,
    simnorm_dim: int = 8,
    vmin: float = -10.0,
    vmax: float = 10.0,
    reward_in_task_units: bool = False,
) -> WorldModel:
    """Read the world model out of an agent that PWM's code saved (github.com/imgeorgiev/PWM).

    The file's normalisation of observations and rewards becomes a part of the weights, so that the model takes raw
    observations and a scalar reward is in task units. (PWM also clips normalised observations at 5; that is left out.)

    Args:
        source: As in `load_tdmpc2`.
        tasks: As in `load_tdmpc2`.
        device: As in `load_tdmpc2`.
        observation_space: As in `load_tdmpc2`.
        action_space: As in `load_tdmpc2`.
        simnorm_dim: As in `load_tdmpc2`.
        vmin: As in `load_tdmpc2`.
        vmax: As in `load_tdmpc2`.
        reward_in_task_units: Decode a categorical reward with symexp. PWM's code, and so its critics, leave it out.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: As in `load_tdmpc2`.
        ImportError: As in `load_tdmpc2`.
        UnsafeFileError: If the file holds other pickled objects than PWM's statistics; nothing is executed.
        ValueError: As in `load_tdmpc2`.
    """
    return _pwm_world_model(
        _read_pwm(source),
        tasks,
        observation_space=observation_space,
        action_space=action_space,
        simnorm_dim=simnorm_dim,
        vmin=vmin,
        vmax=vmax,
        reward_in_task_units=reward_in_task_units,
    ).to(device)


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
    content = _read_pwm(source)
    fields: dict[str, Any] = {"observation_space": None, "action_space": None, "reward_in_task_units": False}
    model = _pwm_world_model(content, tasks, **fields).for_task(task)
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
    rewards, returns = _moments(content.get("rew_rms")), _moments(content.get("ret_rms"))
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
