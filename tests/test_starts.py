"""Every kind of source that imagined rollouts can start from."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer

from pwm_gym.replay import SequenceReplayBuffer
from pwm_gym.starts import Starts, StartSource, as_start_sampler

BOX = spaces.Box(-100.0, 100.0, (2,), np.float32)
ACTIONS = spaces.Box(-1.0, 1.0, (1,), np.float32)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def rows(count: int) -> np.ndarray:
    """Observations that tell which row they are: (i, 10 i)."""
    return np.arange(count, dtype=np.float32)[:, None] * np.array([1, 10], np.float32)


class Coin(gym.Env):
    """Starts at a random place, and tells its physics state where asked to."""

    observation_space = BOX
    action_space = ACTIONS

    def __init__(self, physics: bool = True, as_dict: bool = False) -> None:
        self.physics, self.as_dict, self.seeds = physics, as_dict, []

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.seeds.append(seed)
        place = self.np_random.uniform(size=2)
        observation = place.astype(np.float32)
        info = {"physics_state": place} if self.physics else {}
        return ({"place": observation, "side": 1} if self.as_dict else observation), info


@pytest.mark.parametrize("batch_size", [1, 2])
def test_array_is_sampled_uniformly(batch_size: int) -> None:
    observations = as_start_sampler(rows(3))(batch_size, rng()).observations
    assert observations.shape == (batch_size, 2)
    many = as_start_sampler(rows(3))(3000, rng()).observations
    np.testing.assert_array_equal(many[:, 1], 10 * many[:, 0])
    counts = np.bincount(many[:, 0].astype(int), minlength=3)
    assert abs(counts - 1000).max() < 130  # five standard deviations of √(3000 · 1/3 · 2/3) = 26


def test_tensor_is_sampled_as_a_tensor() -> None:
    starts = as_start_sampler(torch.from_numpy(rows(5)))(4, rng())
    assert isinstance(starts.observations, torch.Tensor)
    assert starts.physics_state is None
    np.testing.assert_array_equal(starts.observations.numpy(), as_start_sampler(rows(5))(4, rng()).observations)


def test_entries_of_a_dict_are_sampled_together() -> None:
    observations = {"a": rows(7), "b": torch.arange(7)}
    starts = as_start_sampler(observations)(50, rng()).observations
    np.testing.assert_array_equal(starts["a"][:, 0], starts["b"].numpy())


@pytest.mark.parametrize(
    "observations",
    [
        np.zeros((0, 2)),
        torch.zeros(0, 2),
        {},
        {"a": np.zeros((0, 2))},
        {"a": np.zeros((3, 2)), "b": np.zeros((2, 2))},
        np.array(1.0),
    ],
    ids=["no row", "no row of a tensor", "no entry", "no row of an entry", "unequal entries", "a scalar"],
)
def test_observations_without_rows_are_refused(observations: Any) -> None:
    with pytest.raises(ValueError, match="expected at least one start observation"):
        as_start_sampler(observations)


def test_sb3_replay_buffer_is_sampled_over_its_filled_part() -> None:
    buffer = ReplayBuffer(20, BOX, ACTIONS, "cpu", n_envs=2)
    sampler = as_start_sampler(buffer)
    with pytest.raises(ValueError, match="got an empty one. Collect data first"):
        sampler(1, rng())
    for t in range(1, 4):
        observation = np.array([[t, 0], [t, 1]], np.float32)
        buffer.add(observation, observation, np.zeros((2, 1)), np.zeros(2), np.zeros(2), [{}, {}])
    places = {tuple(place) for place in sampler(200, rng()).observations.astype(int).tolist()}
    assert places == {(t, env) for t in (1, 2, 3) for env in (0, 1)}


def test_sb3_dict_replay_buffer_is_sampled_by_entry() -> None:
    buffer = DictReplayBuffer(10, spaces.Dict({"a": BOX, "b": spaces.Discrete(9)}), ACTIONS, "cpu")
    for t in range(1, 5):
        observation = {"a": np.array([[t, t]], np.float32), "b": np.array([[t]])}
        buffer.add(observation, observation, np.zeros((1, 1)), np.zeros(1), np.zeros(1), [{}])
    starts = as_start_sampler(buffer)(50, rng()).observations
    np.testing.assert_array_equal(starts["a"][:, 0], starts["b"][:, 0])
    assert set(starts["b"][:, 0]) == {1, 2, 3, 4}


def test_sequence_replay_buffer_samples_itself_with_physics_states() -> None:
    buffer = SequenceReplayBuffer(20, BOX, ACTIONS, "cpu", store_physics_state=True)
    assert isinstance(buffer, StartSource)
    for t in range(8):
        now, then = np.full((1, 2), t, np.float32), np.full((1, 2), t + 1, np.float32)
        buffer.add(now, then, np.zeros((1, 1)), np.zeros(1), np.zeros(1), [{"physics_state": np.array([t + 1.0])}])
    plain = as_start_sampler(buffer)(200, rng())
    assert plain.physics_state is None
    assert set(plain.observations[:, 0]) == set(range(8))
    again = as_start_sampler(buffer)(200, rng())
    np.testing.assert_array_equal(plain.observations, again.observations)
    starts = as_start_sampler(buffer, physics=True)(200, rng())
    np.testing.assert_array_equal(starts.observations[:, :1], starts.physics_state)
    assert set(starts.observations[:, 0]) == set(range(1, 8))  # that of the first step was never told


def test_env_starts_are_its_resets_seeded_reproducibly() -> None:
    env = Coin()
    first = as_start_sampler(env)(3, rng(0))
    again = as_start_sampler(env)(3, rng(0))
    other = as_start_sampler(env)(3, rng(1))
    np.testing.assert_array_equal(first.observations, again.observations)
    assert not np.array_equal(first.observations, other.observations)
    assert len(np.unique(first.observations, axis=0)) == 3
    assert first.physics_state is None
    assert env.seeds[:3] == env.seeds[3:6]
    np.testing.assert_array_equal(first.observations[1], Coin().reset(seed=env.seeds[1])[0])


def test_env_starts_come_with_their_physics_state() -> None:
    starts = as_start_sampler(Coin(), physics=True)(2, rng())
    np.testing.assert_array_equal(starts.physics_state.astype(np.float32), starts.observations)


def test_env_without_physics_state_is_refused_where_it_is_needed() -> None:
    sampler = as_start_sampler(Coin(physics=False), physics=True)
    with pytest.raises(ValueError, match="expected a 'physics_state' in the start env's reset infos"):
        sampler(1, rng())


def test_dict_observations_of_an_env_are_stacked_by_entry() -> None:
    starts = as_start_sampler(Coin(as_dict=True))(2, rng()).observations
    assert starts["place"].shape == (2, 2)
    assert starts["side"].tolist() == [1, 1]


def test_function_is_used_as_it_is() -> None:
    def sample(batch_size: int, generator: np.random.Generator) -> Starts:
        return Starts(generator.normal(size=(batch_size, 2)))

    assert as_start_sampler(sample) is sample


class Episode(NamedTuple):
    observations: Any


class Dataset:
    """The part of a Minari dataset that starts are made from."""

    def __init__(self, *episodes: Any) -> None:
        self.episodes = episodes

    def iterate_episodes(self) -> Iterator[Episode]:
        return (Episode(observations) for observations in self.episodes)


def test_dataset_starts_are_all_observations_but_the_last_of_each_episode() -> None:
    # T + 1 observations each: 0..3 and 4..6, of which 3 and 6 led to no step.
    dataset = Dataset(rows(7)[:4], rows(7)[4:])
    starts = as_start_sampler(dataset)(300, rng()).observations
    assert set(starts[:, 0]) == {0, 1, 2, 4, 5}


def test_dataset_with_dict_observations_is_sampled_by_entry() -> None:
    def episode(first: int) -> dict[str, np.ndarray]:
        return {"a": rows(10)[first : first + 3], "b": np.arange(first, first + 3)}

    starts = as_start_sampler(Dataset(episode(0), episode(5)))(200, rng()).observations
    np.testing.assert_array_equal(starts["a"][:, 0], starts["b"])
    assert set(starts["b"]) == {0, 1, 5, 6}


def test_dataset_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="expected episodes in the dataset, got none"):
        as_start_sampler(Dataset())
    with pytest.raises(ValueError, match="expected at least one start observation"):
        as_start_sampler(Dataset(rows(1)))


@pytest.mark.parametrize("start", ["cartpole", 3, None, [np.zeros(2)]], ids=repr)
def test_anything_else_is_a_type_error(start: Any) -> None:
    with pytest.raises(TypeError, match=f"expected start observations .* got {type(start).__name__}"):
        as_start_sampler(start)


def test_vector_env_is_a_type_error() -> None:
    env = SyncVectorEnv([Coin])
    with pytest.raises(TypeError, match="got SyncVectorEnv"):
        as_start_sampler(env)
    env.close()
