"""Pre-training a world model of any published size on offline data, resumable at any moment."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import time
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.logger import Logger, configure
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor, nn

from pwm_gym.datasets import OfflineDataset
from pwm_gym.networks import PartDropout
from pwm_gym.progress import show_progress
from pwm_gym.replay import SequenceSamples
from pwm_gym.serialization import atomic_write, load_tensors, to_json
from pwm_gym.training.fitting import ModelLoss, fast_matmul, make_model_optimizer, set_learning_rate, update_world_model
from pwm_gym.training.planning_learner import PlanningLearner, episode_discount
from pwm_gym.training.ranks import Ranks
from pwm_gym.training.validation import TaskValidation, plot_validation, validate, write_validation
from pwm_gym.world_model import WorldModel
from pwm_gym.world_model.config import WorldModelConfig

__all__ = ["PAPER", "pretrain"]

# How the world models that PWM's published scores come from were trained (arXiv:2407.02466; TD-MPC2's own training).
PAPER: dict[str, Any] = {
    "updates": 10_000_000,
    "batch_size": 1024,
    "horizon": 16,
    "rho": 0.99,
    "learning_rate": 3e-4,
    "policy_learning_rate": 3e-4,
}
_FORMAT = "pwm_gym.pretraining/1"
_SCHEDULES, _PRECISIONS = ("constant", "cosine"), ("float32", "bfloat16")


def _check_settings(settings: dict[str, Any]) -> None:
    for name in ("updates", "batch_size", "horizon", "checkpoint_every", "log_every"):
        if settings[name] < 1:
            raise ValueError(f"`{name}` must be >= 1, got {settings[name]}.")
    if not 0.0 <= settings["held_out"] < 1.0:
        raise ValueError(f"`held_out` must be in [0, 1), got {settings['held_out']}.")
    if settings["warmup"] < 0:
        raise ValueError(f"`warmup` must be >= 0, got {settings['warmup']}.")
    for name, choices in {"learning_rate_schedule": _SCHEDULES, "precision": _PRECISIONS}.items():
        if settings[name] not in choices:
            raise ValueError(f"`{name}` must be one of {choices}, got {settings[name]!r}.")


def _check_fit(model: WorldModel, dataset: OfflineDataset) -> None:
    """Check that a given model is one for the dataset's tasks."""
    config, count = model.config, len(dataset.tasks)
    if max(config.num_tasks, 1) != count or (config.tasks and config.tasks != dataset.tasks):
        raise ValueError(
            f"expected a dataset of the world model's {max(config.num_tasks, 1)} tasks {config.tasks}, in this order, "
            f"got {count}: {dataset.tasks}. Choose them with dataset.of_tasks(...), or make a new model."
        )
    for name in ("observation", "action"):
        ours, theirs = (getattr(source, f"{name}_dim") for source in (config, dataset))
        own = getattr(config, f"{name}_dims") or (ours,) * count
        if ours != theirs or (config.num_tasks and own != getattr(dataset, f"{name}_dims")):
            raise ValueError(
                f"expected {name}s of width {ours} (by task {own}) as in the world model's spaces, got a dataset of "
                f"{theirs} ({getattr(dataset, f'{name}_dims')})."
            )


def _make_model(
    dataset: OfflineDataset,
    size: str,
    planning: bool,
    observation_space: spaces.Space | None,
    action_space: spaces.Space | None,
    world_model_kwargs: dict[str, Any],
) -> WorldModel:
    longest = [int(dataset.lengths[dataset.task_ids == i].max(initial=1)) for i in range(len(dataset.tasks))]
    fields: dict[str, Any] = {"tasks": dataset.tasks, "discounts": tuple(map(episode_discount, longest))}
    if len(dataset.tasks) > 1:
        fields |= {"observation_dims": dataset.observation_dims, "action_dims": dataset.action_dims}
    dims = {"observation_dim": dataset.observation_dim, "action_dim": dataset.action_dim}
    config = WorldModelConfig.preset(size, planning=planning, **{**dims, **fields, **world_model_kwargs})
    return WorldModel(config, observation_space or dataset.observation_space, action_space or dataset.action_space)


