"""A policy for each task out of one world model: trained, saved and scored on the real env, resumable at any moment."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch

from pwm_gym.agents.policy_bank import PolicyBank
from pwm_gym.agents.pwm import PWM
from pwm_gym.cluster import RayCluster
from pwm_gym.datasets import OfflineDataset
from pwm_gym.evaluation import episode_outcomes
from pwm_gym.extraction.plan import Plan, begin, check
from pwm_gym.extraction.report import TaskResult, write_report
from pwm_gym.latent_env import LatentVectorEnv
from pwm_gym.progress import Progress, ProgressFile, TaskProgress, show_task_progress
from pwm_gym.serialization import atomic_write, load_tensors
from pwm_gym.world_model import WorldModel

__all__ = ["SETTINGS", "extract"]

# How policies are trained in a model that is not their own, unless the caller says otherwise: arguments of `PWM`, whose
# own defaults are the rest.
SETTINGS: dict[str, Any] = {"horizon": 10, "policy_kwargs": {"model_learning_rate": 1e-4}}
_EVALUATION_SEED = 10_000  # of the first real episode
_REAL_CHUNK = 2_500  # real decisions between two saves: whole episodes of our tasks, so that a resume is exact
_SHOWN = 10  # updates between two looks at the progress bar


def extract(
    world_model: WorldModel,
    dataset: OfflineDataset,
    tasks: Sequence[str] | None = None,
    *,
    out: str | os.PathLike[str] = "runs/extraction",
    updates: int = 3_000,
    num_envs: int = 64,
    together: int | None = None,
    shared: bool = False,
    finetune: bool = False,
    real_steps: int = 0,
    episodes: int = 10,
    env_ids: Mapping[str, str] | None = None,
    checkpoint_every: int = 250,
    seed: int | Sequence[int] = 0,
    reward_in_task_units: bool | None = None,
    ray: RayCluster | str | None = None,
    progress_bar: bool = False,
    **settings: Any,
) -> dict[str, TaskResult]:
    """Make a policy for each task of a world model, save it as a `PWM` agent and score it on the task's real env.

    The folder then holds <task>.zip (for `PWM.load`) and <task>.json for each task, table.csv, table.md and scores.png
    with published scores beside. A run that was killed at any moment goes on when it is called again with the same
    arguments, and ends, on a CPU, with the weights of a run that was never interrupted.

    Args:
        world_model: Trained on the tasks, single- or multi-task; it stays as it is.
        dataset: Data of the tasks, which imagined rollouts start from.
        tasks: Their names; None for all of the model's.
        out: The folder.
        updates: Policy updates for each task.
        num_envs: Imagined rollouts in an update.
        together: Tasks that are trained in one batched program (`PolicyBank`): 1 for one after another; None for all,
            or for 1 on a cluster. The policies are the same but for rounding, unless `finetune` is set: each program
            fits one model to its tasks.
        shared: Train one policy that is conditioned on the task instead of one for each task.
        finetune: Go on fitting the model to the tasks' data while the policies train.
        real_steps: Decisions that each policy then learns for on the real env, as `PWM` does there: with the
            model fitted to the data and to what it meets.
        episodes: Real episodes to score each policy on; 0 for none.
        env_ids: {task: Gymnasium id} of tasks that aren't registered under their name.
        checkpoint_every: Updates between two checkpoints.
        seed: Of each task's weights, starts and noise. A task's policy doesn't depend on which others there are. Of
            several, each gets a folder of its own in `out`, seed-<n>.
        reward_in_task_units: Maximise rewards in task units, or with False, as PWM's released code, the expectation
            over symlog bins; None for what the model's config says.
        ray: Cluster to work on, or its address, instead of here: a unit of work is `together` tasks from one seed, and
            gets on with its last checkpoint where its machine dies. `out` must be a folder that all nodes see.
        progress_bar: Show a bar for each task and one for all.
        **settings: Arguments of `PWM` other than policy, env and seed; what is not given is as in `SETTINGS`. A
            schedule of the learning rate must have a repr that tells it from others, as SB3's `LinearSchedule` has.

    Returns:
        The results by task; of several seeds by "seed-<n>/<task>".

    Raises:
        ConnectionError: If there is no cluster at the address.
        ImportError: If matplotlib is missing, or Ray where it is asked for.
        ValueError: If an argument is out of range; a task has no data, is none that the model was trained on, or is
            padded otherwise than in the model; no episode is as long as the horizon; a policy diverges; or the
            folder holds a run with other arguments; or no node has room for a unit of work.

    Example:
        >>> import tempfile
        >>> from pwm_gym.collection import collect
        >>> from pwm_gym.training import pretrain
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> data = collect("Pendulum-v1", episodes=2, out=folder / "data", progress_bar=False)
        >>> model = pretrain(data, "1M", updates=2, batch_size=8)
        >>> results = extract(model, data, out=folder / "policies", updates=2, num_envs=4, episodes=1)
        >>> PWM.load(results["Pendulum-v1"].agent).predict(np.zeros(3, np.float32))[0].shape
        (1,)
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('the plot of the scores needs matplotlib: pip install "pwm-gym[examples]"')
    for name, value, least in (
        ("updates", updates, 1),
        ("num_envs", num_envs, 1),
        ("checkpoint_every", checkpoint_every, 1),
        ("together", 1 if together is None else together, 1),
        ("real_steps", real_steps, 0),
        ("episodes", episodes, 0),
    ):
        if value < least:
            raise ValueError(f"`{name}` must be >= {least}, got {value}.")
    chosen = tuple(tasks) if tasks is not None else world_model.config.tasks or dataset.tasks
    nested = {**SETTINGS["policy_kwargs"], **settings.get("policy_kwargs", {})}
    nested.pop("world_model_kwargs", None)  # of PWM.PAPER; the model is given
    if reward_in_task_units is not None:
        world_model = copy.copy(world_model)  # of the same weights
        world_model.config = dataclasses.replace(world_model.config, reward_in_task_units=reward_in_task_units)
    plan = Plan(
        world_model,
        dataset,
        chosen,
        dict(env_ids or {}),
        pathlib.Path(out),
        updates,
        num_envs,
        shared,
        finetune,
        real_steps,
        episodes,
        seed if isinstance(seed, int) else 0,
        checkpoint_every,
        {**SETTINGS, **settings, "policy_kwargs": nested},
    )
    check(plan)
    plans = [plan] if isinstance(seed, int) else [_of_seed(plan, one) for one in dict.fromkeys(seed)]
    size = len(chosen) if shared else together or (len(chosen) if ray is None else 1)
    for one in plans:
        begin(one, size)
    groups = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    units = [_Unit(number, group) for number in range(len(plans)) for group in groups]
    with show_task_progress({name: plan.work for p in plans for name in p.names(chosen)}, progress_bar) as progress:
        for unit in units:
            if plans[unit.plan].is_done(unit.tasks):
                progress.advance(plans[unit.plan].names(unit.tasks), plan.work)
            elif ray is None:
                _extract_group(plans[unit.plan], unit.tasks, progress)
        if ray is not None:
            left = [unit for unit in units if not plans[unit.plan].is_done(unit.tasks)]
            _extract_on_ray(plans, left, RayCluster.of(ray), progress)
    return {name: result for one in plans for name, result in _report(one).items()}


