"""PWM as an SB3 algorithm: every kind of env, frozen models, callbacks, logs, and nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor, VecNormalize

import pwm_gym
from pwm_gym import PWM, LatentVectorEnv, UnsafeFileError, WorldModel, WorldModelConfig
from pwm_gym.envs.gl_backend import choose_gl_backend

# SubprocVecEnv forks; from Python 3.12 on, that warns in a process with threads.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

BOXES = spaces.Dict(
    {
        "box": spaces.Box(-2.0, 2.0, (2, 3), np.float64),
        "angle": spaces.Box(-np.pi, np.pi, (1,), np.float32),
        "gear": spaces.Discrete(3),
    }
)
SPACES: dict[str, tuple[spaces.Space | None, spaces.Space | None]] = {
    "Box": (None, None),
    "Dict": (BOXES, None),
    "MultiDiscrete": (spaces.MultiDiscrete([3, 2]), None),
    "Discrete": (spaces.Discrete(4), None),
    "MultiBinary": (spaces.MultiBinary(3), None),
    "float64": (spaces.Box(-1e3, 1e3, (4,), np.float64), spaces.Box(-1.0, 1.0, (1,), np.float64)),
    "matrix observations": (spaces.Box(-1.0, 1.0, (2, 2), np.float32), None),
    "matrix actions": (None, spaces.Box(np.full((2, 2), -3, np.float32), np.array([[1, 2], [3, 4]], np.float32))),
}
TASKS = ["Pendulum-v1", "HalfCheetah-v5", "Hopper-v5", "pwm_gym/cartpole-swingup-v0"]


def latent_env(num_envs: int = 4, horizon: int = 3, seed: int = 0, **config: Any) -> LatentVectorEnv:
    """Make an untrained model of `Toy`'s spaces into an env."""
    torch.manual_seed(seed)
    sizes = {"latent_dim": 16, "encoder_dim": 16, "mlp_dim": 16, **config}
    action_space = spaces.Box(-2.0, 2.0, (2,), np.float32)
    model = WorldModel(WorldModelConfig(3, 2, **sizes), spaces.Box(-1.0, 1.0, (3,), np.float32), action_space)
    return LatentVectorEnv(model, np.random.default_rng(seed).normal(size=(10, 3)), num_envs, horizon)


@pytest.fixture
def real_env(toy: Any) -> Callable[[], gym.Env]:
    """Make real envs of the spaces of `latent_env`."""
    return lambda **kwargs: toy(action_space=spaces.Box(-2.0, 2.0, (2,), np.float32), **kwargs)


# The contract


@pytest.mark.parametrize("case", [*SPACES, *TASKS])
def test_learns_predicts_and_survives_a_file(case: str, make_agent: Any, toy: Any, differences: Any, tmp_path: Any):
    def make() -> gym.Env:
        return gym.make(case, max_episode_steps=8) if case in TASKS else toy(*SPACES[case])

    agent = make_agent(make())
    assert agent.learn(25) is agent
    assert (agent.num_timesteps, agent._n_updates) == (25, 3)  # after steps 15, 20 and 25

    env = make()
    observation, _ = env.reset(seed=0)
    action, state = agent.predict(observation, deterministic=True)
    assert state is None
    assert env.action_space.contains(action)
    np.testing.assert_array_equal(action, agent.predict(observation, deterministic=True)[0])
    batch = {k: np.stack([v] * 3) for k, v in observation.items()} if isinstance(observation, dict) else None
    actions, _ = agent.predict(np.stack([observation] * 3) if batch is None else batch, deterministic=True)
    assert actions.shape == (3, *env.action_space.shape)
    np.testing.assert_allclose(actions, np.stack([action] * 3), rtol=1e-5, atol=1e-6)

    agent.save(tmp_path / "agent")
    loaded = PWM.load(tmp_path / "agent", env=make(), device="cpu")
    assert differences(agent, loaded) == []
    np.testing.assert_array_equal(loaded.predict(observation, deterministic=True)[0], action)
    assert (loaded.observation_space, loaded.action_space) == (agent.observation_space, agent.action_space)
    loaded.learn(15)
    assert differences(agent, loaded) != []


def test_random_actions_span_the_action_space_and_stay_inside(make_agent: Any):
    agent = make_agent(gym.make("Pendulum-v1"), learning_starts=0)
    observation, _ = gym.make("Pendulum-v1").reset(seed=0)
    actions = np.stack([agent.predict(observation)[0] for _ in range(200)])
    assert np.abs(actions).max() <= 2.0
    assert actions.std() > 0.3


