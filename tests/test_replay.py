"""Windows of real experience, against a plain record of what was stored."""

import io
import pathlib
import pickle
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from pwm_gym import DictSequenceReplayBuffer, SequenceReplayBuffer, UnsafeFileError
from pwm_gym.replay import SequenceSamples

BOX = spaces.Box(-1e6, 1e6, (3,), np.float32)
DICT = spaces.Dict({"who": spaces.Box(-1e6, 1e6, (2,), np.float32), "step": spaces.Discrete(1000)})
ACTIONS = spaces.Box(-1.0, 1.0, (2,), np.float32)
COMPACT: dict[str, bool] = {"optimize_memory_usage": True, "handle_timeout_termination": False}


class Step(NamedTuple):
    """What one env did at one time."""

    env: int
    episode: int
    step: int
    end: str  # "", "terminated", "truncated" or "reset" (in mid-episode, without a word)


def observation(steps: list[Step], after: int = 0) -> Any:
    """Observations that tell env, episode and step: (n_envs, 3)."""
    return np.array([[s.env, s.episode, s.step + after] for s in steps], np.float32)


def as_dict(observations: np.ndarray) -> dict[str, np.ndarray]:
    return {"who": observations[:, :2], "step": observations[:, 2].astype(np.int64)}


class World:
    """Envs with episodes of random length, and a record of every step that they took."""

    def __init__(self, seed: int, n_envs: int = 1, longest: int = 8, ends: tuple[str, ...] = ("terminated",)) -> None:
        self.rng = np.random.default_rng(seed)
        self.n_envs, self.longest, self.ends = n_envs, longest, ends
        self.episodes = 0
        self.now = [self._begin(env) for env in range(n_envs)]
        self.record: list[list[Step]] = []

    def _begin(self, env: int) -> list[Any]:
        self.episodes += 1
        return [self.episodes, 0, int(self.rng.integers(1, self.longest + 1)), env]

    def step(self, buffer: Any) -> None:
        steps = []
        for env, (episode, step, length, _) in enumerate(self.now):
            end = str(self.rng.choice(self.ends)) if step + 1 == length else ""
            steps.append(Step(env, episode, step, end))
            self.now[env] = self._begin(env) if end else [episode, step + 1, length, env]
        now, then = observation(steps), observation(steps, after=1)
        if isinstance(buffer.observation_space, spaces.Dict):
            now, then = as_dict(now), as_dict(then)
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": s.end == "truncated"} for s in steps]
        if buffer.store_physics_state:
            for info, state in zip(infos, observation(steps, after=1), strict=True):
                info["physics_state"] = state.astype(np.float64)
        actions = np.array([[s.step / 1000, s.env / 1000] for s in steps], np.float32)
        rewards = np.array([s.episode + s.step / 1000 for s in steps], np.float32)
        done = np.array([s.end in ("terminated", "truncated") for s in steps])
        buffer.add(now, then, actions, rewards, done, infos)
        self.record.append(steps)

    def fill(self, buffer: Any, steps: int) -> None:
        for _ in range(steps):
            self.step(buffer)

    def starts(self, buffer: Any, horizon: int) -> set[tuple[int, int, int]]:
        """List the (env, episode, step) that begin a window of `horizon` steps, from the record alone."""
        rows, compact = buffer.buffer_size, buffer.optimize_memory_usage
        total, found = len(self.record), set()
        first = max(0, total - rows)
        if compact and total >= rows:
            first += 1  # the newest observation has overwritten the oldest one
        for t in range(first, total - horizon + 1):
            for env in range(self.n_envs):
                # Where observations are stored once, the last one of a window is the next step's.
                steps = [row[env] for row in self.record[t : t + horizon + compact]]
                if len(steps) == horizon + compact and len({s.episode for s in steps}) == 1:
                    found.add((env, steps[0].episode, steps[0].step))
        return found

    def check(self, windows: SequenceSamples, horizon: int) -> set[tuple[int, int, int]]:
        """Check every number of the windows against the record, and return where they start."""
        observations = windows.observations
        if isinstance(observations, dict):
            observations = torch.cat([observations["who"], observations["step"].float()], -1)
        first = observations[0].numpy().astype(int)  # (B, 3)
        time = np.arange(horizon + 1)[:, None]
        expected = np.stack(np.broadcast_arrays(first[:, 0], first[:, 1], first[:, 2] + time), -1)
        np.testing.assert_array_equal(observations.numpy(), expected)  # one env, one episode, consecutive steps
        env, episode, step = expected[:-1].transpose(2, 0, 1)
        np.testing.assert_array_equal(windows.actions.numpy(), np.stack([step, env], -1).astype(np.float32) / 1000)
        np.testing.assert_array_equal(windows.rewards.numpy(), (episode + step / 1000).astype(np.float32))
        terminal = {(s.env, s.episode, s.step) for row in self.record for s in row if s.end == "terminated"}
        keys = expected[:-1].reshape(-1, 3).tolist()
        assert windows.terminated.flatten().tolist() == [tuple(key) in terminal for key in keys]
        return set(map(tuple, first.tolist()))


