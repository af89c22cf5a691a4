"""What differentiable envs with true dynamics share: episodes, seeds, autoreset modes and checks."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor

from pwm_gym.differentiable import DifferentiableVectorEnv, check_reset_mask

__all__ = ["GroundTruthVectorEnv", "Outcome"]


class Outcome(NamedTuple):
    """What one step of all envs led to; rows of envs that did not step mean nothing."""

    observations: Tensor  # (B, O), in the graph
    rewards: Tensor  # (B,), in the graph
    terminated: np.ndarray  # (B,), bool
    infos: dict[str, Tensor]  # one row for each env


class GroundTruthVectorEnv(DifferentiableVectorEnv):
    """B copies of a task whose dynamics are known: the subclass moves states, this class runs episodes.

    Actions outside the action space are clipped to it and get no gradient there. The horizon is a truncation, never a
    termination. `infos["continue_prob"]` is 1 - terminated: ends have no gradient. `infos["jacobian_norm"]`, (B,), is
    the size ‖∂s'/∂s‖ / ‖I‖ of each env's step where the subclass computes it; an adaptive horizon reads it.

    A subclass implements `_begin`, `_advance`, `_cut`, `get_state` and `_write_state`.

    Args:
        num_envs: Number of envs B.
        single_observation_space: Observation space of one env, (O,).
        single_action_space: Action space of one env, (A,).
        horizon: Env steps until truncation H.
        autoreset_mode: SAME_STEP resets within the step that ends an episode, NEXT_STEP in the one after; DISABLED
            leaves it to the caller, through `reset(options={"reset_mask": ...})`.
        device: Where tensors come from and go to.
        render_mode: "rgb_array" or None.
        render_fps: Frames in a second of the task's time.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        num_envs: int,
        single_observation_space: spaces.Box,
        single_action_space: spaces.Box,
        horizon: int,
        autoreset_mode: AutoresetMode,
        device: torch.device | str,
        render_mode: str | None,
        render_fps: float,
    ) -> None:
        for name, value in {"num_envs": num_envs, "horizon": horizon}.items():
            if value < 1:
                raise ValueError(f"`{name}` must be >= 1, got {value}.")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"`render_mode` must be None or 'rgb_array', got {render_mode!r}.")
        self.num_envs, self.horizon = num_envs, horizon
        self.device = torch.device(device)
        self.render_mode = render_mode
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": render_fps,
            "autoreset_mode": AutoresetMode(autoreset_mode),
        }
        self.single_observation_space, self.single_action_space = single_observation_space, single_action_space
        self.observation_space = batch_space(single_observation_space, num_envs)
        self.action_space = batch_space(single_action_space, num_envs)
        self._low = torch.as_tensor(single_action_space.low, device=self.device)  # (A,)
        self._high = torch.as_tensor(single_action_space.high, device=self.device)
        self._observations: Tensor | None = None  # (B, O), current ones, in the graph
        self._elapsed = np.zeros(num_envs, dtype=np.int64)  # (B,), steps since each env's last reset
        self._ended = np.zeros(num_envs, dtype=np.bool_)  # (B,), envs that wait for a reset

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """The autoreset mode, as in `metadata`."""
        return self.metadata["autoreset_mode"]

    # What a subclass implements

    @abstractmethod
    def _begin(self, rows: np.ndarray) -> Tensor:
        """Put the envs `rows`, (N,), at states drawn from `np_random`, out of the graph; observe them, (N, O)."""

    @abstractmethod
    def _advance(self, actions: Tensor, rows: np.ndarray) -> Outcome:
        """Step the envs `rows`, (N,), with their rows of `actions`, (B, A), which are inside the action space."""

    @abstractmethod
    def _cut(self) -> None:
        """Cut the graph at the current states."""

    @abstractmethod
    def get_state(self) -> np.ndarray:
        """Read everything that decides the futures of all envs but their random numbers and time limits, (B, P)."""

    @abstractmethod
    def _write_state(self, states: np.ndarray, rows: np.ndarray) -> Tensor:
        """Put the envs `rows`, (N,), into states, (N, P), out of the graph; observe them, (N, O)."""

    # Gymnasium

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Begin episodes.

        Args:
            seed: Seeds all of the env's randomness. None keeps it going.
            options: "reset_mask", (B,) bool: reset only these envs; the others stay as they are. "state", (B, P):
                start from what `get_state` gave instead of sampling (rows outside the mask are ignored).

        Returns:
            Observations, (B, O), and infos.

        Raises:
            ResetNeeded: If the first reset of all is for some envs only.
            TypeError: If `reset_mask` is not a bool array.
            ValueError: If `reset_mask` has a wrong shape or is all False, or the states don't fit.
        """
        options = options or {}
        mask = np.ones(self.num_envs, dtype=np.bool_)
        if "reset_mask" in options:
            mask = check_reset_mask(options["reset_mask"], self.num_envs)
            if self._observations is None and not mask.all():
                raise gym.error.ResetNeeded("the first reset must be of all envs. Call reset() without a reset_mask.")
        if isinstance(seed, Sequence):
            self.np_random = np.random.default_rng(seed)
        elif seed is not None:
            super().reset(seed=operator.index(seed))
        states = options.get("state")
        self._restart(mask, None if states is None else self._check_states(states))
        return self._current(), {}

    def set_state(self, states: np.ndarray) -> Tensor:
        """Put every env into a state that `get_state` gave, with a fresh time limit.

        Args:
            states: (B, P), float64.

        Returns:
            The observations, (B, O), without gradient.

        Raises:
            ValueError: If the shape doesn't fit, or a number isn't finite.
        """
        return self.reset(options={"state": states})[0]

    def _check_states(self, states: Any) -> np.ndarray:
        states = np.array(states, np.float64)
        expected = self.get_state().shape
        if states.shape != expected or not np.isfinite(states).all():
            raise ValueError(
                f"a state must be finite, of shape {expected}, got shape {states.shape}"
                f"{'' if np.isfinite(states).all() else ' with numbers that are not finite'}. Give what get_state() "
                f"of an env of the same task and num_envs returned."
            )
        return states

    def _restart(self, mask: np.ndarray, states: np.ndarray | None = None) -> None:
        """Begin episodes in the envs of `mask`, (B,); the others keep their states with their graph."""
        rows = np.flatnonzero(mask)  # (N,)
        observations = self._begin(rows) if states is None else self._write_state(states[rows], rows)
        if mask.all():
            self._observations = observations
        else:
            index = torch.from_numpy(rows).to(self.device)
            self._observations = self._current().index_copy(0, index, observations)  # (B, O)
        self._elapsed[mask] = 0
        self._ended[mask] = False

    def _current(self) -> Tensor:
        if self._observations is None:
            raise gym.error.ResetNeeded("call reset() before step(), detach() or render().")
        return self._observations

    def _check_actions(self, actions: Tensor) -> Tensor:
        if not isinstance(actions, Tensor):
            raise TypeError(f"expected a tensor of actions, got {type(actions).__name__}. Use env.numpy() for arrays.")
        if actions.shape != self.action_space.shape or actions.device.type != self.device.type:
            raise ValueError(
                f"expected actions of shape {self.action_space.shape} on {self.device}, got {tuple(actions.shape)} on "
                f"{actions.device}."
            )
        if not bool(torch.isfinite(actions).all()):
            env, index = torch.nonzero(~torch.isfinite(actions.detach()))[0].tolist()
            raise ValueError(
                f"expected finite actions, got {float(actions.detach()[env, index])} for env {env} at index "
                f"{index}. Look at the policy that chose it."
            )
        return torch.minimum(torch.maximum(actions, self._low.to(actions.dtype)), self._high.to(actions.dtype))

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Step all envs.

        Args:
            actions: (B, A), float32 or float64, on the env's device.

        Returns:
            Observations (B, O); rewards (B,); terminated (B,) and truncated (B,), bool; infos with "continue_prob"
            (B,) and, where an episode ends under SAME_STEP, "final_obs" (B, O) and "_final_obs" (B,).

        Raises:
            ResetNeeded: If an env was never reset or, with DISABLED autoreset, has ended.
            TypeError: If `actions` is no tensor.
            ValueError: If its shape or device is wrong, it isn't finite, or the dynamics gave numbers that aren't.
        """
        self._current()
        waiting = self._ended.copy()  # (B,)
        if self.autoreset_mode == AutoresetMode.DISABLED and waiting.any():
            raise gym.error.ResetNeeded(
                f"envs {np.flatnonzero(waiting).tolist()} have ended. Call "
                f"reset(options={{'reset_mask': terminated | truncated}}) first, or use another autoreset_mode."
            )
        outcome = self._advance(self._check_actions(actions), np.flatnonzero(~waiting))
        self._elapsed += 1
        terminated, truncated = outcome.terminated & ~waiting, (self._elapsed >= self.horizon) & ~waiting
        rewards, self._observations = outcome.rewards, outcome.observations
        if waiting.any():  # NEXT_STEP: these rows spend the step on their reset
            index = torch.from_numpy(np.flatnonzero(waiting)).to(self.device)
            rewards = rewards.index_fill(0, index, 0.0)
        ends = torch.from_numpy(terminated).to(self.device)
        infos: dict[str, Any] = {**outcome.infos, "continue_prob": 1.0 - ends.to(rewards.dtype)}
        done = terminated | truncated  # (B,)

        if self.autoreset_mode == AutoresetMode.SAME_STEP and done.any():
            infos["final_obs"], infos["_final_obs"] = self._observations, torch.from_numpy(done).to(self.device)
            self._restart(done)
        elif self.autoreset_mode == AutoresetMode.NEXT_STEP and waiting.any():
            self._restart(waiting)
        if self.autoreset_mode != AutoresetMode.SAME_STEP:
            self._ended = done
        return self._current(), rewards, ends, torch.from_numpy(truncated).to(self.device), infos

    def detach(self) -> Tensor:
        """Cut the graph at the current states, and return the observations, (B, O)."""
        self._cut()
        self._observations = self._current().detach()
        return self._observations
