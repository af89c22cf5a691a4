"""Hindsight: windows relabelled with goals that were reached, against a plain record of where a point went."""

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from stable_baselines3.her.goal_selection_strategy import GoalSelectionStrategy

from pwm_gym import PWM, HerSequenceReplayBuffer, SequenceReplayBuffer
from pwm_gym.serialization import load_tensors

TINY: dict[str, Any] = {
    "learning_starts": 50,
    "batch_size": 8,
    "model_batch_size": 8,
    "horizon": 3,
    "model_horizon": 3,
    "buffer_size": 1_000,
    "policy_kwargs": {
        "net_arch": [16],
        "world_model_kwargs": {"latent_dim": 16, "encoder_dim": 16, "mlp_dim": 16, "num_bins": 21},
    },
    "seed": 0,
    "device": "cpu",
}


class Reach(gym.Env):
    """Move a point from the middle to within 0.15 of a goal at distance 1, in 20 steps of at most 0.1 a dimension.

    The reward is 0 there and -1 elsewhere. Random actions lead about 0.26 away in each dimension and don't find it.
    """

    box = spaces.Box(-3.0, 3.0, (2,), np.float32)
    observation_space = spaces.Dict({"observation": box, "achieved_goal": box, "desired_goal": box})
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def _observe(self) -> dict[str, np.ndarray]:
        return {"observation": self.at.copy(), "achieved_goal": self.at.copy(), "desired_goal": self.goal.copy()}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        angle = self.np_random.uniform(0.0, 2.0 * np.pi)
        self.at, self.goal = np.zeros(2, np.float32), np.array([np.cos(angle), np.sin(angle)], np.float32)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.at = self.at + 0.1 * action
        self.steps += 1
        reward = float(self.compute_reward(self.at[None], self.goal[None], [{}])[0])
        return self._observe(), reward, False, self.steps == 20, {"is_success": reward == 0.0}

    def compute_reward(self, achieved: np.ndarray, desired: np.ndarray, infos: Any) -> np.ndarray:
        return -(np.linalg.norm(achieved - desired, axis=-1) > 0.15).astype(np.float32)


class Counting(gym.Env):
    """Spaces and rewards for buffers that tests fill by hand; the reward is achieved + 1000 * desired goal."""

    box = spaces.Box(-1e6, 1e6, (1,), np.float32)
    observation_space = spaces.Dict({"observation": box, "achieved_goal": box, "desired_goal": box})
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def compute_reward(self, achieved: np.ndarray, desired: np.ndarray, infos: Any) -> np.ndarray:
        return (achieved + 1000.0 * desired)[:, 0] + np.array([info.get("bonus", 0.0) for info in infos])


class NoReward(gym.Env):
    observation_space, action_space = Counting.observation_space, Counting.action_space


def make(rows: int = 20, n_envs: int = 1, **kwargs: Any) -> HerSequenceReplayBuffer:
    env = DummyVecEnv([Counting] * n_envs)
    spaces_ = env.observation_space, env.action_space
    return HerSequenceReplayBuffer(rows * n_envs, *spaces_, env, "cpu", n_envs, **kwargs)  # type: ignore[arg-type]


def fill(buffer: Any, episode: int, steps: int, first: int = 0, end: bool = True, info: Any = None) -> None:
    """Store steps of an episode in every env: "achieved_goal" counts 100 * episode + step, the goal was -1."""
    for step in range(first, first + steps):
        done = end and step == first + steps - 1
        now, then = (np.full((buffer.n_envs, 1), 100.0 * episode + t, np.float32) for t in (step, step + 1))
        goal = np.full((buffer.n_envs, 1), -1.0, np.float32)
        obs, next_obs = ({"observation": x, "achieved_goal": x, "desired_goal": goal} for x in (now, then))
        dones, rewards = np.full(buffer.n_envs, done), np.full(buffer.n_envs, -7.0, np.float32)
        infos = [{"TimeLimit.truncated": done, **(info or {})} for _ in range(buffer.n_envs)]
        buffer.add(obs, next_obs, np.zeros((buffer.n_envs, 1), np.float32), rewards, dones, infos)


def goals_by_start(buffer: Any, horizon: int = 2, batches: int = 20) -> dict[int, set[int]]:
    """List which goals the relabelled windows got, by what was achieved at their first step."""
    found: dict[int, set[int]] = {}
    rng = np.random.default_rng(0)
    for _ in range(batches):
        windows = buffer.sample_windows(64, horizon, rng)
        first, goal = (windows.observations[key][0, :, 0].int().tolist() for key in ("achieved_goal", "desired_goal"))
        for start, chosen in zip(first, goal, strict=True):
            if chosen != -1:
                found.setdefault(start, set()).add(chosen)
    return found


# Goals


