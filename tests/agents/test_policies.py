"""Networks of PWM: the actor's density and gradients, gSDE, features extractors, Q-values, files."""

from __future__ import annotations

import copy
import os
import pathlib
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor
from torch import Tensor, nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution
from torch.func import functional_call

from pwm_gym import PWM, LatentObservation, LatentVectorEnv, UnsafeFileError, WorldModel
from pwm_gym.agents.averaging import WeightAverage
from pwm_gym.agents.first_order import rollout
from pwm_gym.agents.latent_actor import LatentActor
from pwm_gym.agents.policies import PWMActor, PWMPolicy, ReturnScale, default_world_model_config
from pwm_gym.networks import Mish
from pwm_gym.training.fitting import ENCODER_LR_SCALE

Z, A = 5, 2
OBSERVATIONS, ACTIONS = spaces.Box(-1.0, 1.0, (3,), np.float32), spaces.Box(-2.0, 2.0, (2,), np.float32)
SMALL = {"latent_dim": 16, "encoder_dim": 16, "mlp_dim": 16, "num_bins": 21}
BOTH_NOISES = pytest.mark.parametrize("use_sde", [False, True])


def make_actor(use_sde: bool = False, net_arch: tuple[int, ...] = (6, 4), log_std_init: float = -0.5) -> LatentActor:
    torch.manual_seed(0)
    return LatentActor(Z, A, [*net_arch], Mish, log_std_init, -1.427, use_sde).double()


def make_policy(observation_space: spaces.Space = OBSERVATIONS, **kwargs: Any) -> PWMPolicy:
    torch.manual_seed(0)
    return PWMPolicy(observation_space, ACTIONS, lambda _: 1e-3, [16], world_model_kwargs=SMALL, **kwargs)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Scaled(BaseFeaturesExtractor):
    """A features extractor of one's own, with what behaves differently in training: batch norm and dropout."""

    def __init__(self, observation_space: spaces.Space, width: int = 7) -> None:
        super().__init__(observation_space, width)
        self.linear = nn.Linear(spaces.flatdim(observation_space), width)
        self.norm, self.dropout = nn.BatchNorm1d(width), nn.Dropout(0.5)

    def forward(self, observations: Tensor) -> Tensor:
        return self.dropout(self.norm(self.linear(observations.flatten(1))))


SCALED = {"features_extractor_class": Scaled, "features_extractor_kwargs": {"width": 6}}


def tiny(**policy_kwargs: Any) -> dict[str, Any]:
    return {"policy_kwargs": {"net_arch": [16], "world_model_kwargs": SMALL, **policy_kwargs}}


# The actor


@pytest.mark.parametrize("count", [1, 2])
@BOTH_NOISES
def test_entropy_is_minus_the_log_density_of_a_squashed_gaussian(use_sde: bool, count: int):
    actor = make_actor(use_sde)
    z = draw(count, Z)
    actions, entropy = actor(z, actor.sample_noise(count))
    features, std = actor.features(z), actor.get_std()
    sigma = (features.square() @ std.square() + 1e-6).sqrt() if use_sde else std.expand(count, A)
    density = TransformedDistribution(Independent(Normal(actor.mean(features), sigma), 1), TanhTransform(cache_size=1))
    assert actions.shape == (count, A) and entropy.shape == (count,)
    torch.testing.assert_close(entropy, -density.log_prob(actions), rtol=1e-9, atol=1e-9)