class _Unit(NamedTuple):
    """Tasks whose policies train in one program, as one piece of work."""

    plan: int  # index of the seed's
    tasks: tuple[str, ...]


def _of_seed(plan: Plan, seed: int) -> Plan:
    return dataclasses.replace(plan, seed=seed, folder=plan.folder / f"seed-{seed}", prefix=f"seed-{seed}/")


def _report(plan: Plan) -> dict[str, TaskResult]:
    """Write the report of a finished folder and remove what was only there to go on from."""
    results = [TaskResult.load(plan.result_path(task)) for task in plan.tasks]
    write_report(results, plan.folder)
    for pattern in ("checkpoint-*.pt", "progress-*.json"):
        for leftover in plan.folder.glob(pattern):
            leftover.unlink()
    return dict(zip(plan.names(plan.tasks), results, strict=True))


# On a cluster


def _extract_on_ray(plans: list[Plan], units: list[_Unit], cluster: RayCluster, progress: TaskProgress) -> None:
    """Have a cluster work on the units; the others go on where one fails."""
    if not units:
        return
    model = plans[0].world_model
    model = model if model.device.type == "cpu" else copy.deepcopy(model).cpu()
    sent = [dataclasses.replace(p, world_model=model, folder=p.folder.resolve()) for p in plans]
    failures = []
    for event in cluster.run(_Worker, (sent, cluster.device), units, sent[-1].folder / "call.json"):
        for path in (path for plan in plans for path in plan.folder.glob("progress-*.json")):
            progress.show(ProgressFile.read(path))
        if event is not None:
            plan, tasks = plans[units[event.number].plan], units[event.number].tasks
            _progress_path(plan, tasks).unlink(missing_ok=True)
            if event.failure is None:
                progress.show(dict.fromkeys(plan.names(tasks), plan.work))
            else:
                failures.append(f"{', '.join(plan.names(tasks))}: {event.failure}")
    if failures:
        raise ValueError(
            f"expected a policy for each task, but {len(failures)} of {len(units)} units of work failed; the others "
            f"are done, and the same call tries these again. " + " | ".join(failures)
        )


