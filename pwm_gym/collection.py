"""Gathering offline data from agents, noisy or random, over several tasks and processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import pathlib
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.vec_env.base_vec_env import CloudpickleWrapper

from pwm_gym.agents import PWM
from pwm_gym.cluster import RayCluster
from pwm_gym.datasets import Episode, OfflineDataset
from pwm_gym.datasets.storage import DatasetWriter, Layout
from pwm_gym.envs.factory import make_task
from pwm_gym.progress import show_progress
from pwm_gym.serialization import atomic_write

__all__ = ["collect"]


class _Predictor(Protocol):
    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]: ...


Agent = _Predictor | Callable[[np.ndarray], Any] | str | os.PathLike[str] | Mapping[str, Any] | None


class _Plan(NamedTuple):
    """What every worker knows."""

    env_ids: tuple[str, ...]
    agents: tuple[Agent, ...]
    noise: tuple[float, ...]
    random_share: float
    seed: int
    env_kwargs: dict[str, Any]
    folder: pathlib.Path


class _Chunk(NamedTuple):
    """Consecutive episodes of one env, collected as one piece of work."""

    env: int  # index into the plan's ids
    first: int
    episodes: int

    def path(self, plan: _Plan) -> pathlib.Path:
        return plan.folder / f"{self.env:03d}-{self.first:08d}"


def collect(
    env_ids: str | Sequence[str],
    agent: Agent | Sequence[Agent] = None,
    episodes: int = 100,
    out: str | os.PathLike[str] = "dataset",
    noise: float | Sequence[float] = 0.0,
    random_share: float = 0.0,
    num_workers: int = 1,
    seed: int = 0,
    env_kwargs: Mapping[str, Any] | None = None,
    chunk_episodes: int = 10,
    ray: RayCluster | str | None = None,
    progress_bar: bool = True,
) -> OfflineDataset:
    """Play whole episodes in real envs and write them to a dataset on disk.

    For data of mixed quality give several agents, several noise levels or a share of random episodes: each episode
    draws its own. An episode depends on nothing but `seed`, its env and its number, so that the result is the same to
    the byte for any number of workers. Finished chunks stand in `.NAME.chunks` beside `out`; killed at any moment, the
    same call goes on with those that are missing.

    Args:
        env_ids: Gymnasium ids, or tasks of this package such as "walker-walk". Box actions with bounds, observations
            that flatten to a vector.
        agent: Who acts: anything with SB3's `predict` (asked for its deterministic action), the path of a saved `PWM`,
            a function from an observation to an action, None for random actions, {env id: one of these}, or a list of
            them.
        episodes: Episodes of each env.
        out: The folder to write.
        noise: Standard deviation of Gaussian noise on actions scaled to [-1, 1], which are clipped there; or a list.
        random_share: Share of the episodes that act at random throughout, in [0, 1].
        num_workers: Processes; 1 for this one. With more, a script needs `if __name__ == "__main__":`.
        seed: Of all random numbers.
        env_kwargs: Passed to `gymnasium.make`.
        chunk_episodes: Episodes in a piece of work.
        ray: Cluster to collect on, or its address, instead of in processes here. The folder must be one that all nodes
            see, and so must agents' files.
        progress_bar: Show rate and remaining time.

    Returns:
        The dataset, mapped from `out`; tasks are called as in `env_ids`, in that order.

    Raises:
        ConnectionError: If there is no cluster at the address.
        FileExistsError: If `out` exists.
        ImportError: If a cluster is asked for and Ray is missing.
        ValueError: If an argument is out of range, an env's spaces don't fit, or an unfinished collection with other
            arguments stands there.

    Example:
        >>> import tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp(), "swing")
        >>> dataset = collect("Pendulum-v1", episodes=2, out=folder, progress_bar=False)
        >>> dataset.num_episodes, dataset.num_steps, dataset.observation_dims
        (2, 400, (3,))
    """
    if min(episodes, num_workers, chunk_episodes) < 1 or not 0 <= random_share <= 1:
        raise ValueError(
            f"expected `episodes`, `num_workers` and `chunk_episodes` >= 1 and `random_share` in [0, 1], got "
            f"{episodes}, {num_workers}, {chunk_episodes} and {random_share}."
        )
    target = pathlib.Path(out)
    plan = _Plan(
        (env_ids,) if isinstance(env_ids, str) else tuple(env_ids),
        tuple(agent) if isinstance(agent, list | tuple) else (agent,),  # type: ignore[arg-type]
        tuple(float(x) for x in np.atleast_1d(noise)),
        random_share,
        seed,
        dict(env_kwargs or {}),
        target.with_name(f".{target.name}.chunks"),
    )
    if len(set(plan.env_ids)) != len(plan.env_ids) or not plan.env_ids:
        raise ValueError(f"expected distinct envs, got {plan.env_ids}.")
    _begin(plan, target, episodes, chunk_episodes)
    chunks = [
        _Chunk(env, first, min(chunk_episodes, episodes - first))
        for first in range(0, episodes, chunk_episodes)
        for env in range(len(plan.env_ids))
    ]
    missing = [chunk for chunk in chunks if not chunk.path(plan).exists()]
    total, todo = episodes * len(plan.env_ids), sum(chunk.episodes for chunk in missing)
    with show_progress(total, "collect", "episode", progress_bar, total - todo) as bar:
        for chunk in (
            _run(plan, missing, num_workers) if ray is None else _run_on_ray(plan, missing, RayCluster.of(ray))
        ):
            bar.update(chunk.episodes)
    _join(plan, sorted(chunks), target)
    return OfflineDataset.load(target)


def _begin(plan: _Plan, target: pathlib.Path, episodes: int, chunk_episodes: int) -> None:
    """Make the folder of chunks, or check that the one that stands there is of the same call."""
    if target.exists():
        raise FileExistsError(f"{os.fspath(target)!r} exists. Remove it or write to another folder.")
    fields = {"env_ids": plan.env_ids, "noise": plan.noise, "random_share": plan.random_share, "seed": plan.seed}
    fields |= {"env_kwargs": repr(sorted(plan.env_kwargs.items())), "agents": [_name(agent) for agent in plan.agents]}
    call = json.loads(json.dumps(fields | {"episodes": episodes, "chunk_episodes": chunk_episodes}))
    note = plan.folder / "call.json"
    if not note.exists():
        with atomic_write(note) as file:
            file.write(json.dumps(call).encode())
    elif json.loads(note.read_text(encoding="utf-8")) != call:
        raise ValueError(
            f"expected to go on with the unfinished collection in {os.fspath(plan.folder)!r}, but it was begun with "
            f"other arguments. Give the same again, or remove that folder to start anew."
        )


def _name(agent: Agent) -> Any:
    """Something by which to recognise an agent: a file's checksum, or the name of a class."""
    if isinstance(agent, Mapping):
        return {key: _name(value) for key, value in agent.items()}
    if isinstance(agent, str | os.PathLike):
        return zlib.crc32(pathlib.Path(agent).read_bytes())
    return type(agent).__name__