@BOTH_NOISES
@pytest.mark.parametrize("net_arch", [(), (6, 4)])
def test_actions_and_entropy_have_the_gradients_of_finite_differences(use_sde: bool, net_arch: tuple[int, ...]):
    actor = make_actor(use_sde, net_arch)
    noise = actor.sample_noise(2)
    names = [name for name, _ in actor.named_parameters()]
    assert "log_std" in names

    def act(z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return functional_call(actor, dict(zip(names, parameters, strict=True)), (z, noise))

    inputs = [draw(2, Z).requires_grad_(), *(p.detach().clone().requires_grad_() for p in actor.parameters())]
    assert torch.autograd.gradcheck(act, inputs, eps=1e-6, atol=1e-7, rtol=1e-6)


@BOTH_NOISES
def test_without_noise_the_action_is_the_squashed_mean(use_sde: bool):
    actor, z = make_actor(use_sde), draw(3, Z)
    actions, entropy = actor(z)
    assert torch.equal(actions, torch.tanh(actor.mean(actor.features(z))))
    torch.testing.assert_close(actor(z, torch.zeros_like(actor.sample_noise(3))), (actions, entropy))


@BOTH_NOISES
def test_log_std_has_a_lower_bound(use_sde: bool):
    actor = make_actor(use_sde)
    with torch.no_grad():
        actor.log_std.fill_(-100.0)
    smallest = np.exp(-1.427) / (2.0 if use_sde else 1.0)  # with gSDE over the root of F = 4 features
    torch.testing.assert_close(actor.get_std(), torch.full_like(actor.log_std, smallest))


# gSDE


def test_gsde_noise_has_the_variance_of_its_features():
    actor, count = make_actor(use_sde=True), 100_000
    z = draw(1, Z)
    with torch.no_grad():
        noise = torch.atanh(actor(z.expand(count, Z), actor.sample_noise(count))[0]) - actor.mean(actor.features(z))
        expected = actor.features(z).square() @ actor.get_std().square()  # (1, A)
    assert actor.log_std.shape == (4, A)
    torch.testing.assert_close(noise.mean(0), torch.zeros(A).double(), rtol=0.0, atol=0.01)
    torch.testing.assert_close(noise.var(0), expected[0], rtol=0.02, atol=0.0)


def test_log_std_init_means_the_same_noise_on_actions_with_gsde():
    # LayerNorm leaves features with a mean square of 1, so that Σ_i f_i² σ_ij² = F exp(2 log_std_init) / F.
    actor = make_actor(use_sde=True, log_std_init=-0.5)
    variance = actor.features(draw(3, Z)).square() @ actor.get_std().square()
    torch.testing.assert_close(variance, torch.full((3, A), np.exp(-1.0)).double(), rtol=1e-3, atol=0.0)


def test_gsde_noise_is_a_function_of_the_state_between_resets():
    policy = make_policy(use_sde=True)
    policy.actor.generator = torch.Generator().manual_seed(0)
    observations = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    policy.reset_noise(4)
    first, again = policy.predict(observations)[0], policy.predict(observations)[0]
    assert policy.actor.noise.shape == (4, 16, 2)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, policy.predict(observations, deterministic=True)[0])
    # Each env has a matrix of its own; a batch of another size explores with the first.
    alone = policy.predict(observations[0])[0]
    np.testing.assert_allclose(alone, first[0], rtol=1e-5)
    np.testing.assert_allclose(policy.predict(observations[[0, 0, 0]])[0], np.stack([alone] * 3), rtol=1e-5)
    assert not np.allclose(policy.predict(observations[[0, 0, 0, 0]])[0], alone)
    policy.reset_noise(4)
    assert not np.array_equal(first, policy.predict(observations)[0])


def test_exploration_is_pink_noise_of_the_policys_own_deviation():
    actor = make_policy().actor.requires_grad_(False)
    actor.generator = torch.Generator().manual_seed(0)
    noise = torch.stack([actor._exploration_noise(64) for _ in range(2_048)])  # (T, B, A)
    assert abs(float(noise.mean())) < 0.05 and float(noise.std()) == pytest.approx(1.0, abs=0.05)
    power = torch.fft.rfft(noise, dim=0).abs().square().mean((1, 2))
    octaves = [float(power[k : 2 * k].mean()) * k for k in (4, 16, 64, 256)]  # the same in each: 1/f
    assert octaves == pytest.approx([octaves[0]] * 4, rel=0.25)

    # A batch of another size is other envs: its noise begins anew. At each step it is the policy's own distribution.
    alone = torch.cat([actor._exploration_noise(count) for count in (1_000, 999) * 3])
    assert float(alone.std()) == pytest.approx(1.0, abs=0.05)
    white = make_policy(pink_noise=False).actor
    noise = torch.stack([white._exploration_noise(1_000) for _ in range(2)])
    assert abs(float((noise[0] * noise[1]).mean())) < 0.1