def _rate_share(step: int, settings: dict[str, Any]) -> float:
    """Share of the learning rate at a step: a linear warm-up, then constant or half a cosine down to 0."""
    warmup, updates = settings["warmup"], settings["updates"]
    if step < warmup:
        return (step + 1) / warmup
    if settings["learning_rate_schedule"] == "constant":
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, updates - warmup)))


class _FiniteWindows:
    """A dataset that hands out this process's part of each batch, and refuses NaNs and infinities."""

    def __init__(self, dataset: OfflineDataset, part: slice) -> None:
        self._dataset, self._part = dataset, part

    def longest_window(self, limit: int) -> int:
        return self._dataset.longest_window(limit)

    def sample_windows(
        self,
        batch_size: int,
        horizon: int,
        rng: np.random.Generator | None = None,
        normalizer: VecNormalize | None = None,
        /,
        *,
        partial: bool = False,
    ) -> SequenceSamples:
        windows = self._dataset.sample_windows(batch_size, horizon, rng, normalizer, self._part, partial=partial)
        for name in ("observations", "actions", "rewards"):
            finite = torch.isfinite(getattr(windows, name)).flatten(2 if name != "rewards" else 1)
            finite = finite.all(-1) if name != "rewards" else finite
            if not bool(finite.all()):
                window = int((~finite.all(0)).nonzero()[0])
                task = self._dataset.tasks[0 if windows.task is None else int(windows.task[window])]
                raise ValueError(
                    f"expected finite numbers in the dataset, got NaN or infinity in the {name} of task {task!r}. The "
                    f"model learned nothing from that batch; leave that episode out of the dataset."
                )
        return windows


