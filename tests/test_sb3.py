"""The SB3 adapter against SB3's own DummyVecEnv, and a real env seen through the encoder."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize

from pwm_gym.latent_env import LatentVectorEnv
from pwm_gym.sb3 import LatentObservation, as_sb3_vec_env
from pwm_gym.world_model import WorldModel, WorldModelConfig

# AsyncVectorEnv forks; from Python 3.12 on, that warns in a process with threads.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

SAME_STEP: Any = {"autoreset_mode": AutoresetMode.SAME_STEP}


class Counter(gym.Env):
    """Count steps: terminates at 3 with odd actions, is truncated at 5, and fills its infos."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 7}
    observation_space = spaces.Dict(
        {
            "count": spaces.Box(0.0, 10.0, (2,), np.float64),
            "parity": spaces.Discrete(2),
        }
    )
    action_space = spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.gain = 1.0
        self.buffer = np.zeros(2)  # handed out as it is: whoever keeps it must copy it

    def _observation(self) -> dict[str, Any]:
        self.buffer[:] = self.count
        return {"count": self.buffer, "parity": self.count % 2}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        start = (options or {}).get("start", 0)
        self.count, self.start = start, float(self.np_random.random())
        self.buffer = np.zeros(2)
        return self._observation(), {"start": self.start, "options": str(options)}

    def step(self, action: int) -> tuple[dict, float, bool, bool, dict]:
        self.count += 1
        terminated, truncated = self.count >= 3 and bool(action), self.count >= 5
        info = {
            "count": self.count,
            "name": f"step {self.count}",
            "nested": {"half": self.count / 2, "deep": {"pair": np.full(2, self.count)}},
            "_private": -self.count,
        }
        if self.count % 2:
            info["odd"] = True
        return self._observation(), self.gain * self.count, terminated, truncated, info

    def scaled(self, factor: float, offset: float = 0.0) -> float:
        return factor * self.gain + offset

    def render(self) -> np.ndarray:
        return np.full((4, 6, 3), self.count, np.uint8)


