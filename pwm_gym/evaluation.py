"""Scoring an agent on the real env, and showing what it learned: returns, a learning curve, a video."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from pwm_gym.serialization import atomic_write

__all__ = ["episode_outcomes", "episode_returns", "plot_learning_curves", "record_video"]


class _Predictor(Protocol):
    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]: ...


def episode_returns(
    agent: _Predictor,
    env: gym.Env | Sequence[gym.Env],
    episodes: int = 10,
    seed: int = 0,
    deterministic: bool = True,
) -> np.ndarray:
    """Run whole episodes, each from a seed of its own, so that two agents meet the same initial states.

    Args:
        agent: Anything with SB3's `predict`.
        env: A real env; or several equal ones, in which as many episodes run side by side, the agent answering for
            all of them at once. That is faster for large networks and for planners.
        episodes: Episodes to run.
        seed: Episode i is reset with seed + i.
        deterministic: Act without exploration noise.

    Returns:
        Undiscounted returns, (episodes,), in task units.

    Raises:
        ValueError: If `episodes` < 1.
    """
    return episode_outcomes(agent, env, episodes, seed, deterministic)[0]


def episode_outcomes(
    agent: _Predictor,
    env: gym.Env | Sequence[gym.Env],
    episodes: int = 10,
    seed: int = 0,
    deterministic: bool = True,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Run whole episodes as `episode_returns` does, and look at whether they succeed too.

    Returns:
        Undiscounted returns, (episodes,), in task units; and the last step's `is_success`, (episodes,), bool, or None
        where the env doesn't tell.

    Raises:
        ValueError: If `episodes` < 1.
    """
    if episodes < 1:
        raise ValueError(f"`episodes` must be >= 1, got {episodes}.")
    envs = [env] if isinstance(env, gym.Env) else list(env)
    returns, successes = np.zeros(episodes), dict[int, bool]()
    for first in range(0, episodes, len(envs)):
        running = dict(enumerate(range(first, min(first + len(envs), episodes))))  # env -> episode
        observations = [envs[k].reset(seed=seed + i)[0] for k, i in running.items()]
        state = None
        while running:
            batch = observations[0] if isinstance(env, gym.Env) else _stacked(observations)
            actions, state = agent.predict(batch, state, deterministic=deterministic)
            for k, i in list(running.items()):
                action = actions if isinstance(env, gym.Env) else actions[k]
                observations[k], reward, terminated, truncated, infos = envs[k].step(action)
                returns[i] += float(reward)
                if terminated or truncated:
                    del running[k]
                    if "is_success" in infos:
                        successes[i] = bool(infos["is_success"])
    told = len(successes) == episodes
    return returns, np.array([successes[i] for i in range(episodes)]) if told else None


def _stacked(observations: list[Any]) -> Any:
    """Make a batch, (E, *shape), of E observations; by key where they are dicts."""
    if isinstance(observations[0], dict):
        return {key: np.stack([one[key] for one in observations]) for key in observations[0]}
    return np.stack(observations)


def record_video(
    agent: _Predictor,
    env: gym.Env,
    path: str | os.PathLike[str],
    seed: int = 0,
    max_steps: int = 1_000,
    fps: float | None = None,
) -> float:
    """Film one deterministic episode.

    Args:
        agent: Anything with SB3's `predict`.
        env: A real env made with render_mode="rgb_array".
        path: The file, .mp4 or .gif; written under a temporary name first.
        seed: Of the episode.
        max_steps: Longest film, in steps.
        fps: Frames per second; None for the env's own.

    Returns:
        The episode's return, in task units.

    Raises:
        ImportError: If imageio is missing.
        ValueError: If the env does not render frames.
    """
    try:
        import imageio.v3 as imageio
    except ImportError as error:
        raise ImportError('a video needs imageio: pip install "pwm-gym[examples]"') from error
    if env.render_mode != "rgb_array":
        raise ValueError(f"expected an env with render_mode='rgb_array', got {env.render_mode!r}.")
    observation, _ = env.reset(seed=seed)
    state = None
    frames, total, ended = [np.asarray(env.render())], 0.0, False
    while not ended and len(frames) <= max_steps:
        action, state = agent.predict(observation, state, deterministic=True)
        observation, reward, terminated, truncated, _ = env.step(action)
        frames.append(np.asarray(env.render()))
        total += float(reward)
        ended = terminated or truncated
    suffix, fps = pathlib.Path(path).suffix or ".mp4", fps or env.metadata.get("render_fps", 30)
    speed: dict[str, Any] = {"duration": 1_000 / fps, "loop": 0} if suffix == ".gif" else {"fps": fps}
    content = imageio.imwrite("<bytes>", np.stack(frames), extension=suffix, **speed)
    with atomic_write(path) as file:
        file.write(content)
    return total


def plot_learning_curves(
    curves: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]],
    path: str | os.PathLike[str],
    title: str,
    xlabel: str = "environment steps",
    references: Mapping[str, float] | None = None,
) -> None:
    """Draw returns against steps: a line through the means and a band from the worst to the best episode.

    Args:
        curves: {label: (steps (T,), returns (T, episodes))}; EvalCallback's evaluations.npz holds such arrays.
        path: The picture, .png.
        title: Its title.
        xlabel: What the steps count.
        references: {label: return} of horizontal lines, such as published scores.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('a plot needs matplotlib: pip install "pwm-gym[examples]"') from error
    figure = Figure(figsize=(7.0, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for index, (label, (steps, returns)) in enumerate(curves.items()):
        values = np.asarray(returns, dtype=float)
        x, color = np.asarray(steps), f"C{index}"
        axes.plot(x, values.mean(1), color=color, marker="o", markersize=3, label=label)
        axes.fill_between(x, values.min(1), values.max(1), color=color, alpha=0.2, linewidth=0)
    for index, (label, value) in enumerate((references or {}).items(), start=len(curves)):
        axes.axhline(value, linestyle="--", linewidth=1, color=f"C{index}", label=label)
    axes.set(title=title, xlabel=xlabel, ylabel="return of an episode")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.grid(alpha=0.3)
    axes.legend(loc="best", frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, format=pathlib.Path(path).suffix.lstrip(".") or "png")