@forks
@pytest.mark.parametrize("kind", ["three envs", "subprocesses", "VectorEnv", "VecNormalize", "VecMonitor"])
def test_learns_in_several_envs(kind: str, make_agent: Any, toy: Any):
    if kind == "three envs":
        env: Any = make_vec_env(toy, n_envs=3)
    elif kind == "subprocesses":
        env = make_vec_env(toy, 2, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"})
    elif kind == "VectorEnv":
        env = gym.make_vec("Pendulum-v1", 2, vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP})
    else:
        wrapper: Any = {"VecNormalize": VecNormalize, "VecMonitor": VecMonitor}[kind]
        env = wrapper(DummyVecEnv([toy, toy]))
    agent = make_agent(env, gradient_steps=-1)
    n = env.num_envs
    agent.learn(20 * n)
    assert agent.num_timesteps == 20 * n
    after = 5 * n * sum(5 * n * k > 10 for k in range(1, 5))  # as many as steps, after the 10th
    assert agent._n_updates == after
    assert (agent.replay_buffer.n_envs, agent.replay_buffer.size()) == (n, 20)
    single = gym.make("Pendulum-v1", max_episode_steps=4) if kind == "VectorEnv" else toy()
    evaluate_policy(agent, single, n_eval_episodes=1, warn=False)
    env.close()


def test_vector_env_must_reset_in_the_same_step(make_agent: Any):
    with pytest.raises(ValueError, match=r"AutoresetMode.SAME_STEP, got AutoresetMode.NEXT_STEP.*Use"):
        make_agent(gym.make_vec("Pendulum-v1", 2))


def test_vec_normalize_reaches_the_model_and_imagined_starts(make_agent: Any, toy: Any):
    space = spaces.Box(90.0, 110.0, (3,), np.float32)
    agent = make_agent(VecNormalize(DummyVecEnv([lambda: toy(space)]))).learn(40)
    raw = agent.replay_buffer.observations[:40, 0]
    assert raw.mean() > 90.0  # stored as the env gave them
    windows = agent.replay_buffer.sample_windows(8, 2, np.random.default_rng(0), agent._vec_normalize_env)
    assert windows.observations.abs().max() < 5.0
    z, _ = agent.make_latent_env(num_envs=16).reset(seed=0)
    known = agent.world_model.encode(agent.world_model.preprocess(agent._vec_normalize_env.normalize_obs(raw)))
    assert torch.cdist(z, known).min(1).values.max() < 1e-3


def test_termination_head_is_switched_on_and_trained_where_episodes_terminate(make_agent: Any, toy: Any):
    head = "policy.actor.world_model.termination_head"
    for env in (gym.make("Hopper-v5"), toy(terminates=True)):
        agent = make_agent(env)
        before = copy.deepcopy(agent.world_model.termination_head.state_dict())
        agent.learn(60)
        assert agent.replay_buffer.dones[:60].sum() > 0
        assert agent.world_model.predicts_termination, head
        assert agent._metrics["termination_loss"] > 0.0
        after = agent.world_model.termination_head.state_dict()
        assert any(not torch.equal(before[k], after[k]) for k in before)
        latent = agent.make_latent_env(num_envs=16, horizon=4)
        latent.reset(seed=0)
        continue_prob = latent.step(torch.zeros(latent.action_space.shape))[4]["continue_prob"]
        assert ((continue_prob > 0.0) & (continue_prob < 1.0)).all()


def test_termination_head_stays_off_where_episodes_are_only_cut(make_agent: Any, toy: Any):
    agent = make_agent(toy(terminates=False)).learn(40)
    assert agent.replay_buffer.dones[:40].sum() > 0
    assert not agent.world_model.predicts_termination
    assert "termination_loss" not in agent._metrics


def test_equal_seeds_give_bit_equal_runs_and_other_seeds_do_not(make_agent: Any, toy: Any, differences: Any):
    runs = [make_agent(make_vec_env(toy, 2), seed=seed, ent_coef="auto").learn(60) for seed in (3, 3, 4)]
    assert runs[0]._n_updates == 5
    assert differences(runs[0], runs[1]) == []
    assert torch.equal(runs[0].log_ent_coef, runs[1].log_ent_coef)
    assert len(differences(runs[0], runs[2])) > 50


def test_an_agent_can_be_seeded_again(make_agent: Any, toy: Any):
    agent = make_agent(toy()).learn(20)
    observation = agent.observation_space.sample()
    agent.set_random_seed(7)
    first = [agent.predict(observation)[0] for _ in range(3)]
    agent.set_random_seed(7)
    np.testing.assert_array_equal([agent.predict(observation)[0] for _ in range(3)], first)
    assert not np.array_equal(first[0], first[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}},
        {"train_freq": (1, "episode"), "gradient_steps": -1},
        {"ent_coef": "auto_0.1"},
        {"action_noise": NormalActionNoise(np.zeros(2), np.full(2, 0.1))},
        {"detach_input": True, "tau": 1.0, "critic_epochs": 2},
        {"gradient_steps": 3},
        {"use_sde": True, "sde_sample_freq": 2},
        {"learning_starts": 0, "train_freq": 1},
        {"policy_kwargs": {"net_arch": [16], "world_model_kwargs": {"latent_dim": 8, "regularizer": "spectral_norm"}}},
    ],
    ids=str,
)
def test_options_run(changes: dict[str, Any], make_agent: Any, toy: Any):
    agent = make_agent(toy(), **changes).learn(24)
    assert agent._n_updates > 0
    assert all(torch.isfinite(value) for value in agent._metrics.values())


