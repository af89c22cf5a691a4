"""Small mechanical systems written in torch: analytic gradients, any device, thousands of envs at once."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import Tensor

from pwm_gym.envs.drawing import Canvas
from pwm_gym.envs.ground_truth import GroundTruthVectorEnv, Outcome

__all__ = ["TorchBallWall", "TorchCartPole", "TorchDoublePendulum", "TorchPendulum", "TorchPhysics"]

GRAVITY = 9.81  # m/s²


class TorchPhysics(GroundTruthVectorEnv):
    """A system whose step is one function of torch tensors; a subclass gives its equations.

    Gradients flow through the state itself, (B, S), in `dtype`. Actions are in [-1, 1]. No episode terminates.

    Args:
        num_envs: Number of envs B.
        horizon: Env steps until truncation; None for the system's own.
        autoreset_mode: See `GroundTruthVectorEnv`.
        device: Where it computes.
        dtype: What it computes in, and gives.
        render_mode: "rgb_array" or None.
        size: Width and height of a frame in pixels.

    Raises:
        ValueError: If an argument is out of range.
    """

    # Of the system
    state_dim: ClassVar[int]
    observation_dim: ClassVar[int]
    action_dim: ClassVar[int] = 1
    steps: ClassVar[int] = 200  # of an episode
    timestep: ClassVar[float] = 0.05  # s of an env step

    def __init__(
        self,
        num_envs: int = 32,
        horizon: int | None = None,
        autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        render_mode: str | None = None,
        size: int = 256,
    ) -> None:
        limit = np.finfo(np.float32).max
        super().__init__(
            num_envs,
            spaces.Box(-limit, limit, (self.observation_dim,), np.float32),
            spaces.Box(-1.0, 1.0, (self.action_dim,), np.float32),
            self.steps if horizon is None else horizon,
            autoreset_mode,
            device,
            render_mode,
            round(1 / self.timestep),
        )
        self.dtype, self.size = dtype, size
        self._state = torch.zeros(num_envs, self.state_dim, device=self.device, dtype=dtype)  # (B, S), in the graph

    # What a system gives

    @abstractmethod
    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Draw initial states, (count, S)."""

    @abstractmethod
    def dynamics(self, state: Tensor, action: Tensor) -> Tensor:
        """Give the state one env step later, (B, S), from (B, S) and (B, A)."""

    @abstractmethod
    def observe(self, state: Tensor) -> Tensor:
        """Observe states, (B, S), as (B, O)."""

    @abstractmethod
    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        """Reward a step, (B,)."""

    @abstractmethod
    def draw(self, canvas: Canvas, state: np.ndarray) -> None:
        """Draw a state, (S,), on a canvas that shows [-1, 1] x [-1, 1]."""

    # GroundTruthVectorEnv

    def _begin(self, rows: np.ndarray) -> Tensor:
        return self._write_state(self.sample(len(rows), self.np_random), rows)

    def _write_state(self, states: np.ndarray, rows: np.ndarray) -> Tensor:
        fresh = torch.as_tensor(states, dtype=self.dtype, device=self.device)  # (N, S)
        self._state = self._state.index_copy(0, torch.from_numpy(rows).to(self.device), fresh)
        return self.observe(fresh)

    def get_state(self) -> np.ndarray:
        """Read the states, (B, S), float64."""
        return self._state.detach().cpu().to(torch.float64).numpy()

    def _cut(self) -> None:
        self._state = self._state.detach()

    def _advance(self, actions: Tensor, rows: np.ndarray) -> Outcome:
        state, action = self._state, actions.to(self.dtype)
        following = self.dynamics(state, action)
        reward = self.reward(state, action, following)
        if len(rows) < self.num_envs:  # the others wait
            index = torch.from_numpy(rows).to(self.device)
            following = state.index_copy(0, index, following[index])
        self._state = following
        observation = self.observe(following)
        self._check_finite(observation, reward)
        return Outcome(observation, reward, np.zeros(self.num_envs, dtype=np.bool_), {})

    def _check_finite(self, observation: Tensor, reward: Tensor) -> None:
        values = torch.cat([observation, reward.unsqueeze(-1)], -1).detach()  # (B, O + 1)
        if not bool(torch.isfinite(values).all()):
            env = int(torch.nonzero(~torch.isfinite(values))[0, 0])
            *observed, rewarded = values[env].tolist()
            raise ValueError(
                f"expected finite numbers, got observation {observed} and reward {rewarded} in env {env} "
                f"at its step {self._elapsed[env] + 1}. Look at the actions before it, and reset the env."
            )

    def render(self, indices: Sequence[int] | None = None) -> tuple[np.ndarray, ...] | None:
        """Draw envs.

        Args:
            indices: Envs to draw; None for all.

        Returns:
            Frames, (size, size, 3) uint8, one for each; None without render_mode="rgb_array".
        """
        if self.render_mode is None:
            return None
        self._current()
        states = self.get_state()
        frames = []
        for i in range(self.num_envs) if indices is None else indices:
            canvas = Canvas(self.size)
            self.draw(canvas, states[i])
            frames.append(canvas.pixels())
        return tuple(frames)