class _Worker:
    """Works on units in a process of a cluster."""

    def __init__(self, shared: tuple[list[Plan], str]) -> None:
        self._plans, device = shared
        self._plans[0].world_model.to(device)  # the model of all plans

    def __call__(self, unit: _Unit) -> None:
        plan = self._plans[unit.plan]
        _extract_group(plan, unit.tasks, ProgressFile(_progress_path(plan, unit.tasks)))


def _progress_path(plan: Plan, tasks: Sequence[str]) -> pathlib.Path:
    return plan.folder / f"progress-{plan.result_path(tasks[0]).name}"


# Training and scoring


def _extract_group(plan: Plan, group: Sequence[str], progress: Progress) -> None:
    """Train the policies of a group in one program, then finish each."""
    agents = [_make_agent(plan, task) for task in group]
    several = plan.world_model.config.num_tasks > 0
    model = plan.world_model.for_task(group[0], share=True) if several and len(group) == 1 else plan.world_model
    data = plan.dataset.of_tasks(*group) if plan.finetune else None
    bank = PolicyBank(agents, model, shared=plan.shared, finetune=data)
    spent = _train(plan, bank, plan.folder / f"checkpoint-{plan.result_path(group[0]).stem}.pt", group, progress)
    for task, agent in zip(group, agents, strict=True):
        path = plan.result_path(task)
        if path.exists():
            progress.advance(plan.names([task]), plan.real_steps + plan.episodes)
            continue
        agent.save(path.with_suffix(".zip"))
        _finish(plan, task, path, spent / len(group), progress)


def _make_agent(plan: Plan, task: str) -> PWM:
    """Make an agent in the task's share of the model, with the real env's spaces where there is one."""
    config, data = plan.world_model.config, plan.dataset.of_tasks(task)
    model = plan.world_model.for_task(task if config.num_tasks else None, share=not plan.finetune)
    model = copy.deepcopy(model) if plan.finetune else copy.copy(model)  # of the same weights, where they stay
    if plan.needs_env:
        real = plan.make_env(task)
        model.observation_space, model.action_space = real.observation_space, real.action_space
        real.close()
    env = LatentVectorEnv(model, data, num_envs=plan.num_envs, horizon=plan.settings["horizon"])
    return PWM("MlpPolicy", env, seed=plan.seed, **plan.settings)