class Timer(gym.Env):
    """Reach termination and the time limit in the same step."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple:
        return np.ones(1, np.float32), 0, True, True, {}


class Bare(VectorEnv):
    """A vector env without sub-envs, in the plainest form that the contract allows."""

    def __init__(self, final_obs: bool = True) -> None:
        self.num_envs = 2
        self.metadata = dict(SAME_STEP)
        self.single_observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.single_action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, 2)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, 2)
        self.final_obs, self.gain = final_obs, 1.0
        self.state, self.reward = np.zeros((2, 1), np.float32), np.zeros(2, np.float32)
        self.calls = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.state[:] = self.np_random.uniform(size=(2, 1))
        return self.state, {"horizon": 3}

    def step(self, actions: np.ndarray) -> tuple:
        ends = np.array([True, False])
        infos: dict[str, Any] = {"p": np.array([0.25, 0.5])}
        if self.final_obs:
            infos |= {"final_obs": np.full((2, 1), 0.5, np.float32), "_final_obs": ends}
        return self.state, self.reward, np.zeros(2, bool), ends, infos

    def scaled(self, factor: float) -> float:
        self.calls += 1
        return factor * self.gain


def make(env_id: str, num_envs: int = 3, mode: str = "sync", **kwargs: Any) -> VectorEnv:
    return gym.make_vec(env_id, num_envs=num_envs, vectorization_mode=mode, vector_kwargs=SAME_STEP, **kwargs)


def counters(num_envs: int = 3, **kwargs: Any) -> SyncVectorEnv:
    return SyncVectorEnv([lambda: Counter(**kwargs)] * num_envs, **SAME_STEP)


def assert_equal(a: Any, b: Any) -> None:
    """Compare nested containers: same keys, and equal arrays of the same shape."""
    assert isinstance(a, dict) == isinstance(b, dict)
    if isinstance(a, dict):
        assert sorted(a) == sorted(b)
        for key in a:
            assert_equal(a[key], b[key])
    else:
        assert np.shape(a) == np.shape(b)
        np.testing.assert_array_equal(a, b)


def assert_same_trajectories(ours: VecEnv, theirs: VecEnv, steps: int) -> tuple[int, int]:
    """Step both with equal seeds and actions; return how many terminations and truncations."""
    ours.seed(7)
    theirs.seed(7)
    ours.action_space.seed(0)
    assert_equal(ours.reset(), theirs.reset())
    terminations = truncations = 0
    for _ in range(steps):
        actions = np.array([ours.action_space.sample() for _ in range(ours.num_envs)])
        (obs, rewards, dones, infos), expected = ours.step(actions), theirs.step(actions)
        assert_equal(obs, expected[0])
        assert_equal(rewards, expected[1])
        assert_equal(dones, expected[2])
        assert rewards.dtype == expected[1].dtype and dones.dtype == expected[2].dtype
        for info, expected_info in zip(infos, expected[3], strict=True):
            assert_equal(info, expected_info)
            assert type(info["TimeLimit.truncated"]) is bool
        for info, expected_info in zip(ours.reset_infos, theirs.reset_infos, strict=True):
            assert_equal(info, expected_info)
        truncations += sum(info["TimeLimit.truncated"] for info in infos)
        terminations += sum(dones) - sum(info["TimeLimit.truncated"] for info in infos)
    ours.close()
    theirs.close()
    return terminations, truncations


# Equal to DummyVecEnv


@forks
@pytest.mark.parametrize(
    ("env_id", "mode", "steps", "ends"),
    [
        ("CartPole-v1", "sync", 200, (True, False)),
        ("CartPole-v1", "async", 60, (True, False)),
        ("Pendulum-v1", "sync", 410, (False, True)),
        ("Pendulum-v1", "async", 210, (False, True)),
        ("MountainCarContinuous-v0", "sync", 1010, (False, True)),
    ],
)
def test_trajectories_equal_those_of_dummy_vec_env(env_id: str, mode: str, steps: int, ends: tuple[bool, bool]) -> None:
    theirs = DummyVecEnv([lambda: gym.make(env_id)] * 3)
    counts = assert_same_trajectories(as_sb3_vec_env(make(env_id, mode=mode)), theirs, steps)
    assert (counts[0] > 0, counts[1] > 0) == ends


@pytest.mark.parametrize("copy", [True, False])
def test_dict_observations_and_nested_infos_equal_those_of_dummy_vec_env(copy: bool) -> None:
    ours = as_sb3_vec_env(SyncVectorEnv([Counter] * 3, copy=copy, **SAME_STEP))
    terminations, truncations = assert_same_trajectories(ours, DummyVecEnv([Counter] * 3), 60)
    assert terminations > 0 and truncations > 0


def test_a_termination_at_the_time_limit_is_no_truncation() -> None:
    ours = as_sb3_vec_env(SyncVectorEnv([Timer] * 2, **SAME_STEP))
    assert assert_same_trajectories(ours, DummyVecEnv([Timer] * 2), 3) == (6, 0)


def test_seeds_are_used_once_and_repeat_the_run() -> None:
    env = as_sb3_vec_env(make("Pendulum-v1"))
    assert list(env.seed(3)) == [3, 4, 5]
    first = env.reset()
    second = env.reset()
    env.seed(np.int64(3))
    assert_equal(env.reset(), first)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first[0], first[1])


def test_options_reach_the_next_reset_only() -> None:
    env, theirs = as_sb3_vec_env(counters()), DummyVecEnv([Counter] * 3)
    for vec_env in (env, theirs):
        vec_env.seed(0)
        vec_env.set_options({"start": 4})
    assert_equal(env.reset(), theirs.reset())
    assert env.reset_infos == theirs.reset_infos
    assert env.reset()["count"].max() == 0
    env.set_options([{"start": 2}] * 3)
    assert env.reset()["count"].min() == 2


def test_options_that_differ_between_envs_are_refused() -> None:
    env = as_sb3_vec_env(counters())
    for options in ([{"start": 1}, {"start": 2}, {"start": 1}], [{"start": 1}]):
        with pytest.raises(ValueError, match="one dict or 3 equal dicts"):
            env.set_options(options)


def test_a_masked_reset_leaves_the_options_of_the_caller_alone() -> None:
    env = as_sb3_vec_env(counters())
    env.reset()
    env.step(np.zeros(3, int))
    options = {"reset_mask": np.array([True, False, False])}
    env.set_options(options)
    assert env.reset()["count"][:, 0].tolist() == [0.0, 1.0, 1.0]
    assert list(options) == ["reset_mask"]


# Memory


def test_returned_arrays_never_alias_the_env() -> None:
    bare = Bare()
    env = as_sb3_vec_env(bare)
    first = env.reset()
    assert not np.shares_memory(first, bare.state)
    obs, rewards, _, _ = env.step(np.zeros((2, 1)))
    assert not np.shares_memory(obs, bare.state) and not np.shares_memory(rewards, bare.reward)


def test_observations_of_an_env_without_copy_keep_their_values() -> None:
    env = as_sb3_vec_env(SyncVectorEnv([Counter] * 2, copy=False, **SAME_STEP))
    first = env.reset()
    for _ in range(3):
        env.step(np.zeros(2, int))
    assert first["count"].max() == 0


def test_changing_an_info_changes_no_reset_info() -> None:
    env = as_sb3_vec_env(Bare())
    env.reset()
    _, _, _, infos = env.step(np.zeros((2, 1)))
    infos[0]["p"] = 9.0
    assert env.reset_infos[0] == {"p": 0.25}


# Vector envs without sub-envs, or without Gymnasium's full layout


def test_batched_final_obs_and_unmasked_infos_are_understood() -> None:
    env = as_sb3_vec_env(Bare())
    env.seed(0)
    env.reset()
    assert env.reset_infos == [{"horizon": 3}, {"horizon": 3}]
    _, _, dones, infos = env.step(np.zeros((2, 1)))
    assert dones.tolist() == [True, False]
    assert infos[0].pop("terminal_observation").tolist() == [0.5]
    assert infos == [
        {"p": 0.25, "TimeLimit.truncated": True},
        {"p": 0.5, "TimeLimit.truncated": False},
    ]


def test_an_episode_that_ends_without_final_obs_is_an_error() -> None:
    env = as_sb3_vec_env(Bare(final_obs=False))
    env.reset()
    with pytest.raises(ValueError, match="must hold 'final_obs'"):
        env.step(np.zeros((2, 1)))


def test_the_numpy_face_is_used_where_there_is_one() -> None:
    face = Bare()

    class Torch(Bare):
        def numpy(self) -> VectorEnv:
            return face

    env = as_sb3_vec_env(Torch())
    face.state[:] = 0.75
    assert env.step(np.zeros((2, 1)))[0].tolist() == [[0.75], [0.75]]


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_other_autoreset_modes_are_refused(mode: AutoresetMode) -> None:
    envs = SyncVectorEnv([Counter] * 2, autoreset_mode=mode)
    with pytest.raises(ValueError, match=f"must be AutoresetMode.SAME_STEP, got {mode}. Use"):
        as_sb3_vec_env(envs)


def test_what_is_no_vector_env_is_refused() -> None:
    for env in (Counter(), DummyVecEnv([Counter]), None):
        with pytest.raises(TypeError, match="must be a gymnasium.vector.VectorEnv, got"):
            as_sb3_vec_env(env)  # type: ignore[arg-type]


# Attributes and methods


def test_attributes_are_those_of_the_sub_envs() -> None:
    env = as_sb3_vec_env(counters())
    assert env.get_attr("gain") == [1.0, 1.0, 1.0]
    env.set_attr("gain", 2.0, indices=[1])
    env.set_attr("gain", 3.0, indices=2)
    assert env.get_attr("gain") == [1.0, 2.0, 3.0]
    assert env.get_attr("gain", indices=1) == [2.0]
    assert env.env_method("scaled", 10.0, offset=1.0, indices=[0, 2]) == [11.0, 31.0]
    assert env.has_attr("scaled") and not env.has_attr("absent")
    assert env.get_attr("observation_space") == [Counter.observation_space] * 3
    with pytest.raises(AttributeError, match="'absent'"):
        env.get_attr("absent")


@forks
def test_attributes_cross_process_borders() -> None:
    env = as_sb3_vec_env(gym.vector.AsyncVectorEnv([lambda: Monitor(Counter())] * 2, **SAME_STEP))
    assert not env.has_attr("absent")  # an AttributeError in a worker would end it
    with pytest.raises(AttributeError, match="'absent'"):
        env.get_attr("absent")
    env.set_attr("gain", [5.0])  # a list is one value here
    assert env.get_attr("gain", indices=[1]) == [[5.0]]
    env.set_attr("gain", 2.0)
    assert env.env_method("scaled", 3.0, offset=1.0) == [7.0, 7.0]
    with pytest.raises(ValueError, match="all 2 envs for `scaled`"):
        env.env_method("scaled", 3.0, indices=[0])
    with pytest.raises(ValueError, match="all 2 envs for `set_attr`"):
        env.set_attr("gain", 3.0, indices=[0])
    assert env.env_is_wrapped(Monitor) == [True, True]
    assert env.env_is_wrapped(gym.wrappers.TimeLimit) == [False, False]
    env.reset()
    env.close()


def test_attributes_of_an_env_without_sub_envs_are_its_own() -> None:
    bare = Bare()
    env = as_sb3_vec_env(RecordEpisodeStatistics(bare))
    assert env.get_attr("gain") == [1.0, 1.0]
    assert env.get_attr("episode_count", indices=0) == [0]
    assert env.get_attr("observation_space") == [bare.single_observation_space] * 2
    env.set_attr("gain", 2.0)
    assert bare.gain == 2.0
    assert env.env_method("scaled", 3.0) == [6.0, 6.0] and bare.calls == 1
    with pytest.raises(ValueError, match="all 2 envs for `set_attr`"):
        env.set_attr("gain", 3.0, indices=[0])
    assert env.env_is_wrapped(RecordEpisodeStatistics) == [True, True]
    assert env.env_is_wrapped(Monitor) == [False, False]


def test_wrappers_of_sub_envs_are_found() -> None:
    env = as_sb3_vec_env(SyncVectorEnv([Counter, lambda: Monitor(Counter())], **SAME_STEP))
    assert env.env_is_wrapped(Monitor) == [False, True]
    assert env.env_is_wrapped(Monitor, indices=1) == [True]


def test_statistics_of_gymnasium_and_of_monitor_arrive_with_the_last_step() -> None:
    monitored = SyncVectorEnv([lambda: Monitor(Counter())] * 2, **SAME_STEP)
    for envs in (RecordEpisodeStatistics(counters(2)), monitored):
        env = as_sb3_vec_env(envs)
        env.reset()
        for _ in range(3):
            _, _, dones, infos = env.step(np.array([1, 0]))
        assert dones.tolist() == [True, False]
        assert infos[0]["episode"]["r"] == 6.0 and infos[0]["episode"]["l"] == 3
        assert "episode" not in infos[1] and "episode" not in env.reset_infos[0]
        assert infos[0]["count"] == 3 and "start" in env.reset_infos[0]


# Rendering


@pytest.mark.parametrize("copies", [1, 3])
def test_images_are_tiled(copies: int) -> None:
    env = as_sb3_vec_env(counters(copies, render_mode="rgb_array"))
    assert env.render_mode == "rgb_array" and env.metadata["render_fps"] == 7
    env.reset()
    env.step(np.zeros(copies, int))
    assert [image.max() for image in env.get_images()] == [1] * copies
    image = env.render()
    assert image is not None and image.shape == ((4, 6, 3) if copies == 1 else (8, 12, 3))


def test_without_a_render_mode_there_are_no_images() -> None:
    assert as_sb3_vec_env(counters()).get_images() == [None] * 3


@forks
def test_close_closes_the_vector_env() -> None:
    envs = make("Pendulum-v1", mode="async")
    env = as_sb3_vec_env(envs)
    env.close()
    env.close()
    assert envs.closed


# SB3 on top


def test_vec_monitor_and_vec_normalize_equal_those_on_dummy_vec_env() -> None:
    def stack(vec_env: VecEnv) -> VecEnv:
        return VecNormalize(VecMonitor(vec_env))

    ours = stack(as_sb3_vec_env(make("CartPole-v1")))
    theirs = stack(DummyVecEnv([lambda: gym.make("CartPole-v1")] * 3))
    for env in (ours, theirs):
        env.seed(1)
    assert_equal(ours.reset(), theirs.reset())
    rng, episodes = np.random.default_rng(0), 0
    for _ in range(100):
        actions = rng.integers(2, size=3)
        (obs, rewards, dones, infos), expected = ours.step(actions), theirs.step(actions)
        assert_equal(obs, expected[0])
        assert_equal(rewards, expected[1])
        for i in np.flatnonzero(dones):
            episodes += 1
            assert infos[i]["episode"]["r"] == expected[3][i]["episode"]["r"]
            assert_equal(infos[i]["terminal_observation"], expected[3][i]["terminal_observation"])
    assert episodes > 5


def parameters_after(model: PPO | SAC, timesteps: int) -> torch.Tensor:
    model.learn(timesteps)
    return torch.cat([parameter.flatten() for parameter in model.policy.parameters()])


def test_ppo_learns_the_same_weights_as_on_dummy_vec_env() -> None:
    def weights(env: VecEnv) -> torch.Tensor:
        model = PPO("MlpPolicy", env, n_steps=128, n_epochs=2, seed=0, device="cpu")
        return parameters_after(model, 768)

    theirs = DummyVecEnv([lambda: gym.make("CartPole-v1")] * 3)
    assert torch.equal(weights(as_sb3_vec_env(make("CartPole-v1"))), weights(theirs))


def test_sac_learns_the_same_weights_as_on_dummy_vec_env() -> None:
    def weights(env: VecEnv) -> torch.Tensor:
        model = SAC("MlpPolicy", env, learning_starts=50, seed=0, device="cpu")
        return parameters_after(model, 300)

    theirs = DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 3)
    assert torch.equal(weights(as_sb3_vec_env(make("Pendulum-v1"))), weights(theirs))


def test_dict_observations_train_with_multi_input_policy() -> None:
    env = as_sb3_vec_env(counters())
    model = PPO("MultiInputPolicy", env, n_steps=16, batch_size=24, device="cpu")
    assert model.learn(48).num_timesteps == 48


def test_evaluate_policy_agrees_with_dummy_vec_env() -> None:
    model = PPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu")
    results = []
    for env in (
        as_sb3_vec_env(make("CartPole-v1")),
        DummyVecEnv([lambda: gym.make("CartPole-v1")] * 3),
    ):
        env.seed(5)
        results.append(evaluate_policy(model, VecMonitor(env), return_episode_rewards=True))
    assert results[0] == results[1]


# A real env through the encoder


def model_of(env: gym.Env, **overrides: Any) -> WorldModel:
    torch.manual_seed(0)
    config = WorldModelConfig.preset(
        "1M",
        observation_dim=spaces.flatdim(env.observation_space),
        action_dim=spaces.flatdim(env.action_space),
        **overrides,
    )
    return WorldModel(config, env.observation_space, env.action_space)


class TwoBoxes(gym.Env):
    """Observe a float64 dict whose keys are given out of alphabetical order."""

    observation_space = spaces.Dict(
        [("z", spaces.Box(-9, 9, (2,), np.float64)), ("a", spaces.Box(-9, 9, (3, 1), np.float64))]
    )
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float64)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        return {"z": np.ones(2), "a": np.full((3, 1), 2.0)}, {}

    def step(self, action: np.ndarray) -> tuple:
        return {"z": np.ones(2) * 3, "a": np.full((3, 1), 4.0)}, 0.0, False, False, {}


def test_latent_observation_equals_a_direct_encode() -> None:
    env = gym.make("Pendulum-v1")
    model = model_of(env)
    wrapped = LatentObservation(env, model)
    latent, _ = wrapped.reset(seed=3)
    real, _ = gym.make("Pendulum-v1").reset(seed=3)
    with torch.no_grad():
        expected = model.encode(torch.as_tensor(real)[None])[0].numpy()
    np.testing.assert_array_equal(latent, expected)
    assert latent.dtype == np.float32 and wrapped.observation_space.contains(latent)
    assert wrapped.observation_space == model.latent_space
    assert wrapped.action_space == env.action_space


def test_latent_observation_takes_dicts_of_float64() -> None:
    env = TwoBoxes()
    model = model_of(env)
    latent, *_ = LatentObservation(env, model).step(np.zeros(2))
    batch = {key: value[None] for key, value in env.step(np.zeros(2))[0].items()}
    with torch.no_grad():
        expected = model.encode(model.preprocess(batch))[0].numpy()
    np.testing.assert_array_equal(latent, expected)


@pytest.mark.parametrize("regularizer", ["simnorm", "none"])
def test_latent_observation_passes_the_env_checker_of_sb3(regularizer: str) -> None:
    env = gym.make("MountainCarContinuous-v0").unwrapped
    check_env(LatentObservation(env, model_of(env, regularizer=regularizer)))


def test_latent_observation_keeps_no_graph_and_leaves_the_model_alone() -> None:
    env = gym.make("Pendulum-v1")
    model = model_of(env).train()
    LatentObservation(env, model).reset(seed=0)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_latent_observation_refuses_other_spaces() -> None:
    pendulum = gym.make("Pendulum-v1")
    with pytest.raises(ValueError, match="`env.observation_space` must be the world model's"):
        LatentObservation(gym.make("MountainCarContinuous-v0"), model_of(pendulum))
    with pytest.raises(ValueError, match="`env.observation_space` must be the world model's"):
        LatentObservation(pendulum, model_of(TwoBoxes()))
    bare = WorldModel(WorldModelConfig.preset("1M", observation_dim=3, action_dim=1))  # [-1, 1]
    with pytest.raises(ValueError, match="`env.action_space` must be .*RescaleAction"):
        LatentObservation(pendulum, bare)
    LatentObservation(gym.wrappers.RescaleAction(pendulum, np.float32(-1), np.float32(1)), bare)


def test_latent_observation_ignores_the_float_type_and_the_bounds_of_observations() -> None:
    bare = WorldModel(WorldModelConfig.preset("1M", observation_dim=5, action_dim=2))
    env = gym.wrappers.FlattenObservation(TwoBoxes())
    assert env.observation_space != bare.observation_space
    assert env.action_space.dtype != bare.action_space.dtype
    LatentObservation(env, bare)


def test_a_policy_on_latents_is_evaluated_on_the_real_env() -> None:
    env = LatentObservation(Monitor(gym.make("Pendulum-v1")), model_of(gym.make("Pendulum-v1")))
    model = PPO("MlpPolicy", env, n_steps=64, device="cpu", seed=0).learn(64)
    mean, std = evaluate_policy(model, env, n_eval_episodes=2)
    assert -2000.0 < mean < 0.0 and std >= 0.0


# In the latent env


def latent_env(num_envs: int = 4, horizon: int = 5, **kwargs: Any) -> LatentVectorEnv:
    real = gym.make("Pendulum-v1")
    start = np.stack([real.reset(seed=seed)[0] for seed in range(20)])
    return LatentVectorEnv(model_of(real), start, num_envs=num_envs, horizon=horizon, **kwargs)


def test_the_adapter_of_a_latent_env_equals_its_numpy_face() -> None:
    env, face = as_sb3_vec_env(latent_env()), latent_env().numpy()
    assert env.observation_space == face.single_observation_space
    assert env.action_space == face.single_action_space
    env.seed(3)
    np.testing.assert_array_equal(env.reset(), face.reset(seed=3)[0])
    rng = np.random.default_rng(0)
    for t in range(1, 12):
        actions = rng.uniform(-2, 2, (4, 1)).astype(np.float32)
        latents, rewards, dones, infos = env.step(actions)
        expected = face.step(actions)
        np.testing.assert_array_equal(latents, expected[0])
        np.testing.assert_array_equal(rewards, expected[1])
        assert rewards.dtype == np.float32
        # The horizon, 5 steps, is a truncation.
        assert dones.tolist() == [t % 5 == 0] * 4
        for i, info in enumerate(infos):
            assert info["TimeLimit.truncated"] == (t % 5 == 0)
            assert info["continue_prob"] == 1.0
            if t % 5 == 0:
                last = info["terminal_observation"]
                np.testing.assert_array_equal(last, expected[4]["final_obs"][i])
                assert not np.array_equal(last, latents[i])


def test_a_latent_env_that_does_not_reset_in_the_same_step_is_refused() -> None:
    with pytest.raises(ValueError, match="got AutoresetMode.DISABLED"):
        as_sb3_vec_env(latent_env(autoreset_mode=AutoresetMode.DISABLED))


def test_attributes_of_a_latent_env_are_read_and_set_on_it() -> None:
    latent = latent_env()
    env = as_sb3_vec_env(latent)
    assert env.get_attr("world_model", indices=0) == [latent.world_model]
    env.set_attr("horizon", 2)
    assert latent.horizon == 2 and env.get_attr("horizon") == [2] * 4
    env.reset()
    env.step(np.zeros((4, 1)))
    assert env.step(np.zeros((4, 1)))[2].all()


def test_a_wrapped_numpy_face_is_taken_too() -> None:
    env = as_sb3_vec_env(RecordEpisodeStatistics(latent_env(horizon=2).numpy()))
    env.reset()
    env.step(np.zeros((4, 1)))
    infos = env.step(np.zeros((4, 1)))[3]
    assert [info["episode"]["l"] for info in infos] == [2] * 4


def test_latents_of_a_real_env_are_those_that_the_latent_env_starts_from() -> None:
    real = gym.make("Pendulum-v1")
    latent = latent_env(num_envs=1)
    z, _ = latent.reset(options={"observations": real.reset(seed=11)[0][None]})
    shown, _ = LatentObservation(real, latent.world_model).reset(seed=11)
    np.testing.assert_array_equal(shown, z[0].numpy())


def test_ppo_trained_on_latents_is_evaluated_on_the_real_env() -> None:
    latent = latent_env()
    weights = [parameter.clone() for parameter in latent.world_model.parameters()]
    env = VecMonitor(as_sb3_vec_env(latent))
    model = PPO("MlpPolicy", env, n_steps=32, batch_size=64, seed=0, device="cpu").learn(256)
    assert np.mean([episode["l"] for episode in model.ep_info_buffer]) == 5
    real = LatentObservation(Monitor(gym.make("Pendulum-v1")), latent.world_model)
    returns, lengths = evaluate_policy(model, real, 2, return_episode_rewards=True)
    assert lengths == [200, 200] and max(returns) < 0.0
    after = latent.world_model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))


def test_sac_trained_on_latents_is_evaluated_on_several_real_envs() -> None:
    latent = latent_env()
    model = SAC("MlpPolicy", as_sb3_vec_env(latent), learning_starts=20, seed=0, device="cpu")
    model.learn(80)

    def shown() -> gym.Env:
        return LatentObservation(Monitor(gym.make("Pendulum-v1")), latent.world_model)

    returns, _ = evaluate_policy(model, DummyVecEnv([shown] * 2), 2, return_episode_rewards=True)
    assert len(returns) == 2 and max(returns) < 0.0


def test_a_multi_task_model_encodes_with_the_task_of_the_env() -> None:
    env = gym.make("Pendulum-v1")
    model = model_of(env, num_tasks=2)
    latents = [LatentObservation(env, model, task=task).reset(seed=0)[0] for task in (0, 1)]
    assert not np.array_equal(*latents)