@pytest.mark.parametrize("strategy", ["future", GoalSelectionStrategy.FUTURE, "Final", "episode"])
def test_goals_were_achieved_in_the_windows_own_episode(strategy: Any):
    # Two episodes of four and three steps; step t leads from what counts t to t + 1, which is what it achieves.
    buffer = make(goal_selection_strategy=strategy)
    fill(buffer, episode=1, steps=4)
    fill(buffer, episode=2, steps=3)
    expected = {
        "future": {
            100: {101, 102, 103, 104},
            101: {102, 103, 104},
            102: {103, 104},
            200: {201, 202, 203},
            201: {202, 203},
        },
        "final": {100: {104}, 101: {104}, 102: {104}, 200: {203}, 201: {203}},
        "episode": {s: {101, 102, 103, 104} for s in (100, 101, 102)} | {s: {201, 202, 203} for s in (200, 201)},
    }
    assert goals_by_start(buffer) == expected[str(getattr(strategy, "name", strategy)).lower()]


@pytest.mark.parametrize("n_envs", [1, 3])
def test_a_relabelled_window_has_one_goal_and_the_rewards_for_it(n_envs: int):
    buffer = make(n_envs=n_envs)
    fill(buffer, episode=1, steps=6)
    windows = buffer.sample_windows(10, 3, np.random.default_rng(0))
    achieved, desired = (windows.observations[key][..., 0] for key in ("achieved_goal", "desired_goal"))
    assert (desired == desired[0]).all()
    # 4 / (4 + 1) of ten windows; reward t is for what step t leads to: achieved[t + 1] + 1000 * goal
    torch.testing.assert_close(windows.rewards[:, :8], (achieved[1:] + 1000.0 * desired[1:])[:, :8])
    assert (desired[0, :8] > achieved[0, :8]).all()
    assert (desired[:, 8:] == -1).all()
    assert (windows.rewards[:, 8:] == -7).all()


def test_partial_windows_are_relabelled_up_to_their_episodes_end():
    buffer = make()
    fill(buffer, episode=1, steps=6)
    fill(buffer, episode=2, steps=3, end=False)  # has no goals yet
    windows = buffer.sample_windows(50, 4, np.random.default_rng(0), partial=True)
    achieved, desired = (windows.observations[key][..., 0] for key in ("achieved_goal", "desired_goal"))
    assert (desired == desired[0]).all()
    assert set(achieved[0].tolist()) == {100, 101, 102, 103, 104, 105}
    assert torch.equal(windows.lengths, (106 - achieved[0]).clamp(max=4).long())
    torch.testing.assert_close(windows.rewards[:, :40], (achieved[1:] + 1000.0 * desired[1:])[:, :40])


@pytest.mark.parametrize("n_sampled_goal, relabelled", [(0, 0), (1, 10), (3, 15), (4, 16), (6, 17)])
def test_share_of_relabelled_windows_and_starts_is_that_of_sb3(n_sampled_goal: int, relabelled: int):
    buffer = make(n_sampled_goal=n_sampled_goal)
    fill(buffer, episode=1, steps=6)
    windows, starts = buffer.sample_windows(20, 2), buffer.sample_starts(20)
    assert int((windows.observations["desired_goal"][0] != -1).sum()) == relabelled
    assert int((starts.observations["desired_goal"] != -1).sum()) == relabelled


def test_relabelling_leaves_the_stored_goals_and_rewards():
    buffer = make()
    fill(buffer, episode=1, steps=6)
    buffer.sample_windows(32, 3)
    buffer.sample_starts(32)
    assert (buffer.observations["desired_goal"][:6] == -1).all()
    assert (buffer.rewards[:6] == -7).all()


def test_starts_are_relabelled_with_goals_at_or_after_them():
    buffer = make()
    fill(buffer, episode=1, steps=4)
    starts = buffer.sample_starts(500, np.random.default_rng(0)).observations
    now, goal = (starts[key][:400, 0].astype(int).tolist() for key in ("achieved_goal", "desired_goal"))
    assert set(zip(now, goal, strict=True)) == {(a, b) for a in range(100, 104) for b in range(a + 1, 105)}


def test_infos_reach_compute_reward_if_they_are_kept():
    buffer = make(copy_info_dict=True, goal_selection_strategy="final")
    fill(buffer, episode=1, steps=2, info={"bonus": 0.5})
    assert buffer.sample_windows(2, 2).rewards[:, 0].tolist() == [101 + 102_000 + 0.5, 102 + 102_000 + 0.5]


# Which episodes


def test_only_finished_episodes_are_sampled():
    buffer = make()
    fill(buffer, episode=1, steps=3)
    fill(buffer, episode=2, steps=5, end=False)
    assert buffer.longest_window(10) == 3
    assert set(buffer.sample_starts(200).observations["achieved_goal"][:, 0]) == {100, 101, 102}
    assert set(goals_by_start(buffer, horizon=1)) == {100, 101, 102}
    fill(buffer, episode=2, steps=1, first=5)
    assert buffer.longest_window(10) == 6
    assert set(goals_by_start(buffer, horizon=6)) == {200}