def _train(
    plan: Plan, bank: PolicyBank, checkpoint: pathlib.Path, group: Sequence[str], progress: Progress
) -> np.ndarray:
    """Train to the end, from the last checkpoint where there is one; returns the seconds in all (see `_clocks`)."""
    spent = np.zeros(2)
    if checkpoint.exists():
        content = load_tensors(checkpoint, bank.world_model.device)
        bank.load_state_dict(content["bank"])
        spent = np.array(content["seconds"])
    progress.advance(plan.names(group), bank.updates)
    while bank.updates < plan.updates:
        began = _clocks()
        next_checkpoint = (bank.updates // plan.checkpoint_every + 1) * plan.checkpoint_every
        end = min(plan.updates, next_checkpoint, bank.updates + _SHOWN)
        count = end - bank.updates
        bank.train(count, remaining=1.0 - bank.updates / plan.updates)
        spent += _clocks() - began
        progress.advance(plan.names(group), count)
        if end in (plan.updates, next_checkpoint):
            with atomic_write(checkpoint) as file:
                torch.save({"bank": bank.state_dict(), "seconds": spent.tolist()}, file)
    bank.write()
    return spent


def _clocks() -> np.ndarray:
    """Read the wall clock and this process's CPU time, in seconds, (2,)."""
    return np.array([time.perf_counter(), time.process_time()])


def _finish(plan: Plan, task: str, path: pathlib.Path, spent: np.ndarray, progress: Progress) -> None:
    """Let an offline agent learn on the real env if it is to, score it, and write its result."""
    agent, returns, successes = _load(plan, path.with_suffix(".zip")), np.zeros(0), None
    data = plan.dataset.of_tasks(task)
    env = plan.make_env(task) if plan.needs_env else None
    if plan.real_steps and env is not None:
        agent, more = _learn_for_real(plan, task, env, progress)
        spent = spent + more
        agent.save(path.with_suffix(".zip"))
    if plan.episodes and env is not None:
        returns, successes = episode_outcomes(agent, env, plan.episodes, _EVALUATION_SEED)
    if env is not None:
        env.close()
    of_data = np.sort(data.returns())
    seconds, cpu_seconds = (round(float(value), 2) for value in spent)
    TaskResult(
        task=task,
        agent=os.fspath(path.with_suffix(".zip")),
        updates=plan.updates,
        real_steps=plan.real_steps,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        data_mean=float(of_data.mean()),
        data_best_tenth=float(of_data[-math.ceil(len(of_data) / 10) :].mean()),
        returns=tuple(map(float, returns)),
        successes=() if successes is None else tuple(map(bool, successes)),
    ).save(path)
    shutil.rmtree(plan.folder / f"real-{path.stem}", ignore_errors=True)
    progress.advance(plan.names([task]), plan.episodes)


def _load(plan: Plan, path: pathlib.Path, **kwargs: Any) -> PWM:
    """Read an agent of this run; a schedule has no plain form in its file, so that it is given."""
    rate = plan.settings.get("learning_rate")
    return PWM.load(path, **({"learning_rate": rate} if callable(rate) else {}), **kwargs)


def _learn_for_real(plan: Plan, task: str, env: gym.Env, progress: Progress) -> tuple[PWM, np.ndarray]:
    """Go on with an offline agent on the real env and its data; returns it and the seconds (see `_clocks`)."""
    path = plan.result_path(task)
    folder, data = plan.folder / f"real-{path.stem}", plan.dataset.of_tasks(task)
    note, done, spent = folder / "state.json", 0, np.zeros(2)
    if note.exists():  # written last: it says which agent belongs to it
        state = json.loads(note.read_text(encoding="utf-8"))
        done, spent = state["done"], np.array(state["seconds"])
    source = folder / f"agent-{done}.zip" if done else path.with_suffix(".zip")
    agent = _load(plan, source, env=env, buffer_size=data.num_steps + plan.real_steps)
    if done:
        agent.load_replay_buffer(folder / f"agent-{done}.replay")
    else:
        data.add_to(agent.sequence_replay())
    progress.advance(plan.names([task]), done)
    while done < plan.real_steps:
        began, steps = _clocks(), min(_REAL_CHUNK, plan.real_steps - done)
        agent.learn(steps, reset_num_timesteps=done == 0)
        done, spent = done + steps, spent + _clocks() - began
        agent.save(folder / f"agent-{done}.zip")
        agent.save_replay_buffer(folder / f"agent-{done}.replay")
        with atomic_write(note) as file:
            file.write(json.dumps({"done": done, "seconds": spent.tolist()}).encode())
        for old in folder.glob("agent-*"):
            if old.stem != f"agent-{done}":
                old.unlink()
        progress.advance(plan.names([task]), steps)
    return agent, spent
