"""The world model: sizes, spaces, regularisers, termination, tasks, preprocessing and files."""

import copy
import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from torch import Tensor, nn

from pwm_gym import UnsafeFileError, WorldModel, WorldModelConfig
from pwm_gym.functional import symexp, symlog
from pwm_gym.serialization import to_json
from pwm_gym.world_model import PRESETS

BOX = spaces.Box(-1.0, 1.0, (3,), np.float32)


def make(observation_space: spaces.Space | None = BOX, action_space: Any = None, seed: int = 0, **config: Any) -> Any:
    """Make a small model, with a reward head that says something."""
    sizes = {"latent_dim": 16, "encoder_dim": 8, "mlp_dim": 8, "num_bins": 11, "simnorm_dim": 4, "task_dim": 6}
    width = 3 if observation_space is None else spaces.flatdim(observation_space)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = WorldModel(WorldModelConfig(width, 2, **{**sizes, **config}), observation_space, action_space)
        for parameter in model.reward_head[-1].parameters():
            nn.init.normal_(parameter)
    return model


def batch(*shape: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def outputs(model: WorldModel, task: Any = None) -> list[Tensor]:
    """Everything that a model predicts for a fixed batch of 2."""
    dtype = model.dtype
    z = model.encode(batch(2, width=model.config.observation_dim, dtype=dtype), task)
    actions = batch(2, width=2, seed=1, dtype=dtype).tanh()
    return [z, model.next(z, actions, task), model.reward(z, actions, task), model.termination(z, task)]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# Sizes


@pytest.mark.parametrize(
    ("size", "task_dim", "latent_dim", "parameters"),
    [
        # TD-MPC2's parts that PWM uses (encoder, dynamics, reward, embedding) at MT30's padding, in millions
        ("1M", 96, 128, 0.632),
        ("5M", 64, 512, 1.600),
        ("19M", 64, 512, 5.603),
        ("48M", 64, 768, 18.984),
        ("317M", 96, 1376, 108.281),
    ],
)
def test_preset_has_the_published_number_of_parameters(
    size: str, task_dim: int, latent_dim: int, parameters: float
) -> None:
    config = WorldModelConfig.preset(
        size,
        observation_dim=24,
        action_dim=6,
        num_tasks=30,
        task_dim=task_dim,
        latent_dim=latent_dim,
        termination_head=False,
    )
    with torch.device("meta"):  # shapes without memory
        model = WorldModel(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == parameters


@pytest.mark.parametrize(
    ("size", "task_dim", "latent_dim", "parameters"),
    [
        ("1M", 96, 128, 1.43),
        ("5M", 64, 512, 5.24),
        ("19M", 64, 512, 16.0),
        ("48M", 64, 768, 48.2),
        ("317M", 96, 1376, 317.3),
    ],
)
def test_preset_with_planning_has_all_of_tdmpc2s_parameters(
    size: str, task_dim: int, latent_dim: int, parameters: float
) -> None:
    fields: Any = {"num_tasks": 30, "task_dim": task_dim, "latent_dim": latent_dim, "termination_head": False}
    config = WorldModelConfig.preset(size, observation_dim=24, action_dim=6, planning=True, **fields)
    with torch.device("meta"):
        model = WorldModel(config)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    assert round(count, 2 if parameters < 10 else 1) == parameters


def test_presets_have_the_published_latent_sizes() -> None:
    sizes = {size: WorldModelConfig.preset(size, observation_dim=5, action_dim=1).latent_dim for size in PRESETS}
    assert sizes == {"1M": 128, "5M": 512, "19M": 768, "48M": 768, "317M": 1376}


def test_preset_takes_overrides_and_refuses_unknown_sizes_and_fields() -> None:
    assert WorldModelConfig.preset("1M", observation_dim=5, action_dim=1, mlp_dim=7).mlp_dim == 7
    with pytest.raises(ValueError, match="`size` must be one of .*'317M'.*, got '2M'"):
        WorldModelConfig.preset("2M", observation_dim=5, action_dim=1)
    with pytest.raises(TypeError, match="mlp_width"):
        WorldModelConfig.preset("1M", observation_dim=5, action_dim=1, mlp_width=7)


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        WorldModelConfig(3, 2).latent_dim = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"observation_dim": 0}, "`observation_dim` must be >= 1, got 0"),
        ({"action_dim": 0}, "`action_dim` must be >= 1, got 0"),
        ({"latent_dim": 0}, "`latent_dim` must be >= 1"),
        ({"encoder_dim": -1}, "`encoder_dim` must be >= 1"),
        ({"mlp_dim": 0}, "`mlp_dim` must be >= 1"),
        ({"simnorm_dim": 0}, "`simnorm_dim` must be >= 1"),
        ({"encoder_layers": -1}, "`encoder_layers` and `num_tasks` must be >= 0"),
        ({"num_tasks": -1}, "`encoder_layers` and `num_tasks` must be >= 0"),
        ({"task_dim": 0}, "`task_dim` >= 1"),
        ({"regularizer": "dropout"}, "`regularizer` must be one of .* got 'dropout'"),
        ({"activation": "gelu"}, "`activation` must be one of .* got 'gelu'"),
        ({"latent_dim": 12}, "`latent_dim` must be a multiple of `simnorm_dim`, got 12 and 8"),
        ({"num_bins": 0}, "num_bins >= 1"),
        ({"vmin": 10.0}, "vmin < vmax"),
        ({"num_q": 1}, "`num_q` must be 0 or >= 2"),
        ({"dropout": 1.0}, "`dropout` in .0, 1., got 0 and 1.0"),
        ({"tasks": ("a", "a")}, "one name in `tasks` for each of 2 tasks, all different"),
        ({"tasks": ("a", "b"), "num_tasks": 3}, "one name in `tasks` for each of 3 tasks"),
        ({"num_tasks": 2, "action_dims": (2,)}, "`action_dims` must have 2 entries"),
        ({"action_dims": (2,)}, "`action_dims` must have 0 entries"),
        ({"num_tasks": 2, "action_dims": (2, 3)}, r"`action_dims` must be in 1\.\.2, the padded width"),
        ({"num_tasks": 1, "observation_dims": (0,)}, r"`observation_dims` must be in 1\.\.3"),
        ({"discounts": (1.1,)}, r"`discounts` must be in \[0, 1\]"),
        ({"num_tasks": 2, "normalize_observations": True}, "`normalize_observations` is for a single task.* 2 tasks"),
    ],
)
def test_config_refuses_fields_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WorldModelConfig(**{"observation_dim": 3, "action_dim": 2, **fields})


