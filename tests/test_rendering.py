"""What an imagined rollout looks like, against the real simulator stepped by hand."""

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

import pwm_gym  # noqa: F401  registers the envs
from pwm_gym.envs.gl_backend import choose_gl_backend
from pwm_gym.latent_env import LatentVectorEnv
from pwm_gym.rendering import NearestFrame, SimulatorReplay
from pwm_gym.replay import SequenceReplayBuffer
from pwm_gym.world_model import WorldModel, WorldModelConfig

pytestmark = pytest.mark.skipif(choose_gl_backend() == "disable", reason="no OpenGL library on this machine")

B = 3
SAME_STEP, NEXT_STEP, DISABLED = AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED


def make_real(render_mode: str | None = "rgb_array") -> Any:
    sizes = {"height": 32, "width": 48} if render_mode else {}
    return gym.make("pwm_gym/cartpole-swingup-v0", render_mode=render_mode, **sizes)


@pytest.fixture(scope="module")
def screen() -> Iterator[gym.Env]:
    """The env that LatentVectorEnv draws with."""
    env = make_real()
    yield env
    env.close()


@pytest.fixture(scope="module")
def real_envs() -> Iterator[list[Any]]:
    """Envs that are stepped by hand, one for each imagined one."""
    envs = [make_real().unwrapped for _ in range(B)]
    yield envs
    for env in envs:
        env.close()


@pytest.fixture(scope="module")
def model() -> WorldModel:
    torch.manual_seed(0)
    config = WorldModelConfig(observation_dim=5, action_dim=1, latent_dim=8, encoder_dim=8, mlp_dim=8, simnorm_dim=4)
    return WorldModel(config).requires_grad_(False)


def make_env(model: WorldModel, start: Any, **kwargs: Any) -> LatentVectorEnv:
    return LatentVectorEnv(model, start, **{"num_envs": B, "horizon": 3, "render_mode": "rgb_array"} | kwargs)


