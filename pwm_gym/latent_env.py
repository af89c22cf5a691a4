"""The learned world model as a differentiable, batched Gymnasium VectorEnv in latent space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor

from pwm_gym.differentiable import DifferentiableVectorEnv, check_reset_mask
from pwm_gym.starts import Starts, as_start_sampler
from pwm_gym.world_model import WorldModel

__all__ = ["LatentVectorEnv"]

_TERMINATIONS = ("threshold", "sample", "none")


class LatentVectorEnv(DifferentiableVectorEnv):
    """A world model as a `gymnasium.vector.VectorEnv`: observations are latents, actions are the real env's.

    `step` is differentiable: rewards and latents carry gradients to all actions since the last reset or `detach`.
    Actions outside the action space are clipped to it, as simulators do, and get no gradient there.

    The horizon is a truncation, never a termination, so a value at `infos["final_obs"]` may be bootstrapped. An
    episode terminates where the model predicts so (`termination`), and `infos["continue_prob"]`, (B,), is the
    differentiable probability that it goes on. See `DifferentiableVectorEnv` for the infos of each autoreset mode.

    Gradients also flow into the world model's parameters unless they are frozen (`world_model.requires_grad_(False)`).

    Args:
        world_model: The model; it decides device, dtype and spaces.
        start: Real states that episodes start from: observations (N, *shape), a replay buffer, a dataset, a real env
            or a sampling function (see `pwm_gym.starts.as_start_sampler`). None if `latents` or `reset(options=...)`
            give them.
        num_envs: Number of envs B.
        horizon: Steps until truncation H. The paper uses 16.
        autoreset_mode: SAME_STEP resets within the step that ends an episode, NEXT_STEP in the one after; DISABLED
            leaves it to the caller, through `reset(options={"reset_mask": ...})`.
        termination: How a predicted termination ends an episode: "threshold" at `termination_threshold`, "sample"
            by its probability, "none" never (`continue_prob` alone tells of it).
        termination_threshold: Probability above which "threshold" terminates.
        latents: Latents to start from, (N, Z), sampled uniformly; instead of `start`.
        task: Index of the task for a multi-task model; None for a single-task one.
        render_mode: "rgb_array" or None.
        render_env: A registered pwm_gym/<task>-v0 env, in which `render` replays the imagined actions from the
            start's physics state. The start must know it: a real env does, a replay buffer made with
            store_physics_state=True does, and `reset(options={"physics_state": ...})` can give it.
        render_frames: (observations (N, *shape), frames (N, h, w, 3)); `render` shows the frame whose latent is
            nearest. Used where there is no `render_env`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If it is out of range.

    Example:
        >>> from pwm_gym import WorldModel, WorldModelConfig
        >>> model = WorldModel(WorldModelConfig.preset("1M", observation_dim=5, action_dim=1))
        >>> env = LatentVectorEnv(model, torch.zeros(10, 5), num_envs=64, horizon=16)
        >>> z, info = env.reset(seed=0)
        >>> action = torch.zeros(64, 1, requires_grad=True)
        >>> z, reward, terminated, truncated, info = env.step(action)
        >>> z.shape, torch.autograd.grad(z.square().sum(), action)[0].shape
        (torch.Size([64, 128]), torch.Size([64, 1]))
    """

    def __init__(
        self,
        world_model: WorldModel,
        start: Any = None,
        num_envs: int = 64,
        horizon: int = 16,
        autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
        *,
        termination: str = "threshold",
        termination_threshold: float = 0.5,
        latents: Tensor | None = None,
        task: int | None = None,
        render_mode: str | None = None,
        render_env: gym.Env | None = None,
        render_frames: tuple[Any, np.ndarray] | None = None,
    ) -> None:
        if not isinstance(world_model, WorldModel):
            raise TypeError(f"expected a WorldModel, got {type(world_model).__name__}.")
        if horizon < 1:
            raise ValueError(f"`horizon` must be >= 1, got {horizon}. Use horizon=16 as in the paper.")
        if num_envs < 1:
            raise ValueError(f"`num_envs` must be >= 1, got {num_envs}.")
        if termination not in _TERMINATIONS:
            raise ValueError(f"`termination` must be one of {_TERMINATIONS}, got {termination!r}.")
        if not 0.0 < termination_threshold < 1.0:
            raise ValueError(f"`termination_threshold` must be between 0 and 1, got {termination_threshold}.")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"`render_mode` must be None or 'rgb_array', got {render_mode!r}.")
        if start is not None and latents is not None:
            raise ValueError("expected `start` or `latents`, got both.")
        if latents is not None and (latents.ndim != 2 or latents.shape[-1] != world_model.config.latent_dim):
            raise ValueError(
                f"`latents` must have shape (N, {world_model.config.latent_dim}), got {tuple(latents.shape)}."
            )

        self.world_model, self.horizon, self.task = world_model, horizon, task
        self.num_envs = num_envs
        self.termination, self.termination_threshold = termination, termination_threshold
        self.render_mode, self.render_env, self._render_frames = render_mode, render_env, render_frames
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": (render_env.metadata.get("render_fps") if render_env else None) or 25,
            "autoreset_mode": AutoresetMode(autoreset_mode),
        }
        self.single_observation_space = world_model.latent_space
        self.single_action_space = world_model.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        self._start_latents = latents
        self._knows_physics = render_env is not None
        self._sampler = None if start is None else as_start_sampler(start, physics=self._knows_physics)
        low, high = self.single_action_space.low.ravel(), self.single_action_space.high.ravel()
        self._action_low, self._action_high = torch.from_numpy(low), torch.from_numpy(high)
        self._unit_actions = bool(np.all(low == -1.0) and np.all(high == 1.0))

        self._generator: torch.Generator | None = None
        self._z: Tensor | None = None  # (B, Z), current latents, in the graph
        self._elapsed = np.zeros(num_envs, dtype=np.int64)  # (B,), steps since each env's last reset
        self._ended = np.zeros(num_envs, dtype=np.bool_)  # (B,), envs that wait for a reset
        self._physics: np.ndarray | None = None  # (B, P), of each env's start
        self._actions: list[Tensor] = []  # the latest steps' actions, (B, A) each, kept for rendering only

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The world model's device."""
        return self.world_model.device

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """The autoreset mode, as in `metadata`."""
        return self.metadata["autoreset_mode"]

    # Starts

    def _seed(self, seed: int | Sequence[int] | None) -> None:
        if seed is not None:
            self._np_random = np.random.default_rng(seed)
            self._np_random_seed = seed if isinstance(seed, int) else -1
        if seed is not None or self._generator is None:
            self._generator = torch.Generator(self.device)
            self._generator.manual_seed(int(self.np_random.integers(2**63)))

    @torch.no_grad()
    def _start(self, count: int, options: dict[str, Any]) -> tuple[Tensor, np.ndarray | None]:
        """Draw `count` start latents, (count, Z), with physics states, (count, P), where they are needed."""
        given = options.get("latents")
        if given is not None:
            latents = torch.as_tensor(given, device=self.device, dtype=self.world_model.dtype)
            self._check_start(latents, count, "latents", (self.world_model.config.latent_dim,))
            return latents.clone(), self._given_physics(options, count)
        if options.get("observations") is not None:
            observations = self.world_model.preprocess(options["observations"])
            self._check_start(observations, count, "observations", (self.world_model.config.observation_dim,))
            return self.world_model.encode(observations, self.task), self._given_physics(options, count)
        if self._start_latents is not None:
            index = self.np_random.integers(len(self._start_latents), size=count)
            return self._start_latents[index].to(self.device, self.world_model.dtype), None
        if self._sampler is None:
            raise ValueError(
                "this env has no start states. Give `start` or `latents` to the constructor, or observations to "
                "reset(options={'observations': ...})."
            )
        starts: Starts = self._sampler(count, self.np_random)
        return self.world_model.encode(
            self.world_model.preprocess(starts.observations), self.task
        ), starts.physics_state

    def _given_physics(self, options: dict[str, Any], count: int) -> np.ndarray | None:
        states = options.get("physics_state")
        if states is not None and len(states) != count:
            raise ValueError(f"`options['physics_state']` must have {count} rows, got {len(states)}.")
        return states

    @staticmethod
    def _check_start(given: Tensor, count: int, name: str, shape: tuple[int, ...]) -> None:
        if tuple(given.shape) != (count, *shape):
            raise ValueError(f"`options[{name!r}]` must have shape {(count, *shape)}, got {tuple(given.shape)}.")

    def _keep_physics(self, mask: np.ndarray, states: np.ndarray | None) -> None:
        if states is None:
            if self._physics is not None:
                self._physics[mask] = np.nan
        else:
            if self._physics is None:
                self._physics = np.full((self.num_envs, states.shape[-1]), np.nan)
            self._physics[mask] = states[mask]

    # Gymnasium

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Begin episodes.

        Args:
            seed: Seeds all of the env's randomness. None keeps it going.
            options: "reset_mask", (B,) bool: reset only these envs; the others stay as they are. "observations",
                (B, *shape), or "latents", (B, Z): start here instead of sampling (rows outside the mask are ignored).
                "physics_state", (B, P): the simulator's states that belong to them.

        Returns:
            Latents, (B, Z), and infos.

        Raises:
            TypeError: If `reset_mask` is not a bool array.
            ValueError: If `reset_mask` has a wrong shape or is all False, or the given starts don't fit.
        """
        options = options or {}
        self._seed(seed)
        mask = np.ones(self.num_envs, dtype=np.bool_)
        if "reset_mask" in options:
            mask = check_reset_mask(options["reset_mask"], self.num_envs)
        latents, physics = self._start(self.num_envs, options)
        self._begin(mask, latents, physics)
        return self._current(), {}

    def _begin(self, mask: np.ndarray, latents: Tensor, physics: np.ndarray | None) -> None:
        """Put the envs in `mask` at new starts; the others keep their latents with their graph."""
        if self._z is None or mask.all():
            self._z = latents
        else:
            rows = torch.from_numpy(mask).to(self.device).unsqueeze(-1)  # (B, 1)
            self._z = torch.where(rows, latents, self._z)
        self._elapsed[mask] = 0
        self._ended[mask] = False
        if self._knows_physics or physics is not None:
            self._keep_physics(mask, physics)
        self._actions = self._actions[-int(self._elapsed.max()) :] if self._elapsed.any() else []

    def _current(self) -> Tensor:
        if self._z is None:
            raise gym.error.ResetNeeded("call reset() before step() or render().")
        return self._z

    def _check_actions(self, actions: Tensor) -> Tensor:
        if not isinstance(actions, Tensor):
            raise TypeError(
                f"expected a tensor of shape {self.action_space.shape}, got {type(actions).__name__}. "
                f"For NumPy arrays use the face that latent_env.numpy() returns."
            )
        if tuple(actions.shape) != self.action_space.shape:
            raise ValueError(f"expected actions of shape {self.action_space.shape}, got {tuple(actions.shape)}.")
        if actions.device.type != self.device.type:
            raise ValueError(
                f"expected actions on {self.device}, got {actions.device}. Move them with .to(env.device)."
            )
        return actions

    def _scale(self, actions: Tensor) -> Tensor:
        """Clip to the action space and scale to the model's [-1, 1]; (B, *action_shape) -> (B, A)."""
        actions = actions.flatten(1).to(self.world_model.dtype)
        if self._unit_actions:
            return actions.clamp(-1.0, 1.0)
        low, high = self._action_low.to(actions), self._action_high.to(actions)
        return ((actions - low) * (2.0 / (high - low)) - 1.0).clamp(-1.0, 1.0)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Advance all envs by one imagined step.

        Args:
            actions: (B, A), in the units of `single_action_space`.

        Returns:
            Latents (B, Z); rewards (B,) in task units; terminated (B,) and truncated (B,), bool; infos with
            "continue_prob" (B,) and, where an episode ends under SAME_STEP, "final_obs" (B, Z) and "_final_obs" (B,).

        Raises:
            ResetNeeded: If an env was never reset or, with DISABLED autoreset, has ended.
            TypeError: If `actions` is no tensor.
            ValueError: If its shape or device is wrong.
        """
        z = self._current()
        waiting = self._ended if self._ended.any() else None
        if waiting is not None and self.autoreset_mode == AutoresetMode.DISABLED:
            raise gym.error.ResetNeeded(
                f"envs {np.flatnonzero(waiting).tolist()} have ended. Call "
                f"reset(options={{'reset_mask': terminated | truncated}}) first, or use another autoreset_mode."
            )
        actions = self._scale(self._check_actions(actions))  # (B, A)
        next_z, rewards = self.world_model(z, actions, self.task)  # (B, Z), (B,)
        end_prob = self.world_model.termination(next_z, self.task)  # (B,)
        if self._knows_physics or self._render_frames is not None:
            self._actions.append(actions.detach())

        self._z = next_z
        self._elapsed += 1
        ended = self._elapsed >= self.horizon  # (B,), on the host: truncation needs no look at the device
        terminated_host = self._terminations(end_prob)
        if waiting is not None:  # NEXT_STEP: these rows spend the step on their reset
            ended, terminated_host = ended & ~waiting, terminated_host & ~waiting
            stepped = torch.from_numpy(~waiting).to(self.device)
            rewards = torch.where(stepped, rewards, torch.zeros_like(rewards))
            end_prob = torch.where(stepped, end_prob, torch.zeros_like(end_prob))
        terminated = torch.from_numpy(terminated_host).to(self.device)
        truncated = torch.from_numpy(ended.copy()).to(self.device)
        infos: dict[str, Any] = {"continue_prob": 1.0 - end_prob}
        done = ended | terminated_host

        if self.autoreset_mode == AutoresetMode.SAME_STEP and done.any():
            infos["final_obs"], infos["_final_obs"] = next_z, torch.from_numpy(done).to(self.device)
            self._begin(done, *self._start(self.num_envs, {}))
        elif self.autoreset_mode == AutoresetMode.NEXT_STEP and waiting is not None:
            self._begin(waiting.copy(), *self._start(self.num_envs, {}))
        if self.autoreset_mode != AutoresetMode.SAME_STEP:
            self._ended = done
        return self._current(), rewards, terminated, truncated, infos

    def _terminations(self, end_prob: Tensor) -> np.ndarray:
        """Decide which envs terminate, (B,); the device is only asked where the model can predict it at all."""
        if self.termination == "none" or not self.world_model.predicts_termination:
            return np.zeros(self.num_envs, dtype=np.bool_)
        probability = end_prob.detach()
        if self.termination == "sample":
            terminated = torch.bernoulli(probability, generator=self._generator) > 0.5
        else:
            terminated = probability > self.termination_threshold
        return terminated.cpu().numpy()

    def detach(self) -> Tensor:
        """Cut the graph at the current latents, (B, Z), and return them."""
        self._z = self._current().detach()
        return self._z

    @property
    def has_started(self) -> bool:
        """Whether `reset` was ever called."""
        return self._z is not None

    # Rendering

    def render(self, indices: Sequence[int] | None = None) -> tuple[np.ndarray, ...] | None:
        """Show what the current latents mean.

        With `render_env`, the real simulator starts from each env's start and replays the imagined actions; with
        `render_frames`, the frame with the nearest latent is shown.

        Args:
            indices: Envs to show; None for all.

        Returns:
            Frames, (h, w, 3) uint8, one for each env; None without render_mode="rgb_array".

        Raises:
            ValueError: If there is nothing to draw from.
        """
        if self.render_mode is None:
            return None
        z = self._current()
        chosen = range(self.num_envs) if indices is None else indices
        if self.render_env is not None:
            return tuple(self._replay(self.render_env, i) for i in chosen)
        if self._render_frames is not None:
            observations, frames = self._render_frames
            with torch.no_grad():
                stored = self.world_model.encode(self.world_model.preprocess(observations), self.task)
                nearest = torch.cdist(z.detach()[list(chosen)], stored).argmin(-1)
            return tuple(np.asarray(frames[i]) for i in nearest.tolist())
        raise ValueError(
            "a latent has no picture of its own. Give render_env=gym.make('pwm_gym/<task>-v0', "
            "render_mode='rgb_array') with starts that know their physics state, or render_frames=(observations, "
            "frames)."
        )

    def _replay(self, env: gym.Env, index: int) -> np.ndarray:
        if self._physics is None or np.isnan(self._physics[index]).any():
            raise ValueError(
                f"the start of env {index} has no physics state to draw. Start from a real pwm_gym/<task>-v0 env or "
                f"from a replay buffer made with store_physics_state=True, or give physics_state in reset's options."
            )
        simulator: Any = env.unwrapped
        simulator.set_physics_state(self._physics[index])
        low, high = self._action_low.numpy(), self._action_high.numpy()
        steps = int(self._elapsed[index])
        for actions in self._actions[len(self._actions) - steps :] if steps else []:
            unit = actions[index].cpu().numpy()
            action = low + (unit + 1.0) * 0.5 * (high - low)
            simulator.step(action.astype(np.float32).reshape(self.single_action_space.shape))
        frame: Any = simulator.render()
        return frame