def test_without_gsde_there_is_no_noise_to_keep():
    policy = make_policy()
    policy.reset_noise(3)
    assert policy.actor.noise is None
    assert policy.actor.get_std().shape == (2,)


@BOTH_NOISES
def test_rollout_draws_noise_at_every_step_and_with_gsde_once(use_sde: bool):
    torch.manual_seed(0)
    model = WorldModel(default_world_model_config(OBSERVATIONS, ACTIONS, **SMALL), OBSERVATIONS, ACTIONS)
    actor = LatentActor(16, 2, [8], Mish, -0.5, -1.427, use_sde)
    starts = torch.randn(4, 3)
    env = LatentVectorEnv(model, starts, num_envs=4, horizon=3)
    z = env.reset(options={"observations": starts})[0]
    window = rollout(env, z, actor, 3, torch.Generator().manual_seed(7))

    generator = torch.Generator().manual_seed(7)
    noise = actor.sample_noise(4, generator)
    for t in range(3):
        torch.testing.assert_close(window.observations[t], z)
        actions, entropy = actor(z, noise)
        torch.testing.assert_close(window.entropy[t], entropy)
        z, reward = model(z, actions)
        torch.testing.assert_close(window.rewards[t], reward)
        noise = noise if use_sde else actor.sample_noise(4, generator)


def test_gsde_trains_its_matrix_and_runs_are_bit_equal(make_agent: Any, toy: Any, differences: Any):
    def run() -> PWM:
        return make_agent(toy(), use_sde=True, sde_sample_freq=2, use_sde_at_warmup=True).learn(40)

    agent, again = run(), run()
    assert not differences(agent, again)
    assert agent.policy.actor.latent_actor.log_std.shape == (16, 2)
    assert agent.policy.actor.latent_actor.log_std.std() > 0.0, "entries that started equal have moved apart"
    agent.dump_logs()  # train/std is read from the actor


def test_gsde_at_warmup_takes_the_place_of_random_actions(make_agent: Any, toy: Any):
    spread = []
    for at_warmup in (False, True):
        agent = make_agent(toy(), use_sde=True, use_sde_at_warmup=at_warmup, learning_starts=50)
        agent.learn(50)
        spread.append(agent.replay_buffer.actions[:50].std())
    assert spread[0] > 0.5 > spread[1]  # uniform has 0.58


def test_a_loaded_agent_explores_as_the_saved_one(make_agent: Any, toy: Any, tmp_path: pathlib.Path):
    agent = make_agent(toy(), use_sde=True).learn(25)
    agent.save(tmp_path / "agent")
    loaded = PWM.load(tmp_path / "agent", device="cpu")
    observations = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    for deterministic in (True, False):
        pair = [a.predict(observations, deterministic=deterministic)[0] for a in (agent, loaded)]
        assert np.array_equal(*pair)
    agent.policy.reset_noise()
    loaded.policy.reset_noise()
    assert np.array_equal(agent.predict(observations)[0], loaded.predict(observations)[0])


def test_gsde_trains_in_a_frozen_model(make_agent: Any, toy: Any):
    agent = make_agent(toy(action_space=ACTIONS), use_sde=True).learn(25)
    frozen = make_agent(agent.make_latent_env(4, 3), use_sde=True)
    before = frozen.policy.actor.latent_actor.log_std.detach().clone()
    frozen.learn(60)
    assert not torch.equal(before, frozen.policy.actor.latent_actor.log_std)


# Features extractors


def test_flatten_extractor_is_the_default(make_agent: Any, toy: Any, differences: Any):
    plain = make_agent(toy(), **tiny()).learn(25)
    flat = make_agent(toy(), **tiny(features_extractor_class=FlattenExtractor)).learn(25)
    assert flat.actor.features_extractor is not None
    assert not differences(plain, flat)


