"""What a call of `extract` is to do, and what is refused before anything is trained."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym

from pwm_gym.datasets import OfflineDataset
from pwm_gym.envs.factory import make_task
from pwm_gym.serialization import atomic_write
from pwm_gym.world_model import WorldModel

__all__ = ["Plan", "begin", "check"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """One call of `extract`."""

    world_model: WorldModel
    dataset: OfflineDataset
    tasks: tuple[str, ...]
    env_ids: Mapping[str, str]
    folder: pathlib.Path
    updates: int
    num_envs: int
    shared: bool
    finetune: bool
    real_steps: int
    episodes: int
    seed: int
    checkpoint_every: int
    settings: dict[str, Any]
    prefix: str = ""  # of the results' names

    @property
    def needs_env(self) -> bool:
        """Whether real envs are needed."""
        return self.episodes > 0 or self.real_steps > 0

    @property
    def work(self) -> int:
        """Units of a task that progress is counted in."""
        return self.updates + self.real_steps + self.episodes

    def names(self, tasks: Sequence[str]) -> list[str]:
        """Give what results of tasks are called."""
        return [f"{self.prefix}{task}" for task in tasks]

    def is_done(self, tasks: Sequence[str]) -> bool:
        """Tell whether all of the tasks have their results."""
        return all(self.result_path(task).exists() for task in tasks)

    def make_env(self, task: str) -> gym.Env:
        """Make a task's real env."""
        return make_task(self.env_ids.get(task, task))

    def result_path(self, task: str) -> pathlib.Path:
        """Where a task's result stands."""
        return self.folder / f"{task.replace('/', '_')}.json"


def check(plan: Plan) -> None:
    """Raise ValueError unless model, data and envs fit each other for every task."""
    config, dataset, horizon = plan.world_model.config, plan.dataset, plan.settings["horizon"]
    known = config.tasks or (dataset.tasks if config.num_tasks == 0 and len(dataset.tasks) == 1 else ())
    if not plan.tasks or len(set(plan.tasks)) != len(plan.tasks):
        raise ValueError(f"expected distinct tasks, got {plan.tasks}.")
    for task in plan.tasks:
        if task not in known:
            raise ValueError(
                f"expected tasks that the world model was trained on, {', '.join(known) or 'which it does not name'}; "
                f"got {task!r}. Pre-train a model on its data: pwm_gym.pretrain(dataset, ...)."
            )
        lengths = dataset.lengths[dataset.task_ids == dataset.tasks.index(task)] if task in dataset.tasks else ()
        if not len(lengths):
            raise ValueError(
                f"expected data of every task, got no episode of {task!r} among {dataset.num_episodes} of "
                f"{', '.join(dataset.tasks)}. Collect some, or leave it out of `tasks`."
            )
        needed = max(horizon, plan.settings.get("model_horizon", 0) if plan.finetune else 0)
        if max(lengths) < needed:
            raise ValueError(
                f"expected an episode of {task!r} that is at least as long as the horizon of {needed} steps, got "
                f"{max(lengths)} at most. Use a shorter horizon."
            )
        own, data = (config.for_task(task) if config.num_tasks else config), dataset.of_tasks(task)
        if (own.observation_dim, own.action_dim) != (data.observation_dim, data.action_dim):
            raise ValueError(
                f"expected {task!r} with {own.observation_dim} observations and {own.action_dim} actions beside its "
                f"padding, as in the world model, got {data.observation_dim} and {data.action_dim}. The dataset's "
                f"padding is another: import it with the task set that the model was trained on."
            )
        if plan.needs_env:
            _check_env(plan, task, own.observation_dim, own.action_dim)


def _check_env(plan: Plan, task: str, observation_dim: int, action_dim: int) -> None:
    try:
        env = plan.make_env(task)
    except gym.error.Error as error:
        raise ValueError(
            f"expected a registered env for {task!r}, got none ({error}). Name it with env_ids={{{task!r}: ...}}, or "
            f"skip the evaluation with episodes=0."
        ) from error
    shapes = env.observation_space.shape, env.action_space.shape
    env.close()
    if shapes != ((observation_dim,), (action_dim,)):
        raise ValueError(
            f"expected an env of shapes {(observation_dim,)} and {(action_dim,)} for {task!r}, got {shapes}."
        )


def begin(plan: Plan, together: int) -> None:
    """Make the folder, or check that the run in it was begun with the same arguments."""
    checksum = 0
    for value in plan.world_model.state_dict().values():
        checksum = zlib.crc32(value.detach().cpu().contiguous().numpy().tobytes(), checksum)
    left_out = {"world_model", "dataset", "folder", "checkpoint_every", "settings", "prefix"}
    if together == 1:
        left_out.add("tasks")  # more can be added
    call = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name not in left_out}
    call |= {"together": together, "model": checksum, "steps": plan.dataset.num_steps, "settings": repr(plan.settings)}
    call["reward_in_task_units"] = plan.world_model.config.reward_in_task_units
    call, note = json.loads(json.dumps(call)), plan.folder / "call.json"
    if not note.exists():
        with atomic_write(note) as file:
            file.write(json.dumps(call, indent=1).encode())
        return
    before = json.loads(note.read_text(encoding="utf-8"))
    differing = sorted(name for name in before | call if before.get(name) != call.get(name))
    if differing:
        was, now = ({name: given.get(name) for name in differing} for given in (before, call))
        raise ValueError(
            f"expected the arguments that {os.fspath(plan.folder)!r} was begun with, {was}, got {now}. Give the same, "
            f"or another `out` folder for a new run."
        )
