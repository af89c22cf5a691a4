"""What an imagined latent looks like: the real simulator replayed along the rollout, or the nearest stored frame."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from pwm_gym.world_model import WorldModel

__all__ = ["NearestFrame", "SimulatorReplay"]


class SimulatorReplay:
    """Draw imagined rollouts by replaying their actions in the real simulator, from where they started.

    Each of B envs has its own start and its own number of steps since; the actions are kept once for all of them,
    back to the oldest start.

    Args:
        env: A registered pwm_gym/<task>-v0 env with render_mode="rgb_array". Drawing overwrites its state.
        num_envs: B.

    Raises:
        ValueError: If the env can't be put into a physics state, or draws nothing.
    """

    def __init__(self, env: gym.Env, num_envs: int) -> None:
        if not hasattr(env.unwrapped, "set_physics_state"):
            raise ValueError(
                f"`render_env` must be a pwm_gym/<task>-v0 env, got {env}, which can't be put into the state that a "
                f"rollout starts from. For other envs give render_frames=(observations, frames)."
            )
        if env.render_mode != "rgb_array":
            raise ValueError(
                f"`render_env` must have render_mode='rgb_array', got {env.render_mode!r}. Make it with "
                f"gym.make('pwm_gym/<task>-v0', render_mode='rgb_array')."
            )
        self._env: Any = env.unwrapped
        self._states: list[np.ndarray | None] = [None] * num_envs  # (P,) each, where the rollout started
        self._steps = np.zeros(num_envs, dtype=np.int64)  # (B,), since then
        self._actions: list[Tensor] = []  # the latest steps' actions, (B, *shape) each

    def begin(self, mask: np.ndarray, states: np.ndarray | None) -> None:
        """Start anew.

        Args:
            mask: Envs that start, (B,), bool.
            states: Physics states of their starts, (N, P), one for each True; None where they are unknown.
        """
        for row, i in enumerate(np.flatnonzero(mask).tolist()):
            self._states[i] = None if states is None else np.array(states[row], np.float64)
        self._steps[mask] = 0
        self._actions = self._actions[len(self._actions) - int(self._steps.max()) :]

    def record(self, actions: Tensor) -> None:
        """Keep one step's actions, (B, *shape), in the env's units."""
        self._actions.append(actions.detach().clone())
        self._steps += 1

    def frame(self, index: int) -> np.ndarray:
        """Draw where the rollout of one env has come to, (h, w, 3), uint8.

        Raises:
            ValueError: If the physics state of its start is unknown.
        """
        state = self._states[index]
        if state is None:
            raise ValueError(
                f"the start of env {index} has no physics state to draw. Start from a real pwm_gym/<task>-v0 env or "
                f"from a replay buffer made with store_physics_state=True, or give physics_state in reset's options."
            )
        space = self._env.action_space
        self._env.set_physics_state(state)
        for actions in self._actions[len(self._actions) - int(self._steps[index]) :]:
            action = actions[index].cpu().numpy().astype(space.dtype)
            _, _, terminated, truncated, _ = self._env.step(np.clip(action, space.low, space.high))
            if terminated or truncated:  # the simulator goes no further: its last frame stands
                break
        frame: np.ndarray = self._env.render()
        return frame


class NearestFrame:
    """Show the stored frame whose observation has the nearest latent.

    Args:
        observations: Real observations, (N, *shape), or a dict of such.
        frames: Their frames, (N, h, w, 3).

    Raises:
        ValueError: If there are none, or not one frame for each observation.
    """

    def __init__(self, observations: Any, frames: Any) -> None:
        first = next(iter(observations.values())) if isinstance(observations, dict) else observations
        if len(frames) == 0 or len(first) != len(frames):
            raise ValueError(
                f"`render_frames` must hold one frame for each observation, got {len(frames)} frames and {len(first)} "
                f"observations."
            )
        self._observations, self._frames = observations, frames

    @torch.no_grad()
    def frames(self, z: Tensor, world_model: WorldModel) -> list[np.ndarray]:
        """Find the frames nearest to the latents z, (N, Z); encoded anew each time, as the model may learn."""
        stored = world_model.encode(world_model.preprocess(self._observations))
        # By differences: the faster way through products can't tell near latents apart.
        distances = torch.cdist(z, stored, compute_mode="donot_use_mm_for_euclid_dist")  # (N, stored)
        return [np.array(self._frames[i]) for i in distances.argmin(-1).tolist()]