def make(buffer_size: int, n_envs: int = 1, space: spaces.Space = BOX, **kwargs: Any) -> Any:
    kind = DictSequenceReplayBuffer if isinstance(space, spaces.Dict) else SequenceReplayBuffer
    return kind(buffer_size * n_envs, space, ACTIONS, "cpu", n_envs, **kwargs)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def add(buffer: Any, now: float, then: float, done: bool = False, **info: Any) -> None:
    """Add a step of one env from observation (now, now, now) to (then, then, then)."""
    buffer.add(
        np.full((1, 3), now, np.float32),
        np.full((1, 3), then, np.float32),
        np.zeros((1, 2), np.float32),
        np.zeros(1, np.float32),
        np.array([done]),
        [info],
    )


# Windows


@pytest.mark.parametrize("kwargs", [{}, COMPACT], ids=["plain", "compact"])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("horizon", [1, 3])
def test_windows_cross_neither_an_episodes_end_nor_the_write_position(
    horizon: int, n_envs: int, kwargs: dict[str, bool]
) -> None:
    ends = ("terminated", "reset") if kwargs else ("terminated", "truncated", "reset")
    for seed in range(8):
        world, buffer = World(seed, n_envs, longest=2 + seed, ends=ends), make(13 + seed, n_envs, **kwargs)
        for steps in (5, 3, 4 + seed, 1, 1, 9, 40):  # up to the exact fill of the ring, and round and round
            world.fill(buffer, steps)
            expected = world.starts(buffer, horizon)
            if not expected:
                with pytest.raises(ValueError, match="expected (an episode of )?at least"):
                    buffer.sample_windows(2, horizon, rng(seed))
                continue
            seen = world.check(buffer.sample_windows(40 * len(expected), horizon, rng(seed)), horizon)
            assert seen == expected  # nothing else, and nothing left out


@pytest.mark.parametrize(("space", "kwargs"), [(BOX, {}), (BOX, COMPACT), (DICT, {})], ids=["plain", "compact", "dict"])
def test_partial_windows_begin_at_every_step_and_go_as_far_as_there_is(
    space: spaces.Space, kwargs: dict[str, bool]
) -> None:
    ends = ("terminated", "reset") if kwargs else ("terminated", "truncated", "reset")
    for seed in range(4):
        world, buffer = World(seed, 2, longest=2 + 2 * seed, ends=ends), make(13 + seed, 2, space, **kwargs)
        for steps in (5, 8 + seed, 9, 40):
            world.fill(buffer, steps)
            windows = buffer.sample_windows(2000, 4, rng(seed), partial=True)
            observations: Any = windows.observations
            if isinstance(observations, dict):
                observations = torch.cat([observations["who"], observations["step"].float()], -1)
            seen = set()
            for length in range(1, 5):
                own = windows.lengths == length
                stacks = (observations[: length + 1], *(x[:length] for x in windows[1:4]))
                starts = world.check(SequenceSamples(*(x[:, own] for x in stacks)), length)
                assert length == 4 or not starts & world.starts(buffer, length + 1), "it was cut too early"
                assert (observations[length:, own] == observations[length, own]).all()
                assert not windows.terminated[length:, own].any()
                seen |= starts
            assert seen == world.starts(buffer, 1)


