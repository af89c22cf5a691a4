"""Scores that can be compared, and pictures that open."""

from __future__ import annotations

import gc
import sys
from typing import Any

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
from gymnasium import spaces

from pwm_gym.evaluation import episode_outcomes, episode_returns, plot_learning_curves, record_video


class Counter(gym.Env):
    """Episodes of 5 steps; the reward is the action plus the start, which the seed draws."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    observation_space = spaces.Box(0.0, 10.0, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, terminates: bool = False, render_mode: str | None = "rgb_array") -> None:
        self.terminates, self.render_mode = terminates, render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple:
        super().reset(seed=seed)
        self.start, self.steps = self.np_random.random(), 0
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple:
        self.steps += 1
        ended = self.steps == 5
        reward = float(action[0]) + self.start
        return np.full(1, self.steps, np.float32), reward, ended and self.terminates, ended and not self.terminates, {}

    def render(self) -> np.ndarray:
        return np.full((32, 48, 3), 40 * self.steps, np.uint8)


class Constant:
    """Acts with 0.5, or 0.25 with exploration."""

    def predict(self, observation: Any, state: Any = None, *, deterministic: bool) -> tuple[np.ndarray, int]:
        assert observation.shape == (1,)
        assert (state or 0) == observation[0], "an episode begins without a state, and goes on with the last one"
        return np.array([0.5 if deterministic else 0.25]), int(observation[0]) + 1


def start(seed: int) -> float:
    env = Counter()
    env.reset(seed=seed)
    return env.start


@pytest.mark.parametrize("terminates", [False, True])
def test_each_episode_has_a_seed_of_its_own(terminates: bool):
    returns = episode_returns(Constant(), Counter(terminates), episodes=3, seed=10)
    np.testing.assert_allclose(returns, [5 * (0.5 + start(10 + i)) for i in range(3)])
    np.testing.assert_array_equal(returns[1:], episode_returns(Constant(), Counter(terminates), episodes=2, seed=11))


class Batched(Constant):
    """Acts in several envs at once, remembering for each."""

    def predict(self, observation: Any, state: Any = None, *, deterministic: bool) -> tuple[np.ndarray, Any]:
        before = np.zeros(len(observation)) if state is None else state
        np.testing.assert_array_equal(before, observation[:, 0])
        return np.full((len(observation), 1), 0.5), observation[:, 0] + 1


def test_several_envs_play_the_same_episodes_side_by_side():
    alone = episode_returns(Constant(), Counter(), episodes=5, seed=10)
    together = episode_returns(Batched(), [Counter() for _ in range(2)], episodes=5, seed=10)
    np.testing.assert_allclose(together, alone)


def test_exploration_can_be_scored_too():
    (noisy,) = episode_returns(Constant(), Counter(), episodes=1, seed=0, deterministic=False)
    (quiet,) = episode_returns(Constant(), Counter(), episodes=1, seed=0)
    assert quiet - noisy == pytest.approx(5 * 0.25)


def test_no_episode_is_refused():
    with pytest.raises(ValueError, match="`episodes` must be >= 1, got 0"):
        episode_returns(Constant(), Counter(), episodes=0)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # imageio leaves ffmpeg's pipes open
@pytest.mark.parametrize("name", ["film.mp4", "film.gif", "folder/film.mp4"])
def test_videos_show_the_whole_episode(name: str, tmp_path: Any):
    total = record_video(Constant(), Counter(), tmp_path / name, seed=3)
    assert total == pytest.approx(5 * (0.5 + start(3)))
    film = imageio.imread(tmp_path / name)
    assert film.shape == (6, 32, 48, 3)
    np.testing.assert_allclose(film.mean((1, 2, 3)), 40 * np.arange(6), atol=4)
    assert len(list((tmp_path / name).parent.iterdir())) == 1
    gc.collect()


def test_videos_can_be_cut_short_and_run_at_their_own_speed(tmp_path: Any):
    record_video(Constant(), Counter(), tmp_path / "film.gif", max_steps=2)
    assert len(imageio.imread(tmp_path / "film.gif")) == 3
    assert imageio.immeta(tmp_path / "film.gif")["duration"] == 50  # ms
    record_video(Constant(), Counter(), tmp_path / "film.gif", fps=10)
    assert imageio.immeta(tmp_path / "film.gif")["duration"] == 100


def test_videos_need_an_env_that_draws(tmp_path: Any):
    with pytest.raises(ValueError, match="expected an env with render_mode='rgb_array', got None"):
        record_video(Constant(), Counter(render_mode=None), tmp_path / "film.mp4")
    assert list(tmp_path.iterdir()) == []


def test_learning_curves_are_drawn(tmp_path: Any):
    curves = {"PWM": ([0, 10, 20], np.arange(6.0).reshape(3, 2)), "SAC": ([0, 20], [[-1.0], [2.0]])}
    plot_learning_curves(curves, tmp_path / "plots" / "curve.png", "task", references={"published": 4.0})
    picture = imageio.imread(tmp_path / "plots" / "curve.png")
    assert picture.shape[:2] == (504, 840)
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 20  # colours
    plot_learning_curves(curves, tmp_path / "curve", "task")
    assert (tmp_path / "curve").read_bytes().startswith(b"\x89PNG")


def test_missing_packages_are_named(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "imageio", None)
    monkeypatch.setitem(sys.modules, "imageio.v3", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for run in (
        lambda: record_video(Constant(), Counter(), tmp_path / "film.mp4"),
        lambda: plot_learning_curves({}, tmp_path / "curve.png", "task"),
    ):
        with pytest.raises(ImportError, match=r'pip install "pwm-gym\[examples\]"'):
            run()


class Told(gym.Wrapper):
    """Tells of success where the episode's seed is even."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.even = seed is not None and seed % 2 == 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, infos = self.env.step(action)
        return observation, reward, terminated, truncated, {**infos, "is_success": self.even}


class Still:
    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> Any:
        return np.zeros(1, np.float32), None


def test_success_is_that_of_the_last_step_where_the_env_tells():
    env = gym.make("Pendulum-v1", max_episode_steps=5)
    returns, successes = episode_outcomes(Still(), Told(env), 4, seed=1)
    assert successes is not None
    assert successes.tolist() == [False, True, False, True]
    plain, none = episode_outcomes(Still(), env, 4, seed=1)
    assert none is None
    assert plain.tolist() == returns.tolist()