def _runge_kutta(derivative: Any, state: Tensor, timestep: float) -> Tensor:
    """Take one step of the classical fourth-order Runge-Kutta method; `derivative` maps (B, S) to (B, S)."""
    k1 = derivative(state)
    k2 = derivative(state + 0.5 * timestep * k1)
    k3 = derivative(state + 0.5 * timestep * k2)
    k4 = derivative(state + timestep * k3)
    return state + (timestep / 6.0) * (k1 + 2.0 * k2 + 2.0 * k3 + k4)


class TorchPendulum(TorchPhysics):
    """Swing a pendulum up and keep it there with a torque too weak to lift it at once.

    State (θ, θ') with θ = 0 upright; a uniform rod of 1 kg and 1 m,  θ'' = (3 g / 2 l) sin θ + 3 τ / (m l²),  τ = 2 a
    in N m (gravity's largest is 4.9 N m). Observation (cos θ, sin θ, θ'). Reward cos θ - 0.01 θ'² - 0.001 a².

    Example:
        >>> env = TorchPendulum(num_envs=2)
        >>> env.reset(seed=0)[0].shape
        torch.Size([2, 3])
    """

    state_dim, observation_dim = 2, 3

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Draw any angle, and a speed in [-1, 1] rad/s."""
        return rng.uniform([-math.pi, -1.0], [math.pi, 1.0], (count, 2))

    def dynamics(self, state: Tensor, action: Tensor) -> Tensor:
        """Turn."""

        def derivative(state: Tensor) -> Tensor:
            acceleration = 1.5 * GRAVITY * torch.sin(state[:, 0]) + 3.0 * 2.0 * action[:, 0]
            return torch.stack([state[:, 1], acceleration], -1)

        return _runge_kutta(derivative, state, self.timestep)

    def observe(self, state: Tensor) -> Tensor:
        """Show the angle by cosine and sine, and the speed."""
        return torch.stack([torch.cos(state[:, 0]), torch.sin(state[:, 0]), state[:, 1]], -1)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        """Reward height."""
        return torch.cos(next_state[:, 0]) - 0.01 * next_state[:, 1].square() - 0.001 * action[:, 0].square()

    def draw(self, canvas: Canvas, state: np.ndarray) -> None:
        """Draw the rod."""
        tip = 0.8 * math.sin(state[0]), 0.8 * math.cos(state[0])
        canvas.line((0.0, 0.0), tip, 0.06, "rod")
        canvas.disc((0.0, 0.0), 0.05, "joint")


class TorchCartPole(TorchPhysics):
    """Swing a pole up by pushing its cart, and keep it up near the middle of an endless rail.

    State (x, θ, x', θ') with θ = 0 upright; cart 1 kg, pole a point of 0.1 kg at 0.5 m, force F = 10 a in N:

        x'' = (F + m sin θ (l θ'² - g cos θ)) / (M + m sin² θ),    θ'' = (g sin θ - x'' cos θ) / l

    Observation (x, cos θ, sin θ, x', θ'). Reward cos θ - 0.1 x² - 0.01 (x'² + θ'²) - 0.001 a². Episodes start with the
    pole hanging down, as good as at rest.

    Example:
        >>> env = TorchCartPole(num_envs=2)
        >>> env.reset(seed=0)[0].shape
        torch.Size([2, 5])
    """

    state_dim, observation_dim = 4, 5
    _CART, _POLE, _LENGTH, _FORCE = 1.0, 0.1, 0.5, 10.0

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Draw states near hanging at rest, within 0.1 of it in every number."""
        return np.array([0.0, math.pi, 0.0, 0.0]) + rng.uniform(-0.1, 0.1, (count, 4))

    def dynamics(self, state: Tensor, action: Tensor) -> Tensor:
        """Push."""
        force = self._FORCE * action[:, 0]

        def derivative(state: Tensor) -> Tensor:
            _, angle, speed, turn = state.unbind(-1)
            sine, cosine = torch.sin(angle), torch.cos(angle)
            pull = self._POLE * sine * (self._LENGTH * turn.square() - GRAVITY * cosine)
            acceleration = (force + pull) / (self._CART + self._POLE * sine.square())
            turning = (GRAVITY * sine - acceleration * cosine) / self._LENGTH
            return torch.stack([speed, turn, acceleration, turning], -1)

        return _runge_kutta(derivative, state, self.timestep)

    def observe(self, state: Tensor) -> Tensor:
        """Show the angle by cosine and sine."""
        x, angle, speed, turn = state.unbind(-1)
        return torch.stack([x, torch.cos(angle), torch.sin(angle), speed, turn], -1)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        """Reward height, little motion, and the middle of the rail."""
        x, angle, speed, turn = next_state.unbind(-1)
        motion = speed.square() + turn.square()
        return torch.cos(angle) - 0.1 * x.square() - 0.01 * motion - 0.001 * action[:, 0].square()

    def draw(self, canvas: Canvas, state: np.ndarray) -> None:
        """Draw 4 m of the rail, the cart on it and the pole."""
        x, angle = 0.5 * state[0], state[1]
        canvas.line((-1.0, 0.0), (1.0, 0.0), 0.01, "ground")
        canvas.line((x - 0.12, 0.0), (x + 0.12, 0.0), 0.07, "body")
        canvas.line((x, 0.0), (x + 0.5 * math.sin(angle), 0.5 * math.cos(angle)), 0.04, "rod")
        canvas.disc((x, 0.0), 0.03, "joint")


class TorchDoublePendulum(TorchPhysics):
    """Lift two links, hinged to each other, by a torque at the fixed end: chaotic, so gradients grow with the horizon.

    State (θ1, θ2, θ1', θ2'), both from the upright; massless links of 0.5 m, each with 0.5 kg at its end. The
    equations of motion are M(θ) θ'' = b, with s = sin(θ1 - θ2), c = cos(θ1 - θ2):

        (m1 + m2) l² θ1'' + m2 l² c θ2'' = τ - m2 l² s θ2'² + (m1 + m2) g l sin θ1
        m2 l² c θ1'' + m2 l² θ2''        =     m2 l² s θ1'² + m2 g l sin θ2

    with τ = 6 a in N m (gravity's largest is 7.4 N m). Observation: cosines and sines of both angles, and both speeds.
    Reward: the tip's height, (cos θ1 + cos θ2) / 2, minus 0.005 (θ1'² + θ2'²) and 0.001 a².

    Example:
        >>> env = TorchDoublePendulum(num_envs=2)
        >>> env.reset(seed=0)[0].shape
        torch.Size([2, 6])
    """

    state_dim, observation_dim = 4, 6
    _MASS, _LENGTH, _TORQUE = 0.5, 0.5, 6.0

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Draw states near hanging at rest, within 0.1 of it in every number."""
        return np.array([math.pi, math.pi, 0.0, 0.0]) + rng.uniform(-0.1, 0.1, (count, 4))

    def dynamics(self, state: Tensor, action: Tensor) -> Tensor:
        """Turn the first link."""
        inertia, weight = self._MASS * self._LENGTH**2, self._MASS * GRAVITY * self._LENGTH
        torque = self._TORQUE * action[:, 0]

        def derivative(state: Tensor) -> Tensor:
            first, second, first_turn, second_turn = state.unbind(-1)
            sine, cosine = torch.sin(first - second), torch.cos(first - second)
            b1 = torque - inertia * sine * second_turn.square() + 2.0 * weight * torch.sin(first)
            b2 = inertia * sine * first_turn.square() + weight * torch.sin(second)
            determinant = inertia * (2.0 - cosine.square())
            a1, a2 = (b1 - cosine * b2) / determinant, (2.0 * b2 - cosine * b1) / determinant
            return torch.stack([first_turn, second_turn, a1, a2], -1)

        for _ in range(4):
            state = _runge_kutta(derivative, state, 0.25 * self.timestep)
        return state

    def observe(self, state: Tensor) -> Tensor:
        """Show the angles by cosines and sines."""
        angles, turns = state[:, :2], state[:, 2:]
        return torch.cat([torch.cos(angles), torch.sin(angles), turns], -1)

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        """Reward the tip's height."""
        height = torch.cos(next_state[:, :2]).mean(-1)
        return height - 0.005 * next_state[:, 2:].square().sum(-1) - 0.001 * action[:, 0].square()

    def draw(self, canvas: Canvas, state: np.ndarray) -> None:
        """Draw both links."""
        elbow = np.array([math.sin(state[0]), math.cos(state[0])]) * 0.45
        tip = elbow + np.array([math.sin(state[1]), math.cos(state[1])]) * 0.45
        canvas.line((0.0, 0.0), tuple(elbow), 0.05, "rod")
        canvas.line(tuple(elbow), tuple(tip), 0.05, "body")
        for point in ((0.0, 0.0), tuple(elbow)):
            canvas.disc(point, 0.04, "joint")


class TorchBallWall(TorchPhysics):
    """Throw a ball as far as it goes, over a wall that stops it: one throw is an episode.

    The example by which differentiable simulation is shown to mislead (arXiv:2202.00817, sec. 3; PWM, arXiv:2407.02466,
    fig. 2): the distance jumps where the ball begins to clear the wall, and of a jump the gradient
    says nothing. The angle is α = 45° (1 + a); the ball leaves the ground at 10 m/s. Gravity alone would carry it to
    x = v² sin 2α / g; if its height x_w tan α - g x_w² / (2 v² cos² α) at the wall, x_w = 6 m away and h = 2.4 m high,
    is below h, then it goes no farther than the wall. Reward: the distance in units of 10 m.

    State and observation: (distance of the last throw, its angle in rad), 0 before the throw.

    Example:
        >>> env = TorchBallWall(num_envs=3)
        >>> _ = env.reset(seed=0)
        >>> env.step(torch.tensor([[-0.5], [0.0], [0.5]]))[1]  # 22.5° hits the wall, 45° and 67.5° clear it
        tensor([0.6000, 1.0194, 0.7208])
    """

    state_dim = observation_dim = 2
    steps = 1
    timestep = 2.0
    _SPEED, _WALL, _HEIGHT = 10.0, 6.0, 2.4

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Put the ball on the ground."""
        return np.zeros((count, 2))

    def dynamics(self, state: Tensor, action: Tensor) -> Tensor:
        """Throw."""
        angle = 0.25 * math.pi * (1.0 + action[:, 0])
        reach = self._SPEED**2 * torch.sin(2.0 * angle) / GRAVITY
        # Bounded away from straight up, where the height at the wall has no finite value, nor its gradient.
        steep = angle.detach().clamp(max=1.5)
        height = self._WALL * torch.tan(steep) - 0.5 * GRAVITY * (self._WALL / (self._SPEED * torch.cos(steep))) ** 2
        stopped = (reach > self._WALL) & (height < self._HEIGHT)
        return torch.stack([torch.where(stopped, torch.full_like(reach, self._WALL), reach), angle], -1)

    def observe(self, state: Tensor) -> Tensor:
        """Show the last throw."""
        return state

    def reward(self, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
        """Reward distance."""
        return 0.1 * next_state[:, 0]

    def draw(self, canvas: Canvas, state: np.ndarray) -> None:
        """Draw 11 m of ground, the wall, and the last throw."""
        scale = 2.0 / 11.0

        def at(x: float, y: float) -> tuple[float, float]:
            return scale * x - 0.95, scale * y - 0.6

        canvas.line(at(-1.0, 0.0), at(12.0, 0.0), 0.01, "ground")
        canvas.line(at(self._WALL, 0.0), at(self._WALL, self._HEIGHT), 0.02, "body")
        angle, distance = state[1], state[0]
        if angle > 0.0:
            xs = np.linspace(0.0, distance, 24)
            ys = xs * np.tan(angle) - 0.5 * GRAVITY * (xs / (self._SPEED * np.cos(angle))) ** 2
            for x0, y0, x1, y1 in zip(xs, ys, xs[1:], ys[1:], strict=False):
                canvas.line(at(x0, y0), at(x1, y1), 0.008, "rod")
        canvas.disc(at(distance, 0.15), 0.03, "joint")