def test_simnorm_group_size_only_matters_with_simnorm() -> None:
    assert WorldModelConfig(3, 2, latent_dim=12, regularizer="none").latent_dim == 12


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 2)])
def test_predictions_have_the_leading_shape_of_their_inputs(shape: tuple[int, ...]) -> None:
    model = make()
    z = model.encode(batch(*shape, width=3))
    actions = batch(*shape, width=2)
    assert z.shape == model.next(z, actions).shape == (*shape, 16)
    assert model.reward_logits(z, actions).shape == (*shape, 11)
    assert model.reward(z, actions).shape == model.termination(z).shape == model.termination_logits(z).shape == shape
    assert model.reward_loss(z, actions, torch.zeros(shape)).shape == shape
    assert model.termination_loss(z, torch.zeros(shape, dtype=torch.bool)).shape == shape


def test_forward_is_next_and_reward() -> None:
    model = make()
    z, actions = model.encode(batch(2, width=3)), batch(2, width=2)
    assert_equal(list(model(z, actions)), [model.next(z, actions), model.reward(z, actions)])


def test_first_reward_is_0_and_its_loss_that_of_a_uniform_categorical() -> None:
    # The last reward layer begins at zero: cross-entropy ln 101 whatever the target.
    model = WorldModel(WorldModelConfig(3, 2, latent_dim=16, encoder_dim=8, mlp_dim=8)).double()
    z, actions = batch(2, width=16, dtype=torch.float64), batch(2, width=2, dtype=torch.float64)
    torch.testing.assert_close(model.reward(z, actions), torch.zeros(2, dtype=torch.float64))
    loss = model.reward_loss(z, actions, torch.tensor([-3.0, 800.0], dtype=torch.float64))
    torch.testing.assert_close(loss, torch.full((2,), 101.0, dtype=torch.float64).log())


def test_bin_space_reward_leaves_symexp_out() -> None:
    task_units, bin_space = make(), make(reward_in_task_units=False)
    assert_equal(list(task_units.parameters()), list(bin_space.parameters()))
    z, actions = task_units.encode(batch(2, width=3)), batch(2, width=2)
    in_bins = bin_space.reward(z, actions)
    assert in_bins.abs().min() > 0.1
    torch.testing.assert_close(task_units.reward(z, actions), symexp(in_bins))
    torch.testing.assert_close(symlog(task_units.reward(z, actions)), bin_space(z, actions)[1])


# Spaces


def test_spaces_default_to_unbounded_observations_and_unit_actions() -> None:
    model = make(None)
    assert model.observation_space == spaces.Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (3,), np.float32)
    assert model.action_space == spaces.Box(-1.0, 1.0, (2,), np.float32)


def test_latent_space_is_the_unit_cube_with_simnorm_and_unbounded_without() -> None:
    assert make().latent_space == spaces.Box(0.0, 1.0, (16,), np.float32)
    assert make(regularizer="none").latent_space.high[0] == np.finfo(np.float32).max


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(0, 255, (36, 36, 3), np.uint8),
        spaces.Box(0, 255, (3, 36, 36), np.uint8),
        spaces.Dict({"camera": spaces.Box(0, 255, (36, 36, 3), np.uint8), "speed": BOX}),
    ],
    ids=["channels last", "channels first", "in a Dict"],
)
def test_images_are_refused(space: spaces.Space) -> None:
    with pytest.raises(TypeError, match="expected vector observations, got an image space"):
        WorldModel(WorldModelConfig(spaces.flatdim(space), 2), space)


@pytest.mark.filterwarnings("ignore:.*multi-dimensional MultiDiscrete")  # from Gymnasium's flatdim
@pytest.mark.parametrize(
    "space",
    [
        spaces.Text(3),
        spaces.Tuple([BOX]),
        spaces.Dict({"nested": spaces.Dict({"deep": BOX})}),
        spaces.MultiDiscrete([[2, 2], [2, 2]]),
    ],
    ids=lambda space: type(space).__name__,
)
def test_other_observation_spaces_are_refused(space: spaces.Space) -> None:
    with pytest.raises(TypeError, match="expected Box, Discrete, MultiDiscrete, MultiBinary or a flat Dict"):
        WorldModel(WorldModelConfig(3, 2), space)


