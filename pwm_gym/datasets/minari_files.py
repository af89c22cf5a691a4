"""Minari's datasets, both ways."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

from pwm_gym.datasets.offline import OfflineDataset
from pwm_gym.datasets.storage import Episode

if TYPE_CHECKING:
    from minari import MinariDataset

__all__ = ["export_minari", "import_minari"]

_METADATA = "pwm_gym_tasks"  # names and dimensions of the tasks, in the dataset's metadata
_INFO = "task"  # the id of an episode's task, in its infos


def _minari() -> Any:
    try:
        import minari
    except ImportError as error:
        raise ImportError('Minari datasets need minari: pip install "pwm-gym[minari]"') from error
    return minari


def _flat(observations: Any, space: spaces.Space) -> np.ndarray:
    """Flatten observations over time to (T + 1, O), Dict entries in the space's order."""
    if isinstance(space, spaces.Dict):
        return np.concatenate([_flat(observations[key], entry) for key, entry in space.spaces.items()], axis=1)
    if not isinstance(space, spaces.Box):
        raise ValueError(f"expected observations of Box or Dict spaces, got {space}.")
    return np.asarray(observations, np.float32).reshape(len(observations), -1)


def import_minari(source: MinariDataset | str, task: str | None = None) -> OfflineDataset:
    """Read a Minari dataset into memory; see `OfflineDataset.from_minari`."""
    data = _minari().load_dataset(source) if isinstance(source, str) else source
    action_space = data.action_space
    if not isinstance(action_space, spaces.Box) or not action_space.is_bounded("both"):
        raise ValueError(f"expected bounded Box actions, which can be scaled to [-1, 1], got {action_space}.")
    low, high = (bound.reshape(-1).astype(np.float64) for bound in (action_space.low, action_space.high))
    ours = json.loads(data.storage.metadata.get(_METADATA, "null"))
    names = ours["tasks"] if ours else [task or data.id]
    episodes = []
    for episode in data.iterate_episodes():
        actions = np.asarray(episode.actions, np.float64).reshape(len(episode.actions), -1)
        number = int(np.ravel(episode.infos[_INFO])[0]) if ours else 0
        o_dim, a_dim = (ours[key][number] for key in ("observation_dims", "action_dims")) if ours else (None, None)
        episodes.append(
            Episode(
                _flat(episode.observations, data.observation_space)[:, :o_dim],
                (2 * (actions - low) / (high - low) - 1)[:, :a_dim].astype(np.float32),
                np.asarray(episode.rewards, np.float32),
                bool(episode.terminations[-1]),
                bool(episode.truncations[-1]),
                number,
            )
        )
    return OfflineDataset(episodes, names)


def export_minari(dataset: OfflineDataset, dataset_id: str, **metadata: Any) -> MinariDataset:
    """Write a Minari dataset; see `OfflineDataset.to_minari`."""
    minari = _minari()
    from minari.data_collector import EpisodeBuffer

    buffers = []
    for number, episode in enumerate(dataset):
        ends = np.zeros((2, len(episode.rewards)), bool)
        ends[:, -1] = episode.terminated, episode.truncated
        buffers.append(
            EpisodeBuffer(
                id=number,
                observations=np.array(episode.observations),
                actions=np.array(episode.actions),
                rewards=np.array(episode.rewards),
                terminations=ends[0],
                truncations=ends[1],
                infos={_INFO: np.full(len(episode.observations), episode.task)},
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one for each piece of metadata that the caller leaves out
        written = minari.create_dataset_from_buffers(
            dataset_id,
            buffers,
            action_space=dataset.action_space,
            observation_space=dataset.observation_space,
            **metadata,
        )
    tasks = {key: getattr(dataset, key) for key in ("tasks", "observation_dims", "action_dims")}
    written.storage.update_metadata({_METADATA: json.dumps(tasks)})
    return written