def test_the_papers_settings_are_a_preset(make_agent: Any, toy: Any):
    agent = PWM("MlpPolicy", toy(), **PWM.PAPER, _init_setup_model=False)
    assert (agent.horizon, agent.rho, agent.tau, agent.detach_input) == (16, 0.99, 1.0, True)
    assert agent.policy_kwargs["world_model_kwargs"] == {"size": "48M", "reward_in_task_units": False}


# A frozen model


def test_training_in_a_latent_env_leaves_the_model_untouched_and_counts_imagined_steps(make_agent: Any, real_env: Any):
    env = latent_env(num_envs=4, horizon=3, regularizer="spectral_norm")
    env.world_model.reward_head.requires_grad_(False)
    before = copy.deepcopy(env.world_model.state_dict())
    flags = [p.requires_grad for p in env.world_model.parameters()]
    agent = make_agent(env)
    actor = copy.deepcopy(agent.actor.latent_actor.state_dict())
    agent.learn(60)
    assert agent.world_model is env.world_model
    assert (agent.num_timesteps, agent._n_updates) == (60, 5)  # 4 envs x 3 steps for each update
    assert all(torch.equal(before[k], v) for k, v in env.world_model.state_dict().items())
    assert [p.requires_grad for p in env.world_model.parameters()] == flags
    assert all(p.grad is None for p in env.world_model.parameters())
    assert any(not torch.equal(actor[k], v) for k, v in agent.actor.latent_actor.state_dict().items())

    real = real_env()
    assert (agent.observation_space, agent.action_space) == (real.observation_space, real.action_space)
    action, _ = agent.predict(real.reset(seed=0)[0], deterministic=True)
    assert real.action_space.contains(action)
    with pytest.raises(ValueError, match="observation shape"):
        agent.predict(np.zeros(16, np.float32))  # a latent


def test_every_update_in_a_latent_env_counts_its_steps(make_agent: Any):
    agent = make_agent(latent_env(), gradient_steps=2).learn(48)
    assert (agent.num_timesteps, agent._n_updates) == (48, 4)
    agent = make_agent(latent_env(), gradient_steps=-1).learn(24)
    assert (agent.num_timesteps, agent._n_updates) == (24, 2)


@pytest.mark.parametrize("face", ["torch", "numpy", "sb3"])
def test_every_face_of_a_latent_env_is_recognised(face: str, make_agent: Any):
    env = latent_env()
    faces = {"torch": env, "numpy": env.numpy(), "sb3": VecMonitor(pwm_gym.as_sb3_vec_env(env))}
    agent = make_agent(faces[face])
    assert agent.latent_env is env
    assert agent.observation_space.shape == (3,)


def test_equal_seeds_give_equal_runs_in_a_latent_env(make_agent: Any, differences: Any):
    runs = [make_agent(latent_env(), seed=seed).learn(48) for seed in (1, 1, 2)]
    assert differences(runs[0], runs[1]) == []
    assert differences(runs[0], runs[2]) != []


def test_an_agent_moves_between_real_and_latent_envs(make_agent: Any, real_env: Any, differences: Any):
    agent = make_agent(real_env()).learn(20)
    model = copy.deepcopy(agent.world_model.state_dict())
    steps = agent.num_timesteps
    agent.set_env(agent.make_latent_env(num_envs=4, horizon=3))
    agent.learn(24, reset_num_timesteps=False)
    assert agent.num_timesteps == steps + 24
    assert all(torch.equal(model[k], v) for k, v in agent.world_model.state_dict().items())
    agent.set_env(real_env())
    agent.learn(10, reset_num_timesteps=False)
    assert agent.replay_buffer.size() == 30
    assert any(not torch.equal(model[k], v) for k, v in agent.world_model.state_dict().items())


def test_a_policy_from_a_frozen_model_goes_on_in_the_real_env(make_agent: Any, real_env: Any):
    agent = make_agent(latent_env()).learn(24)
    before = copy.deepcopy(agent.world_model.state_dict())
    agent.set_env(real_env())
    agent.learn(20)
    assert agent.replay_buffer.size() == 20
    changed = [k for k, v in agent.world_model.state_dict().items() if not torch.equal(before[k], v)]
    assert len(changed) > 10  # the optimizer works on the model that the policy uses