class Recorded(gym.Wrapper):
    """Note the seeds that starts are drawn with."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.seeds: list[int] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        assert seed is not None
        self.seeds.append(seed)
        return self.env.reset(seed=seed)


# The simulator


@pytest.mark.parametrize("mode", [SAME_STEP, NEXT_STEP, DISABLED])
def test_frames_are_those_of_the_real_env_stepped_by_hand_also_after_resets_of_single_envs(
    mode, model, screen, real_envs
):
    start = Recorded(make_real(render_mode=None))
    env = make_env(model, start, autoreset_mode=mode, render_env=screen)
    frames_seen = []

    def restart(mask: np.ndarray) -> None:
        new = start.seeds[-int(mask.sum()) :]
        for i, seed in zip(np.flatnonzero(mask), new, strict=True):
            real_envs[i].reset(seed=seed)

    def compare() -> None:
        frames = env.render()
        assert frames is not None and len(frames) == B
        for frame, real in zip(frames, real_envs, strict=True):
            assert frame.shape == (32, 48, 3) and frame.dtype == np.uint8
            np.testing.assert_array_equal(frame, real.render())
        frames_seen.append(np.stack(frames))

    env.reset(seed=0)
    restart(np.ones(B, bool))
    compare()
    waiting = np.zeros(B, bool)
    actions = 1.5 * (2 * torch.rand((8, B, 1), generator=torch.Generator().manual_seed(0)) - 1)
    for t in range(8):
        if t == 1:
            restart_one = np.array([False, True, False])
            env.reset(options={"reset_mask": restart_one})
            restart(restart_one)
            compare()
        given = actions[t].clone()
        _, _, terminated, truncated, _ = env.step(given)
        given.fill_(0.0)  # the env must have kept its own
        for i in np.flatnonzero(~waiting):
            real_envs[i].step(actions[t, i].numpy())
        done = (terminated | truncated).numpy()
        if waiting.any():  # NEXT_STEP
            restart(waiting)
        waiting = done & (mode == NEXT_STEP)
        if mode == SAME_STEP and done.any():
            restart(done)
        compare()
        if mode == DISABLED and done.any():
            env.reset(options={"reset_mask": done})
            restart(done)
            compare()
    assert len(start.seeds) > 2 * B
    assert all((a != b).any() for a, b in zip(frames_seen, frames_seen[1:], strict=False))


def test_frames_of_walker_walk_are_those_of_the_real_env_stepped_by_hand():
    screen = gym.make("pwm_gym/walker-walk-v0", render_mode="rgb_array", height=32, width=32)
    config = WorldModelConfig(observation_dim=24, action_dim=6, latent_dim=8, encoder_dim=8, mlp_dim=8, simnorm_dim=4)
    env = make_env(WorldModel(config), screen, render_env=screen, num_envs=1, horizon=20)  # one env may do both
    real: Any = gym.make("pwm_gym/walker-walk-v0", render_mode="rgb_array", height=32, width=32)
    env.reset(seed=3)
    real.reset(seed=int(np.random.default_rng(3).integers(2**31)))
    for actions in 2 * torch.rand((9, 1, 6), generator=torch.Generator().manual_seed(0)) - 1:
        env.step(actions)
        real.step(actions[0].numpy())
    frames = env.render()
    assert frames is not None
    np.testing.assert_array_equal(frames[0], real.render())


def collect(model: WorldModel, steps: int = 10, store: bool = True) -> SequenceReplayBuffer:
    real = make_real(render_mode=None)
    buffer = SequenceReplayBuffer(100, model.observation_space, model.action_space, "cpu", store_physics_state=store)
    observation, _ = real.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        action = rng.uniform(-1, 1, 1).astype(np.float32)
        following, reward, terminated, _, info = real.step(action)
        columns = observation[None], following[None], action[None], np.array([reward]), np.array([terminated])
        buffer.add(*columns, [info])
        observation = following
    return buffer


def test_frames_from_a_replay_buffer_go_on_from_its_stored_states(model, screen, real_envs):
    buffer = collect(model)
    env = make_env(model, buffer, render_env=screen)
    z, _ = env.reset(seed=1)
    stored = model.encode(torch.from_numpy(buffer.observations[:10, 0]))
    rows = (z.unsqueeze(1) - stored).abs().amax(-1).argmin(1).tolist()
    assert len(set(rows)) > 1 and 0 not in rows  # the state before the first step was in no info
    actions = 2 * torch.rand((2, B, 1), generator=torch.Generator().manual_seed(0)) - 1
    for t in range(2):
        env.step(actions[t])
    frames = env.render()
    assert frames is not None
    for i, (row, real) in enumerate(zip(rows, real_envs, strict=True)):
        real.set_physics_state(buffer.physics_state[row, 0])
        for t in range(2):
            real.step(actions[t, i].numpy())
        np.testing.assert_array_equal(frames[i], real.render())
    chosen = env.render(indices=[2, 0])
    assert chosen is not None and len(chosen) == 2
    np.testing.assert_array_equal(chosen[0], frames[2])
    np.testing.assert_array_equal(chosen[1], frames[0])


def test_frames_from_given_physics_states(model, screen, real_envs):
    observations, states = [], []
    for seed in range(B):
        observation, info = real_envs[seed].reset(seed=seed)
        observations.append(observation)
        states.append(info["physics_state"])
    env = make_env(model, None, render_env=screen)
    env.reset(options={"observations": np.stack(observations), "physics_state": np.stack(states)})
    states[0][:] = 0.0
    frames = env.render()
    assert frames is not None
    for frame, real in zip(frames, real_envs, strict=True):
        np.testing.assert_array_equal(frame, real.render())
    face = env.numpy()
    assert face.render_mode == "rgb_array" and face.metadata["render_fps"] == screen.metadata["render_fps"]
    for frame, of_face in zip(frames, face.render() or (), strict=True):
        np.testing.assert_array_equal(frame, of_face)


def test_actions_of_another_space_reach_the_simulator_unscaled_and_clipped():
    class Simulator(gym.Env):
        action_space = spaces.Box(-2.0, 2.0, (1, 2), np.float32)
        render_mode = "rgb_array"

        def set_physics_state(self, state: np.ndarray) -> None:
            self.calls = [state]

        def step(self, action: np.ndarray) -> Any:
            assert action in self.action_space
            self.calls.append(action)
            return None, 0.0, False, len(self.calls) == 4, {}

        def render(self) -> Any:
            return self.calls

    replay = SimulatorReplay(Simulator(), 2)
    replay.begin(np.ones(2, bool), np.array([[1.0], [2.0]]))
    for size in (0.1, 1.7, 3.0, 4.0):
        replay.record(torch.tensor([[[size, -size]], [[0.0, 0.0]]], dtype=torch.float64))
    state, *actions = replay.frame(0)
    assert state.tolist() == [1.0]
    # The third step ends the simulator's episode, and so the fourth isn't taken.
    np.testing.assert_array_equal(actions, np.array([[[0.1, -0.1]], [[1.7, -1.7]], [[2.0, -2.0]]], np.float32))


def test_only_actions_since_the_oldest_start_are_kept(model, screen):
    env = make_env(model, make_real(render_mode=None), render_env=screen, horizon=4)
    env.reset(seed=0)
    assert env._replay is not None
    lengths = []
    for t in range(9):
        if t == 2:
            env.reset(options={"reset_mask": np.array([True, False, False])})
        env.step(torch.zeros(B, 1))
        lengths.append(len(env._replay._actions))
    assert lengths == [1, 2, 3, 2, 3, 2, 3, 2, 3]  # env 0 began at step 2, 6; the others at 0, 4, 8
    env.reset()
    assert env._replay._actions == []


def test_drawing_changes_no_imagined_number(model, screen):
    def run(draw: bool) -> torch.Tensor:
        env = make_env(model, screen, render_env=screen)
        latents = [env.reset(seed=0)[0]]
        for _ in range(7):
            latents.append(env.step(torch.full((B, 1), 0.3))[0])
            if draw:
                env.render()
        return torch.stack(latents)

    assert torch.equal(run(draw=True), run(draw=False))


# The nearest stored frame


def test_the_nearest_stored_frame_is_shown(model):
    observations = 2 * torch.rand((6, 5), generator=torch.Generator().manual_seed(0)) - 1
    frames = np.stack([np.full((4, 4, 3), 10 * i, np.uint8) for i in range(6)])
    env = make_env(model, None, render_frames=(observations.numpy(), frames))
    env.reset(options={"observations": observations[[4, 0, 2]] + 1e-4})
    shown = env.render()
    assert shown is not None
    assert [int(frame[0, 0, 0]) for frame in shown] == [40, 0, 20]
    shown[0][:] = 0
    assert frames[4].all()
    assert [int(frame[0, 0, 0]) for frame in env.render(indices=[1]) or ()] == [0]
    z, *_ = env.step(torch.zeros(B, 1))
    nearest = (z.unsqueeze(1) - model.encode(observations)).norm(dim=-1).argmin(1)
    assert [int(frame[0, 0, 0]) // 10 for frame in env.render() or ()] == nearest.tolist()


def test_the_simulator_is_preferred_to_stored_frames(model, screen):
    frames = np.zeros((1, 2, 2, 3), np.uint8)
    env = make_env(model, make_real(None), render_env=screen, render_frames=(np.zeros((1, 5)), frames))
    env.reset(seed=0)
    assert (env.render() or ())[0].shape == (32, 48, 3)


@pytest.mark.parametrize(("observations", "frames"), [(2, 3), (0, 0)])
def test_every_stored_frame_needs_its_observation(observations, frames):
    with pytest.raises(ValueError, match=f"one frame for each.*got {frames} frames and {observations} observations"):
        NearestFrame(np.zeros((observations, 5)), np.zeros((frames, 2, 2, 3), np.uint8))
    with pytest.raises(ValueError, match="one frame for each"):
        NearestFrame({"a": np.zeros((observations, 5))}, np.zeros((frames, 2, 2, 3), np.uint8))


# Where there is nothing to draw


def test_without_a_render_mode_nothing_is_drawn_and_no_physics_state_is_needed(model, screen):
    env = LatentVectorEnv(model, collect(model, store=False), B, 3, render_env=screen)
    env.reset(seed=0)
    assert env.render() is None and env.render_mode is None


def test_an_env_with_nothing_to_draw_from_says_what_to_give(model):
    env = make_env(model, np.zeros((2, 5)))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"no picture of its own. Give render_env=gym.make.*or render_frames="):
        env.render()


@pytest.mark.parametrize("kwargs", [{"start": np.zeros((2, 5))}, {"start": None, "latents": torch.zeros(1, 8)}])
def test_a_start_without_physics_state_says_what_to_start_from(kwargs, model, screen):
    env = make_env(model, **kwargs, render_env=screen)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="env 0 has no physics state.*store_physics_state=True.*reset's options"):
        env.render()


def test_a_later_start_without_physics_state_is_not_drawn_from_the_earlier_one(model, screen, real_envs):
    observation, info = real_envs[0].reset(seed=0)
    env = make_env(model, None, render_env=screen)
    observations, states = np.stack([observation] * B), np.stack([info["physics_state"]] * B)
    env.reset(options={"observations": observations, "physics_state": states})
    env.reset(options={"observations": observations, "reset_mask": np.array([False, True, False])})
    assert len(env.render(indices=[0, 2]) or ()) == 2
    with pytest.raises(ValueError, match="env 1 has no physics state"):
        env.render()


def test_sources_without_physics_states_say_what_to_give(model, screen):
    env = make_env(model, collect(model, store=False), render_env=screen)
    with pytest.raises(ValueError, match="holds no physics states.*store_physics_state"):
        env.reset(seed=0)
    pendulum = gym.make("Pendulum-v1")
    env = make_env(model, pendulum, render_env=screen)
    with pytest.raises(ValueError, match=r"'physics_state'.*Use a pwm_gym/<task>-v0 env"):
        env.reset(seed=0)


def test_a_render_env_that_cannot_draw_rollouts_is_refused(model):
    with pytest.raises(ValueError, match=r"must be a pwm_gym/<task>-v0 env, got .*Pendulum.*render_frames"):
        make_env(model, None, render_env=gym.make("Pendulum-v1", render_mode="rgb_array"))
    with pytest.raises(ValueError, match="must have render_mode='rgb_array', got None"):
        make_env(model, None, render_env=make_real(render_mode=None))
