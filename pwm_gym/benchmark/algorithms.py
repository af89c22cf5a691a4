"""The algorithms that can be compared: what each is, which env it trains in, and its settings for a benchmark."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer

from pwm_gym.datasets import OfflineDataset
from pwm_gym.envs.factory import make_differentiable
from pwm_gym.latent_env import LatentVectorEnv
from pwm_gym.sb3 import LatentObservation, as_sb3_vec_env
from pwm_gym.world_model import WorldModel

__all__ = ["ALGORITHMS", "Algorithm", "algorithm_of", "check_arguments", "env_id_of", "label_of", "nearest"]

_ROLLOUT, _MINIBATCH = 2048, 64  # SB3's defaults of PPO's n_steps and batch_size
_MOST_ENVS = 64
_FILM = 240  # pixels


class Algorithm(NamedTuple):
    """One algorithm.

    Attributes:
        label: Its name in tables and pictures.
        source: "module:Class", imported when it is needed.
        differentiable: Whether it trains through true dynamics, on `make_differentiable(task)`.
        latent_face: How it trains in a frozen world model: on the "torch" face of its `LatentVectorEnv`, or as SB3's
            own on the "numpy" one, its policy then reading latents; "agent" for one that takes that env and acts on
            real observations; None where it can't.
    """

    label: str
    source: str
    differentiable: bool = False
    latent_face: str | None = "numpy"

    @property
    def reads_latents(self) -> bool:
        """Tell whether a policy that was trained in a world model sees latents."""
        return self.latent_face in ("torch", "numpy")

    def load_class(self) -> type[BaseAlgorithm]:
        """Import the class."""
        module, _, name = self.source.partition(":")
        return getattr(importlib.import_module(module), name)


ALGORITHMS: dict[str, Algorithm] = {
    "pwm": Algorithm("PWM", "pwm_gym.agents:PWM", latent_face="agent"),
    "tdmpc2": Algorithm("TD-MPC2", "pwm_gym.agents:TDMPC2", latent_face=None),
    "sac": Algorithm("SAC", "stable_baselines3:SAC"),
    "ppo": Algorithm("PPO", "stable_baselines3:PPO"),
    "shac": Algorithm("SHAC", "pwm_gym.agents:SHAC", differentiable=True, latent_face="torch"),
}


# Names


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which of the known names `name` may have been meant for, for the end of an error message."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"expected one of {', '.join(sorted(known))}."


def algorithm_of(name: str) -> Algorithm:
    """Find an algorithm by name; what stands behind an @ names a variant of it, as in "pwm@h16".

    Raises:
        ValueError: If there is none of that name.

    Example:
        >>> algorithm_of("pwm@h16").label
        'PWM'
    """
    base = name.partition("@")[0]
    if base not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {name!r}: {nearest(base, ALGORITHMS)}")
    return ALGORITHMS[base]


def label_of(name: str) -> str:
    """Give the name for tables and pictures: "pwm@h16" becomes "PWM (h16)"."""
    variant = name.partition("@")[2]
    return algorithm_of(name).label + (f" ({variant})" if variant else "")


def env_id_of(task: str) -> str:
    """Find the Gymnasium id of a task: of this package's own by their plain names, of others as they are registered.

    Raises:
        ValueError: If there is none of that name, or it is no single env.

    Example:
        >>> env_id_of("walker-walk"), env_id_of("Pendulum-v1")
        ('pwm_gym/walker-walk-v0', 'Pendulum-v1')
    """
    own = f"pwm_gym/{task}-v0"
    found = own if own in gym.registry else task
    if found not in gym.registry:
        ours = [
            name.removeprefix("pwm_gym/").removesuffix("-v0") for name in gym.registry if name.startswith("pwm_gym/")
        ]
        raise ValueError(f"unknown task {task!r}: {nearest(task, [*ours, *gym.registry])}")
    if gym.registry[found].entry_point is None:
        raise ValueError(f"expected a task that is also a single env, on which agents are scored, got {task!r}.")
    return found


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Check that the algorithm has these arguments.

    Raises:
        ValueError: If it doesn't know one.
    """
    known = [*inspect.signature(algorithm_of(name).load_class().__init__).parameters, "num_envs"]
    for argument in arguments:
        if argument not in known:
            raise ValueError(f"{label_of(name)} has no argument {argument!r}: {nearest(argument, known)}")


# Envs