def test_an_episode_is_dropped_once_one_of_its_steps_is_overwritten():
    buffer = make(rows=8)
    for episode in (1, 2, 3):  # of three steps each: the ninth step takes the row of the first
        fill(buffer, episode, steps=3)
    assert set(buffer.sample_starts(200).observations["achieved_goal"][:, 0] // 100) == {2, 3}
    goals = goals_by_start(buffer, horizon=3)  # the third episode goes on at the ring's beginning
    assert goals == {200: {201, 202, 203}, 300: {301, 302, 303}}


def test_an_episode_that_a_reset_cut_short_is_relabelled_on_its_own():
    buffer = make()
    fill(buffer, episode=1, steps=3, end=False)
    fill(buffer, episode=2, steps=3)
    assert goals_by_start(buffer, horizon=3) == {100: {101, 102, 103}, 200: {201, 202, 203}}


def test_a_truncated_last_episode_can_be_sampled_and_is_not_gone_on_with():
    buffer = make()
    fill(buffer, episode=1, steps=3, end=False)
    with pytest.warns(UserWarning, match="The last trajectory in the replay buffer will be truncated"):
        buffer.truncate_last_trajectory()
    fill(buffer, episode=1, steps=2, first=3)  # as if it went on: its first observation is where the last one led
    assert goals_by_start(buffer, horizon=2) == {100: {101, 102, 103}, 101: {102, 103}, 103: {104, 105}}
    assert not buffer.sample_windows(32, 2).terminated.any()


# Files


@pytest.mark.parametrize("copy_info_dict", [False, True])
def test_a_saved_buffer_goes_on_as_the_one_in_memory(copy_info_dict: bool, tmp_path: Any):
    buffer = make(rows=8, copy_info_dict=copy_info_dict, n_sampled_goal=2, goal_selection_strategy="episode")
    info = {"bonus": 0.25, "achieved": np.arange(2.0)}
    for episode in (1, 2, 3):
        fill(buffer, episode, steps=3, info=info)
    fill(buffer, episode=4, steps=2, end=False, info=info)
    buffer.save(tmp_path / "her.replay")
    load_tensors(tmp_path / "her.replay")  # nothing in it would have to be unpickled
    loaded: Any = SequenceReplayBuffer.load(tmp_path / "her.replay", "cpu")
    assert type(loaded) is HerSequenceReplayBuffer
    loaded.set_env(buffer.env)
    for replay in (buffer, loaded):
        fill(replay, episode=4, steps=2, first=2, info=info)
    first, second = (replay.sample_windows(30, 3, np.random.default_rng(0)) for replay in (buffer, loaded))
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)
    assert (first.observations["achieved_goal"] >= 400).any()


@pytest.mark.parametrize("truncate", [False, True])
def test_an_agents_replay_buffer_survives_a_file(truncate: bool, tmp_path: Any):
    agent = PWM("MultiInputPolicy", Reach(), replay_buffer_class=HerReplayBuffer, **TINY).learn(70)
    agent.save(tmp_path / "agent")
    agent.save_replay_buffer(tmp_path / "agent")
    again = PWM.load(tmp_path / "agent", Reach(), device="cpu")
    if truncate:  # 70 steps are three episodes and a half
        with pytest.warns(UserWarning, match="will be truncated"):
            again.load_replay_buffer(tmp_path / "agent")
    else:
        again.load_replay_buffer(tmp_path / "agent", truncate_last_traj=False)
    replay: Any = again.replay_buffer
    assert replay.size() == 70
    assert int((replay.ep_length > 0).sum()) == (70 if truncate else 60)
    again.learn(30, reset_num_timesteps=False)
    assert replay.size() == 100


def test_an_agent_loads_without_an_env_and_goes_on_once_it_has_one(tmp_path: Any):
    agent = PWM("MultiInputPolicy", Reach(), replay_buffer_class=HerReplayBuffer, **TINY)
    agent.save(tmp_path / "agent")
    again = PWM.load(tmp_path / "agent", device="cpu")
    observation, _ = Reach().reset(seed=0)
    np.testing.assert_array_equal(*(a.predict(observation, deterministic=True)[0] for a in (agent, again)))
    again.set_env(Reach())
    again.learn(60)
    assert isinstance(again.replay_buffer, HerSequenceReplayBuffer)


# Agents


