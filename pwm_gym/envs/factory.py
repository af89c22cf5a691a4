"""Envs by name: real tasks as datasets hold them, and differentiable MuJoCo tasks and torch physics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit

from pwm_gym.differentiable import DifferentiableVectorEnv
from pwm_gym.envs.gl_backend import choose_gl_backend

__all__ = ["make_differentiable", "make_task"]


def make_task(name: str, **kwargs: Any) -> gym.Env:
    """Make a real env of vectors: a registered task by its short name, or any Gymnasium id.

    Args:
        name: "walker-walk" for "pwm_gym/walker-walk-v0", or an id such as "Pendulum-v1".
        **kwargs: Passed to `gymnasium.make`.

    Raises:
        gymnasium.error.UnregisteredEnv: If there is no such env.
        ValueError: If its actions are no bounded Box.

    Example:
        >>> make_task("Pendulum-v1").observation_space.shape
        (3,)
    """
    ours = f"pwm_gym/{name}-v0"
    env = gym.make(ours if ours in gym.registry else name, **kwargs)
    if not isinstance(env.action_space, spaces.Box) or not env.action_space.is_bounded("both"):
        raise ValueError(f"expected bounded Box actions in {name!r}, got {env.action_space}.")
    if not isinstance(env.observation_space, spaces.Box) or len(env.observation_space.shape) != 1:
        env = gym.wrappers.FlattenObservation(env)
    return env


def make_differentiable(
    env: str | gym.Env,
    num_envs: int = 32,
    *,
    horizon: int | None = None,
    autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
    integrator: str | None = None,
    num_threads: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    render_mode: str | None = None,
    **kwargs: Any,
) -> DifferentiableVectorEnv:
    """Make a task with true dynamics into a differentiable `VectorEnv`.

    Args:
        env: A registered id of a dm_control task ("pwm_gym/cheetah-run-v0"), of a Gymnasium MuJoCo task ("Hopper-v5")
            or of torch physics ("pwm_gym/TorchCartPole-v0"); or an env of the first two kinds, of which copies are
            made.
        num_envs: Copies B.
        horizon: Env steps until truncation; None for the task's own limit.
        autoreset_mode: SAME_STEP, NEXT_STEP or DISABLED, as in `GroundTruthVectorEnv`.
        integrator: MuJoCo's "implicitfast", "Euler", ... instead of the model's own, in all B copies. "implicitfast" is
            several times faster than "RK4", but is another simulation: evaluate on the registered task.
        num_threads: Threads that simulate; None for as many as torch uses.
        device: Where tensors come from and go to.
        dtype: Of observations and rewards. MuJoCo computes in float64 whatever it is.
        render_mode: "rgb_array" or None.
        **kwargs: Arguments of the task, such as `action_repeat` or `forward_reward_weight`; only with an id.

    Raises:
        ImportError: If the task's simulator isn't installed.
        TypeError: If `env` is no id or env.
        ValueError: If its dynamics can't be differentiated, or an argument doesn't fit.

    Example:
        >>> import pwm_gym
        >>> env = pwm_gym.make_differentiable("Hopper-v5", num_envs=2)
        >>> env.reset(seed=0)[0].shape, env.horizon
        (torch.Size([2, 11]), 1000)
    """
    common: dict[str, Any] = {"autoreset_mode": autoreset_mode, "device": device, "dtype": dtype}
    common |= {"render_mode": render_mode}
    if isinstance(env, str):
        spec = gym.spec(env)
        if spec.vector_entry_point is not None:
            if integrator is not None or num_threads is not None:
                raise ValueError(f"`integrator` and `num_threads` are MuJoCo's; {env} is torch physics.")
            arguments = {**kwargs, **common} if horizon is None else {**kwargs, **common, "horizon": horizon}
            made: Any = gym.make_vec(env, num_envs, "vector_entry_point", **arguments)
            if not isinstance(made, DifferentiableVectorEnv):
                raise ValueError(f"expected a differentiable env, got {env}, which has no gradients.")
            return made

        def make() -> gym.Env:
            return gym.make(env, render_mode=render_mode, **kwargs)
    elif isinstance(env, gym.Env):
        if kwargs:
            raise ValueError(f"expected arguments of the task only with an id, got {sorted(kwargs)} beside an env.")
        make = _copies_of(env, render_mode)
    else:
        raise TypeError(
            f"`env` must be a registered id or a gymnasium.Env, got {type(env).__name__}. Give 'Hopper-v5', "
            f"'pwm_gym/cheetah-run-v0' or 'pwm_gym/TorchCartPole-v0'."
        )
    return _mujoco(make, num_envs, horizon, integrator, num_threads, common)


def _copies_of(env: gym.Env, render_mode: str | None) -> Callable[[], gym.Env]:
    layer: Any = env
    while isinstance(layer, gym.Wrapper):
        if not isinstance(layer, TimeLimit | OrderEnforcing | PassiveEnvChecker):
            raise ValueError(
                f"expected a task without wrappers of its own, got {type(layer).__name__} around it: a wrapper's part "
                f"of the step would be missing from the gradients. Give the task itself."
            )
        layer = layer.env
    spec = env.spec
    if spec is not None:
        return lambda: gym.make(spec, render_mode=render_mode)
    return lambda: copy.deepcopy(env)


def _mujoco(
    make: Callable[[], gym.Env],
    num_envs: int,
    horizon: int | None,
    integrator: str | None,
    num_threads: int | None,
    common: dict[str, Any],
) -> DifferentiableVectorEnv:
    choose_gl_backend()  # before anything imports mujoco
    first = make()
    kind = first.unwrapped
    try:
        from gymnasium.envs.mujoco import MujocoEnv

        from pwm_gym.envs.differentiable_simulator import DifferentiableSimulator
        from pwm_gym.envs.dm_control import DMControlEnv
        from pwm_gym.envs.dm_control_simulator import DMControlSimulator
        from pwm_gym.envs.gymnasium_simulator import GymnasiumSimulator
        from pwm_gym.envs.mujoco_dynamics import MujocoVectorEnv, ThreadedDynamics, default_threads
    except ImportError as error:
        raise ImportError('MuJoCo tasks need mujoco: pip install "pwm-gym[mujoco]"') from error
    if not isinstance(kind, DMControlEnv | MujocoEnv):
        raise ValueError(
            f"expected a dm_control or Gymnasium MuJoCo task, or torch physics, got {kind}, which has no gradients. "
            f"Learn a model of it instead: PWM('MlpPolicy', env)."
        )
    limit = getattr(kind, "max_episode_steps", None) or (first.spec.max_episode_steps if first.spec else None)
    horizon = limit if horizon is None else horizon
    if horizon is None:
        raise ValueError(f"expected `horizon` for {kind}, which has no time limit of its own, got None.")
    made = iter([first])

    def make_simulator() -> DifferentiableSimulator:
        task: Any = next(made, None) or make()
        task = task.unwrapped
        if isinstance(task, DMControlEnv):
            return DMControlSimulator(task, integrator)
        return GymnasiumSimulator(task, lambda: make().unwrapped, integrator)

    threads = default_threads(num_envs) if num_threads is None else num_threads
    dynamics = ThreadedDynamics(make_simulator, num_envs, threads)
    fps = kind.metadata.get("render_fps", 30)
    return MujocoVectorEnv(dynamics, num_envs, horizon, render_fps=fps, **common)
