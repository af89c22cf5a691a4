"""Many policies in one batched program: each learns what it would have learned alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pwm_gym import PWM, LatentVectorEnv, OfflineDataset, WorldModel, WorldModelConfig
from pwm_gym.agents.policy_bank import PolicyBank
from pwm_gym.datasets import Episode

DIMS = {"one": (3, 1), "two": (5, 2), "three": (4, 3)}  # observations and actions
SETTINGS: dict[str, Any] = {
    "horizon": 4,
    "policy_kwargs": {"net_arch": [16, 12]},
    "model_batch_size": 8,
    "model_horizon": 3,
    "critic_epochs": 2,
    "critic_minibatches": 3,
    "device": "cpu",
}


def make_dataset(tasks=tuple(DIMS), episodes=2, length=12) -> OfflineDataset:
    rng = np.random.default_rng(0)
    made = [
        Episode(
            rng.normal(size=(length + 1, DIMS[name][0])),
            rng.uniform(-1, 1, (length, DIMS[name][1])),
            rng.random(length),
            truncated=True,
            task=index,
        )
        for index, name in enumerate(tasks)
        for _ in range(episodes)
    ]
    return OfflineDataset(made, tasks)


def make_model(tasks=tuple(DIMS), **fields: Any) -> WorldModel:
    torch.manual_seed(0)
    several = {"observation_dims": tuple(DIMS[t][0] for t in tasks), "action_dims": tuple(DIMS[t][1] for t in tasks)}
    small = {"latent_dim": 16, "encoder_dim": 16, "mlp_dim": 16, "num_bins": 21, "task_dim": 4}
    width = {"observation_dim": max(DIMS[t][0] for t in tasks), "action_dim": max(DIMS[t][1] for t in tasks)}
    model = WorldModel(WorldModelConfig(**width, tasks=tasks, **(several if len(tasks) > 1 else {}), **small, **fields))
    with torch.no_grad():
        for parameter in model.parameters():  # else all rewards are 0
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.eval()


def make_agents(model, dataset, tasks=tuple(DIMS), rows=6, **overrides: Any) -> list[PWM]:
    agents = []
    for index, task in enumerate(tasks):
        env = LatentVectorEnv(model, dataset, num_envs=rows, horizon=SETTINGS["horizon"], task=task)
        agents.append(PWM("MlpPolicy", env, seed=index, **{**SETTINGS, **overrides}))
    return agents


def learned(agent: PWM) -> dict[str, torch.Tensor]:
    tensors = {f"policy.{k}": v for k, v in agent.policy.state_dict().items() if "world_model" not in k}
    for name in ("actor", "critic"):
        for i, state in enumerate(getattr(agent.policy, f"{name}_optimizer").state.values()):
            tensors |= {f"{name}.{i}.{k}": v for k, v in state.items()}
    return tensors


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"use_sde": True, "ent_coef": 0.1},
        {"detach_input": True, "td_lambda": 0.0, "extra_bootstrap_discount": True, "tau": 1.0, "max_grad_norm": 0.01},
    ],
    ids=["defaults", "gSDE", "released"],
)
def test_ten_batched_updates_are_those_of_one_after_another(overrides):
    model, dataset = make_model(), make_dataset()
    alone, together = (make_agents(model, dataset, **overrides) for _ in range(2))
    for agent in alone:
        agent.learn(10 * agent.n_envs * agent.horizon)
        assert agent._n_updates == 10
    bank = PolicyBank(together, model)
    bank.train(10)
    bank.write()
    for one, other, task in zip(alone, together, DIMS, strict=True):
        expected, got = learned(one), learned(other)
        assert expected.keys() == got.keys()
        assert len(expected) > 40
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-5, msg=f"{task} {name}")
        assert one.num_timesteps == other.num_timesteps


def test_a_bank_goes_on_exactly_from_its_state():
    model, dataset = make_model(), make_dataset()
    whole, first, second = (PolicyBank(make_agents(model, dataset), model, finetune=dataset) for _ in range(3))
    whole.train(4)
    first.train(2)
    second.load_state_dict(first.state_dict())
    second.train(2)
    for bank in (whole, second):
        bank.write()
    for one, other in zip(whole.agents, second.agents, strict=True):
        expected, got = learned(one), learned(other)
        assert all(torch.equal(got[name], value) for name, value in expected.items())
        weights = zip(one.world_model.parameters(), other.world_model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in weights)


def test_the_shared_policy_acts_as_the_agents_that_it_is_folded_into():
    model, dataset = make_model(), make_dataset()
    agents = make_agents(model, dataset)
    bank = PolicyBank(agents, model, shared=True)
    bank.train(3)
    bank.write()
    z = torch.rand(len(agents), 5, model.config.latent_dim)
    masks = model.action_masks.unsqueeze(1)
    with torch.no_grad():
        actions, _ = bank._nets.actor(z, torch.zeros(len(agents), 5, 3), masks)
        values = bank._nets.critic(z)  # (E, K, 5)
        for k, (agent, (_, own)) in enumerate(zip(agents, DIMS.values(), strict=True)):
            torch.testing.assert_close(agent.policy.actor.latent_actor(z[k])[0], actions[k, :, :own])
            torch.testing.assert_close(agent.policy.critic.value(z[k]), values[:, k])


def test_a_shared_policy_learns_from_every_task():
    model, dataset = make_model(), make_dataset()
    bank = PolicyBank(make_agents(model, dataset), model, shared=True)
    before = [p.clone() for p in bank._nets.actor.parameters()]
    metrics = bank.train(1)
    assert metrics["return"].shape == (3,)
    assert all(not torch.equal(a, b) for a, b in zip(before, bank._nets.actor.parameters(), strict=True))


def test_finetuning_lowers_the_models_loss_on_the_data():
    from pwm_gym.training import world_model_loss

    model, dataset = make_model(("two",)), make_dataset(("two",))
    bank = PolicyBank(make_agents(model, dataset, ("two",)), model, finetune=dataset)
    bank.train(40)
    windows = dataset.sample_windows(16, 3, np.random.default_rng(1))
    with torch.no_grad():
        before, after = (world_model_loss(m, *windows[:4], rho=0.5)[0] for m in (model, bank.world_model))
    assert after < 0.9 * before


def test_agents_of_other_settings_or_sizes_are_refused():
    model, dataset = make_model(), make_dataset()
    one = make_agents(model, dataset)[0]
    other = make_agents(model, dataset, gamma=0.5)[1]
    with pytest.raises(ValueError, match="one `gamma`, got 0.99, 0.5"):
        PolicyBank([one, other], model)
    with pytest.raises(ValueError, match="as many envs for each task, got 6, 2"):
        PolicyBank([one, make_agents(model, dataset, rows=2)[1]], model)
    with pytest.raises(ValueError, match="fixed `ent_coef`"):
        PolicyBank(make_agents(model, dataset, ent_coef="auto"), model)
    with pytest.raises(ValueError, match="LatentVectorEnvs"):
        PolicyBank([PWM("MlpPolicy", "Pendulum-v1", device="cpu")], model)


def test_divergence_is_told():
    model, dataset = make_model(), make_dataset()
    bank = PolicyBank(make_agents(model, dataset), model)
    with torch.no_grad():
        bank._nets.actor.leading("mean.bias")[1, 0] = float("nan")
    with pytest.raises(ValueError, match="diverged"):
        bank.train(1)


@pytest.mark.parametrize("shared", [False, True])
def test_every_policy_comes_to_imagine_larger_returns(shared):
    model, dataset = make_model(), make_dataset()
    bank = PolicyBank(make_agents(model, dataset, rows=32, ent_coef=0.0), model, shared=shared)
    before = bank.train(1)["return"]
    after = bank.train(30)["return"]
    assert (after > before).all(), (before, after)