# Workers


def _run(plan: _Plan, chunks: list[_Chunk], num_workers: int) -> Iterator[_Chunk]:
    """Collect chunks, and yield each when it is done."""
    if num_workers == 1 or len(chunks) < 2:
        with _one_thread():
            player = _Player(plan)
            for chunk in chunks:
                yield player.collect(chunk)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, _start_worker, (CloudpickleWrapper(plan),))
    try:
        for future in as_completed([pool.submit(_work, chunk) for chunk in chunks]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _run_on_ray(plan: _Plan, chunks: list[_Chunk], cluster: RayCluster) -> Iterator[_Chunk]:
    """Collect chunks on a cluster, and yield each when it is done."""
    agents = tuple(_absolute(agent) for agent in plan.agents)
    plan = plan._replace(folder=plan.folder.resolve(), agents=agents)
    for event in cluster.run(_player_of, plan, chunks, plan.folder / "call.json"):
        if event is not None and event.failure is not None:
            raise ValueError(f"expected to play {chunks[event.number]}, but: {event.failure}")
        if event is not None:
            yield event.result


def _absolute(agent: Agent) -> Agent:
    """Name a file so that it is found from other folders too."""
    if isinstance(agent, Mapping):
        return {name: _absolute(one) for name, one in agent.items()}
    return os.path.abspath(agent) if isinstance(agent, str | os.PathLike) else agent


def _player_of(plan: _Plan) -> Callable[[_Chunk], _Chunk]:
    return _Player(plan).collect


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute on one thread, as workers do: sums on several can differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_player: _Player


def _start_worker(plan: CloudpickleWrapper) -> None:
    global _player
    torch.set_num_threads(1)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    _player = _Player(plan.var)


def _stop_with_parent() -> None:
    """End this worker when its parent is gone, which, killed, can't stop its workers itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(chunk: _Chunk) -> _Chunk:
    return _player.collect(chunk)


class _Player:
    """Plays episodes; keeps the envs and agents that it has used."""

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan
        self.envs: dict[int, gym.Env] = {}
        self.files: dict[str, PWM] = {}

    def collect(self, chunk: _Chunk) -> _Chunk:
        """Play a chunk's episodes and put them in a folder of their own."""
        numbers = range(chunk.first, chunk.first + chunk.episodes)
        env = self._env(chunk.env)
        episodes = [self._play(env, self.plan.env_ids[chunk.env], number) for number in numbers]
        OfflineDataset(episodes, [self.plan.env_ids[chunk.env]]).save(chunk.path(self.plan))
        return chunk

    def _env(self, index: int) -> gym.Env:
        if index not in self.envs:
            self.envs[index] = make_task(self.plan.env_ids[index], **self.plan.env_kwargs)
        return self.envs[index]

    def _agent(self, agent: Agent, name: str) -> Any:
        if isinstance(agent, Mapping):
            agent = agent[name]
        if isinstance(agent, str | os.PathLike):
            path = os.fspath(agent)
            if path not in self.files:
                self.files[path] = PWM.load(path, device="cpu")
            return self.files[path]
        return agent

    def _play(self, env: gym.Env, name: str, number: int) -> Episode:
        plan = self.plan
        rng = np.random.default_rng([plan.seed, zlib.crc32(name.encode()), number])
        agent = self._agent(plan.agents[rng.integers(len(plan.agents))], name)
        noise = plan.noise[rng.integers(len(plan.noise))]
        if rng.random() < plan.random_share:
            agent = None
        box: Any = env.action_space
        middle, radius = (box.high + box.low) / 2, (box.high - box.low) / 2
        observation, _ = env.reset(seed=int(rng.integers(2**31)))
        observations, actions, rewards = [np.array(observation, np.float32)], [], []
        terminated = truncated = False
        state = None
        while not (terminated or truncated):
            if agent is None:
                action = rng.uniform(-1.0, 1.0, box.shape)
            else:
                if hasattr(agent, "predict"):
                    wanted, state = agent.predict(observation, state, deterministic=True)
                else:
                    wanted = agent(observation)
                action = (np.asarray(wanted) - middle) / radius
                if noise:
                    action = action + noise * rng.standard_normal(box.shape)
            action = np.clip(action, -1.0, 1.0).astype(np.float32)
            observation, reward, terminated, truncated, _ = env.step((middle + radius * action).astype(box.dtype))
            observations.append(np.array(observation, np.float32))
            actions.append(action.ravel())
            rewards.append(reward)
        return Episode(np.stack(observations), np.stack(actions), np.array(rewards, np.float32), terminated, truncated)


def _join(plan: _Plan, chunks: list[_Chunk], target: pathlib.Path) -> None:
    """Put the chunks, in order, into one dataset and remove them."""
    first = [OfflineDataset.load(_Chunk(env, 0, 0).path(plan)) for env in range(len(plan.env_ids))]
    layout = Layout(plan.env_ids, *(tuple(getattr(d, dim) for d in first) for dim in ("observation_dim", "action_dim")))
    with DatasetWriter(target, layout) as writer:
        for chunk in chunks:
            for episode in OfflineDataset.load(chunk.path(plan), in_memory=True):
                writer.append_episode(*episode._replace(task=chunk.env))
        writer.finish()
    shutil.rmtree(plan.folder)
