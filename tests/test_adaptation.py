"""A task that pre-training left out: its embedding, fine-tuning, and bad input."""

from typing import Any

import numpy as np
import pytest
import torch

from pwm_gym import OfflineDataset, WorldModel, adapt, extract, pretrain
from pwm_gym.training import update_world_model
from pwm_gym.world_model import WorldModelConfig
from tests.test_pretraining import SMALL, TASKS, assert_same_weights, make_dataset, make_episode

NEW: dict[str, Any] = {"batch_size": 16, "horizon": 3, "device": "cpu", "seed": 0}


@pytest.fixture(scope="module")
def model() -> WorldModel:
    return pretrain(make_dataset(), "1M", **SMALL | {"updates": 60})


def new_data(episodes: int = 2, scale: float = 1.0) -> OfflineDataset:
    """The second task's system, worth 5 more a step."""
    rng = np.random.default_rng(1)
    made = [make_episode(rng, 1)._replace(task=0) for _ in range(episodes)]
    return OfflineDataset([e._replace(rewards=scale * (e.rewards + 4.0)) for e in made], ("spin",))


def loss(model: WorldModel, data: OfflineDataset) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rng = np.random.default_rng(0)
    return float(update_world_model(model, optimizer, data, 256, 3, 0.5, rng)["model_loss"])


def test_embedding_alone_fits_better_and_fine_tuning_better_still(model: WorldModel) -> None:
    data, before = new_data(), {name: value.clone() for name, value in model.state_dict().items()}
    found = [
        loss(adapt(model, data, **NEW, embedding_updates=e, updates=u, learning_rate=1e-3), data)
        for e, u in ((0, 0), (60, 0), (60, 60))
    ]
    assert found[1] < 0.98 * found[0] and found[2] < 0.9 * found[1], found
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_embedding_phase_leaves_all_other_weights_as_they_were(model: WorldModel) -> None:
    old, new = (adapt(model, new_data(), **NEW, embedding_updates=e, updates=0) for e in (0, 5))
    mine = old.state_dict()
    changed = {name for name, value in new.state_dict().items() if not torch.equal(value, mine[name])}
    assert changed and all(name.endswith(".0.0.bias") for name in changed)  # what the embedding is folded into


def test_result_is_a_single_task_model_that_policies_are_made_of(model: WorldModel, tmp_path: Any) -> None:
    data = new_data()
    adapted = adapt(model, data, **NEW, embedding_updates=2, updates=2)
    assert (adapted.config.num_tasks, adapted.config.tasks) == (0, ("spin",))
    assert adapted.config.discounts == (0.95,) and not adapted.training
    assert extract(adapted, data, out=tmp_path, updates=1, num_envs=2, horizon=3, episodes=0)["spin"].agent


def test_same_seed_gives_the_same_model_and_an_interrupted_one_goes_on(model: WorldModel, tmp_path: Any) -> None:
    data, settings = new_data(), {**NEW, "embedding_updates": 3, "checkpoint_every": 2}
    whole = adapt(model, data, **settings, updates=6)
    assert_same_weights(whole, adapt(model, data, **settings, updates=6))
    adapt(model, data, **settings, updates=4, out=tmp_path)
    assert_same_weights(whole, adapt(model, data, **settings, updates=6, out=tmp_path))


def test_one_task_of_several_is_chosen_by_name(model: WorldModel) -> None:
    both = OfflineDataset([make_episode(np.random.default_rng(2), i) for i in (0, 1)], ("glide", "twirl"))
    assert adapt(model, both, "twirl", **NEW, embedding_updates=1, updates=1).config.observation_dim == 2
    with pytest.raises(ValueError, match="expected `task`, one of .* for a dataset of several"):
        adapt(model, both, **NEW)


def test_bad_input_is_refused(model: WorldModel) -> None:
    with pytest.raises(ValueError, match="`updates` must be >= 0, got -1"):
        adapt(model, new_data(), updates=-1)
    with pytest.raises(ValueError, match="expected a multi-task model without 'glide'"):
        adapt(model, make_dataset((TASKS[0],)), **NEW)
    with pytest.raises(ValueError, match="got one of a single task"):
        adapt(WorldModel(WorldModelConfig.preset("1M", observation_dim=2, action_dim=1)), new_data(), **NEW)
    with pytest.raises(ValueError, match="expected finite numbers"):
        adapt(model, new_data(scale=float("nan")), **NEW, embedding_updates=1, updates=0)