@pytest.mark.parametrize("buffer_class", [HerReplayBuffer, HerSequenceReplayBuffer])
def test_sb3s_class_stands_for_ours(buffer_class: Any):
    kwargs = {"n_sampled_goal": 2, "goal_selection_strategy": "final"}
    env = DummyVecEnv([Reach, Reach])
    agent = PWM("MultiInputPolicy", env, replay_buffer_class=buffer_class, replay_buffer_kwargs=kwargs, **TINY)
    replay: Any = agent.learn(60).replay_buffer
    assert type(replay) is HerSequenceReplayBuffer
    assert (replay.n_envs, replay.n_sampled_goal, replay.env) == (2, 2, agent.env)
    assert kwargs == {"n_sampled_goal": 2, "goal_selection_strategy": "final"}


def test_compute_reward_is_reached_in_other_processes():
    env = SubprocVecEnv([Reach, Reach])
    try:
        PWM("MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, **TINY).learn(60)
    finally:
        env.close()


def test_goals_are_compared_in_the_envs_units_and_normalised_after():
    env = VecNormalize(DummyVecEnv([Reach]), clip_reward=100.0)
    agent = PWM("MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, **TINY).learn(60)
    replay = agent.sequence_replay()
    raw, scaled = (replay.sample_windows(40, 3, np.random.default_rng(0), e) for e in (None, env))
    reached = (raw.observations["achieved_goal"][1:] - raw.observations["desired_goal"][1:]).norm(dim=-1) <= 0.15
    assert reached.any()
    torch.testing.assert_close(raw.rewards, reached.float() - 1.0)
    expected = env.normalize_obs({k: v.numpy() for k, v in raw.observations.items()})
    for key, value in scaled.observations.items():  # type: ignore[union-attr]
        np.testing.assert_allclose(value.numpy(), expected[key], rtol=1e-6)
    np.testing.assert_allclose(scaled.rewards.numpy(), env.normalize_reward(raw.rewards.numpy()), rtol=1e-6)


def test_another_env_takes_over_computing_rewards():
    agent = PWM("MultiInputPolicy", Reach(), replay_buffer_class=HerReplayBuffer, **TINY)
    agent.set_env(Reach())
    replay: Any = agent.replay_buffer
    assert replay.env is agent.env


# Bad input


def test_an_env_without_compute_reward_is_refused_at_once():
    with pytest.raises(TypeError, match=r"with compute_reward\(.*got one without. Add that method"):
        PWM("MultiInputPolicy", NoReward(), replay_buffer_class=HerReplayBuffer, **TINY)


def test_observations_without_goals_are_refused():
    space = spaces.Dict({"observation": Counting.box})
    with pytest.raises(TypeError, match=r"with the keys \['achieved_goal', 'desired_goal', 'observation'\], got Dict"):
        HerSequenceReplayBuffer(10, space, Counting.action_space)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"goal_selection_strategy": "past"}, r"one of \['episode', 'final', 'future'\], got 'past'"),
        ({"goal_selection_strategy": None}, "got None"),
        ({"n_sampled_goal": -1}, "`n_sampled_goal` must be >= 0, got -1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_training_before_an_episode_has_ended_is_refused():
    agent = PWM("MultiInputPolicy", Reach(), replay_buffer_class=HerReplayBuffer, **{**TINY, "learning_starts": 10})
    with pytest.raises(ValueError, match=r"expected a finished episode.*got none in 1\d steps.*learning_starts above"):
        agent.learn(30)


def test_relabelling_without_an_env_or_with_rewards_one_by_one_is_refused():
    buffer = make()
    fill(buffer, episode=1, steps=3)
    lonely = copy.deepcopy(buffer)  # SB3 leaves the env behind
    with pytest.raises(ValueError, match="expected an env to compute rewards with"):
        lonely.sample_windows(5, 2)

    class OneByOne(Counting):
        def compute_reward(self, achieved: np.ndarray, desired: np.ndarray, infos: Any) -> Any:
            return 0.0

    buffer.set_env(DummyVecEnv([OneByOne]))
    with pytest.raises(ValueError, match=r"expected rewards of shape \(8,\).*got \(\). It must take batches"):
        buffer.sample_windows(5, 2)


# Learning


@pytest.mark.expensive
def test_hindsight_learns_to_reach_goals_that_are_not_found_by_chance():
    def successes(**kwargs: Any) -> int:
        agent = PWM("MultiInputPolicy", Reach(), learning_starts=200, seed=0, device="cpu", **kwargs).learn(800)
        reached, env = 0, Reach()
        for episode in range(50):
            observation, _ = env.reset(seed=episode)
            for _ in range(20):
                observation, *_, info = env.step(agent.predict(observation, deterministic=True)[0])
            reached += info["is_success"]
        return reached

    # 45 s of one core each; of 50 goals, seeds 0 and 1 reached all with hindsight, and seed 1 reached 4 without.
    assert successes(replay_buffer_class=HerReplayBuffer) >= 40
    assert successes() <= 15