def test_partial_windows_end_at_the_write_position_where_one_episode_fills_the_ring() -> None:
    buffer = make(10)
    for t in range(25):
        add(buffer, t, t + 1)
    windows = buffer.sample_windows(200, 4, rng(), partial=True)
    first = windows.observations[0, :, 0]
    assert torch.equal(windows.lengths, (25 - first).clamp(max=4).long())
    assert torch.equal(windows.observations[-1, :, 0], (first + 4).clamp(max=25))


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("horizon", [1, 3])
def test_windows_are_time_first(batch_size: int, horizon: int) -> None:
    world, buffer = World(0, n_envs=2, longest=20), make(50, 2)
    world.fill(buffer, 30)
    windows = buffer.sample_windows(batch_size, horizon, rng())
    assert windows.observations.shape == (horizon + 1, batch_size, 3)
    assert windows.actions.shape == (horizon, batch_size, 2)
    assert windows.rewards.shape == windows.terminated.shape == (horizon, batch_size)
    assert windows.terminated.dtype == torch.bool


def test_last_observation_of_a_window_is_the_next_observation_not_the_next_row() -> None:
    buffer = make(10)
    add(buffer, 0, 1)
    add(buffer, 1, 77, done=True)  # the terminal observation
    add(buffer, 500, 501)  # the first of the next episode
    windows = buffer.sample_windows(50, 2, rng())
    assert set(map(tuple, windows.observations[:, :, 0].T.tolist())) == {(0.0, 1.0, 77.0)}


def test_reset_in_mid_episode_begins_a_new_episode() -> None:
    buffer = make(10, n_envs=2)
    step = np.zeros((2, 2), np.float32), np.zeros(2), np.zeros(2, bool), [{}, {}]
    for t in range(6):
        now = np.stack([np.full(3, t), np.full(3, t if t < 3 else 100 + t)]).astype(np.float32)
        buffer.add(now, now + 1, *step)  # the right env is put elsewhere before its step 3, without `done`
    assert buffer.episode[:6, 0].tolist() == [0] * 6
    assert buffer.episode[:6, 1].tolist() == [1, 1, 1, 2, 2, 2]


def test_steps_that_fit_together_stay_one_episode() -> None:
    buffer = make(10)
    for t in range(25):  # rounds the ring twice
        add(buffer, t, t + 1)
    assert set(buffer.episode[:, 0]) == {0}
    assert buffer.longest_window(100) == 10


def test_termination_is_told_from_truncation() -> None:
    buffer = make(10)
    add(buffer, 0, 1, done=True)
    add(buffer, 2, 3, done=True, **{"TimeLimit.truncated": True})
    add(buffer, 4, 5)
    windows = buffer.sample_windows(100, 1, rng())
    pairs = set(zip(windows.observations[0, :, 0].tolist(), windows.terminated[0].tolist(), strict=True))
    assert pairs == {(0.0, True), (2.0, False), (4.0, False)}


def test_truncation_counts_as_termination_where_timeouts_are_not_handled() -> None:
    buffer = make(10, handle_timeout_termination=False)
    add(buffer, 0, 1, done=True, **{"TimeLimit.truncated": True})
    assert buffer.sample_windows(1, 1, rng()).terminated.item()


@pytest.mark.parametrize("horizon", [1, 3])
def test_dict_windows_have_every_entry(horizon: int) -> None:
    world, buffer = World(3, n_envs=2, ends=("terminated", "truncated", "reset")), make(20, 2, DICT)
    world.fill(buffer, 33)
    windows = buffer.sample_windows(200, horizon, rng())
    assert windows.observations["who"].shape == (horizon + 1, 200, 2)
    assert windows.observations["step"].shape == (horizon + 1, 200, 1)  # as SB3 stores discrete observations
    assert world.check(windows, horizon) == world.starts(buffer, horizon)


# Five standard deviations of a count with mean n are about 5 √n.
@pytest.mark.parametrize("kwargs", [{}, COMPACT], ids=["plain", "compact"])
def test_valid_starts_are_sampled_uniformly(kwargs: dict[str, bool]) -> None:
    world, buffer = World(0, n_envs=2, longest=6), make(15, 2, **kwargs)
    world.fill(buffer, 40)
    valid = world.starts(buffer, 3)
    assert len(valid) > 3
    mean = 2000
    windows = buffer.sample_windows(mean * len(valid), 3, rng())
    counts = np.unique(windows.observations[0].numpy(), axis=0, return_counts=True)[1]
    assert len(counts) == len(valid)
    assert abs(counts - mean).max() < 5 * mean**0.5