@pytest.mark.parametrize("space", [spaces.Discrete(2), spaces.MultiDiscrete([2, 2]), spaces.MultiBinary(2)], ids=repr)
def test_discrete_actions_are_refused(space: Any) -> None:
    with pytest.raises(TypeError, match="expected a Box action space, got .*First-order gradients need continuous"):
        WorldModel(WorldModelConfig(3, 2), BOX, space)


def test_unbounded_actions_are_refused() -> None:
    with pytest.raises(ValueError, match="expected finite action bounds"):
        WorldModel(WorldModelConfig(3, 2), BOX, spaces.Box(-np.inf, 1.0, (2,)))


def test_spaces_that_do_not_fit_the_config_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a space.* of observation_dim 4 as in the config, got one of 3"):
        WorldModel(WorldModelConfig(4, 2), BOX)
    with pytest.raises(ValueError, match="expected a space of action_dim 1 as in the config, got one of 2"):
        WorldModel(WorldModelConfig(3, 1), BOX, spaces.Box(-1.0, 1.0, (2,)))


# Preprocessing


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(
    ("space", "observation", "expected"),
    [
        (BOX, [0.1, 0.2, 0.3], [0.1, 0.2, 0.3]),
        (spaces.Box(-1.0, 1.0, (2, 2)), [[1.0, 2.0], [3.0, 4.0]], [1.0, 2.0, 3.0, 4.0]),
        (spaces.Box(-1.0, 1.0, ()), 0.5, [0.5]),
        (spaces.Box(-5, 5, (2,), np.int64), [-5, 3], [-5.0, 3.0]),
        (spaces.Discrete(3), 1, [0.0, 1.0, 0.0]),
        (spaces.Discrete(3), [1], [0.0, 1.0, 0.0]),  # as SB3 stores it
        (spaces.Discrete(3, start=-1), 1, [0.0, 0.0, 1.0]),
        (spaces.MultiDiscrete([2, 3]), [1, 0], [0.0, 1.0, 1.0, 0.0, 0.0]),
        (spaces.MultiDiscrete([2, 3], start=[5, 7]), [5, 9], [1.0, 0.0, 0.0, 0.0, 1.0]),
        (spaces.MultiBinary(3), [1, 0, 1], [1.0, 0.0, 1.0]),
        (spaces.MultiBinary((3, 2)), [[1, 0], [0, 0], [1, 1]], [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]),
    ],
    ids=lambda value: repr(value) if isinstance(value, spaces.Space) else "",
)
def test_observations_are_flattened_and_discrete_ones_made_one_hot(
    space: spaces.Space, observation: Any, expected: list[float], batch_size: int
) -> None:
    model = make(space)
    rows = np.array([observation] * batch_size, dtype=space.dtype)
    for observations in (rows, torch.from_numpy(rows)):
        features = model.preprocess(observations)
        assert features.dtype == torch.float32
        torch.testing.assert_close(features, torch.tensor([expected] * batch_size))
        assert model.encode(features).shape == (batch_size, 16)


def test_dict_entries_are_concatenated_in_the_spaces_order(tmp_path: pathlib.Path) -> None:
    # Pairs keep their order; Gymnasium sorts the keys of a plain dict.
    space = spaces.Dict([("z", spaces.Box(-9.0, 9.0, (2,))), ("a", spaces.Discrete(2)), ("m", spaces.MultiBinary(2))])
    observations = {"a": np.array([1, 0]), "m": np.array([[1, 0], [1, 1]]), "z": np.array([[3.0, 4.0], [5.0, 6.0]])}
    expected = torch.tensor([[3.0, 4.0, 0.0, 1.0, 1.0, 0.0], [5.0, 6.0, 1.0, 0.0, 1.0, 1.0]])
    model = make(space)
    torch.testing.assert_close(model.preprocess({**observations, "unused": np.zeros(2)}), expected)
    model.save(tmp_path / "model.pt")
    torch.testing.assert_close(WorldModel.load(tmp_path / "model.pt").preprocess(observations), expected)


def test_observations_are_normalised_by_all_that_was_counted(tmp_path: pathlib.Path) -> None:
    model = make(normalize_observations=True)
    middle, spread = torch.tensor([3.0, -20.0, 0.1]), torch.tensor([0.5, 30.0, 0.0])  # the last is constant
    rows = middle + spread * batch(600, width=3)
    torch.testing.assert_close(model.preprocess(rows), rows.clamp(-10.0, 10.0), rtol=1e-4, atol=0.0)  # nothing counted
    for part in rows.split(200):
        model.count(part)
    features = model.preprocess(rows)
    torch.testing.assert_close(features.mean(0), torch.zeros(3), atol=1e-4, rtol=0.0)
    torch.testing.assert_close(features[:, :2].std(0, correction=0), torch.ones(2), atol=1e-3, rtol=0.0)
    jump = rows.mean(0) + torch.tensor([0.0, 0.0, 5.0])
    torch.testing.assert_close(model.preprocess(jump[None])[0, 2], torch.tensor(10.0))  # clipped
    model.save(tmp_path / "model.pt")
    loaded = WorldModel.load(tmp_path / "model.pt")
    assert torch.equal(loaded.preprocess(rows), features)
    assert float(loaded.normalizer.count) == pytest.approx(600.0, abs=1e-3)


class Learned(BaseFeaturesExtractor):
    """One linear layer."""

    def __init__(self, space: spaces.Box, width: int) -> None:
        super().__init__(space, width)
        self.net = nn.Linear(space.shape[0], width)

    def forward(self, observations: Tensor) -> Tensor:
        return self.net(observations)


