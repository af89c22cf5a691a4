"""Each failure's signature, provoked once."""

import copy
from collections import deque

import numpy as np
import pytest
import torch
from gymnasium import spaces

from pwm_gym import LatentVectorEnv, OfflineDataset, SequenceReplayBuffer
from pwm_gym.agents.diagnosis import DiagnoseCallback, diagnose


@pytest.fixture(scope="module")
def trained():
    """A PWM whose model has learned Pendulum's dynamics a little; tests change copies of it."""
    from pwm_gym import PWM

    kwargs = {"world_model_kwargs": {"latent_dim": 32, "encoder_dim": 32, "mlp_dim": 32}, "net_arch": [32]}
    agent = PWM(
        "MlpPolicy", "Pendulum-v1", learning_starts=400, train_freq=400, gradient_steps=200, batch_size=32, horizon=8,
        model_batch_size=64, policy_kwargs=kwargs, seed=0, device="cpu",
    )  # fmt: skip
    return agent.learn(800)


@pytest.fixture
def agent(trained):
    changed = copy.copy(trained)
    changed.policy = copy.deepcopy(trained.policy)
    changed.ep_info_buffer = deque(maxlen=100)
    return changed


def signatures(diagnosis):
    return {finding.signature for finding in diagnosis.findings}


def test_measures_every_step_of_the_horizon(agent):
    diagnosis = agent.diagnose()
    assert {name: values.shape for name, values in diagnosis.along_horizon.items()} == dict.fromkeys(
        ("reward_correlation", "latent_error", "gradient_norm", "gradient_snr"), (8,)
    )
    assert all(np.isfinite(value) for value in diagnosis.scalars.values())
    assert diagnosis.along_horizon["reward_correlation"][0] > 0.5  # it was fitted to this
    assert diagnosis.along_horizon["latent_error"][0] < diagnosis.along_horizon["latent_error"][-1]


def test_equal_seeds_give_equal_diagnoses_and_change_nothing(agent):
    before = copy.deepcopy(agent.policy.state_dict())
    state = copy.deepcopy(agent._rng.bit_generator.state)
    first, second = agent.diagnose(seed=3), agent.diagnose(seed=3)
    assert str(first) == str(second)
    assert agent._rng.bit_generator.state == state
    assert all(torch.equal(value, before[key]) for key, value in agent.policy.state_dict().items())
    assert all(p.requires_grad for p in agent.policy.actor.latent_actor.parameters())


def test_a_reward_that_only_the_model_pays_is_an_exploited_model(agent):
    assert "exploited model" not in signatures(agent.diagnose())
    last = agent.world_model.reward_head[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(-50.0)
        last.bias[-20] = 50.0  # every state pays the same high reward
    found = {f.signature: f for f in agent.diagnose().findings}
    assert "horizon" in found["exploited model"].remedy


def test_dynamics_that_amplify_give_exploding_gradients(agent):
    assert "exploding gradients" not in signatures(agent.diagnose())
    with torch.no_grad():  # the same actions everywhere
        for parameter in agent.policy.actor.latent_actor.parameters():
            parameter.zero_()
    # dr_t / da_0 = 32 * 3^(t - 1)
    agent.world_model.forward = lambda z, action: (3.0 * z + action, (z + 0.0 * action).sum(-1))
    diagnosis = agent.diagnose()
    expected = np.cumsum([0.0] + [0.99**t * 32 * 3.0 ** (t - 1) for t in range(1, 8)])
    np.testing.assert_allclose(diagnosis.along_horizon["gradient_norm"], expected, rtol=1e-4)
    assert "exploding gradients" in signatures(diagnosis)


def test_rewards_that_flip_with_the_noise_give_noisy_gradients(agent):
    assert "noisy gradients" not in signatures(agent.diagnose())
    agent.world_model.forward = lambda z, action: (z + action, torch.sin(1e3 * (z + action).sum(-1)))
    assert "noisy gradients" in signatures(agent.diagnose())


def test_starts_far_from_the_data_are_found(agent):
    data = OfflineDataset.from_replay_buffer(agent.replay_buffer, "pendulum")
    inside = LatentVectorEnv(agent.world_model, data, num_envs=16, horizon=8)
    agent.latent_env = inside
    assert "starts outside the data" not in signatures(agent.diagnose(data))
    agent.latent_env = LatentVectorEnv(agent.world_model, latents=torch.full((4, 32), 5.0), num_envs=16, horizon=8)
    assert "starts outside the data" in signatures(agent.diagnose(data))


def test_values_without_rewards_behind_them_are_critic_drift(agent):
    with torch.no_grad():
        for name, parameter in agent.policy.critic.value.named_parameters():
            if name.endswith("bias"):
                parameter.add_(1_000.0)
    assert "critic drift" in signatures(agent.diagnose())


def test_returns_that_stay_are_a_plateau(agent):
    agent.ep_info_buffer.extend({"r": 100.0 + i % 3, "l": 200, "t": 0.0} for i in range(60))
    assert "plateau" in signatures(agent.diagnose())
    agent.ep_info_buffer.extend({"r": 100.0 + 2 * i, "l": 200, "t": 0.0} for i in range(100))
    assert "plateau" not in signatures(agent.diagnose())


def test_an_agent_in_a_frozen_model_needs_data(agent):
    agent.latent_env = LatentVectorEnv(agent.world_model, np.zeros((4, 3), np.float32), num_envs=4, horizon=8)
    with pytest.raises(ValueError, match="expected `data`, got None"):
        agent.diagnose()


def test_an_agent_without_experience_says_so(make_agent):
    with pytest.raises(ValueError, match="expected real experience"):
        diagnose(make_agent("Pendulum-v1"))


def test_the_callback_logs_and_keeps_the_latest(make_agent, capsys):
    agent = make_agent("Pendulum-v1")
    callback = DiagnoseCallback(every=20)
    agent.learn(64, callback=callback, log_interval=1_000)
    assert callback.latest is not None
    assert agent.logger.name_to_value["diagnosis/critic_bias"] == callback.latest.scalars["critic_bias"]
    printed = capsys.readouterr().out
    assert callback.latest.findings
    assert all(finding.signature in printed for finding in callback.latest.findings)
    with pytest.raises(ValueError, match="`every` must be >= 1, got 0"):
        DiagnoseCallback(every=0)


def test_only_the_newest_windows_are_compared_with():
    buffer = SequenceReplayBuffer(100, spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (1,)), "cpu")
    for t in range(60):
        row = np.full((1, 1), t), np.full((1, 1), t + 1)
        buffer.add(*row, np.zeros((1, 1)), np.zeros(1), np.array([t % 10 == 9]), [{}])
    first = buffer.sample_windows(500, 3, np.random.default_rng(0), newest=15).observations[0]
    assert first.min() >= 43 and first.max() <= 57  # the last 15 of the steps that a window can begin at
    few = buffer.sample_windows(50, 10, np.random.default_rng(0), newest=5).observations[0]
    assert set(few.flatten().tolist()) == {50.0}  # the one window of 10 among them


def test_the_picture_is_drawn(agent, tmp_path):
    agent.diagnose().plot(tmp_path / "diagnosis.png")
    assert (tmp_path / "diagnosis.png").read_bytes()[:4] == b"\x89PNG"