def test_extractors_see_observations_in_their_shape_and_discrete_ones_as_one_hot():
    seen: list[Any] = []

    class Look(FlattenExtractor):
        def forward(self, observations: Any) -> Tensor:
            seen.append(observations)
            flat = observations if isinstance(observations, Tensor) else torch.cat([*observations.values()], -1)
            return super().forward(flat)

    matrix = make_policy(spaces.Box(-1.0, 1.0, (2, 2), np.float32), features_extractor_class=Look)
    matrix.world_model.preprocess(np.ones((3, 2, 2)))
    assert seen[-1].shape == (3, 2, 2) and seen[-1].dtype == torch.float32
    both = spaces.Dict({"box": spaces.Box(-1.0, 1.0, (2,), np.float64), "gear": spaces.Discrete(3)})
    policy = make_policy(both, features_extractor_class=Look)
    features = policy.world_model.preprocess({"box": np.ones((1, 2)), "gear": np.array([[2]])})
    assert seen[-1].keys() == {"box", "gear"}
    assert features.tolist() == [[1.0, 1.0, 0.0, 0.0, 1.0]]


def test_features_extractor_is_trained_by_the_models_loss_alone(make_agent: Any, toy: Any):
    agent = make_agent(toy(), **tiny(**SCALED))
    extractor = agent.world_model.features_extractor
    assert agent.world_model.config.observation_dim == 6
    assert agent.actor.features_extractor is agent.critic.features_extractor is extractor
    slow, rest = agent.policy.model_optimizer.param_groups
    assert {id(p) for p in extractor.parameters()} <= {id(p) for p in slow["params"]}
    assert slow["lr"] == pytest.approx(ENCODER_LR_SCALE * rest["lr"])

    before = copy.deepcopy(extractor.state_dict())
    agent.learn(25)
    after = extractor.state_dict()
    assert all(not torch.equal(before[key], after[key]) for key in ("linear.weight", "norm.bias", "norm.running_mean"))
    trained = {id(p) for optimizer in ("actor_optimizer", "critic_optimizer") for group in
               getattr(agent.policy, optimizer).param_groups for p in group["params"]}  # fmt: skip
    assert not trained & {id(p) for p in agent.world_model.parameters()}


def test_every_face_of_the_model_goes_through_the_features_extractor(make_agent: Any, toy: Any):
    agent = make_agent(toy(), **tiny(**SCALED)).learn(25)
    agent.actor.reset_average()
    model, extractor = agent.world_model, agent.world_model.features_extractor
    observations = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    before = copy.deepcopy(extractor.state_dict())
    with torch.no_grad():
        latents = model.encoder(extractor.eval()(torch.from_numpy(observations)))
        torch.testing.assert_close(model.encode(model.preprocess(observations)), latents)
        env = agent.make_latent_env(4, 3)
        torch.testing.assert_close(env.reset(options={"observations": observations})[0], latents)
        torch.testing.assert_close(
            agent.predict(observations, deterministic=True)[0],
            agent.policy.unscale_action(agent.actor.latent_actor(latents)[0].numpy()),
        )
    real = toy()
    wrapped = LatentObservation(real, model)
    torch.testing.assert_close(torch.from_numpy(wrapped.observation(observations[0])), latents[0])
    agent.critic(torch.from_numpy(observations), torch.zeros(4, 2))
    torch.testing.assert_close(dict(extractor.state_dict()), dict(before))  # no statistics of batch norm moved


def test_training_in_a_frozen_model_leaves_its_features_extractor_as_it_is(make_agent: Any, toy: Any):
    agent = make_agent(toy(), **tiny(**SCALED)).learn(25)
    before = copy.deepcopy(agent.world_model.state_dict())
    frozen = make_agent(agent.make_latent_env(4, 3), **tiny(**SCALED)).learn(60)
    assert frozen.actor.features_extractor is agent.actor.features_extractor
    torch.testing.assert_close(dict(agent.world_model.state_dict()), dict(before), rtol=0.0, atol=0.0)
    with pytest.raises(ValueError, match="features_extractor"):
        make_agent(agent.make_latent_env(4, 3), **tiny())