def test_what_a_learned_extractor_makes_is_not_normalised() -> None:
    config = WorldModelConfig(4, 2, latent_dim=16, normalize_observations=True)
    extractor = Learned(BOX, 4)
    learned = WorldModel(config, BOX, features_extractor=extractor)
    flat = WorldModel(dataclasses.replace(config, observation_dim=3), BOX, features_extractor=FlattenExtractor(BOX))
    rows = 5.0 + batch(8, width=3)
    for model in (learned, flat):
        model.count(rows)
    assert torch.equal(learned.preprocess(rows), extractor(rows))
    torch.testing.assert_close(flat.preprocess(rows).mean(0), torch.zeros(3), atol=1e-3, rtol=0.0)


def test_float64_observations_become_the_models_dtype_without_a_detour() -> None:
    space = spaces.Box(-1.0, 1.0, (3,), np.float64)
    third = np.full((1, 3), 1 / 3)
    assert make(space).preprocess(third).dtype == torch.float32
    features = make(space).double().preprocess(third)
    assert features.dtype == torch.float64
    assert (features == 1 / 3).all()  # every digit


def test_gradients_pass_through_preprocessing() -> None:
    observations = batch(2, width=3).requires_grad_()
    features = make().preprocess(observations)
    assert torch.equal(torch.autograd.grad(features.sum(), observations)[0], torch.ones(2, 3))


@pytest.mark.parametrize(
    ("space", "observations"),
    [
        (BOX, np.zeros(3)),  # no batch axis
        (BOX, np.zeros((2, 4))),
        (BOX, np.zeros((2, 3, 1))),
        (BOX, np.float32(0.0)),
        (BOX, {"a": np.zeros((2, 3))}),
        (spaces.Discrete(3), np.zeros((2, 3), np.int64)),
        (spaces.MultiDiscrete([2, 3]), np.zeros((2, 3), np.int64)),
        (spaces.MultiBinary((3, 2)), np.zeros((2, 6), np.int8)),
        (spaces.Dict({"a": BOX}), np.zeros((2, 3))),
        (spaces.Dict({"a": BOX, "b": BOX}), {"a": np.zeros((2, 3))}),
        (spaces.Dict({"a": BOX}), {"a": np.zeros((2, 4))}),
    ],
)
def test_observations_of_another_shape_are_refused(space: spaces.Space, observations: Any) -> None:
    with pytest.raises(ValueError, match="expected observations"):
        make(space).preprocess(observations)


# Regularisers


def test_simnorm_latents_are_points_of_simplices() -> None:
    z, next_z, *_ = outputs(make())
    for latents in (z, next_z):
        groups = latents.unflatten(-1, (4, 4))  # (B, V, G)
        torch.testing.assert_close(groups.sum(1), torch.ones(2, 4))
        assert (latents >= 0).all()


@pytest.mark.parametrize(("activation", "lowest"), [("relu", 0.0), ("mish", -0.31)])  # Mish's minimum is -0.309
def test_latents_without_regularizer_are_those_of_the_activation(activation: str, lowest: float) -> None:
    model = make(regularizer="none", activation=activation)
    with torch.no_grad():
        z = model.encode(20 * batch(200, width=3))
    assert not any(type(module).__name__ == "SimNorm" for module in model.modules())
    assert (z >= lowest).all()
    assert z.max() > 1.0


def test_spectral_norm_bounds_how_far_encoder_and_dynamics_stretch() -> None:
    # ReLU and every linear map stretch by at most 1, and so does their composition.
    model = make(regularizer="spectral_norm", activation="relu")
    pair = torch.zeros(1, 3), torch.zeros(1, 18)
    with torch.no_grad():
        for _ in range(200):  # power iterations
            model.encoder(pair[0]), model.dynamics(pair[1])
        model.eval()
        for part, width in ((model.encoder, 3), (model.dynamics, 18)):
            a, b = 5 * batch(50, width=width), 5 * batch(50, width=width, seed=1)
            stretch = (part(a) - part(b)).norm(dim=-1) / (a - b).norm(dim=-1)
            assert 0 < stretch.max() <= 1.01


@pytest.mark.parametrize("regularizer", ["simnorm", "none", "spectral_norm"])
@pytest.mark.parametrize("activation", ["mish", "relu"])
def test_gradients_reach_the_first_action_and_every_parameter(regularizer: str, activation: str) -> None:
    model = make(regularizer=regularizer, activation=activation, latent_dim=32, mlp_dim=32)
    first = torch.zeros(2, 2, requires_grad=True)
    z = model.next(model.encode(batch(2, width=3)), first)
    for _ in range(2):
        z = model.next(z, torch.zeros(2, 2))
    (model.reward(z, torch.zeros(2, 2)).sum() + model.termination_logits(z).sum()).backward()
    assert first.grad is not None
    assert first.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in model.parameters())


# Termination


def test_termination_is_exactly_0_until_one_was_seen() -> None:
    model = make()
    z = model.encode(batch(2, width=3))
    assert not model.predicts_termination
    assert torch.equal(model.termination(z), torch.zeros(2))
    model.expect_termination()
    assert model.predicts_termination
    torch.testing.assert_close(model.termination(z), torch.sigmoid(model.termination_logits(z)))
    assert (model.termination(z) > 0).all()


def test_termination_loss_is_the_binary_cross_entropy() -> None:
    # A zero last layer says 1/2: ln 2 for either flag.
    model = make()
    nn.init.zeros_(model.termination_head[-1].weight)
    loss = model.termination_loss(batch(2, width=16), torch.tensor([True, False]))
    torch.testing.assert_close(loss, torch.full((2,), 2.0).log())


