"""MuJoCo tasks as differentiable VectorEnvs: the real simulator forward, its finite-difference Jacobians backward."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import Tensor
from torch.autograd.function import once_differentiable

from pwm_gym.envs.differentiable_simulator import DifferentiableSimulator
from pwm_gym.envs.ground_truth import GroundTruthVectorEnv, Outcome

__all__ = ["Dynamics", "MujocoVectorEnv", "ThreadedDynamics", "Transition"]


class Transition(NamedTuple):
    """One step of B envs; rows that did not step are 0."""

    observations: np.ndarray  # (B, O), float64
    rewards: np.ndarray  # (B,), float64
    terminated: np.ndarray  # (B,), bool
    jacobians: (
        np.ndarray | None
    )  # (B, n + O + 1, n + A): ∂ (next tangent state, observation, reward) / ∂ (state, action)


class Dynamics(Protocol):
    """What moves B copies of a task: the seam for another engine, on a GPU for instance.

    Attributes:
        tangent_dim: n, the dimensions of the state that gradients flow through.
        observation_space: Of one env, (O,).
        action_space: Of one env, (A,).
    """

    tangent_dim: int
    observation_space: spaces.Box
    action_space: spaces.Box

    def reset(self, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Start an episode in the envs `rows`, (N,), one seed for each; gives the observations (N, O)."""

    def step(self, actions: np.ndarray, rows: np.ndarray, jacobians: bool) -> Transition:
        """Step the envs `rows`, (N,), with their rows of `actions`, (B, A), and differentiate if asked to."""

    def read(self) -> np.ndarray:
        """Read all full states, (B, P)."""

    def write(self, states: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Put the envs `rows`, (N,), into full states, (N, P); gives the observations (N, O)."""

    def culprit(self, row: int) -> str | None:
        """Name what went wrong in an env whose numbers are not finite, or None."""

    def render(self, row: int) -> np.ndarray:
        """Draw an env, (h, w, 3), uint8."""

    def close(self) -> None:
        """Free everything."""


class ThreadedDynamics:
    """`Dynamics` by one simulator for each env, on a pool of threads: MuJoCo computes outside Python's lock.

    Args:
        make_simulator: Makes one simulator.
        num_envs: B.
        num_threads: Threads; 1 computes in the caller's.
    """

    def __init__(self, make_simulator: Callable[[], DifferentiableSimulator], num_envs: int, num_threads: int) -> None:
        self._simulators = [make_simulator() for _ in range(num_envs)]
        first = self._simulators[0]
        self.tangent_dim = first.tangent_dim
        self.observation_space, self.action_space = first.observation_space, first.action_space
        self._pool = ThreadPoolExecutor(num_threads) if num_threads > 1 else None

    def _map(self, function: Callable[..., Any], *columns: Any) -> list[Any]:
        return list((map if self._pool is None else self._pool.map)(function, *columns))

    def reset(self, rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Start episodes; in the caller's thread, as tasks build models in it."""
        return np.stack([self._simulators[i].reset(int(seed)) for i, seed in zip(rows, seeds, strict=True)])

    def step(self, actions: np.ndarray, rows: np.ndarray, jacobians: bool) -> Transition:
        """Step envs."""
        batch, observed, n = len(self._simulators), self.observation_space.shape[0], self.tangent_dim
        observations, rewards = np.zeros((batch, observed)), np.zeros(batch)
        terminated = np.zeros(batch, dtype=np.bool_)
        matrices = np.zeros((batch, n + observed + 1, n + actions.shape[1])) if jacobians else None
        steps = self._map(lambda i: self._simulators[i].step(actions[i], jacobians), rows.tolist())
        for i, step in zip(rows, steps, strict=True):
            observations[i], rewards[i], terminated[i] = step.observation, step.reward, step.terminated
            if matrices is not None:
                matrices[i] = step.jacobian
        return Transition(observations, rewards, terminated, matrices)

    def read(self) -> np.ndarray:
        """Read all full states, (B, P)."""
        return np.stack([simulator.read() for simulator in self._simulators])

    def write(self, states: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Put envs into full states."""
        return np.stack([self._simulators[i].write(state) for i, state in zip(rows, states, strict=True)])

    def culprit(self, row: int) -> str | None:
        """Name what went wrong in an env."""
        return self._simulators[row].culprit()

    def render(self, row: int) -> np.ndarray:
        """Draw an env."""
        return self._simulators[row].env.render()

    def close(self) -> None:
        """Stop the threads and close the simulators."""
        if self._pool is not None:
            self._pool.shutdown()
        for simulator in self._simulators:
            simulator.env.close()


class _TransitionFunction(torch.autograd.Function):
    """Hang the Jacobians of a step, which the simulator took already, into the graph.

    The tangent state carries no number, only gradients: its values are 0 at every state.
    """

    @staticmethod
    def forward(
        ctx: Any, tangent: Tensor, actions: Tensor, observations: Tensor, rewards: Tensor, jacobians: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(jacobians)
        return torch.zeros_like(tangent), observations.clone(), rewards.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, tangent: Tensor, observations: Tensor, rewards: Tensor) -> tuple[Tensor | None, ...]:
        (jacobians,) = ctx.saved_tensors  # (B, n + O + 1, n + A)
        outer = torch.cat([tangent, observations, rewards.unsqueeze(-1)], -1)  # (B, n + O + 1)
        inner = torch.bmm(outer.unsqueeze(1), jacobians).squeeze(1)  # (B, n + A)
        n = tangent.shape[-1]
        return inner[:, :n], inner[:, n:], None, None, None


class MujocoVectorEnv(GroundTruthVectorEnv):
    """B copies of a MuJoCo task with gradients of its true dynamics. `make_differentiable` makes it from a task's id.

    The forward step is the registered task's own, in float64; observations and rewards leave in `dtype`. Where no
    gradient is asked for (`torch.no_grad`, or actions and state without one), no Jacobian is computed.

    Args:
        dynamics: Moves the envs.
        horizon: Env steps until truncation.
        autoreset_mode: See `GroundTruthVectorEnv`.
        device: Where tensors come from and go to; the simulation stays on the CPU.
        dtype: Of observations and rewards.
        render_mode: "rgb_array" or None.
        render_fps: Frames in a second of the task's time.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import pwm_gym
        >>> env = pwm_gym.make_differentiable("pwm_gym/pendulum-swingup-v0", num_envs=2)
        >>> observations, infos = env.reset(seed=0)
        >>> actions = torch.zeros(2, 1, requires_grad=True)
        >>> for _ in range(3):
        ...     observations, rewards, terminated, truncated, infos = env.step(actions)
        >>> torch.autograd.grad(observations.sum(), actions)[0].shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        dynamics: Dynamics,
        num_envs: int,
        horizon: int,
        autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        render_mode: str | None = None,
        render_fps: float = 30,
    ) -> None:
        super().__init__(
            num_envs,
            dynamics.observation_space,
            dynamics.action_space,
            horizon,
            autoreset_mode,
            device,
            render_mode,
            render_fps,
        )
        self.dynamics, self.dtype = dynamics, dtype
        self._steps = 0  # taken in all, for error messages
        self._cut()

    def _cut(self) -> None:
        self._tangent = torch.zeros(self.num_envs, self.dynamics.tangent_dim, dtype=torch.float64)  # (B, n), on the CPU

    def _outward(self, values: Tensor) -> Tensor:
        return values.to(self.device, self.dtype)

    def _clear_tangent(self, rows: np.ndarray) -> None:
        zeros = torch.zeros(len(rows), self.dynamics.tangent_dim, dtype=torch.float64)
        self._tangent = self._tangent.index_copy(0, torch.from_numpy(rows), zeros)

    def _begin(self, rows: np.ndarray) -> Tensor:
        seeds = self.np_random.integers(2**31, size=len(rows))
        self._clear_tangent(rows)
        return self._outward(torch.from_numpy(self.dynamics.reset(rows, seeds)))

    def get_state(self) -> np.ndarray:
        """Read the full states of all simulators, (B, P), float64: with one of them the future repeats bit for bit."""
        return self.dynamics.read()

    def _write_state(self, states: np.ndarray, rows: np.ndarray) -> Tensor:
        self._clear_tangent(rows)
        return self._outward(torch.from_numpy(self.dynamics.write(states, rows)))

    def _advance(self, actions: Tensor, rows: np.ndarray) -> Outcome:
        inside = actions.to("cpu", torch.float64)  # (B, A)
        wanted = torch.is_grad_enabled() and (inside.requires_grad or self._tangent.requires_grad)
        step = self.dynamics.step(inside.detach().numpy(), rows, wanted)
        self._steps += 1
        self._check_finite(step)
        observations, rewards = torch.from_numpy(step.observations), torch.from_numpy(step.rewards)
        infos: dict[str, Tensor] = {}
        if step.jacobians is not None:
            jacobians, n = torch.from_numpy(step.jacobians), self.dynamics.tangent_dim
            norm = torch.linalg.matrix_norm(jacobians[:, :n, :n]) / n**0.5  # Frobenius, and 1 for standing still
            infos["jacobian_norm"] = self._outward(norm)  # (B,)
            self._tangent, observations, rewards = _TransitionFunction.apply(
                self._tangent, inside, observations, rewards, jacobians
            )
        else:
            self._cut()
        return Outcome(self._outward(observations), self._outward(rewards), step.terminated, infos)

    def _check_finite(self, step: Transition) -> None:
        parts = {"observation": step.observations, "reward": step.rewards, "Jacobian": step.jacobians}
        for name, values in parts.items():
            if values is None or np.isfinite(values).all():
                continue
            env, *index = np.argwhere(~np.isfinite(values))[0].tolist()
            culprit = self.dynamics.culprit(env)
            raise ValueError(
                f"expected finite numbers from the simulator, got {values[(env, *index)]} in the {name} of env {env}"
                f"{f' at index {index}' if index else ''}, at its step {self._elapsed[env] + 1} (step {self._steps} of "
                f"this VectorEnv){f'; first bad number: {culprit}' if culprit else ''}. The simulation diverged: look "
                f"at the actions before it, and reset the env."
            )

    def render(self, indices: Sequence[int] | None = None) -> tuple[np.ndarray, ...] | None:
        """Draw envs.

        Args:
            indices: Envs to draw; None for all. Each that is ever drawn has a rendering context of its own.

        Returns:
            Frames, (h, w, 3) uint8, one for each; None without render_mode="rgb_array".
        """
        if self.render_mode is None:
            return None
        self._current()
        return tuple(self.dynamics.render(i) for i in (range(self.num_envs) if indices is None else indices))

    def close_extras(self, **kwargs: Any) -> None:
        """Stop the threads and free the simulators."""
        self.dynamics.close()


def default_threads(num_envs: int) -> int:
    """Give the number of threads that torch would use, at most one for each env."""
    return max(1, min(num_envs, torch.get_num_threads(), os.cpu_count() or 1))