def test_dict_observations_go_through_combined_extractor(make_agent: Any, toy: Any):
    space = spaces.Dict({"a": spaces.Box(-1.0, 1.0, (2,), np.float64), "b": spaces.Discrete(3)})
    agent = make_agent(toy(space), **tiny(features_extractor_class=CombinedExtractor)).learn(25)
    env = toy(space)
    assert agent.predict(env.reset(seed=0)[0])[0].shape == (2,)


def test_files_with_a_features_extractor(make_agent: Any, toy: Any, tmp_path: pathlib.Path):
    agent = make_agent(toy(), **tiny(**SCALED)).learn(25)
    observation = np.ones(3, np.float32)
    action = agent.predict(observation, deterministic=True)[0]

    agent.save(tmp_path / "agent")
    with pytest.raises(UnsafeFileError, match="trust_pickle"):
        PWM.load(tmp_path / "agent")
    loaded = PWM.load(tmp_path / "agent", device="cpu", trust_pickle=True)
    assert np.array_equal(loaded.predict(observation, deterministic=True)[0], action)

    agent.world_model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"features_extractor=Scaled\(\.\.\.\)"):
        WorldModel.load(tmp_path / "model")
    model = WorldModel.load(tmp_path / "model", features_extractor=Scaled(agent.observation_space, width=6)).eval()
    batch = observation[None]
    assert torch.equal(model.preprocess(batch), agent.world_model.eval().preprocess(batch))

    with pytest.raises(TypeError, match="JSON"):  # a class of one's own has no plain form
        agent.policy.save(tmp_path / "policy")


def test_a_policy_with_sb3s_extractor_survives_a_file(tmp_path: pathlib.Path):
    policy = make_policy(features_extractor_class=FlattenExtractor)
    policy.save(tmp_path / "policy")
    loaded = PWMPolicy.load(tmp_path / "policy", device="cpu")
    assert isinstance(loaded.actor.features_extractor, FlattenExtractor)
    assert np.array_equal(*(p.predict(np.ones(3), deterministic=True)[0] for p in (policy, loaded)))


def test_extractor_arguments_without_a_class_are_refused():
    with pytest.raises(ValueError, match="features_extractor_class"):
        make_policy(features_extractor_kwargs={"features_dim": 16})


@pytest.mark.parametrize("kwargs", [{}, {"features_extractor_kwargs": {"cnn_output_dim": 16}}])
def test_images_are_refused(kwargs: dict[str, Any]):
    image = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    for space in (image, spaces.Dict({"image": image, "vector": OBSERVATIONS})):
        with pytest.raises(TypeError, match="image space"):
            make_policy(space, **kwargs)


# The critic


def test_q_values_look_one_step_ahead_through_the_model():
    policy = make_policy(n_critics=2)
    policy.world_model.expect_termination()
    nn.init.normal_(policy.world_model.termination_head[-1].weight)
    nn.init.normal_(policy.world_model.reward_head[-1].weight)
    policy.critic.gamma = 0.9
    observations, actions = torch.randn(3, 3), torch.rand(3, 2) * 2.0 - 1.0
    model = policy.world_model
    z = model.encode(model.preprocess(observations))
    next_z = model.next(z, actions)
    goes_on = 1.0 - model.termination(next_z)
    expected = model.reward(z, actions) + 0.9 * goes_on * policy.critic.value(next_z)  # (2, 3)
    q = policy.critic(observations, actions)
    assert isinstance(q, tuple) and [member.shape for member in q] == [(3, 1), (3, 1)]
    torch.testing.assert_close(torch.cat(q, 1).T, expected)
    assert 0.0 < goes_on.min() < 1.0