def test_model_without_termination_head_never_predicts_one() -> None:
    model = make(termination_head=False)
    model.expect_termination()
    z = model.encode(batch(2, width=3))
    assert not model.predicts_termination
    assert torch.equal(model.termination(z), torch.zeros(2))
    with pytest.raises(ValueError, match="no termination head. Make it with termination_head=True"):
        model.termination_logits(z)


def test_seen_termination_survives_state_dict_and_copy() -> None:
    seen, unseen = make(), make()
    seen.expect_termination()
    assert copy.deepcopy(seen).predicts_termination
    other = make(seed=1)
    other.load_state_dict(seen.state_dict())
    assert_equal(outputs(other), outputs(seen))
    other.load_state_dict(unseen.state_dict())
    assert not other.predicts_termination
    holder = nn.ModuleDict({"model": make()})  # as a part of another module, such as a policy
    holder.load_state_dict({f"model.{key}": value for key, value in seen.state_dict().items()})
    assert holder["model"].predicts_termination


def test_copy_of_a_model_answers_for_itself() -> None:
    model = make()
    twin = copy.deepcopy(model)
    twin.load_state_dict({**model.state_dict(), "seen_termination": torch.ones(())})
    assert twin.predicts_termination
    assert not model.predicts_termination


# Tasks


def test_task_embedding_is_scaled_back_to_norm_1() -> None:
    model = make(num_tasks=3)
    with torch.no_grad():
        model.task_embedding.weight[0] = torch.tensor([3.0, 4.0, 0.0, 0.0, 0.0, 0.0])  # norm 5
        model.task_embedding.weight[1] = torch.tensor([0.6, 0.8, 0.0, 0.0, 0.0, 0.0])  # that over 5
        model.task_embedding.weight[2] = torch.tensor([0.3, 0.4, 0.0, 0.0, 0.0, 0.0])  # norm 1/2: left as it is
    long, unit, short = (outputs(model, task) for task in range(3))
    for a, b, c in zip(long[:3], unit[:3], short[:3], strict=True):
        torch.testing.assert_close(a, b)
        assert not torch.allclose(a, c)


def test_each_element_can_have_a_task_of_its_own() -> None:
    model = make(num_tasks=2)
    together = outputs(model, torch.tensor([1, 0]))
    first, second = outputs(model, 0), outputs(model, 1)
    for both, a, b in zip(together, second, first, strict=True):
        torch.testing.assert_close(both[0], a[0])
        torch.testing.assert_close(both[1], b[1])
    sequence = model.encode(batch(3, 2, width=3), torch.tensor([1, 0]))  # (H, B, Z)
    torch.testing.assert_close(sequence[:, 0], model.encode(batch(3, 2, width=3)[:, 0], 1))


def test_task_is_required_with_tasks_and_refused_without() -> None:
    x = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="expected `task` in 0..2: this world model is multi-task"):
        make(num_tasks=3).encode(x)
    with pytest.raises(ValueError, match="expected task=None, got a task"):
        make().encode(x, 0)
    with pytest.raises(IndexError):
        make(num_tasks=3).encode(x, 3)


def padded_model(**config: Any) -> Any:
    """Two tasks, of 3 and 2 observations and of 2 actions and 1, with all heads."""
    fields = {"tasks": ("walk", "turn"), "observation_dims": (3, 2), "action_dims": (2, 1), "discounts": (0.9, 0.8)}
    bounds = np.array([1.0, 2.0], np.float32)
    heads = {"num_q": 3, "policy_prior": True, **fields, **config}
    model = make(BOX, spaces.Box(-bounds, bounds), **heads)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.value.parameters():
            nn.init.normal_(parameter)  # its last layer is 0 at first
    model.expect_termination()
    return model.eval()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_tasks_are_found_by_name_and_index() -> None:
    config = padded_model().config
    assert config.num_tasks == 2
    assert [config.task_index(task) for task in ("walk", "turn", 0, 1)] == [0, 1, 0, 1]
    for wrong in ("run", None, 2, -1):
        with pytest.raises(ValueError, match=r"`task` must be in 0\.\.1: .* or one of .'walk', 'turn'."):
            config.task_index(wrong)
    alone = WorldModelConfig(3, 2, tasks=("walk",))
    assert alone.num_tasks == 0
    assert alone.task_index("walk") is None


def test_action_mask_and_discount_are_the_tasks_own() -> None:
    model = padded_model()
    assert model.action_mask(0).tolist() == [1.0, 1.0]
    assert model.action_mask(torch.tensor([1, 0])).tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert make().action_mask().tolist() == [1.0, 1.0]
    torch.testing.assert_close(model.discount(torch.tensor([1, 0])), torch.tensor([0.8, 0.9]))
    assert make().discount().item() == pytest.approx(0.99)


def test_what_stands_in_an_actions_padding_has_no_effect_and_no_gradient() -> None:
    model, z = padded_model(), batch(2, width=16).softmax(-1)
    actions = batch(2, width=2, seed=1).requires_grad_()
    other = torch.cat([actions[:, :1], torch.full((2, 1), 7.0)], 1)
    for predict in (
        model.next,
        model.reward,
        model.q_logits,
        lambda *given: torch.cat([x.flatten() for x in model(*given)]),
        lambda z, a, task: model.reward_loss(z, a, torch.ones(2), task),
    ):
        assert torch.equal(predict(z, actions, 1), predict(z, other, 1))
        assert not torch.equal(predict(z, actions, 0), predict(z, other, 0))
        weights = batch(1, width=predict(z, actions, 1).numel(), seed=2)[0]
        gradient = torch.autograd.grad(predict(z, actions, torch.tensor([1, 0])).flatten() @ weights, actions)[0]
        assert gradient[0, 1] == 0.0
        assert (gradient[[0, 1, 1], [0, 0, 1]] != 0.0).all()


