"""Where the time of online learning goes: PWM with its defaults on cartpole-swingup."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import gymnasium as gym
from gymnasium.vector import AutoresetMode
from speed_timing import Clock, clock

from pwm_gym import PWM
from pwm_gym.agents import pwm

TASK = "pwm_gym/cartpole-swingup-v0"
SAME_STEP = {"autoreset_mode": AutoresetMode.SAME_STEP}
WARM_UP, STEPS = 600, 240  # decisions over all envs


class Stopwatch:
    """Adds up the time inside functions, that of inner ones apart."""

    def __init__(self, now: Clock) -> None:
        self.now = now
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]  # of what is called by each function on the stack

    def watch(self, owner: Any, name: str, label: str) -> Any:
        """Patch a function so that its time counts under a label."""
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            began = self.now()
            try:
                return original(*args, **kwargs)
            finally:
                whole = self.now() - began
                self.seconds[label] = self.seconds.get(label, 0.0) + whole - self._inner.pop()
                self._inner[-1] += whole

        return mock.patch.object(owner, name, timed)


@contextlib.contextmanager
def watched(agent: PWM, stopwatch: Stopwatch) -> Iterator[None]:
    """Time the parts of an agent's loop."""
    replay, env = agent.sequence_replay(), agent.get_env()
    parts = [
        (env, "step", "env steps"),
        (agent, "_sample_action", "acting"),
        (replay, "add", "storing"),
        (replay, "sample_windows", "replay sampling"),
        (replay, "sample_starts", "replay sampling"),
        (pwm, "update_world_model", "model fit"),
        (pwm, "rollout", "imagined rollout"),
        (agent, "update_policy", "actor and critics"),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, label in parts:
            stack.enter_context(stopwatch.watch(owner, name, label))
        yield


def measure_loop(num_envs: int) -> list[dict[str, Any]]:
    """Learn for a while with several envs, each in a process of its own, and tell the parts' shares of the time."""
    env: Any = (
        gym.make_vec(TASK, num_envs, vectorization_mode="async", vector_kwargs=SAME_STEP) if num_envs > 1 else TASK
    )
    agent = PWM("MlpPolicy", env, seed=0, learning_starts=WARM_UP // 2, device="cpu")
    agent.learn(WARM_UP)
    now = clock(1) if num_envs == 1 else time.perf_counter  # other processes' time counts where they are waited for
    stopwatch = Stopwatch(now)
    began = now()
    with watched(agent, stopwatch):
        agent.learn(STEPS, reset_num_timesteps=False)
    whole = now() - began
    if agent.env is not None:
        agent.env.close()
    seconds = {**stopwatch.seconds, "the rest": whole - sum(stopwatch.seconds.values())}
    return [
        {
            "envs": num_envs,
            "part": part,
            "share": f"{of / whole:.4f}",
            "ms_per_decision": f"{1e3 * of / STEPS:.3f}",
        }
        for part, of in seconds.items()
    ]