def test_few_valid_starts_among_many_steps_are_sampled_uniformly() -> None:
    # Of 400 steps, 3 begin a window of 4; rejection alone would find none of them in most cases.
    buffer = make(1000)
    for t in range(396):
        add(buffer, -t, 0, done=True)
        if t in (50, 200, 390):
            for step in range(4):
                add(buffer, 1000 * t + step, 1000 * t + step + 1, done=step == 3)
    windows = buffer.sample_windows(3000, 4, rng())
    places, counts = np.unique(windows.observations[0, :, 0].numpy(), return_counts=True)
    assert places.tolist() == [50_000.0, 200_000.0, 390_000.0]
    assert abs(counts - 1000).max() < 130  # five times √(3000 · 1/3 · 2/3) = 26


def test_windows_follow_numpys_global_generator_by_default() -> None:
    world, buffer = World(0), make(50)
    world.fill(buffer, 50)

    def sample(seed: int) -> torch.Tensor:
        np.random.seed(seed)  # noqa: NPY002  SB3 seeds this one
        return buffer.sample_windows(20, 2).observations

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))


def test_given_generator_alone_decides_the_windows() -> None:
    world, buffer = World(0), make(50)
    world.fill(buffer, 50)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, again = (buffer.sample_windows(20, 2, rng(5)).observations for _ in range(2))
    assert torch.equal(first, again)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_empty_or_too_short_replay_is_refused() -> None:
    buffer = make(10)
    with pytest.raises(ValueError, match="expected at least 1 steps .* got 0. Collect more steps first"):
        buffer.sample_windows(1, 1)
    with pytest.raises(ValueError, match="got an empty one. Collect data first"):
        buffer.sample_starts(1)
    add(buffer, 0, 1)
    add(buffer, 1, 2, done=True)
    with pytest.raises(ValueError, match="expected at least 3 steps in the replay buffer"):
        buffer.sample_windows(1, 3)
    add(buffer, 5, 6)
    with pytest.raises(ValueError, match="expected an episode of at least 3 steps .* got 3 steps of shorter ones"):
        buffer.sample_windows(1, 3)
    assert buffer.sample_windows(1, 2).actions.shape[0] == 2


@pytest.mark.parametrize(("batch_size", "horizon"), [(0, 1), (1, 0), (1, -1)])
def test_batch_size_and_horizon_below_1_are_refused(batch_size: int, horizon: int) -> None:
    buffer = make(10)
    add(buffer, 0, 1)
    with pytest.raises(ValueError, match="`horizon` and `batch_size` must be >= 1"):
        buffer.sample_windows(batch_size, horizon)


def test_longest_window_is_0_when_empty_and_then_the_longest_episode_up_to_the_limit() -> None:
    buffer = make(10)
    assert buffer.longest_window(5) == 0
    for t in range(4):
        add(buffer, t, t + 1, done=t == 3)
    add(buffer, 50, 51, done=True)
    assert [buffer.longest_window(limit) for limit in (3, 4, 9, 1, 0)] == [3, 4, 4, 1, 0]


@pytest.mark.parametrize("kwargs", [{}, COMPACT], ids=["plain", "compact"])
def test_longest_window_is_right_at_every_step_also_where_long_episodes_are_overwritten(
    kwargs: dict[str, bool],
) -> None:
    for seed in range(6):
        world, buffer = World(seed, n_envs=2, longest=9), make(12, 2, **kwargs)
        for t in range(60):
            world.longest = 9 if t % 30 < 12 else 2
            world.step(buffer)
            if world.rng.random() < 0.7:
                fits = [horizon for horizon in range(1, 7) if world.starts(buffer, horizon)]
                assert buffer.longest_window(6) == max(fits, default=0)


def test_longest_window_knows_that_the_compact_ring_is_overwritten_one_row_ahead() -> None:
    buffer = make(4, **COMPACT)
    for t in range(3):
        add(buffer, t, t + 1, done=t == 2)
    assert buffer.longest_window(2) == 2  # observations 0, 1, 2
    add(buffer, 10, 11, done=True)  # fills the last row, and its next observation overwrites the first
    assert buffer.longest_window(2) == 1


# VecNormalize, physics states, SB3's own sampling


class Still(gym.Env):
    observation_space = BOX
    action_space = ACTIONS