@pytest.mark.parametrize("encoder_layers", [0, 2])
def test_model_of_one_task_predicts_as_the_whole_without_padding(encoder_layers: int) -> None:
    model = padded_model(encoder_layers=encoder_layers).double()
    state = torch.get_rng_state()
    for task, (name, width, count) in enumerate([("walk", 3, 2), ("turn", 2, 1)]):
        single = model.for_task(name)
        assert (single.config.num_tasks, single.config.tasks) == (0, (name,))
        assert single.observation_space == spaces.Box(-1.0, 1.0, (width,), np.float32)
        assert single.action_space.high.tolist() == [1.0, 2.0][:count]
        assert single.discount() == model.discount(task)
        observations = nn.functional.pad(batch(4, width=width, dtype=torch.float64), (0, 3 - width))
        actions = nn.functional.pad(batch(4, width=count, seed=1, dtype=torch.float64), (0, 2 - count))
        z = model.encode(observations, task)
        torch.testing.assert_close(single.encode(observations[:, :width]), z)
        own = actions[:, :count]
        torch.testing.assert_close(single.next(z, own), model.next(z, actions, task))
        torch.testing.assert_close(single.reward(z, own), model.reward(z, actions, task))
        torch.testing.assert_close(single.termination(z), model.termination(z, task))
        for target in (False, True):
            torch.testing.assert_close(single.q(z, own, target=target), model.q(z, actions, task, target=target))
        means = [m.prior(z, t, generator()).mean for m, t in ((single, None), (model, task))]
        torch.testing.assert_close(means[0], means[1][:, :count])
        assert single.for_task(None) is single.for_task(name) is single
    assert torch.equal(torch.get_rng_state(), state)


def test_task_of_a_spectral_normed_model_is_not_taken_out() -> None:
    with pytest.raises(ValueError, match="expected a model without spectral norm"):
        make(num_tasks=2, regularizer="spectral_norm").for_task(0)


@pytest.mark.parametrize("encoder_layers", [0, 2])
@pytest.mark.parametrize("like", [None, "turn"])
def test_model_of_a_new_task_predicts_with_the_weights_and_its_own_embedding(
    encoder_layers: int, like: str | None
) -> None:
    model = padded_model(encoder_layers=encoder_layers).double()
    known = model.embedding(torch.arange(2))
    embedding = known.mean(0) if like is None else known[1]
    new = model.for_new_task("spin", 2, 1, 0.9, like)
    with torch.no_grad():
        model.task_embedding.weight[1] = embedding  # type: ignore[union-attr]  # an old task of the same kind
    assert (new.config.num_tasks, new.config.tasks, new.config.discounts) == (1, ("spin",), (0.9,))
    assert (new.observation_space.shape, new.action_space.shape) == ((2,), (1,))
    assert not new.training and new.task_embedding.weight.requires_grad  # type: ignore[union-attr]
    observations, actions = batch(4, width=2, dtype=torch.float64), batch(4, width=1, seed=1, dtype=torch.float64)
    z = model.encode(nn.functional.pad(observations, (0, 1)), 1)  # "turn" is padded from 2 to 3, and from 1 to 2
    old = nn.functional.pad(actions, (0, 1))
    single = new.for_task("spin")
    assert single.config.num_tasks == 0 and single.discount() == 0.9
    for one in (new, single):
        torch.testing.assert_close(one.encode(observations), z)
        torch.testing.assert_close(one.next(z, actions), model.next(z, old, 1))
        torch.testing.assert_close(one.reward(z, actions), model.reward(z, old, 1))
        torch.testing.assert_close(one.q(z, actions), model.q(z, old, 1))
        mean = one.prior(z, generator=generator()).mean
        torch.testing.assert_close(mean, model.prior(z, 1, generator()).mean[:, :1])


def test_what_is_beyond_the_known_width_of_a_new_task_counts_for_nothing_until_it_is_learned() -> None:
    model = padded_model()
    new = model.for_new_task("swim", 5, 4)
    assert new.discount() == pytest.approx(sum(model.config.all_discounts) / 2)
    z, observations, actions = batch(4, width=16), batch(4, width=5), batch(4, width=4, seed=1)
    cut = model.for_new_task("swim", 3, 2)
    torch.testing.assert_close(new.encode(observations), cut.encode(observations[:, :3]))
    torch.testing.assert_close(new.next(z, actions), cut.next(z, actions[:, :2]))
    sample = new.prior(z)
    assert sample.actions.shape == (4, 4) and (sample.mean[:, 2:] == 0.0).all()
    new.encode(observations).square().sum().backward()
    first = new.encoder[0][0].weight  # type: ignore[index]
    assert (first.grad[:, 3:5] != 0.0).any() and (first[:, 3:5] == 0.0).all()


def test_new_task_of_a_model_that_has_no_place_for_one_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a multi-task model without 'spin' .* got one of a single task"):
        make().for_new_task("spin", 3, 2)
    with pytest.raises(ValueError, match="expected a multi-task model without 'walk'"):
        padded_model().for_new_task("walk", 3, 2)
    with pytest.raises(ValueError, match="expected a model without spectral norm"):
        make(num_tasks=2, regularizer="spectral_norm").for_new_task("spin", 3, 2)
    with pytest.raises(ValueError, match="got 'spin'"):
        padded_model().for_new_task("swim", 3, 2, like="spin")


