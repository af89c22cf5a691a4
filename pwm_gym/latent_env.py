"""The learned world model as a differentiable, batched Gymnasium VectorEnv in latent space."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor

from pwm_gym.differentiable import DifferentiableVectorEnv, check_reset_mask
from pwm_gym.rendering import NearestFrame, SimulatorReplay
from pwm_gym.starts import Starts, as_start_sampler
from pwm_gym.world_model import WorldModel

__all__ = ["LatentVectorEnv"]

_TERMINATIONS = ("threshold", "sample", "none")


def _as_tensor(given: Any) -> Tensor:
    """Make a tensor; arrays are copied, because torch warns of read-only ones such as `np.broadcast_to` gives."""
    return torch.as_tensor(np.array(given) if isinstance(given, np.ndarray) else given)


class LatentVectorEnv(DifferentiableVectorEnv):
    """A world model as a `gymnasium.vector.VectorEnv`: observations are latents, actions are the real env's.

    `step` is differentiable: rewards and latents carry gradients to all actions since the last reset or `detach`.
    Actions outside the action space are clipped to it, as simulators do, and get no gradient there.

    The horizon is a truncation, never a termination, so a value at `infos["final_obs"]` may be bootstrapped. An
    episode terminates where the model predicts so (`termination`), and `infos["continue_prob"]`, (B,), is the
    differentiable probability that it goes on. See `DifferentiableVectorEnv` for the infos of each autoreset mode.

    Gradients also flow into the world model's parameters unless they are frozen (`world_model.requires_grad_(False)`).

    Args:
        world_model: The model; it decides device, dtype and spaces. The env keeps it in evaluation mode.
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
        latents: Latents to start from, (N, Z), array or tensor, sampled uniformly; instead of `start`.
        task: Name or index of the task for a multi-task model, whose single-task form the env then holds
            (`WorldModel.for_task`); None for a single-task one. Of a dataset of several tasks only this task's
            episodes are starts; observations may be padded as the multi-task model's. Or a sequence of K tasks: the
            env then keeps the multi-task model with its padded spaces, its first B / K envs are of the first task, the
            next of the second and so on, and `reset(options=...)` gives the starts.
        render_mode: "rgb_array" or None.
        render_env: A registered pwm_gym/<task>-v0 env with render_mode="rgb_array", in which `render` replays the
            imagined actions from the start's physics state. The start must know it: a real env does, a replay buffer
            made with store_physics_state=True does, and `reset(options={"physics_state": ...})` can give it.
        render_frames: (observations (N, *shape), frames (N, h, w, 3)); `render` shows the frame whose latent is
            nearest. Used where there is no `render_env`.

    `close` leaves the start and render envs open, as they are the caller's.

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
        latents: Tensor | np.ndarray | None = None,
        task: int | str | Sequence[int | str] | None = None,
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
        if latents is not None:
            latents = _as_tensor(latents)
            if latents.ndim != 2 or len(latents) == 0 or latents.shape[-1] != world_model.config.latent_dim:
                raise ValueError(
                    f"`latents` must have shape (N, {world_model.config.latent_dim}) with N >= 1, got "
                    f"{tuple(latents.shape)}."
                )
        self._padded_dim = world_model.config.observation_dim
        self.task_rows: Tensor | None = None  # (B,), task of each env, where there are several
        if isinstance(task, Sequence) and not isinstance(task, str):
            indices = [world_model.config.task_index(one) for one in task]
            if not indices or None in indices or num_envs % len(indices) or start is not None or latents is not None:
                raise ValueError(
                    f"expected several tasks of a multi-task model, a multiple of {len(task)} as `num_envs`, and no "
                    f"starts but those of reset(options=...); got {task}, {num_envs} envs, {type(start).__name__}."
                )
            self.task_rows = torch.tensor(indices, device=world_model.device).repeat_interleave(
                num_envs // len(indices)
            )
        else:
            index = world_model.config.task_index(task)
            if index is not None and len(getattr(start, "tasks", ())) > 1:  # an `OfflineDataset` of several tasks
                start = start.of_tasks((world_model.config.tasks or start.tasks)[index])
            world_model = world_model.for_task(task)
        self.world_model, self.horizon = world_model, horizon
        self.num_envs = num_envs
        self.termination, self.termination_threshold = termination, termination_threshold
        self.render_mode = render_mode
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
        draws = render_mode is not None
        self._replay = SimulatorReplay(render_env, num_envs) if draws and render_env is not None else None
        self._nearest = NearestFrame(*render_frames) if draws and render_frames is not None else None
        self._sampler = None if start is None else as_start_sampler(start, physics=self._replay is not None)
        low, high = world_model.action_space.low.ravel(), world_model.action_space.high.ravel()
        self._action_low, self._action_high = torch.from_numpy(low), torch.from_numpy(high)
        self._unit_actions = bool(np.all(low == -1.0) and np.all(high == 1.0))

        self._generator: torch.Generator | None = None
        self._generator_source: np.random.Generator | None = None  # what it was derived from
        self._z: Tensor | None = None  # (B, Z), current latents, in the graph
        self._elapsed = np.zeros(num_envs, dtype=np.int64)  # (B,), steps since each env's last reset
        self._ended = np.zeros(num_envs, dtype=np.bool_)  # (B,), envs that wait for a reset

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The world model's device."""
        return self.world_model.device

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """The autoreset mode, as in `metadata`."""
        return self.metadata["autoreset_mode"]

    @property
    def _model(self) -> WorldModel:
        """The world model in evaluation mode: in training mode, spectral norm would change it with every step."""
        return self.world_model.eval() if self.world_model.training else self.world_model

    # Starts

    def _seed(self, seed: int | Sequence[int] | None) -> None:
        if isinstance(seed, Sequence):
            self.np_random = np.random.default_rng(seed)
        elif seed is not None:
            super().reset(seed=operator.index(seed))

    def _torch_generator(self) -> torch.Generator:
        """Derive the torch generator from `self.np_random`, anew whenever that was seeded or set."""
        stale = self._generator_source is not self.np_random
        if self._generator is None or stale or self._generator.device.type != self.device.type:
            self._generator = torch.Generator(self.device)
            self._generator.manual_seed(int(self.np_random.integers(2**63)))
            self._generator_source = self.np_random
        return self._generator

    @torch.no_grad()
    def _start(self, mask: np.ndarray, options: dict[str, Any]) -> tuple[Tensor, np.ndarray | None]:
        """Find the starts of the N envs in `mask`: latents, (N, Z), and physics states, (N, P), where they are known.

        They are drawn for these envs alone, because one start of a real env takes one reset of it.
        """
        given = [key for key in ("latents", "observations") if options.get(key) is not None]
        states = options.get("physics_state")
        if len(given) > 1 or (states is not None and not given):
            raise ValueError(
                f"expected `options` with 'latents' or 'observations', and 'physics_state' only beside one of them, "
                f"got {sorted(options)}."
            )
        rows = torch.from_numpy(np.flatnonzero(mask)).to(self.device)  # (N,)
        if states is not None:
            states = self._check_start(np.asarray(states, np.float64), "physics_state", None)[mask]
        if options.get("latents") is not None:
            latents = _as_tensor(options["latents"]).to(self.device, self.world_model.dtype)
            return self._check_start(latents, "latents", self.world_model.config.latent_dim)[rows], states
        if options.get("observations") is not None:
            observations = self._preprocess(options["observations"])
            self._check_start(observations, "observations", self.world_model.config.observation_dim)
            tasks = None if self.task_rows is None else self.task_rows[rows]
            return self._model.encode(observations[rows], tasks), states
        return self._draw_starts(len(rows), self.np_random)

    def _draw_starts(self, count: int, rng: np.random.Generator) -> tuple[Tensor, np.ndarray | None]:
        if self._start_latents is not None:
            index = torch.from_numpy(rng.integers(len(self._start_latents), size=count))
            return self._start_latents[index].to(self.device, self.world_model.dtype), None
        observations, states = self._draw_observations(count, rng)
        return self._model.encode(observations), states

    def _draw_observations(self, count: int, rng: np.random.Generator) -> tuple[Tensor, np.ndarray | None]:
        if self._sampler is None:
            raise ValueError(
                "this env has no start states. Give `start` or `latents` to the constructor, or observations to "
                "reset(options={'observations': ...})."
            )
        starts: Starts = self._sampler(count, rng)
        observations = self._preprocess(starts.observations)
        if len(observations) != count:
            raise ValueError(f"expected {count} starts from the start sampler, got {len(observations)}.")
        return observations, starts.physics_state

    @torch.no_grad()
    def sample_starts(self, count: int, rng: np.random.Generator) -> Tensor:
        """Sample latents that episodes begin with, (count, Z), without touching the env's own state.

        Raises:
            ValueError: If the env has no start states.
        """
        return self._draw_starts(count, rng)[0]

    def sample_observations(self, count: int, rng: np.random.Generator) -> Tensor:
        """Sample the real observations that episodes begin with, preprocessed, (count, O), as `sample_starts` does.

        Raises:
            ValueError: If the env has no start states, or only latents.
        """
        return self._draw_observations(count, rng)[0]

    def _preprocess(self, observations: Any) -> Tensor:
        """Preprocess the task's real observations, or such with a multi-task model's padding: (N, O)."""
        own = self.world_model.config.observation_dim
        if own < self._padded_dim and np.shape(observations)[1:] == (self._padded_dim,):
            observations = observations[:, :own]
        return self.world_model.preprocess(observations)

    def _check_start(self, given: Any, name: str, width: int | None) -> Any:
        if given.ndim != 2 or len(given) != self.num_envs or width not in (None, given.shape[1]):
            shape = f"({self.num_envs}, {'P' if width is None else width})"
            raise ValueError(f"`options[{name!r}]` must have shape {shape}, got {tuple(given.shape)}.")
        return given

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
            ResetNeeded: If the first reset of all is for some envs only.
            TypeError: If `reset_mask` is not a bool array.
            ValueError: If `reset_mask` has a wrong shape or is all False, or the given starts don't fit.
        """
        options = options or {}
        mask = np.ones(self.num_envs, dtype=np.bool_)
        if "reset_mask" in options:
            mask = check_reset_mask(options["reset_mask"], self.num_envs)
            if self._z is None and not mask.all():
                raise gym.error.ResetNeeded("the first reset must be of all envs. Call reset() without a reset_mask.")
        self._seed(seed)
        self._begin(mask, *self._start(mask, options))
        return self._current(), {}

    def _begin(self, mask: np.ndarray, latents: Tensor, physics: np.ndarray | None) -> None:
        """Put the envs in `mask` at new starts, (N, Z); the others keep their latents with their graph."""
        if mask.all():
            self._z = latents
        else:
            rows = torch.from_numpy(np.flatnonzero(mask)).to(self.device)  # (N,)
            self._z = self._current().index_copy(0, rows, latents)  # (B, Z); no gradient goes through the new rows
        self._elapsed[mask] = 0
        self._ended[mask] = False
        if self._replay is not None:
            self._replay.begin(mask, physics)

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
        actions = actions.reshape(self.num_envs, -1).to(self.world_model.dtype)
        if self._unit_actions:
            return actions.clamp(-1.0, 1.0)
        low, high = self._action_low.to(actions), self._action_high.to(actions)
        # As SB3 scales what it stores; in this order the bounds become -1 and 1 exactly, so they are not clipped.
        return (2.0 * ((actions - low) / (high - low)) - 1.0).clamp(-1.0, 1.0)

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
        waiting = self._ended.copy() if self._ended.any() else None  # (B,)
        if waiting is not None and self.autoreset_mode == AutoresetMode.DISABLED:
            raise gym.error.ResetNeeded(
                f"envs {np.flatnonzero(waiting).tolist()} have ended. Call "
                f"reset(options={{'reset_mask': terminated | truncated}}) first, or use another autoreset_mode."
            )
        unit_actions = self._scale(self._check_actions(actions))  # (B, A)
        next_z, rewards = self._model(z, unit_actions, self.task_rows)  # (B, Z), (B,)
        end_prob = self.world_model.termination(next_z, self.task_rows)  # (B,)
        if self._replay is not None:
            self._replay.record(actions)

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
            self._begin(done, *self._start(done, {}))
        elif self.autoreset_mode == AutoresetMode.NEXT_STEP and waiting is not None:
            self._begin(waiting, *self._start(waiting, {}))
        if self.autoreset_mode != AutoresetMode.SAME_STEP:
            self._ended = done
        return self._current(), rewards, terminated, truncated, infos

    def _terminations(self, end_prob: Tensor) -> np.ndarray:
        """Decide which envs terminate, (B,); the device is only asked where the model can predict it at all."""
        if self.termination == "none" or not self.world_model.predicts_termination:
            return np.zeros(self.num_envs, dtype=np.bool_)
        probability = end_prob.detach()
        if self.termination == "sample":
            terminated = torch.bernoulli(probability, generator=self._torch_generator()) > 0.5
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
        chosen = list(range(self.num_envs) if indices is None else indices)
        if self._replay is not None:
            return tuple(self._replay.frame(i) for i in chosen)
        if self._nearest is not None:
            return tuple(self._nearest.frames(z.detach()[chosen], self.world_model))
        raise ValueError(
            "a latent has no picture of its own. Give render_env=gym.make('pwm_gym/<task>-v0', "
            "render_mode='rgb_array') with starts that know their physics state, or render_frames=(observations, "
            "frames)."
        )