def act_with(agent: PWM, observation: np.ndarray, latest: bool) -> np.ndarray:
    """Give the mean action, in the env's units, of the latest or of the averaged weights."""
    actor = agent.policy.actor
    encoder, latent_actor = actor.world_model.encoder, actor.latent_actor
    if not latest:
        encoder, latent_actor = actor.average.copies["encoder"], actor.average.copies["latent_actor"]
    with torch.no_grad():
        action = latent_actor(encoder(actor.world_model.preprocess(observation[None])))[0][0]
    return agent.policy.unscale_action(action.numpy())


def test_deterministic_actions_come_from_averaged_weights(make_agent: Any, real_env: Any, tmp_path: Any):
    agent = make_agent(real_env()).learn(40)
    observation = agent.observation_space.sample()
    action = agent.predict(observation, deterministic=True)[0]
    np.testing.assert_allclose(action, act_with(agent, observation, latest=False), rtol=1e-5, atol=1e-6)
    assert np.abs(action - act_with(agent, observation, latest=True)).max() > 1e-4
    agent.save(tmp_path / "agent")
    loaded = PWM.load(tmp_path / "agent")
    np.testing.assert_array_equal(loaded.predict(observation, deterministic=True)[0], action)


def test_normalised_observations_travel_with_the_agent(make_agent: Any, real_env: Any, tmp_path: Any):
    sizes = {"latent_dim": 16, "encoder_dim": 16, "mlp_dim": 16, "num_bins": 21, "normalize_observations": True}
    agent = make_agent(real_env(), policy_kwargs={"world_model_kwargs": sizes}).learn(40)
    assert agent.world_model.normalizer.mean.abs().min() > 0.0
    agent.save(tmp_path / "agent")
    loaded = PWM.load(tmp_path / "agent")
    observation = agent.observation_space.sample()
    action = agent.predict(observation, deterministic=True)[0]
    np.testing.assert_allclose(action, act_with(agent, observation, latest=False), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(loaded.predict(observation, deterministic=True)[0], action)
    loaded.world_model.normalizer.merge(torch.ones(8, len(observation)))
    with pytest.raises(ValueError, match="got another model"):  # equal weights, but other statistics
        agent.set_env(LatentVectorEnv(loaded.world_model, num_envs=4))


def test_latest_weights_act_in_a_frozen_model_and_without_a_share(make_agent: Any, real_env: Any):
    agent = make_agent(real_env()).learn(40)
    agent.set_env(agent.make_latent_env(num_envs=4, horizon=3))
    agent.learn(12, reset_num_timesteps=False)
    plain = make_agent(real_env(), policy_kwargs={"averaged_share": 0.0}).learn(40)
    assert plain.policy.actor.average is None
    for one in (agent, plain):
        observation = one.observation_space.sample()
        action = one.predict(observation, deterministic=True)[0]
        np.testing.assert_allclose(action, act_with(one, observation, latest=True), rtol=1e-5, atol=1e-6)


def test_files_of_frozen_agents_open_with_either_kind_of_env(make_agent: Any, real_env: Any, tmp_path: Any):
    env = latent_env()
    agent = make_agent(env).learn(24)
    observation = agent.observation_space.sample()
    action = agent.predict(observation, deterministic=True)[0]
    agent.save(tmp_path / "agent")

    latent = PWM.load(tmp_path / "agent", env=env)
    np.testing.assert_array_equal(latent.predict(observation, deterministic=True)[0], action)
    assert latent.world_model is env.world_model
    assert latent.learn(12, reset_num_timesteps=False).num_timesteps == 36
    latent.set_env(real_env())
    assert latent.learn(10).replay_buffer.size() == 10

    for load in (
        lambda: PWM.load(tmp_path / "agent", env=make_vec_env(real_env, 2), device="cpu"),
        lambda: PWM.load(tmp_path / "agent", device="cpu"),
    ):
        real = load()
        np.testing.assert_array_equal(real.predict(observation, deterministic=True)[0], action)
        if real.env is None:
            real.set_env(make_vec_env(real_env, 2))
        assert real.learn(20).replay_buffer.n_envs == 2


def test_another_world_model_is_refused(make_agent: Any, tmp_path: Any):
    agent = make_agent(latent_env(seed=0))
    agent.save(tmp_path / "agent")
    for refuse in (lambda: agent.set_env(latent_env(seed=1)), lambda: PWM.load(tmp_path / "agent", latent_env(seed=1))):
        with pytest.raises(ValueError, match=r"agent's own world model, got another.*make_latent_env"):
            refuse()
    agent.set_env(latent_env(seed=0, num_envs=2))  # an equal one
    assert agent.learn(12).num_timesteps == 12


def test_other_number_of_envs_than_the_replay_buffer_holds_is_refused(make_agent: Any, real_env: Any):
    agent = make_agent(real_env()).learn(20)
    agent.set_env(agent.make_latent_env(num_envs=4))
    with pytest.raises(ValueError, match=r"expected 1 envs, as many as the replay buffer holds, got 2.*Give"):
        agent.set_env(make_vec_env(real_env, 2))
    assert agent.latent_env is not None


@pytest.mark.filterwarnings("ignore:Training and eval env are not of the same type")  # indeed
def test_eval_callback_scores_a_frozen_agent_on_the_real_env(make_agent: Any, real_env: Any, tmp_path: Any):
    evaluate = EvalCallback(
        Monitor(real_env()), eval_freq=6, n_eval_episodes=2, best_model_save_path=str(tmp_path), verbose=0
    )
    agent = make_agent(latent_env()).learn(48, callback=evaluate)
    assert (agent.num_timesteps, evaluate.n_calls) == (48, 12)
    assert np.isfinite(evaluate.best_mean_reward)
    PWM.load(tmp_path / "best_model", device="cpu").predict(agent.observation_space.sample())


def test_make_latent_env_starts_from_replayed_observations(make_agent: Any, real_env: Any):
    agent = make_agent(real_env()).learn(20)
    env = agent.make_latent_env(num_envs=7, horizon=2)
    assert (env.num_envs, env.horizon, env.world_model) == (7, 2, agent.world_model)
    assert agent.make_latent_env().horizon == agent.horizon
    z, _ = env.reset(seed=0)
    known = agent.world_model.encode(agent.world_model.preprocess(agent.replay_buffer.observations[:20, 0]))
    assert torch.cdist(z, known).min(1).values.max() < 1e-3
    given = torch.full((1, 16), 0.125)
    z, _ = agent.make_latent_env(num_envs=2, latents=given).reset(seed=0)
    assert torch.equal(z, given.expand(2, -1))


@pytest.mark.skipif(choose_gl_backend() == "disable", reason="no OpenGL library on this machine")
def test_stored_physics_states_draw_imagined_rollouts(make_agent: Any):
    task = "pwm_gym/cartpole-swingup-v0"
    agent = make_agent(gym.make(task), replay_buffer_kwargs={"store_physics_state": True}).learn(20)
    camera = gym.make(task, render_mode="rgb_array", height=32, width=48)
    env = agent.make_latent_env(num_envs=2, horizon=4, render_mode="rgb_array", render_env=camera)
    env.reset(seed=0)
    env.step(torch.zeros(2, 1))
    frames = env.render()
    assert [frame.shape for frame in frames] == [(32, 48, 3)] * 2


# Callbacks and logs


class Recorder(BaseCallback):
    """Write down which hook was called at which step, and answer as told from step `stop` on."""

    def __init__(self, stop: int | None = None, answer: Any = False) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []
        self.stop, self.answer = stop, answer

    def _note(self, name: str) -> None:
        self.calls.append((name, self.num_timesteps))

    def _init_callback(self) -> None:
        self._note("init")

    def _on_training_start(self) -> None:
        self._note("training_start")

    def _on_rollout_start(self) -> None:
        self._note("rollout_start")

    def _on_step(self) -> Any:
        self._note("step")
        assert {"self", "callback"} <= self.locals.keys()
        return self.answer if self.stop is not None and self.num_timesteps >= self.stop else True

    def _on_rollout_end(self) -> None:
        self._note("rollout_end")

    def _on_training_end(self) -> None:
        self._note("training_end")


@pytest.mark.parametrize("stop", [None, 13])
def test_callbacks_are_called_as_in_sac(stop: int | None, make_agent: Any, toy: Any):
    ours, theirs = Recorder(stop), Recorder(stop)
    make_agent(make_vec_env(toy, 2)).learn(20, callback=ours)
    SAC("MlpPolicy", make_vec_env(toy, 2), train_freq=5, learning_starts=100, device="cpu").learn(20, callback=theirs)
    assert ours.calls == theirs.calls
    assert len(ours.calls) > 10


@pytest.mark.parametrize("answer", [False, np.bool_(0), torch.tensor(False), 0], ids=repr)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_falsy_answer_stops_training(answer: Any, frozen: bool, make_agent: Any, toy: Any):
    recorder = Recorder(stop=12, answer=answer)
    agent = make_agent(latent_env() if frozen else toy()).learn(100, callback=recorder)
    assert agent.num_timesteps == 12
    assert recorder.calls[-2:] == [("step", 12), ("training_end", 12)]


@pytest.mark.filterwarnings("ignore::tqdm.TqdmExperimentalWarning")
@pytest.mark.parametrize("frozen", [False, True])
def test_progress_bar_reaches_the_end(frozen: bool, make_agent: Any, toy: Any, capsys: pytest.CaptureFixture[str]):
    make_agent(latent_env() if frozen else toy()).learn(60, progress_bar=True)
    assert "60/60" in capsys.readouterr().out


def test_logs_have_the_keys_that_people_plot(make_agent: Any, toy: Any, tmp_path: Any):
    agent = make_agent(Monitor(toy()), tensorboard_log=str(tmp_path / "board"))
    agent.learn(40, log_interval=1, tb_log_name="run")
    (events,) = (tmp_path / "board" / "run_1").iterdir()
    plotted = ["rollout/ep_rew_mean", "rollout/ep_len_mean", "time/fps", "train/learning_rate"]
    losses = [f"train/{part}_loss" for part in ("actor", "critic", "model", "reward", "consistency")]
    assert [key for key in plotted + losses if key.encode() not in events.read_bytes()] == []

    agent.set_logger(configure(str(tmp_path / "csv"), ["csv"]))
    agent.learn(40, log_interval=1).logger.close()
    rows = (tmp_path / "csv" / "progress.csv").read_text().splitlines()
    header, last = rows[0].split(","), rows[-1].split(",")
    table = dict(zip(header, last, strict=True))
    assert set(plotted + losses + ["time/total_timesteps", "train/n_updates"]) <= table.keys()
    assert float(table["time/total_timesteps"]) == 40
    assert float(table["rollout/ep_len_mean"]) == 8
    assert -1.0 < float(table["rollout/ep_rew_mean"]) / 8 < 0.0
    annealed = (1.0 + (float(table["train/n_updates"]) - 1.0) / 2_500) ** -0.5
    assert float(table["train/learning_rate"]) == pytest.approx(agent.learning_rate * annealed, rel=1e-4)


def test_frozen_training_logs_its_losses(make_agent: Any, tmp_path: Any):
    agent = make_agent(latent_env())
    agent.set_logger(configure(str(tmp_path), ["csv"]))
    agent.learn(12 * 30, log_interval=1).logger.close()
    header = (tmp_path / "progress.csv").read_text().splitlines()[0].split(",")
    assert {"train/actor_loss", "train/critic_loss", "train/imagined_return", "time/total_timesteps"} <= set(header)


def test_success_rate_is_logged_where_the_env_tells_success(make_agent: Any, toy: Any, tmp_path: Any):
    class Telling(gym.Wrapper):
        def step(self, action: Any) -> Any:
            *result, info = super().step(action)
            return *result, {**info, "is_success": True}

    agent = make_agent(Telling(toy()))
    agent.set_logger(configure(str(tmp_path), ["csv"]))
    agent.learn(20, log_interval=1).logger.close()
    assert "rollout/success_rate" in (tmp_path / "progress.csv").read_text()


def test_checkpoints_with_replay_buffer_can_be_gone_on_from(make_agent: Any, toy: Any, tmp_path: Any):
    callback = CheckpointCallback(20, str(tmp_path), save_replay_buffer=True)
    make_agent(toy()).learn(40, callback=callback)
    loaded = PWM.load(tmp_path / "rl_model_20_steps", env=toy(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "rl_model_replay_buffer_20_steps.pkl")
    assert loaded.num_timesteps == 20
    assert loaded.replay_buffer.size() == 19  # SB3 calls back before it stores the step
    loaded.learn(10, reset_num_timesteps=False)
    assert (loaded.num_timesteps, loaded.replay_buffer.size()) == (30, 29)


def test_eval_callback_keeps_the_best_policy(make_agent: Any, toy: Any, differences: Any, tmp_path: Any):
    kept: list[PWM] = []

    class Copy(BaseCallback):
        def _on_step(self) -> bool:
            kept.append(copy.deepcopy(self.model.policy.state_dict()))
            return True

    evaluate = EvalCallback(
        Monitor(toy()),
        callback_on_new_best=Copy(),
        eval_freq=10,
        n_eval_episodes=2,
        best_model_save_path=str(tmp_path),
        log_path=str(tmp_path),
        verbose=0,
    )
    make_agent(toy()).learn(60, callback=evaluate)
    best = PWM.load(tmp_path / "best_model", device="cpu").policy.state_dict()
    assert all(torch.equal(best[k], v) for k, v in kept[-1].items())
    results = np.load(tmp_path / "evaluations.npz")
    assert results["timesteps"].tolist() == [10, 20, 30, 40, 50, 60]
    assert evaluate.best_mean_reward == results["results"].mean(1).max()


def test_a_learning_rate_schedule_is_followed_and_its_file_asks_for_trust(make_agent: Any, toy: Any, tmp_path: Any):
    arguments: dict[str, Any] = {"learning_rate": lambda remaining: 1e-3 * remaining, "ent_coef": "auto"}
    agent = make_agent(toy(), **arguments, annealing=None).learn(40)
    rate = 1e-3 * agent._current_progress_remaining
    assert agent._current_progress_remaining == 0.0
    agent.learn(20, callback=Recorder(stop=11))  # stopped in the middle: the last update was at step 10 of 20
    for optimizer in (agent.policy.actor_optimizer, agent.policy.critic_optimizer, agent.ent_coef_optimizer):
        assert optimizer.param_groups[0]["lr"] == rate
    agent.learn(40, callback=Recorder(stop=31))  # the last update was at step 30, a quarter before the end
    for optimizer in (agent.policy.actor_optimizer, agent.policy.critic_optimizer, agent.ent_coef_optimizer):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2.5e-4)
    assert agent.policy.model_optimizer.param_groups[1]["lr"] == 5e-4

    agent.save(tmp_path / "agent")
    with pytest.raises(UnsafeFileError, match=r"got pickled ones for 'learning_rate'.*trust_pickle=True"):
        PWM.load(tmp_path / "agent")
    assert PWM.load(tmp_path / "agent", device="cpu", trust_pickle=True).learning_rate(0.5) == 5e-4
    for replaced in ({"custom_objects": {"learning_rate": 1e-4}}, {"learning_rate": 1e-4}):
        assert PWM.load(tmp_path / "agent", device="cpu", **replaced).lr_schedule(1.0) == 1e-4


def _learning_rates(agent: PWM) -> dict[str, float]:
    names = ["actor_optimizer", "critic_optimizer", "model_optimizer"]
    return {name: getattr(agent.policy, name).param_groups[-1]["lr"] for name in names}


def test_learning_rates_and_entropy_weight_fall_with_the_updates(make_agent: Any, toy: Any):
    agent = make_agent(toy(), annealing=3, train_freq=1, learning_starts=8).learn(18)
    assert agent._n_updates == 10
    before_the_last = (1.0 + 9 / 3) ** -0.5
    assert _learning_rates(agent) == pytest.approx(dict.fromkeys(_learning_rates(agent), 5e-4 * before_the_last))
    assert float(agent.ent_coef_tensor) == pytest.approx(0.03)  # as it was given; what counts is annealed
    assert float(agent._entropy_coefficient(torch.zeros(()))) == pytest.approx(0.03 * (1.0 + 10 / 3) ** -0.5)

    agent.learn(10)  # on and on: another call doesn't begin anew
    assert _learning_rates(agent)["actor_optimizer"] < 5e-4 * before_the_last


def test_without_annealing_learning_rates_stay(make_agent: Any, toy: Any):
    agent = make_agent(toy(), annealing=None).learn(40)
    assert set(_learning_rates(agent).values()) == {5e-4}
    assert float(agent._entropy_coefficient(torch.zeros(()))) == pytest.approx(0.03)


def test_in_a_frozen_model_nothing_is_annealed(make_agent: Any):
    agent = make_agent(latent_env(), annealing=1).learn(60)
    assert agent._n_updates > 2
    assert _learning_rates(agent)["actor_optimizer"] == 5e-4


# Nothing left behind


def test_learning_changes_nothing_global(make_agent: Any, toy: Any):
    def settings() -> tuple[Any, ...]:
        return (
            torch.get_num_threads(),
            torch.get_float32_matmul_precision(),
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            np.geterr(),
        )

    before = settings()
    agent = make_agent(toy()).learn(20)
    assert settings() == before
    assert all(p.requires_grad for p in agent.world_model.parameters())
    assert all(not p.requires_grad for p in agent.policy.critic_target.parameters())
    agent.replay_buffer.sample_starts = None  # an error in the middle of an update
    with pytest.raises(TypeError):
        agent.train(1, 8)
    assert all(p.requires_grad for p in agent.world_model.parameters())
    assert settings() == before


@pytest.mark.parametrize("buffer_class", [ReplayBuffer, NStepReplayBuffer])
def test_a_replay_buffer_class_that_is_given_is_taken_and_n_steps_warned_of(toy: Any, buffer_class: type[ReplayBuffer]):
    with pytest.warns(UserWarning, match="n_steps=3"):
        agent = PWM("MlpPolicy", toy(), n_steps=3, replay_buffer_class=buffer_class)
    assert type(agent.replay_buffer) is buffer_class


def test_arguments_are_not_written_to(toy: Any):
    policy_kwargs = {"net_arch": [8], "world_model_kwargs": {"latent_dim": 8, "encoder_dim": 8, "mlp_dim": 8}}
    replay_buffer_kwargs = {"handle_timeout_termination": True}
    given = copy.deepcopy((policy_kwargs, replay_buffer_kwargs))
    for n_steps in (1, 3):
        PWM("MlpPolicy", toy(), n_steps=n_steps, policy_kwargs=policy_kwargs, replay_buffer_kwargs=replay_buffer_kwargs)
        assert (policy_kwargs, replay_buffer_kwargs) == given
    env = latent_env()
    PWM("MlpPolicy", env, policy_kwargs=policy_kwargs)
    assert (policy_kwargs, replay_buffer_kwargs) == given


# Bad arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"horizon": 0}, "`horizon` must be >= 1, got 0"),
        ({"model_horizon": 0}, "`model_horizon` must be >= 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be >= 1, got 0"),
        ({"model_batch_size": -1}, "`model_batch_size` must be >= 1, got -1"),
        ({"critic_epochs": 0}, "`critic_epochs` must be >= 1, got 0"),
        ({"critic_minibatches": 0}, "`critic_minibatches` must be >= 1, got 0"),
        ({"gamma": 1.5}, r"`gamma` must be in \[0, 1\], got 1.5"),
        ({"gamma": float("nan")}, r"`gamma` must be in \[0, 1\], got nan"),
        ({"td_lambda": -0.1}, r"`td_lambda` must be in \[0, 1\], got -0.1"),
        ({"tau": 2.0}, r"`tau` must be in \[0, 1\], got 2.0"),
        ({"rho": -1.0}, r"`rho` must be in \[0, 1\], got -1.0"),
        ({"annealing": 0}, "`annealing` must be >= 1 update, or None, got 0"),
        ({"ent_coef": "auto_0"}, "initial value in ent_coef='auto_<initial>' must be > 0, got 0.0"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str, make_agent: Any, toy: Any):
    with pytest.raises(ValueError, match=message):
        make_agent(toy(), **arguments)


def test_a_discrete_action_space_is_refused(make_agent: Any):
    with pytest.raises(AssertionError, match=r"only supports .*Box.* but Discrete\(2\) was provided"):
        make_agent(gym.make("CartPole-v1"))


def test_unbounded_actions_are_refused(make_agent: Any, toy: Any):
    with pytest.raises(AssertionError, match="finite lower and upper bound"):
        make_agent(toy(action_space=spaces.Box(-np.inf, np.inf, (1,), np.float32)))


def test_images_are_refused(make_agent: Any, toy: Any):
    pixels = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    with pytest.raises(TypeError, match=r"expected vector observations, got an image space.*give proprioceptive"):
        make_agent(toy(pixels))
    with pytest.raises(TypeError, match="expected vector observations, got an image space"):
        make_agent(toy(spaces.Dict({"box": spaces.Box(-1.0, 1.0, (2,), np.float32), "camera": pixels})))


def test_dict_observations_need_the_multi_input_policy(make_agent: Any, toy: Any):
    with pytest.raises(ValueError, match="You must use `MultiInputPolicy`"):
        make_agent(toy(BOXES), policy="MlpPolicy")


def test_buffers_without_windows_are_refused_before_the_first_step(make_agent: Any, toy: Any):
    env = toy()
    with pytest.raises(TypeError, match=r"expected a SequenceReplayBuffer.*got ReplayBuffer.*Leave"):
        make_agent(env, replay_buffer_class=ReplayBuffer).learn(20)
    assert env.steps == 0


def test_wrong_shapes_are_refused(make_agent: Any, toy: Any):
    agent = make_agent(toy()).learn(20)
    with pytest.raises(ValueError, match=r"Unexpected observation shape \(4,\)"):
        agent.predict(np.zeros(4, np.float32))
    env = agent.make_latent_env(num_envs=2)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"expected actions of shape \(2, 2\), got \(2, 3\)"):
        env.step(torch.zeros(2, 3))