def test_padding_needs_flat_boxes() -> None:
    config = WorldModelConfig(3, 2, num_tasks=1, observation_dims=(3,))
    with pytest.raises(TypeError, match="expected flat Boxes where tasks are padded"):
        WorldModel(config, spaces.Dict({"a": BOX}))


# What TD-MPC2 plans with


def test_values_are_0_at_first_and_so_are_their_targets() -> None:
    model = make(num_q=5)
    z, actions = batch(2, width=16), batch(2, width=2)
    for target in (False, True):
        torch.testing.assert_close(model.q(z, actions, target=target), torch.zeros(5, 2), atol=1e-5, rtol=0.0)


def test_smaller_and_mean_value_are_of_the_same_two_members() -> None:
    model, z, actions = padded_model(), batch(50, width=16), batch(50, width=2)
    members = model.q(z, actions, 0)  # (3, 50)
    least, mean = (model.q(z, actions, 0, how, generator=generator()) for how in ("min", "mean"))
    pairs = [members[[i, j]] for i, j in ((0, 1), (0, 2), (1, 2))]
    (pair,) = [p for p in pairs if torch.allclose(p.mean(0), mean)]
    torch.testing.assert_close(pair.amin(0), least)
    drawn = {model.q(z, actions, 0, "mean", generator=generator(seed)).sum().item() for seed in range(20)}
    assert len(drawn) == 3
    with pytest.raises(ValueError, match="`reduce` must be 'all', 'min' or 'mean', got 'max'"):
        model.q(z, actions, 0, "max")


def test_dropout_is_for_members_in_training_and_never_for_targets() -> None:
    model, z, actions = padded_model(dropout=0.5), batch(2, width=16), batch(2, width=2)
    still, target = model.q(z, actions, 0), model.q(z, actions, 0, target=True)
    model.train()
    assert not torch.equal(model.q(z, actions, 0), still)
    assert torch.equal(model.q(z, actions, 0, target=True), target)
    model.eval()
    assert torch.equal(model.q(z, actions, 0), still)


def test_targets_move_by_tau_and_get_no_gradient() -> None:
    value = padded_model().value
    before, online = value.target[0][0].weight.clone(), value.online[0][0].weight
    value.update_target(0.25)
    torch.testing.assert_close(value.target[0][0].weight, 0.75 * before + 0.25 * online)
    assert not any(p.requires_grad for p in value.target.parameters())


def test_prior_keeps_out_of_the_padding() -> None:
    model, z = padded_model(), batch(3, width=16)
    sample = model.prior(z, torch.tensor([0, 1, 0]), generator())
    assert sample.actions.shape == sample.mean.shape == sample.log_std.shape == (3, 2)
    assert (sample.actions != 0).tolist() == (sample.mean != 0).tolist() == [[True, True], [True, False], [True, True]]
    assert sample.actions.abs().max() <= 1.0


def test_prior_is_a_squashed_gaussian_with_tdmpc2s_bonus() -> None:
    # A zero last layer with bias (atanh 1/2, 0 | 0, 0) says tanh μ = (1/2, 0) and log σ = -10 + 6 = -4.
    model = make(policy_prior=True)
    last = model.policy_prior.net[-1]
    nn.init.zeros_(last.weight)
    with torch.no_grad():
        last.bias[0] = np.arctanh(0.5)
    noise = torch.tensor([[1.0, -2.0]])
    sample = model.policy_prior(batch(1, width=16), noise)
    torch.testing.assert_close(sample.mean, torch.tensor([[0.5, 0.0]]))
    torch.testing.assert_close(sample.log_std, torch.full((1, 2), -4.0))
    sigma = np.exp(-4.0)
    torch.testing.assert_close(
        sample.actions, torch.tensor([[np.arctanh(0.5) + sigma, -2 * sigma]], dtype=torch.float32).tanh()
    )
    # -log N = ε²/2 + log σ + log(2π)/2 for each of 2 dimensions, and times 2: 2 (2.5 - 8 + log 2π)
    torch.testing.assert_close(sample.entropy, torch.tensor([2 * (2.5 - 8.0 + np.log(2 * np.pi))], dtype=torch.float32))


def test_model_without_heads_says_how_to_get_them() -> None:
    z = torch.zeros(1, 16)
    with pytest.raises(ValueError, match="no value ensemble. Make one with .*planning=True"):
        make().q(z, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="no policy prior. Make one with .*planning=True"):
        make().prior(z)


# Dtype


def test_double_model_computes_in_float64() -> None:
    single, double = make(), make().double()
    for model in (single, double):
        model.expect_termination()
    assert double.dtype == double.bins.dtype == torch.float64
    assert double.predicts_termination
    for a, b in zip(outputs(double), outputs(single), strict=True):
        assert a.dtype == torch.float64
        assert a.shape == b.shape


def test_rewards_gradient_is_that_of_finite_differences() -> None:
    model = make().double()
    z = model.encode(batch(2, width=3, dtype=torch.float64)).detach()
    actions = batch(2, width=2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: model(z, a), (actions,))


# Files