def test_vec_normalize_is_applied_to_observations_and_rewards() -> None:
    world, buffer = World(0, longest=20), make(50)
    world.fill(buffer, 30)
    normalizer = VecNormalize(DummyVecEnv([Still]), clip_obs=1e9, clip_reward=1e9, epsilon=0.0)
    normalizer.obs_rms.mean, normalizer.obs_rms.var = np.array([0.0, 1.0, 2.0]), np.array([1.0, 4.0, 16.0])
    normalizer.ret_rms.var = np.array(25.0)
    plain, scaled = (buffer.sample_windows(20, 3, rng(), env) for env in (None, normalizer))
    shift, scale = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 4.0])
    torch.testing.assert_close(scaled.observations, (plain.observations - shift) / scale)
    torch.testing.assert_close(scaled.rewards, plain.rewards / 5)
    assert torch.equal(scaled.actions, plain.actions)
    starts, scaled_starts = (buffer.sample_starts(20, rng(), env=env).observations for env in (None, normalizer))
    np.testing.assert_allclose(scaled_starts, (starts - shift.numpy()) / scale.numpy(), rtol=1e-6)


@pytest.mark.parametrize("kwargs", [{}, COMPACT], ids=["plain", "compact"])
def test_physics_states_belong_to_the_observations_they_come_with(kwargs: dict[str, bool]) -> None:
    ends = ("terminated", "reset") if kwargs else ("terminated", "truncated", "reset")
    world, buffer = World(1, n_envs=2, longest=5, ends=ends), make(11, 2, store_physics_state=True, **kwargs)
    for _ in range(40):
        world.step(buffer)
        if len(world.record) > 3:
            starts = buffer.sample_starts(50, rng(), physics=True)
            np.testing.assert_array_equal(starts.observations, starts.physics_state)
            assert (starts.observations[:, 2] >= 1).all()  # an episode's first state is told by no step


def test_physics_states_are_only_given_where_asked_for() -> None:
    world, buffer = World(1), make(11, store_physics_state=True)
    world.fill(buffer, 11)
    starts = buffer.sample_starts(200, rng())
    assert starts.physics_state is None
    stored = {(s.env, s.episode, s.step) for row in world.record for s in row}
    assert set(map(tuple, starts.observations.astype(int).tolist())) == stored


def test_missing_physics_states_are_errors_that_say_what_to_give() -> None:
    plain = make(10)
    add(plain, 0, 1, physics_state=np.zeros(2))
    with pytest.raises(ValueError, match="store_physics_state"):
        plain.sample_starts(1, physics=True)
    keeping = make(10, store_physics_state=True)
    with pytest.raises(ValueError, match="the env's infos have no 'physics_state'"):
        add(keeping, 0, 1)
    keeping = make(10, store_physics_state=True)
    add(keeping, 0, 1, physics_state=np.zeros(2))
    with pytest.raises(ValueError, match="expected a stored step with a known physics state, got none yet"):
        keeping.sample_starts(1, physics=True)


@pytest.mark.parametrize("kwargs", [{}, COMPACT], ids=["plain", "compact"])
def test_sb3s_own_sample_still_works(kwargs: dict[str, bool]) -> None:
    world, ours = World(2, n_envs=2, longest=5), make(9, 2, **kwargs)
    theirs = ReplayBuffer(18, BOX, ACTIONS, "cpu", 2, **kwargs)
    theirs.store_physics_state = False
    world.fill(ours, 30)
    World(2, n_envs=2, longest=5).fill(theirs, 30)
    samples = []
    for buffer in (ours, theirs):
        np.random.seed(0)  # noqa: NPY002  SB3 samples from this one
        samples.append(buffer.sample(64))
    assert isinstance(ours, ReplayBuffer)
    assert all(torch.equal(a, b) for a, b in zip(*(s[:5] for s in samples), strict=True))


# Files