class _Run:
    """A model in training, with all that an exact resume needs."""

    def __init__(self, model: WorldModel, settings: dict[str, Any], seed: int, ranks: Ranks) -> None:
        self.model, self.settings, self.ranks, self.step = model, settings, ranks, 0
        planned = model.value is not None and model.policy_prior is not None
        rate = settings["policy_learning_rate"]
        self.planning = PlanningLearner(model, rate, seed=seed, ranks=ranks) if planned else None
        self._part = ranks.part(settings["batch_size"])
        for module in model.modules():
            if isinstance(module, PartDropout) and ranks.size > 1:
                module.part, module.count = self._part, settings["batch_size"]
        self._loss: nn.Module | None = None
        self._ends = model.predicts_termination  # when it was made
        self._make_loss()  # before the optimizer, which is to have the parameters that it leaves
        self.optimizer = make_model_optimizer(model, settings["learning_rate"])
        self.rng = np.random.default_rng(seed)
        self.seconds = 0.0  # of training so far, before resumes included

    def _make_loss(self) -> nn.Module:
        """Give the loss, made anew when the termination head begins to take part in it."""
        model, ends = self.model, self.model.predicts_termination
        if self._loss is None or (ends != self._ends and not self.ranks.sharded):
            apart = () if model.policy_prior is None else tuple(model.policy_prior.parameters())
            idle = () if ends or model.termination_head is None else tuple(model.termination_head.parameters())
            self._loss = None  # with its hooks
            self._loss = self.ranks.wrap(ModelLoss(model, self.settings["rho"], self.planning), apart, idle)
            self._ends = ends
        return self._loss

    def update(self, dataset: OfflineDataset) -> dict[str, Tensor]:
        settings, share = self.settings, _rate_share(self.step, self.settings)
        set_learning_rate(self.optimizer, share * settings["learning_rate"])
        if self.planning is not None:
            set_learning_rate(self.planning.optimizer, share * settings["policy_learning_rate"])
        device = self.model.device
        half = settings["precision"] == "bfloat16"
        # Without the cache of rounded weights, which would outlive the optimizer's step.
        with fast_matmul(device), torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            metrics = update_world_model(
                self.model,
                self.optimizer,
                _FiniteWindows(dataset, self._part),
                settings["batch_size"],
                settings["horizon"],
                settings["rho"],
                self.rng,
                planning=self.planning,
                ranks=self.ranks,
                make_loss=self._make_loss,
            )
        self.step += 1
        return metrics

    def mean(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give metrics of the whole batch."""
        metrics = {name: self.ranks.full(value).clone() for name, value in metrics.items()}
        self.ranks.mean_(list(metrics.values()))
        return metrics

    def whole_model(self) -> WorldModel:
        """Give the model with all of its weights; each process must call it where they are shared out."""
        if not self.ranks.sharded:
            return self.model
        model = WorldModel(self.model.config, self.model.observation_space, self.model.action_space)
        model.load_state_dict(self.ranks.full(dict(self.model.state_dict())))
        return model.to(self.model.device, self.model.dtype).eval()

    def save(self, path: pathlib.Path) -> None:
        """Write a checkpoint, once for all processes; each must call it."""
        cuda, full = self.model.device.type == "cuda", self.ranks.full
        content = {
            "format": _FORMAT,
            "settings": json.dumps(self.settings, sort_keys=True),
            "step": self.step,
            "seconds": self.seconds,
            "model": full(dict(self.model.state_dict())),
            "optimizer": full(self.optimizer.state_dict()),
            "planning": full(self.planning.state_dict()) if self.planning else None,
            "rng": json.dumps(self.rng.bit_generator.state),
            "torch_rng": torch.get_rng_state(),  # of dropout
            "cuda_rng": torch.cuda.get_rng_state(self.model.device) if cuda else None,
        }
        if self.ranks.rank == 0:
            with atomic_write(path) as file:
                torch.save(content, file)

    def resume(self, path: pathlib.Path) -> None:
        content = load_tensors(path, self.model.device)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"expected a pre-training checkpoint in {os.fspath(path)!r}, got something else.")
        before, now = json.loads(content["settings"]), json.loads(json.dumps(self.settings))
        differing = {key for key in before | now if before.get(key) != now.get(key)}
        if self.settings["learning_rate_schedule"] == "constant":
            differing -= {"updates"}
        if differing:
            was = {key: before.get(key) for key in sorted(differing)}
            raise ValueError(
                f"expected the settings that {os.fspath(path)!r} was begun with, {was}, got "
                f"{ {key: now.get(key) for key in was} }. Give the same, or another `out` folder for a new run."
            )
        share_out, weights = self.ranks.share_out, self.model.state_dict()
        self.model.load_state_dict({name: share_out(value, weights[name]) for name, value in content["model"].items()})
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, state in content["optimizer"]["state"].items():
            state |= {name: share_out(value, parameters[index]) for name, value in state.items()}
        self.optimizer.load_state_dict(content["optimizer"])
        if self.planning is not None:
            self.planning.load_state_dict(content["planning"])
        self.rng.bit_generator.state = json.loads(content["rng"])
        torch.set_rng_state(content["torch_rng"].cpu())
        if content["cuda_rng"] is not None and self.model.device.type == "cuda":
            torch.cuda.set_rng_state(content["cuda_rng"].cpu(), self.model.device)
        self.step, self.seconds = content["step"], content["seconds"]


def pretrain(
    dataset: OfflineDataset,
    size: str = "5M",
    *,
    updates: int = 20_000,
    batch_size: int = 256,
    horizon: int = 5,
    rho: float = 0.5,
    learning_rate: float = 5e-4,
    policy_learning_rate: float = 3e-4,
    learning_rate_schedule: str = "constant",
    warmup: int = 0,
    precision: str = "float32",
    planning: bool = True,
    held_out: float = 0.1,
    out: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1_000,
    validate_every: int | None = None,
    log_every: int = 100,
    tensorboard: bool = False,
    progress_bar: bool = False,
    seed: int = 0,
    device: torch.device | str = "auto",
    observation_space: spaces.Space | None = None,
    action_space: spaces.Space | None = None,
    world_model: WorldModel | None = None,
    world_model_kwargs: dict[str, Any] | None = None,
    ranks: Ranks | None = None,
) -> WorldModel:
    """Train a world model on offline data of one task or several, without touching an env.

    With `out`, a run that was killed at any moment goes on from its last checkpoint when it is called again with the
    same arguments, and ends, on a CPU, with the weights of a run that was never interrupted, bit for bit. The folder
    then holds checkpoint.pt, and at the end world_model.pt (for `WorldModel.load`), validation.csv, validation.png
    and summary.json.

    The defaults suit small data (up to some 100,000 steps); for the published settings see `PAPER`.

    Args:
        dataset: Episodes of one task or several.
        size: A preset of `WorldModelConfig`: "1M", "5M", "19M", "48M" or "317M".
        updates: Gradient steps in all.
        batch_size: Windows in a batch.
        horizon: Steps in a window.
        rho: Weight ρ of later steps, in (0, 1].
        learning_rate: Adam's, of all but the encoder (0.3 of it) and the policy prior.
        policy_learning_rate: The policy prior's.
        learning_rate_schedule: "constant", or "cosine" down to 0.
        warmup: Updates in which the rates rise linearly from 0.
        precision: "float32", or "bfloat16" for autocast; weights stay float32.
        planning: Train TD-MPC2's value ensemble and policy prior too, which planners need.
        held_out: Share of the episodes to validate on, in [0, 1).
        out: Folder of the run; None to keep nothing.
        checkpoint_every: Updates between two checkpoints.
        validate_every: Updates between two validations beside the one at the end; None for that one alone.
        log_every: Updates between two log entries.
        tensorboard: Log to TensorBoard, into `out`.
        progress_bar: Show progress, rate and remaining time.
        seed: Of the split, the weights, the batches and all other randomness.
        device: Where to train.
        observation_space: Real observation space of a single task; None for an unbounded one.
        action_space: Real action space of a single task; None for [-1, 1]. Actions in the data are scaled to [-1, 1].
        world_model: A model to go on from, trained in place, instead of a new one of `size`; it says by itself
            whether it has what `planning` is about.
        world_model_kwargs: Any field of `WorldModelConfig`.
        ranks: The processes that train this model together (`Ranks.join`), each calling this with the same arguments;
            they decide the device. None alone.

    Returns:
        The trained model, in evaluation mode.

    Raises:
        ConnectionError: If another process isn't heard of in time.
        ImportError: If `tensorboard` or a picture is asked for and its package is missing.
        ValueError: If an argument is out of range, processes differ in arguments or data, the dataset is empty, holds
            a number that is not finite or does not fit the model, the loss diverges, or `out` holds a run with other
            settings.

    Example:
        >>> from pwm_gym.datasets import Episode
        >>> rng = np.random.default_rng(0)
        >>> def episode():
        ...     return Episode(rng.normal(size=(31, 3)), rng.uniform(-1, 1, (30, 1)), np.ones(30), truncated=True)
        >>> data = OfflineDataset([episode() for _ in range(4)], ["hop"])
        >>> pretrain(data, "1M", updates=2, batch_size=8).config.tasks
        ('hop',)
    """
    # What fixes the result; the rest of the arguments may differ when a run goes on.
    settings = {
        "updates": updates,
        "batch_size": batch_size,
        "horizon": horizon,
        "rho": rho,
        "learning_rate": learning_rate,
        "policy_learning_rate": policy_learning_rate,
        "learning_rate_schedule": learning_rate_schedule,
        "warmup": warmup,
        "precision": precision,
        "held_out": held_out,
        "seed": seed,
    }
    _check_settings({**settings, "checkpoint_every": checkpoint_every, "log_every": log_every})
    if dataset.num_episodes == 0:
        raise ValueError("expected episodes to train on, got an empty dataset.")
    if tensorboard and out is None:
        raise ValueError("expected `out` beside tensorboard=True: the folder that the logs go to.")
    if out is not None and held_out and importlib.util.find_spec("matplotlib") is None:
        raise ImportError('the picture of the validation needs matplotlib: pip install "pwm-gym[examples]"')
    if ranks is None and Ranks.launched():
        raise ValueError(
            "expected `ranks` in a script that torchrun started: pretrain(..., ranks=ranks) in Ranks.join()."
        )
    ranks = ranks or Ranks()
    train, held = dataset.split(held_out, seed) if held_out else (dataset, None)
    device = ranks.device or get_device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # dropout draws from the global one
        torch.manual_seed(seed)
        if world_model is None:
            world_model = _make_model(
                dataset, size, planning, observation_space, action_space, world_model_kwargs or {}
            )
        _check_fit(world_model, dataset)
        world_model.to(device)
        settings |= {"config": to_json(dataclasses.asdict(world_model.config)), "steps": dataset.num_steps}
        folder = None if out is None else pathlib.Path(out)
        begun = folder is not None and (folder / "checkpoint.pt").exists()
        others = {"checkpoint_every": checkpoint_every, "validate_every": validate_every, "log_every": log_every}
        ranks.agree("arguments and data", {**settings, **others, "data": dataset.checksum(), "has_checkpoint": begun})
        run = _Run(world_model, settings, seed, ranks)
        if folder is not None and begun:
            run.resume(folder / "checkpoint.pt")
        leads = ranks.rank == 0
        logger = configure(str(folder), ["tensorboard"]) if tensorboard and leads else Logger(None, [])
        with show_progress(updates, "pre-training", "update", progress_bar and leads, run.step) as bar:
            _train(run, train, held, bar, folder, logger, checkpoint_every, validate_every, log_every)
        world_model = run.whole_model()
        if folder is not None and leads:
            _finish(run, world_model, held, folder, logger)
        logger.close()
    return world_model.eval()


def _train(
    run: _Run,
    train: OfflineDataset,
    held: OfflineDataset | None,
    bar: Any,
    folder: pathlib.Path | None,
    logger: Logger,
    checkpoint_every: int,
    validate_every: int | None,
    log_every: int,
) -> None:
    began = time.perf_counter()
    while run.step < run.settings["updates"]:
        metrics = run.update(train)
        bar.update()
        last = run.step == run.settings["updates"]
        if run.step % log_every == 0 or last or (run.step % checkpoint_every == 0 and folder is not None):
            metrics = run.mean(metrics)
            loss = float(metrics["model_loss"])
            if not math.isfinite(loss):
                raise ValueError(
                    f"expected a finite loss, got {loss} at update {run.step}: training diverged. Lower learning_rate, "
                    f"or use precision='float32'; the last checkpoint is still good."
                )
            now = time.perf_counter()
            run.seconds, began = run.seconds + now - began, now
            for name, value in metrics.items():
                logger.record(f"train/{name}", float(value))
            logger.record("time/samples_per_second", run.step * run.settings["batch_size"] / run.seconds)
            logger.dump(run.step)
        if folder is not None and (run.step % checkpoint_every == 0 or last):
            run.save(folder / "checkpoint.pt")
        if held is not None and validate_every is not None and run.step % validate_every == 0 and not last:
            model = run.whole_model()
            if run.ranks.rank == 0:
                _log_validation(validate(model, held), logger, run.step)


def _log_validation(results: dict[str, TaskValidation], logger: Logger, step: int) -> None:
    for name, result in results.items():
        logger.record(f"validation/{name}/reward_correlation", float(np.nanmean(result.reward_correlation)))
        logger.record(f"validation/{name}/latent_error", float(result.latent_error.mean()))
        logger.record(f"validation/{name}/imagined_return", float(result.imagined_returns.mean()))
        logger.record(f"validation/{name}/real_return", float(result.real_returns.mean()))
    logger.dump(step)


def _finish(run: _Run, model: WorldModel, held: OfflineDataset | None, folder: pathlib.Path, logger: Logger) -> None:
    """Leave model, validation and a summary in the folder."""
    model.eval().save(folder / "world_model.pt")
    summary = {
        "updates": run.step,
        "seconds": round(run.seconds, 1),
        "samples_per_second": round(run.step * run.settings["batch_size"] / max(run.seconds, 1e-9), 1),
        "peak_memory_mb": round(_peak_memory() / 2**20, 1),
        "device": str(run.model.device),
        "processes": run.ranks.size,
    }
    if held is not None:
        results = validate(model, held)
        _log_validation(results, logger, run.step)
        write_validation(results, folder / "validation.csv")
        plot_validation(results, folder / "validation.png", f"held-out episodes after {run.step:,} updates")
    with atomic_write(folder / "summary.json") as file:
        file.write(json.dumps(summary, indent=1).encode())


def _peak_memory() -> int:
    """Peak resident memory of this process in bytes; 0 where the system doesn't tell."""
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