def test_q_values_have_the_gradients_of_finite_differences_in_the_action():
    policy = make_policy().double()
    nn.init.normal_(policy.world_model.reward_head[-1].weight)
    observations = draw(2, 3)
    actions = (0.5 * draw(2, 2, seed=1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: policy.critic(observations, a), actions, atol=1e-7, rtol=1e-6)


def test_agents_answer_q_values_as_in_sac(make_agent: Any, toy: Any):
    space = spaces.Box(-3.0, 3.0, (2, 2), np.float32)
    agent = make_agent(toy(action_space=space), gamma=0.7).learn(25)
    observations = agent.policy.obs_to_tensor(agent.get_env().reset())[0]
    assert agent.critic.gamma == agent.critic_target.gamma == 0.7
    q = agent.critic(observations, agent.actor(observations))
    stored = agent.replay_buffer.sample(5)
    assert len(q) == 3 and q[0].shape == (1, 1)
    assert agent.critic(stored.observations, stored.actions)[0].shape == (5, 1)
    assert agent.critic(stored.observations, stored.actions.unflatten(1, (2, 2)))[0].shape == (5, 1)


def test_the_critics_parameters_are_the_values_alone():
    policy = make_policy()
    assert {name.split(".")[0] for name, _ in policy.critic.named_parameters()} == {"value"}
    tensors = [*policy.state_dict(keep_vars=True).values()]
    assert len({id(tensor) for tensor in tensors}) == len(tensors), "a weight has two names"
    clone = copy.deepcopy(policy)
    assert clone.critic._actor[0] is clone.actor
    assert not any(p.requires_grad for p in policy.critic_target.parameters())


# The scale of returns


def test_return_scale_is_the_deviation_of_all_returns_so_far():
    scale, rng, returns = ReturnScale(), np.random.default_rng(0), []
    for count in (1, 2, 64, 7):
        returns.append(rng.normal(3.0, 5.0, size=count).astype(np.float32))
        std = scale.update(torch.from_numpy(returns[-1]))
        everything = np.concatenate(returns)
        if len(everything) > 1:
            assert float(std) == pytest.approx(everything.std(), rel=1e-2)
    # The prior, 1e-4 of a return with mean 0 and variance 1, is all that is missing.
    total = 74 + 1e-4
    mean = everything.sum() / total
    var = (np.square(everything - mean).sum() + 1e-4 * (1.0 + mean**2)) / total
    assert float(scale.count) == pytest.approx(total)
    assert float(scale.mean) == pytest.approx(mean, rel=1e-5)
    assert float(scale.var) == pytest.approx(var, rel=1e-5)


# Policies and their files


def test_actor_and_policy_predict_the_same():
    policy = make_policy()
    rng = np.random.default_rng(0)
    for shape in ((3,), (1, 3), (5, 3)):
        observation = rng.normal(size=shape).astype(np.float32)
        actions = policy.predict(observation, deterministic=True)[0]
        assert actions.shape == (*shape[:-1], 2) and ACTIONS.contains(actions.reshape(-1, 2)[0])
        assert np.array_equal(policy.actor.predict(observation, deterministic=True)[0], actions)


@BOTH_NOISES
def test_policies_and_actors_survive_a_file(use_sde: bool, tmp_path: pathlib.Path):
    policy = make_policy(use_sde=use_sde, activation_fn=nn.ELU)
    observations = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    expected = policy.predict(observations, deterministic=True)[0]
    policy.save(tmp_path / "policy.pt")
    policy.actor.save(tmp_path / "actor.pt")
    for loaded in (PWMPolicy.load(tmp_path / "policy.pt"), PWMActor.load(tmp_path / "actor.pt", device="cpu")):
        assert np.array_equal(loaded.predict(observations, deterministic=True)[0], expected)
    torch.testing.assert_close(dict(PWMPolicy.load(tmp_path / "policy.pt").state_dict()), dict(policy.state_dict()))


class _Payload:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: pathlib.Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def test_a_malicious_policy_file_is_not_executed(tmp_path: pathlib.Path):
    policy, trace = make_policy(), tmp_path / "trace"
    content = {"state_dict": policy.state_dict(), "data": {"payload": _Payload(trace)}}
    torch.save(content, tmp_path / "policy.pt")
    for kind in (PWMPolicy, PWMActor):
        with pytest.raises(UnsafeFileError, match="nothing was executed"):
            kind.load(tmp_path / "policy.pt")
    assert not trace.exists()
    torch.load(tmp_path / "policy.pt", weights_only=False)
    assert trace.exists(), "the payload works"


def test_a_policy_file_cannot_name_a_class_outside_the_trusted_packages(tmp_path: pathlib.Path):
    make_policy().save(tmp_path / "policy.pt")
    content = torch.load(tmp_path / "policy.pt", weights_only=True)
    content["data"]["activation_fn"] = {"!class": "subprocess:Popen"}
    torch.save(content, tmp_path / "policy.pt")
    with pytest.raises(UnsafeFileError, match=r"subprocess\.Popen"):
        PWMPolicy.load(tmp_path / "policy.pt")


def test_damaged_and_foreign_policy_files_are_refused(tmp_path: pathlib.Path):
    path = tmp_path / "policy.pt"
    with pytest.raises(FileNotFoundError):
        PWMPolicy.load(path)
    make_policy().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or damaged"):
        PWMPolicy.load(path)
    make_policy().actor.save(path)
    with pytest.raises(ValueError, match="expected a PWMPolicy"):
        PWMPolicy.load(path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="expected a PWMActor"):
        PWMActor.load(path)


# Sizes


@pytest.mark.parametrize(("width", "latent", "hidden"), [(16, 128, 256), (17, 256, 384)])
def test_default_world_models_grow_with_the_observation(width: int, latent: int, hidden: int):
    config = default_world_model_config(spaces.Box(-1.0, 1.0, (width,)), ACTIONS)
    assert (config.observation_dim, config.action_dim) == (width, 2)
    assert (config.latent_dim, config.encoder_dim, config.mlp_dim) == (latent, hidden, hidden)


def test_default_world_model_takes_a_size_and_any_field():
    assert default_world_model_config(OBSERVATIONS, ACTIONS, "5M").latent_dim == 512
    assert default_world_model_config(OBSERVATIONS, ACTIONS, "5M", latent_dim=64).latent_dim == 64
    assert default_world_model_config(OBSERVATIONS, ACTIONS, num_bins=51).num_bins == 51
    assert default_world_model_config(OBSERVATIONS, ACTIONS, observation_dim=17).latent_dim == 256
    with pytest.raises(ValueError, match="`size` must be one of"):
        default_world_model_config(OBSERVATIONS, ACTIONS, "6M")


def test_discrete_and_dict_observations_count_their_one_hot_width():
    space = spaces.Dict({"box": spaces.Box(-1.0, 1.0, (2, 2)), "gear": spaces.Discrete(3)})
    assert default_world_model_config(space, gym.spaces.Box(-1.0, 1.0, (2, 3))).observation_dim == 7


# The average of recent weights


def test_average_runs_over_the_given_share_of_updates():
    linear = nn.Linear(1, 1, bias=False)
    average = WeightAverage({"linear": linear}, share=0.1)
    values = np.random.default_rng(0).normal(size=500)
    mean = 0.0
    for t, value in enumerate(values):
        nn.init.constant_(linear.weight, value)
        average.update({"linear": linear})
        mean += (np.float64(value) - mean) / (1 + 0.1 * t)
    assert average.copies["linear"].weight.item() == pytest.approx(mean, abs=1e-5)
    profile = (np.arange(1, 501) / 500) ** 9  # of exponent 1 / share - 1
    assert mean == pytest.approx(np.average(values, weights=profile), abs=0.02)


def test_average_keeps_the_latest_buffers():
    norm = nn.BatchNorm1d(2)
    average = WeightAverage({"norm": norm}, share=0.5)
    norm(torch.randn(8, 2) + 3)
    average.update({"norm": norm})
    assert torch.equal(average.copies["norm"].running_mean, norm.running_mean)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="share"):
        WeightAverage({}, share)
