"""The NumPy face against Gymnasium's own SyncVectorEnv, its wrappers, and the torch face."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers.vector import (
    ClipAction,
    DictInfoToList,
    NormalizeObservation,
    NormalizeReward,
    RecordEpisodeStatistics,
    RescaleAction,
)

from pwm_gym.differentiable import DifferentiableVectorEnv, NumpyVectorEnv, check_reset_mask
from pwm_gym.latent_env import LatentVectorEnv
from pwm_gym.world_model import WorldModel, WorldModelConfig

SAME_STEP, NEXT_STEP, DISABLED = AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED
every_mode = pytest.mark.parametrize("mode", [SAME_STEP, NEXT_STEP, DISABLED])
TORQUE = spaces.Box(-2.0, 2.0, (1,), np.float32)  # Pendulum's actions


def make_model(action_space: spaces.Box = TORQUE, ends: bool = False, **config: Any) -> WorldModel:
    """Make a tiny model with Pendulum's spaces and weights so large that everything depends on the actions.

    With `ends`, the termination head predicts an end in about a fifth of all states.
    """
    fields: dict[str, Any] = {"latent_dim": 8, "simnorm_dim": 4, "encoder_dim": 12, "mlp_dim": 12, "num_bins": 11}
    actions = int(np.prod(action_space.shape))
    space = spaces.Box(-8.0, 8.0, (3,), np.float32)
    config = fields | config
    model = WorldModel(WorldModelConfig(observation_dim=3, action_dim=actions, **config), space, action_space)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
        if ends:
            model.expect_termination()
            latents = [model.encode(2 * torch.rand((500, 3), generator=generator) - 1)]
            for _ in range(3):
                latents.append(model.next(latents[-1], 2 * torch.rand((500, actions), generator=generator) - 1))
            last: Any = model.termination_head[-1]  # type: ignore[index]
            last.bias -= model.termination_logits(torch.cat(latents[1:])).quantile(0.8)
    return model.requires_grad_(False)


def make_face(
    model: WorldModel | None = None, num_envs: int = 3, horizon: int = 4, starts: int = 20, **kwargs: Any
) -> NumpyVectorEnv:
    start = np.random.default_rng(0).uniform(-1, 1, (starts, 3)).astype(np.float32)
    return LatentVectorEnv(model or make_model(), start, num_envs, horizon, **kwargs).numpy()


def random_actions(env: VectorEnv, steps: int, seed: int = 0) -> np.ndarray:
    space: Any = env.action_space
    return np.random.default_rng(seed).uniform(space.low, space.high, (steps, *space.shape)).astype(np.float32)


# Spaces, types and memory


def test_spaces_are_batches_of_the_single_ones():
    torch_face = LatentVectorEnv(make_model(), np.zeros((2, 3)), num_envs=5)
    for env in (torch_face, torch_face.numpy()):
        assert env.num_envs == 5
        assert env.single_observation_space == spaces.Box(0, 1, (8,), np.float32)
        assert env.single_action_space == TORQUE
        assert env.observation_space == batch_space(env.single_observation_space, 5)
        assert env.action_space == batch_space(env.single_action_space, 5)


@every_mode
@pytest.mark.parametrize("double", [False, True])
def test_everything_returned_is_of_gymnasiums_types_and_in_its_space(mode, double):
    model = make_model(ends=True)
    env = make_face(model.double() if double else model, num_envs=5, autoreset_mode=mode)
    observations, infos = env.reset(seed=0)
    assert observations in env.observation_space and infos == {}
    for actions in random_actions(env, 12):
        observations, rewards, terminated, truncated, infos = env.step(actions)
        assert observations in env.observation_space
        assert (rewards.dtype, rewards.shape) == (np.float32, (5,))
        assert terminated.dtype == truncated.dtype == np.bool_
        assert terminated.shape == truncated.shape == (5,)
        for array in arrays_in(infos):
            assert array.dtype in (np.float32, np.bool_) and array.shape[0] in (5, 8)
        for i in np.flatnonzero(infos.get("_final_obs", [])):
            assert infos["final_obs"][i] in env.single_observation_space
        if mode == DISABLED and (terminated | truncated).any():
            observations, infos = env.reset(options={"reset_mask": terminated | truncated})
            assert observations in env.observation_space and infos == {}


@pytest.mark.parametrize("regularizer", ["none", "spectral_norm"])
def test_latents_without_simnorm_are_in_their_space_too(regularizer):
    env = make_face(make_model(regularizer=regularizer))
    assert env.reset(seed=0)[0] in env.observation_space
    assert env.step(random_actions(env, 1)[0])[0] in env.observation_space


def arrays_in(data: Any) -> list[np.ndarray]:
    if isinstance(data, dict):
        return [array for value in data.values() for array in arrays_in(value)]
    if isinstance(data, tuple) or (isinstance(data, np.ndarray) and data.dtype == object):
        return [array for value in data for array in arrays_in(value)]
    return [data] if isinstance(data, np.ndarray) else []


@every_mode
def test_writing_into_what_was_returned_or_given_changes_nothing(mode):
    def run(meddle: bool) -> Any:
        env = make_face(make_model(ends=True), num_envs=5, autoreset_mode=mode)
        seen = [arrays_in(env.reset(seed=0))]
        for actions in random_actions(env, 12):
            given = actions.copy()
            result = env.step(given)
            done = result[2] | result[3]
            seen.append([array.copy() for array in arrays_in(result)])
            if meddle:
                for array in [given, *arrays_in(result)]:
                    array[...] = 1
            if mode == DISABLED and done.any():
                mask = done.copy()
                seen.append([array.copy() for array in arrays_in(env.reset(options={"reset_mask": mask}))])
                mask[:] = True
        return seen

    assert data_equivalence(run(meddle=True), run(meddle=False), exact=True)


def test_nothing_returned_shares_memory_with_the_env_or_with_each_other():
    env = make_face(make_model(ends=True), num_envs=5)
    state = [env.reset(seed=0)[0]]
    for actions in random_actions(env, 12):
        result = env.step(actions)
        arrays = arrays_in(result)
        inner = [env.env._z.numpy(), env.env._elapsed, env.env._ended]
        for i, array in enumerate(arrays):
            assert not any(np.shares_memory(array, other) for other in [*inner, *state, *arrays[:i]])
        state = arrays


# Against Gymnasium's SyncVectorEnv over single envs


class OneLatent(gym.Env):
    """One imagined env, written out as a plain `gymnasium.Env`."""

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(self, model: WorldModel, start: np.ndarray, horizon: int) -> None:
        self.model, self.start, self.horizon = model, torch.from_numpy(start[None]), horizon
        self.observation_space, self.action_space = model.latent_space, model.action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.z, self.elapsed = self.model.encode(self.start), 0
        return self.z[0].numpy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        unit = torch.from_numpy(action[None] / 2).clamp(-1, 1)
        reward = float(self.model.reward(self.z, unit))
        self.z = self.model.next(self.z, unit)
        end = self.model.termination(self.z).numpy()
        self.elapsed += 1
        return (
            self.z[0].numpy(),
            reward,
            bool(end[0] > 0.5),
            self.elapsed >= self.horizon,
            {"continue_prob": 1 - end[0]},
        )


@every_mode
@pytest.mark.parametrize("ends", [False, True])
def test_every_step_equals_that_of_a_sync_vector_env_down_to_the_infos(mode, ends):
    model, num_envs, horizon = make_model(ends=ends), 5, 4
    env = make_face(model, num_envs, horizon, starts=1, autoreset_mode=mode)
    start = np.random.default_rng(0).uniform(-1, 1, 3).astype(np.float32)
    sync = SyncVectorEnv([lambda: OneLatent(model, start, horizon)] * num_envs, autoreset_mode=mode)
    assert sync.metadata["autoreset_mode"] is env.metadata["autoreset_mode"]
    assert data_equivalence(env.reset(seed=0), sync.reset(seed=0))
    terminations, some, everyone = 0, 0, 0
    for actions in random_actions(env, 60):
        ours, theirs = list(env.step(actions)), list(sync.step(actions))
        theirs[1] = theirs[1].astype(np.float32)
        assert data_equivalence(ours, theirs)
        done = ours[2] | ours[3]
        terminations += ours[2].sum()
        some, everyone = some + (done.any() and not done.all()), everyone + done.all()
        if mode == DISABLED and done.any():
            # Gymnasium's own reset takes the mask out of the dict, hence two.
            assert data_equivalence(
                env.reset(options={"reset_mask": done.copy()}), sync.reset(options={"reset_mask": done.copy()})
            )
        elif ends and actions[0] > 1.2:  # resets by the caller, of envs that wait and of others
            mask = np.array([True, False, True, False, False])
            assert data_equivalence(
                env.reset(options={"reset_mask": mask}), sync.reset(options={"reset_mask": mask.copy()})
            )
    assert min(terminations, some) > 5 if ends else everyone > 5


def layout(env: VectorEnv, horizon: int) -> list[Any]:
    """Run an env on and tell what every step looks like, but not the numbers."""

    def types(data: Any) -> Any:
        if isinstance(data, dict):
            return {key: types(value) for key, value in data.items() if "continue_prob" not in key}
        if isinstance(data, np.ndarray) and data.dtype == object:
            return [value is None for value in data]
        return data if data.dtype == bool else (type(data), data.shape[:1])

    seen: list[Any] = [types(env.reset(seed=0)[1])]
    for t, actions in enumerate(random_actions(env, 3 * horizon)):
        observations, rewards, terminated, truncated, infos = env.step(actions)
        seen.append([types(x) for x in (observations, rewards != 0, terminated, truncated, infos)])
        done = terminated | truncated
        if env.metadata["autoreset_mode"] == DISABLED and done.any():
            seen.append(types(env.reset(options={"reset_mask": done})[1]))
        if t == 0:  # so that not all envs end at once from then on
            seen.append(types(env.reset(options={"reset_mask": np.array([True, False, False])})[1]))
    return seen


@every_mode
def test_flags_rewards_and_infos_are_laid_out_as_those_of_pendulum(mode):
    ours: Any = make_face(horizon=4, autoreset_mode=mode)
    theirs = gym.make_vec(
        "Pendulum-v1",
        3,
        "sync",
        vector_kwargs={"autoreset_mode": mode, "observation_mode": "same"},
        max_episode_steps=4,
    )
    assert ours.action_space == theirs.action_space
    assert ours.metadata["autoreset_mode"] is theirs.metadata["autoreset_mode"]
    assert data_equivalence(layout(ours, 4), layout(theirs, 4), exact=True)


@pytest.mark.parametrize(
    ("actions", "error", "ours_says"),
    [
        (1.5, TypeError, r"expected actions of shape \(3, 1\), got the scalar 1.5"),
        (np.float32(1.5), TypeError, "got the scalar"),
        (np.array(1.5), TypeError, "got the scalar"),
        (None, TypeError, "got the scalar None"),
        (np.zeros((2, 1), np.float32), ValueError, r"expected actions of shape \(3, 1\), got \(2, 1\)"),
        (np.zeros((4, 1), np.float32), ValueError, r"expected actions of shape \(3, 1\), got \(4, 1\)"),
    ],
)
def test_wrong_actions_raise_what_a_sync_vector_env_raises(actions, error, ours_says):
    env = make_face()
    env.reset(seed=0)
    with pytest.raises(error, match=ours_says):
        env.step(actions)
    theirs = gym.make_vec("Pendulum-v1", 3, "sync")
    theirs.reset(seed=0)
    with pytest.raises(error):
        theirs.step(actions)


@pytest.mark.parametrize("actions", [np.zeros((3, 2)), np.zeros(3), np.zeros((3, 1, 1))])
def test_actions_of_another_shape_are_refused(actions):
    env = make_face()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"expected actions of shape \(3, 1\)"):
        env.step(actions)


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        ([True, False, False], TypeError),
        (np.array([1, 0, 0]), TypeError),
        (np.array([True, False]), ValueError),
        (np.zeros(3, bool), ValueError),
    ],
)
def test_wrong_reset_masks_raise_what_a_sync_vector_env_raises(mask, error):
    for env in (make_face(autoreset_mode=DISABLED), gym.make_vec("Pendulum-v1", 3, "sync")):
        env.reset(seed=0)
        with pytest.raises(error, match="reset_mask"):
            env.reset(options={"reset_mask": mask})


def test_a_checked_reset_mask_is_a_copy():
    mask = np.array([True, False])
    checked = check_reset_mask(mask, 2)
    mask[:] = True
    assert checked.tolist() == [True, False]
    flags = torch.tensor([True, False])
    checked = check_reset_mask(flags, 2)
    flags[:] = True
    assert checked.tolist() == [True, False]


# Against the torch face


@every_mode
def test_the_faces_give_equal_numbers_and_share_their_state(mode):
    model = make_model(ends=True)
    face, latent_env = (make_face(model, num_envs=5, autoreset_mode=mode) for _ in range(2))
    latent_env = latent_env.env
    observations, _ = face.reset(seed=1)
    z, _ = latent_env.reset(seed=1)
    assert np.array_equal(observations, z)
    for actions in random_actions(face, 12):
        ours, theirs = face.step(actions), latent_env.step(torch.from_numpy(actions))
        for array, tensor in zip(ours[:4], theirs[:4], strict=True):
            assert np.array_equal(array, tensor)
        assert torch.equal(face.env.detach(), latent_env.detach())
        assert ("final_obs" in ours[4]) == ("final_obs" in theirs[4])
        if "final_obs" in theirs[4]:
            ended = theirs[4]["_final_obs"]
            assert np.array_equal(
                np.stack([row for row in ours[4]["final_obs"] if row is not None]), theirs[4]["final_obs"][ended]
            )
        done = ours[2] | ours[3]
        if mode == DISABLED and done.any():
            face.reset(options={"reset_mask": done})
            latent_env.reset(options={"reset_mask": done})


def test_no_graph_is_kept():
    model = make_model().requires_grad_(True)
    face = make_face(model)
    face.reset(seed=0)
    face.step(random_actions(face, 1)[0])
    assert not face.env.detach().requires_grad
    assert face.env._z.grad_fn is None


def test_actions_of_a_float64_space_keep_their_precision():
    space = spaces.Box(-2.0, 2.0, (1,), np.float64)
    face = make_face(make_model(space).double(), num_envs=1)
    rewards = []
    for action in (0.1, 0.1 + 1e-12):
        face.reset(seed=0)
        before = face.env.detach()
        with torch.no_grad():
            face.step(np.array([[action]]))
        rewards.append(face.env.detach() - before)
    assert not torch.equal(*rewards)


def test_integers_and_lists_are_taken_as_actions():
    face = make_face()
    results = []
    for actions in (np.ones((3, 1), np.float32), np.ones((3, 1), int), [[1.0], [1.0], [1.0]]):
        face.reset(seed=0)
        results.append(face.step(actions))
    assert data_equivalence(results[0], results[1], exact=True)
    assert data_equivalence(results[0], results[2], exact=True)


def test_both_faces_have_one_random_generator():
    face = make_face()
    face.reset(seed=7)
    assert face.np_random is face.env.np_random
    assert face.np_random_seed == face.env.np_random_seed == 7
    generator = np.random.default_rng(3)
    face.np_random = generator
    assert face.env.np_random is generator
    assert face.np_random_seed == -1
    first, _ = face.reset()
    face.np_random = np.random.default_rng(3)
    assert np.array_equal(first, face.reset()[0])


def test_asking_for_the_seed_of_a_new_env_does_not_change_its_starts():
    face = make_face()
    seed = face.np_random_seed
    first, _ = face.reset()
    assert seed is not None and np.array_equal(first, face.reset(seed=seed)[0])


def test_the_face_is_an_env_of_its_own_and_reaches_what_the_torch_face_has():
    torch_face = LatentVectorEnv(make_model(), np.zeros((2, 3)), num_envs=2, horizon=6)
    face = torch_face.numpy()
    assert isinstance(face, VectorEnv)
    assert face.unwrapped is face and face.env is torch_face
    assert face.horizon == 6 and face.world_model is torch_face.world_model
    assert face.render_mode is None and face.render() is None and face.spec is None
    assert str(face) == "NumpyVectorEnv(num_envs=2)"
    assert not hasattr(face, "envs") and not hasattr(face, "_z")
    with pytest.raises(AttributeError, match="no_such_thing"):
        face.no_such_thing  # noqa: B018
    face.metadata["changed"] = True
    assert "changed" not in torch_face.metadata
    face.close()
    assert face.closed and torch_face.closed
    face.close()


# Gymnasium's wrappers, with warnings as errors


@pytest.mark.parametrize("mode", [SAME_STEP, NEXT_STEP])
def test_record_episode_statistics_sees_whole_episodes(mode):
    env = RecordEpisodeStatistics(make_face(horizon=4, autoreset_mode=mode))
    env.reset(seed=0)
    rewards = []
    for actions in random_actions(env, 9):
        _, reward, _, truncated, infos = env.step(actions)
        rewards.append(reward)
        assert ("episode" in infos) == truncated.any()
        if truncated.any():
            np.testing.assert_allclose(infos["episode"]["r"], np.sum(rewards[-4:], 0), rtol=1e-5)
            assert infos["episode"]["l"].tolist() == [4, 4, 4]
    assert env.episode_count == 6


def test_record_episode_statistics_resets_what_the_caller_resets():
    env = RecordEpisodeStatistics(make_face(horizon=3, autoreset_mode=DISABLED))
    env.reset(seed=0)
    zeros = np.zeros((3, 1), np.float32)
    env.step(zeros)
    env.reset(options={"reset_mask": np.array([True, False, False])})
    env.step(zeros)
    assert env.step(zeros)[4]["episode"]["l"].tolist() == [0, 3, 3]


@every_mode
def test_normalize_reward_scales_the_rewards(mode):
    plain, env = (make_face(horizon=4, autoreset_mode=mode) for _ in range(2))
    env = NormalizeReward(env)
    plain.reset(seed=0)
    env.reset(seed=0)
    for actions in random_actions(env, 3 if mode == DISABLED else 9):
        _, rewards, *_ = env.step(actions)
        np.testing.assert_allclose(rewards, plain.step(actions)[1] / np.sqrt(env.return_rms.var + 1e-8), rtol=1e-6)


@every_mode
def test_clip_action_and_rescale_action_change_the_actions_only(mode):
    plain, clipped, rescaled = (make_face(horizon=4, autoreset_mode=mode) for _ in range(3))
    clipped = ClipAction(clipped)
    rescaled = RescaleAction(rescaled, np.full(1, -1.0, np.float32), np.full(1, 1.0, np.float32))
    for env in (plain, clipped, rescaled):
        env.reset(seed=0)
    for actions in random_actions(plain, 3):
        expected = plain.step(np.clip(1.5 * actions, -2, 2))
        assert data_equivalence(expected, clipped.step(1.5 * actions), exact=True)
        assert data_equivalence(expected, rescaled.step(np.clip(1.5 * actions, -2, 2) / 2))


def test_normalize_observation_works_in_next_step_mode():
    env = NormalizeObservation(make_face(num_envs=20, horizon=4, autoreset_mode=NEXT_STEP))
    env.reset(seed=0)
    observations = np.stack([env.step(actions)[0] for actions in random_actions(env, 60)])
    assert (np.abs(observations[30:].mean((0, 1))) < 0.3).all()
    assert (np.abs(observations[30:].std((0, 1)) - 1) < 0.3).all()


def test_dict_info_to_list_gives_every_env_its_infos():
    env = DictInfoToList(make_face(horizon=1))
    assert env.reset(seed=0)[1] == [{}, {}, {}]
    observations, _, _, _, infos = env.step(np.zeros((3, 1), np.float32))
    assert [set(info) for info in infos] == [{"final_obs", "final_info"}] * 3
    assert [info["final_info"] for info in infos] == [{"continue_prob": 1.0}] * 3


@pytest.mark.parametrize("mode", [SAME_STEP, NEXT_STEP])
def test_all_wrappers_together(mode):
    env: Any = RecordEpisodeStatistics(make_face(make_model(ends=True), num_envs=5, autoreset_mode=mode))
    env = RescaleAction(NormalizeReward(env), np.full(1, -1.0, np.float32), np.full(1, 1.0, np.float32))
    env = ClipAction(env)
    if mode == NEXT_STEP:
        env = NormalizeObservation(env)
    observations, _ = env.reset(seed=0)
    for actions in random_actions(env.unwrapped, 30):
        observations, rewards, _, _, _ = env.step(actions)
        assert observations in env.observation_space and np.isfinite(rewards).all()
    assert env.unwrapped.env.horizon == 4
    env.close()


# The contract, kept by an env that is no world model


class Drift(DifferentiableVectorEnv):
    """x' = x + a and r = -x'^2, with infos of all kinds; SAME_STEP, horizon 2."""

    def __init__(self, num_envs: int) -> None:
        self.num_envs, self.device = num_envs, torch.device("cpu")
        self.metadata = {"autoreset_mode": SAME_STEP}
        self.single_observation_space = spaces.Box(-9, 9, (1,), np.float32)
        self.single_action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[torch.Tensor, dict]:
        super().reset(seed=seed)
        self.x, self.steps = torch.zeros(self.num_envs, 1), 0
        return self.x, {"start": self.x}

    def step(self, actions: torch.Tensor) -> tuple:
        self.x, self.steps = self.x + actions, self.steps + 1
        x, ended = self.x, torch.full((self.num_envs,), self.steps == 2)
        infos = {
            "continue_prob": torch.ones(self.num_envs),
            "physics_state": np.full((self.num_envs, 2), 1 / 3),
            "name": np.array([f"env {i}" for i in range(self.num_envs)]),
        }
        if self.steps == 2:
            infos |= {"final_obs": x, "_final_obs": ended}
            self.reset()
        return self.x, -x.square().squeeze(-1), torch.zeros_like(ended), ended, infos

    def detach(self) -> torch.Tensor:
        self.x = self.x.detach()
        return self.x


def test_any_differentiable_env_has_a_face():
    face = Drift(2).numpy()
    observations, infos = face.reset(seed=0)
    assert observations.tolist() == [[0.0], [0.0]]
    assert set(infos) == {"start", "_start"} and infos["_start"].all()
    actions = np.array([[0.5], [-1.0]], np.float32)
    observations, rewards, _, _, infos = face.step(actions)
    assert rewards.tolist() == [-0.25, -1.0]
    assert infos["physics_state"].dtype == np.float64 and (infos["physics_state"] == 1 / 3).all()
    assert infos["name"].tolist() == ["env 0", "env 1"]
    observations, _, _, truncated, infos = face.step(actions)
    assert truncated.all() and not observations.any()
    assert [row.tolist() for row in infos["final_obs"]] == [[1.0], [-2.0]]
    assert set(infos) == {"final_obs", "_final_obs", "final_info", "_final_info"}
    assert infos["final_info"]["name"].tolist() == ["env 0", "env 1"]
    assert infos["final_info"]["physics_state"].tolist() == [[1 / 3] * 2] * 2