CHOICES: list[Any] = [
    pytest.param({}, id="default"),
    pytest.param({"regularizer": "none", "activation": "relu"}, id="no regularizer"),
    pytest.param({"regularizer": "spectral_norm"}, id="spectral norm"),
    pytest.param({"termination_head": False, "reward_in_task_units": False}, id="no termination"),
    pytest.param({"num_q": 2, "policy_prior": True, "tasks": ("walk",)}, id="planning"),
    pytest.param({"normalize_observations": True}, id="normalised"),
    pytest.param({"vmin": np.float64(-5.0), "num_bins": np.int64(7)}, id="NumPy numbers"),
]


@pytest.mark.parametrize("choice", CHOICES)
def test_loaded_model_equals_the_saved_one(tmp_path: pathlib.Path, choice: dict[str, Any]) -> None:
    model = make(spaces.Box(-np.inf, np.inf, (3,), np.float64), spaces.Box(-2.0, 3.0, (2,)), **choice)
    model.expect_termination()
    model.eval()
    model.save(tmp_path / "model.pt")
    loaded = WorldModel.load(tmp_path / "model.pt").eval()
    assert loaded.config == model.config
    assert (loaded.observation_space, loaded.action_space) == (model.observation_space, model.action_space)
    assert loaded.predicts_termination == model.predicts_termination
    assert_equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize(
    "space",
    [
        spaces.Dict({"b": spaces.Box(-np.inf, np.inf, (2,), np.float64), "a": spaces.MultiDiscrete([2, 3])}),
        spaces.MultiBinary((3, 2)),
        spaces.Discrete(4, start=1),
        spaces.Box(np.array([-1.0, -np.inf], np.float32), np.array([np.inf, 2.0], np.float32)),
    ],
    ids=repr,
)
def test_saved_model_carries_its_spaces(tmp_path: pathlib.Path, space: spaces.Space) -> None:
    actions = spaces.Box(np.array([-1.0, 0.0]), np.array([1.0, 7.0]), dtype=np.float64)
    make(space, actions).save(tmp_path / "model.pt")
    loaded = WorldModel.load(str(tmp_path / "model.pt"))
    assert loaded.observation_space == space
    assert loaded.action_space == actions


def test_file_from_before_tasks_and_planning_still_loads(tmp_path: pathlib.Path) -> None:
    model = make(num_tasks=2)
    model.save(tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    new = ("num_q", "dropout", "policy_prior", "tasks", "observation_dims", "action_dims", "discounts")
    content["config"] = {key: value for key, value in content["config"].items() if key not in new}
    torch.save(content, tmp_path / "model.pt")
    loaded = WorldModel.load(tmp_path / "model.pt")
    assert loaded.config == model.config
    assert_equal(outputs(loaded, 1), outputs(model.eval(), 1))


def test_unseen_termination_survives_the_file(tmp_path: pathlib.Path) -> None:
    make().save(tmp_path / "model.pt")
    assert not WorldModel.load(tmp_path / "model.pt").predicts_termination


def test_missing_file_is_a_file_not_found_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError):
        WorldModel.load(tmp_path / "model.pt")


def test_truncated_file_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.pt"
    make().save(path)
    whole = path.read_bytes()
    for length in (0, 1, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated or damaged"):
            WorldModel.load(path)


def test_foreign_file_is_refused(tmp_path: pathlib.Path) -> None:
    for content in ({"format": "pwm_gym.replay/1"}, [1, 2], make().state_dict()):
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(ValueError, match="expected a world model of format 'pwm_gym.world_model/1'"):
            WorldModel.load(tmp_path / "model.pt")


def change(content: dict[str, Any], key: str, **values: Any) -> None:
    content[key] = {**content[key], **values}


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.pop("config"),
        lambda content: content.pop("state_dict"),
        lambda content: content["state_dict"].pop("encoder.0.0.weight"),
        lambda content: change(content, "state_dict", extra=torch.zeros(1)),
        lambda content: change(content, "state_dict", **{"encoder.0.0.weight": torch.zeros(1, 1)}),
        lambda content: content.update(state_dict=[1, 2]),
        lambda content: content.update(config=3),
        lambda content: change(content, "config", no_such_field=1),
        lambda content: change(content, "config", latent_dim=-1),
        lambda content: change(content, "config", latent_dim="wide"),
        lambda content: change(content, "config", observation_dim=4),
        lambda content: content.update(observation_space="Box"),
        lambda content: content.update(observation_space={"!space": {}}),
        lambda content: content.update(observation_space={"!class": "torch.nn:NoSuchLayer"}),
        lambda content: content.update(action_space=to_json(spaces.Discrete(2))),
        lambda content: content.update(action_space={"!class": "os:system"}),
    ],
    ids=range(16),
)
def test_tampered_file_is_refused(tmp_path: pathlib.Path, damage: Any) -> None:
    path = tmp_path / "model.pt"
    make().save(path)
    content = torch.load(path, weights_only=True)
    damage(content)
    torch.save(content, path)
    with pytest.raises(ValueError):
        WorldModel.load(path)


class Evil:
    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


def test_malicious_file_is_refused_and_not_executed(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.pt"
    make().save(path)
    content = torch.load(path, weights_only=True)
    content["state_dict"]["encoder.0.0.weight"] = Evil(tmp_path / "created")
    torch.save(content, path)
    with pytest.raises(UnsafeFileError, match="nothing was executed"):
        WorldModel.load(path)
    assert not (tmp_path / "created").exists()


def test_failed_save_keeps_the_old_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = tmp_path / "model.pt", make()
    model.save(path)

    def full_disk(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make(seed=1).save(path)
    assert_equal(outputs(WorldModel.load(path)), outputs(model))