def assert_equal_buffers(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    assert (a.pos, a.full, a.n_envs, a.buffer_size) == (b.pos, b.full, b.n_envs, b.buffer_size)
    assert (a.observation_space, a.action_space) == (b.observation_space, b.action_space)
    arrays, others = a._arrays(), b._arrays()
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        assert array.dtype == others[name].dtype
        np.testing.assert_array_equal(array, others[name], err_msg=name)


VARIANTS = [
    pytest.param(BOX, {}, id="plain"),
    pytest.param(BOX, COMPACT, id="compact"),
    pytest.param(DICT, {}, id="dict"),
    pytest.param(BOX, {"store_physics_state": True}, id="physics"),
    pytest.param(spaces.Box(-np.inf, np.inf, (3,), np.float64), {}, id="float64"),
]


@pytest.mark.parametrize(("space", "kwargs"), VARIANTS)
@pytest.mark.parametrize("steps", [0, 7, 10, 27])
def test_loaded_buffer_equals_the_saved_one_and_goes_on_like_it(
    tmp_path: pathlib.Path, space: spaces.Space, kwargs: dict[str, Any], steps: int
) -> None:
    world, saved = World(4, n_envs=2, longest=6, ends=("terminated", "reset")), make(10, 2, space, **kwargs)
    world.fill(saved, steps)
    saved.save(tmp_path / "buffer")
    loaded: Any = SequenceReplayBuffer.load(tmp_path / "buffer", "cpu")
    assert_equal_buffers(loaded, saved)
    if steps:
        np.random.seed(0)  # noqa: NPY002
        a = saved.sample(16)
        np.random.seed(0)  # noqa: NPY002
        b = loaded.sample(16)
        for x, y in zip(a[:5], b[:5], strict=True):
            assert x.keys() == y.keys() if isinstance(x, dict) else torch.equal(x, y)

    for t in range(8):  # in the middle of an episode
        state = world.rng.bit_generator.state
        now, episodes, count = [list(x) for x in world.now], world.episodes, len(world.record)
        world.step(saved)
        world.rng.bit_generator.state = state
        world.now, world.episodes, world.record = now, episodes, world.record[:count]
        world.step(loaded)
        assert loaded.longest_window(4) == saved.longest_window(4), t
    assert_equal_buffers(loaded, saved)
    seen = world.check(loaded.sample_windows(100, 2, rng()), 2)
    assert seen <= world.starts(saved, 2)


def test_buffer_can_be_saved_to_and_loaded_from_an_open_file() -> None:
    world, saved, file = World(0), make(10), io.BytesIO()
    world.fill(saved, 14)
    saved.save(file)
    file.seek(0)
    assert_equal_buffers(SequenceReplayBuffer.load(file), saved)


def test_only_the_filled_part_is_written(tmp_path: pathlib.Path) -> None:
    world, saved = World(0), make(100_000)
    world.fill(saved, 10)
    saved.save(tmp_path / "buffer")
    assert (tmp_path / "buffer").stat().st_size < 20_000


def test_failed_save_keeps_the_old_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, saved = World(0), make(10)
    world.fill(saved, 5)
    saved.save(tmp_path / "buffer")

    def full_disk(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        saved.save(tmp_path / "buffer")
    assert_equal_buffers(SequenceReplayBuffer.load(tmp_path / "buffer"), saved)
    assert [path.name for path in tmp_path.iterdir()] == ["buffer"]


def test_sb3s_pickled_buffer_is_refused(tmp_path: pathlib.Path) -> None:
    buffer = ReplayBuffer(10, BOX, ACTIONS, "cpu")
    (tmp_path / "buffer.pkl").write_bytes(pickle.dumps(buffer))
    with pytest.raises(UnsafeFileError, match="nothing was executed"):
        SequenceReplayBuffer.load(tmp_path / "buffer.pkl")


def test_damaged_or_foreign_files_are_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "buffer"
    with pytest.raises(FileNotFoundError):
        SequenceReplayBuffer.load(path)
    world, saved = World(0), make(10)
    world.fill(saved, 5)
    saved.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or damaged"):
        SequenceReplayBuffer.load(path)
    torch.save({"format": "something else"}, path)
    with pytest.raises(ValueError, match="expected a replay buffer of format"):
        SequenceReplayBuffer.load(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.pop("arrays"),
        lambda content: content.update(arrays=[1, 2]),
        lambda content: content["arrays"].pop("rewards"),
        lambda content: content["arrays"].update(rewards="none"),
        lambda content: content["arrays"].update(rewards=torch.zeros(1, 1)),
        lambda content: content["meta"].pop("pos"),
        lambda content: content["meta"].update(pos=10),
        lambda content: content["meta"].update(pos=-1),
        lambda content: content["meta"].update(buffer_size=2),
        lambda content: content["meta"].update(observation_space={"!space": {}}),
        lambda content: content["meta"].update(action_space=None),
    ],
    ids=range(11),
)
def test_tampered_buffers_are_refused(tmp_path: pathlib.Path, damage: Any) -> None:
    world, saved = World(0), make(10)
    world.fill(saved, 5)
    saved.save(tmp_path / "buffer")
    content = torch.load(tmp_path / "buffer", weights_only=True)
    damage(content)
    torch.save(content, tmp_path / "buffer")
    with pytest.raises(ValueError, match="expected"):
        SequenceReplayBuffer.load(tmp_path / "buffer")