def training_env(
    algorithm: Algorithm, env_id: str, every: int, num_envs: int | None, model: str | None, data: str | None
) -> Any:
    """Make the env that an algorithm trains in.

    SHAC gets as many envs as can play whole episodes between two evaluations, since a run begins anew there.

    Args:
        algorithm: The algorithm.
        env_id: Gymnasium id of the task.
        every: Decisions between two evaluations.
        num_envs: Envs of a batch, where there are several; None for 64 in a world model, 16 for SB3's own, and see
            above.
        model: File of a frozen world model to train in, None for the task itself.
        data: Folder of the dataset that imagined episodes start from.

    Raises:
        ValueError: If the task has no gradients for SHAC, or the algorithm can't learn in a world model.
    """
    if model is not None:
        if algorithm.latent_face is None:
            raise ValueError(f"{algorithm.label} plans with a model instead of learning in it: leave it out here.")
        world_model, dataset = WorldModel.load(model).requires_grad_(False), OfflineDataset.load(str(data))
        count = num_envs or (16 if algorithm.latent_face == "numpy" else 64)
        latent_env = LatentVectorEnv(world_model, dataset, num_envs=count)
        return as_sb3_vec_env(latent_env) if algorithm.latent_face == "numpy" else latent_env
    if not algorithm.differentiable:
        return gym.make(env_id)
    if num_envs is None:
        horizon = make_differentiable(env_id, 1).horizon  # type: ignore[attr-defined]
        num_envs = int(np.clip(every // horizon, 1, _MOST_ENVS))
    return make_differentiable(env_id, num_envs)


def real_env(algorithm: Algorithm, env_id: str, model: str | None, render_mode: str | None = None) -> gym.Env:
    """Make the env that an algorithm is scored in: the task, seen through the model where its policy reads latents.

    Raises:
        ValueError: If the model doesn't fit the task.
    """
    size: dict[str, Any] = {"height": _FILM, "width": _FILM} if render_mode and env_id.startswith("pwm_gym/") else {}
    env = gym.make(env_id, render_mode=render_mode, **size)
    if model is None:
        return env
    seen = LatentObservation(env, WorldModel.load(model))
    return seen if algorithm.reads_latents else env


# Agents


def default_arguments(name: str, every: int, num_envs: int) -> dict[str, Any]:
    """Give the arguments in which a benchmark departs from an algorithm's own defaults.

    That is one: PPO's rollouts, 2,048 steps by default, end where evaluations are, so that each evaluation is of the
    policy after as many steps as it says. They become the longest part of `every` that is no longer, and minibatches
    the largest part of those with up to 64 steps.

    Args:
        name: The algorithm.
        every: Decisions between two evaluations.
        num_envs: Envs that it trains in.

    Example:
        >>> default_arguments("ppo", every=2_500, num_envs=1)
        {'n_steps': 1250, 'batch_size': 50}
    """
    if algorithm_of(name).source != ALGORITHMS["ppo"].source:
        return {}
    steps = _largest_part(max(every // num_envs, 1), _ROLLOUT)
    return {"n_steps": steps, "batch_size": _largest_part(steps * num_envs, _MINIBATCH)}


def _largest_part(whole: int, limit: int) -> int:
    return next(part for part in range(min(limit, whole), 0, -1) if whole % part == 0)


def make_agent(name: str, env: Any, every: int, arguments: Mapping[str, Any], seed: int, device: str) -> BaseAlgorithm:
    """Make a new agent with its defaults and these arguments."""
    num_envs = getattr(env, "num_envs", 1)
    given = copy.deepcopy({key: value for key, value in arguments.items() if key != "num_envs"})  # SB3 writes into some
    settings = {**default_arguments(name, every, num_envs), **given}
    agent_class: Any = algorithm_of(name).load_class()
    return agent_class("MlpPolicy", env, seed=seed, device=device, **settings)


# What SB3 would pickle whole, a million rows of it, is kept as plain arrays up to the last row in use.
_ROWS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


def save_agent(agent: Any, path: str) -> None:
    """Write an agent, and its replay buffer where it has one, to `path`.zip and `path`.replay or `path`.npz."""
    agent.save(path)
    replay = getattr(agent, "replay_buffer", None)
    if type(replay) is ReplayBuffer:
        rows = {name: getattr(replay, name)[: replay.size()] for name in _ROWS}
        np.savez(f"{path}.npz", pos=replay.pos, full=replay.full, **rows)
    elif replay is not None:
        agent.save_replay_buffer(path)


def load_agent(name: str, path: str, env: Any, device: str) -> BaseAlgorithm:
    """Read an agent that `save_agent` wrote, with its replay buffer."""
    agent: Any = algorithm_of(name).load_class().load(path, env=env, device=device)
    replay = getattr(agent, "replay_buffer", None)
    if type(replay) is ReplayBuffer:
        with np.load(f"{path}.npz") as rows:
            for key in _ROWS:
                getattr(replay, key)[: len(rows[key])] = rows[key]
            replay.pos, replay.full = int(rows["pos"]), bool(rows["full"])
    elif hasattr(agent, "save_replay_buffer") and replay is not None:
        agent.load_replay_buffer(path)
    return agent