def test_physics_states_can_only_be_stored_where_the_env_tells_them(make_agent: Any, toy: Any):
    with pytest.raises(ValueError, match=r"infos have no 'physics_state'. Use a pwm_gym/<task>-v0 env"):
        make_agent(toy(), replay_buffer_kwargs={"store_physics_state": True}).learn(5)


def test_actions_are_scaled_to_the_envs_units(make_agent: Any, toy: Any):
    wide = toy(action_space=spaces.Box(np.float32(-3.0), np.float32(5.0), (1,)))
    unit = toy(action_space=spaces.Box(-1.0, 1.0, (1,), np.float32))
    observation = unit.observation_space.sample()
    action, unscaled = (make_agent(env).predict(observation, deterministic=True)[0] for env in (wide, unit))
    np.testing.assert_allclose(action, 1.0 + 4.0 * unscaled, rtol=1e-5)


# Learning


@pytest.mark.expensive
def test_the_defaults_learn_to_bring_a_point_home():
    class Point(gym.Env):
        """Push a point on a line to 0 in 25 steps: random actions return -37, the untrained policy less, a PD -1.9."""

        observation_space = spaces.Box(-5.0, 5.0, (2,), np.float32)
        action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple:
            super().reset(seed=seed)
            self.state, self.steps = np.array([self.np_random.uniform(-1.5, 1.5), 0.0], np.float32), 0
            return self.state.copy(), {}

        def step(self, action: np.ndarray) -> tuple:
            self.state[1] = 0.8 * self.state[1] + 0.2 * float(action[0])
            self.state[0] += self.state[1]
            self.steps += 1
            return self.state.copy(), -abs(float(self.state[0])), False, self.steps == 25, {}

    agent = PWM("MlpPolicy", Point(), seed=0, device="cpu").learn(1_000)  # 22 s of one core
    score, _ = evaluate_policy(agent, Monitor(Point()), n_eval_episodes=20)
    assert score > -4.0
