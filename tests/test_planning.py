"""MPPI against plain loops and a problem with a known optimum: batches, warm starts, ends, masks, ensembles."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pwm_gym import Planner, WorldModel, WorldModelConfig
from pwm_gym.planning import PlanNoise, _pair

SMALL: dict[str, Any] = {"num_samples": 12, "num_elites": 4, "num_prior": 3, "iterations": 3}


def make_model(**fields: Any) -> WorldModel:
    """Make a tiny model in float64 whose every part says something."""
    sizes = {"latent_dim": 8, "encoder_dim": 8, "mlp_dim": 8, "num_bins": 11, "vmin": -2.0, "vmax": 2.0}
    config = WorldModelConfig(
        **{"observation_dim": 3, "action_dim": 2, "num_q": 3, "policy_prior": True, **sizes, **fields}
    )
    model = WorldModel(config).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def draw(planner: Planner, num_envs: int, seed: int = 0) -> PlanNoise:
    return planner.draw(num_envs, torch.Generator().manual_seed(seed))


def latents(model: WorldModel, num_envs: int, task: Any = None) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    shape = (num_envs, model.config.observation_dim)
    with torch.no_grad():
        return model.encode(torch.randn(shape, generator=generator, dtype=torch.float64), task)


def env_of(noise: PlanNoise, b: int) -> PlanNoise:
    """Cut one env's noise out of a batch's."""
    return PlanNoise(
        noise.prior[:, b : b + 1],
        noise.samples[:, :, b : b + 1],
        noise.terminal[:, b : b + 1],
        noise.members,
        noise.choice[b : b + 1],
        noise.action[b : b + 1],
    )


def assert_equal_plans(ours: Any, theirs: Any) -> None:
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


# Against plain loops


def plain_returns(model: WorldModel, z: Tensor, sequence: list[Tensor], last: Tensor, pair: list[int]) -> Tensor:
    """Return of one sequence of actions from one latent, (Z,), step by step."""
    total, alive, gamma = torch.zeros((), dtype=torch.float64), 1.0, float(model.discount())
    for t, action in enumerate(sequence):
        total = total + gamma**t * alive * model.reward(z, action)
        z = model.next(z, action)
        alive = alive * (1.0 - float(model.termination(z)))
    q = model.q(z, model.prior(z, noise=last).actions)
    return total + gamma ** len(sequence) * alive * (q[pair[0]] + q[pair[1]]) / 2.0


@torch.no_grad()
def plain_mppi(model: WorldModel, z: Tensor, noise: PlanNoise, mean: Tensor, deterministic: bool) -> dict[str, Any]:
    """MPPI for one env, one sequence after the other; the noise is that of one env."""
    horizon, _, num_prior, actions = noise.prior.shape
    count = len(model.q(z, torch.zeros(actions, dtype=torch.float64)))
    guided = []
    for p in range(num_prior):
        state, sequence = z, []
        for t in range(horizon):
            sequence.append(model.prior(state, noise=noise.prior[t, 0, p]).actions)
            state = model.next(state, sequence[-1])
        guided.append(sequence)
    std = [torch.full((actions,), 2.0, dtype=torch.float64) for _ in range(horizon)]
    mean = list(mean)
    for i in range(len(noise.samples)):
        first = int(noise.members[i, 0] * count)
        second = [m for m in range(count) if m != first]
        second = second[first:] + second[:first]  # those after the first one come first
        pair = [first, second[int(noise.members[i, 1] * (count - 1))]]
        sequences = list(guided)
        for s in range(noise.samples.shape[3]):
            sequences.append([(mean[t] + std[t] * noise.samples[i, t, 0, s]).clamp(-1, 1) for t in range(horizon)])
        scored = [
            (float(plain_returns(model, z, sequence, noise.terminal[i, 0, s], pair)), sequence)
            for s, sequence in enumerate(sequences)
        ]
        elites = sorted(scored, key=lambda pair: -pair[0])[: noise.choice.shape[1]]
        raw = [math.exp(0.5 * (value - elites[0][0])) for value, _ in elites]
        weights = [w / sum(raw) for w in raw]
        for t in range(horizon):
            mean[t] = sum(w * sequence[t] for w, (_, sequence) in zip(weights, elites, strict=True))
            spread = sum(w * (sequence[t] - mean[t]) ** 2 for w, (_, sequence) in zip(weights, elites, strict=True))
            std[t] = spread.sqrt().clamp(0.05, 2.0)
    chosen = max(range(len(elites)), key=lambda k: math.log(weights[k]) + float(noise.choice[0, k]))
    action = elites[chosen][1][0]
    if not deterministic:
        action = (action + std[0] * noise.action[0]).clamp(-1, 1)
    return {
        "actions": action,
        "mean": torch.stack(mean),
        "std": torch.stack(std),
        "elites": torch.stack([torch.stack(sequence) for _, sequence in elites], 1),
        "values": torch.tensor([value for value, _ in elites], dtype=torch.float64),
    }


@pytest.mark.parametrize(("terminates", "deterministic"), [(True, False), (False, True)])
def test_plans_are_those_of_plain_loops_over_envs_sequences_and_steps(terminates: bool, deterministic: bool):
    model = make_model()
    if terminates:
        model.expect_termination()
    planner = Planner(model, num_samples=7, num_elites=3, num_prior=2, iterations=2)
    z, noise = latents(model, 2), draw(planner, 2)
    previous = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5
    plan = planner.plan(z, noise, previous, torch.tensor([False, True]), deterministic)
    for b in range(2):
        begin = torch.zeros(3, 2, dtype=torch.float64)
        if b == 0:
            begin[:-1] = previous[1:, 0]
        expected = plain_mppi(model, z[b], env_of(noise, b), begin, deterministic)
        ours = {name: value[:, b] if value.ndim > 2 else value[b] for name, value in plan._asdict().items()}
        for name, value in expected.items():
            torch.testing.assert_close(
                ours[name], value, rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}"
            )


# Against a problem with a known optimum


class LinearQuadratic:
    """z' = F z + G a and r = -|z|² - 0.1 |a|², as a planner sees a world model; V(z) = -|z|²."""

    def __init__(self) -> None:
        self.config = WorldModelConfig(2, 1, latent_dim=8)
        self.device, self.dtype = torch.device("cpu"), torch.float64
        self.F = torch.tensor([[1.0, 0.4], [0.0, 1.0]], dtype=torch.float64)
        self.G = torch.tensor([[0.0], [0.5]], dtype=torch.float64)
        self.end = 0.0  # probability that a step ends the episode
        self.predicts_termination = False

    def next(self, z: Tensor, actions: Tensor, task: Any = None) -> Tensor:
        return z @ self.F.T + actions @ self.G.T

    def __call__(self, z: Tensor, actions: Tensor, task: Any = None) -> tuple[Tensor, Tensor]:
        return self.next(z, actions), -z.square().sum(-1) - 0.1 * actions.square().sum(-1)

    def termination(self, z: Tensor, task: Any = None) -> Tensor:
        return torch.full(z.shape[:-1], self.end, dtype=z.dtype)

    def action_mask(self, task: Any = None) -> Tensor:
        return torch.ones(1, dtype=torch.float64)

    def planner(self, **settings: Any) -> Planner:
        def prior(z: Tensor, noise: Tensor, task: Any) -> Tensor:
            return torch.tanh(noise).expand(*z.shape[:-1], 1)

        def values(z: Tensor, actions: Tensor, task: Any) -> Tensor:
            return -z.square().sum(-1, keepdim=True).movedim(-1, 0)

        return Planner(self, prior, values, **{"gamma": 1.0, **settings})  # type: ignore[arg-type]

    def optimum(self, z: Tensor, horizon: int) -> Tensor:
        """Solve for the best actions, (H, 1), by the Riccati recursion."""
        P, gains = torch.eye(2, dtype=torch.float64), []
        for _ in range(horizon):
            K = torch.linalg.solve(
                0.1 * torch.eye(1, dtype=torch.float64) + self.G.T @ P @ self.G, self.G.T @ P @ self.F
            )
            P = torch.eye(2, dtype=torch.float64) + self.F.T @ P @ (self.F - self.G @ K)
            gains.append(K)
        actions = []
        for K in reversed(gains):
            actions.append(-K @ z)
            z = self.F @ z + self.G @ actions[-1]
        return torch.stack(actions)


def test_the_mean_converges_to_the_optimum_of_a_linear_quadratic_problem():
    system = LinearQuadratic()
    planner = system.planner(iterations=12, num_elites=32, temperature=20.0, min_std=0.01)
    z = torch.tensor([[0.3, -0.2], [-0.5, 0.3], [0.1, 0.1]], dtype=torch.float64)
    plan = planner.plan(z, draw(planner, 3), deterministic=True)
    for b in range(3):
        best = system.optimum(z[b], 3)
        assert best.abs().max() < 1.0, "no bound is active, or the recursion isn't the optimum"
        torch.testing.assert_close(plan.mean[:, b], best, rtol=0.0, atol=0.03)
        state, value = z[b], 0.0
        for action in best:
            value += float(-state.square().sum() - 0.1 * action.square().sum())
            state = system.next(state, action)
        value -= float(state.square().sum())
        assert float(plan.values[b, 0]) == pytest.approx(value, abs=2e-3)
        assert float(plan.values[b, 0]) <= value + 1e-9, "nothing is better than the optimum"


def test_what_follows_is_worth_as_much_as_the_episode_is_likely_to_go_on():
    system = LinearQuadratic()
    z, actions = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.zeros(3, 1, 1, 1, dtype=torch.float64)

    def worth(end: float | None, gamma: float) -> float:
        system.predicts_termination, system.end = end is not None, end or 0.0
        planner = system.planner(gamma=gamma, num_samples=1, num_elites=1, num_prior=0)
        noise = draw(planner, 1)
        return float(planner._estimate(z, actions, noise.terminal[0], noise.members[0], None))

    # The state stays (1, 0): every step earns -1, and the end is worth -1.
    assert worth(None, 1.0) == pytest.approx(-4.0)
    assert worth(0.0, 1.0) == pytest.approx(-4.0)
    assert worth(None, 0.5) == pytest.approx(-(1 + 0.5 + 0.25 + 0.125))
    assert worth(1.0, 1.0) == pytest.approx(-1.0)
    assert worth(0.25, 0.5) == pytest.approx(-(1 + 0.375 + 0.375**2 + 0.375**3))


def test_a_planner_seeks_the_end_where_going_on_costs():
    """Episodes end where the speed is positive: standing still goes on, and pushing on saves all that comes later."""

    class Ending(LinearQuadratic):
        def termination(self, z: Tensor, task: Any = None) -> Tensor:
            return (z[..., 1] > 0.0).double()

    system = Ending()
    z = torch.tensor([[0.5, -0.2]], dtype=torch.float64)
    speeds = {}
    for predicts in (False, True):
        system.predicts_termination = predicts
        planner = system.planner(temperature=20.0)
        mean = planner.plan(z, draw(planner, 1), deterministic=True).mean
        speeds[predicts] = float(system.next(z[0], mean[0, 0])[1])
    assert speeds[False] < 0.0 < speeds[True]


# Batches and noise


def test_a_batch_of_envs_is_planned_as_each_of_them_alone():
    model = make_model()
    model.expect_termination()
    planner = Planner(model, **SMALL)
    z, noise = latents(model, 4), draw(planner, 4)
    previous = planner.plan(z, noise).mean
    starts = torch.tensor([False, True, False, True])
    together = planner.plan(z, noise, previous, starts)
    for b in range(4):
        alone = planner.plan(z[b : b + 1], env_of(noise, b), previous[:, b : b + 1], starts[b : b + 1])
        cut = [value[:, b : b + 1] if value.ndim > 2 else value[b : b + 1] for value in together]
        assert_equal_plans(alone, type(alone)(*cut))
    assert not torch.equal(together.actions[0], together.actions[2])


def test_noise_of_one_env_is_shared_by_all():
    model = make_model()
    planner = Planner(model, **SMALL)
    z, noise = latents(model, 3), draw(planner, 1)
    together = planner.plan(z, noise)
    for b in range(3):
        cut = [value[:, b : b + 1] if value.ndim > 2 else value[b : b + 1] for value in together]
        assert_equal_plans(planner.plan(z[b : b + 1], noise), type(together)(*cut))


def test_a_plan_draws_nothing_and_leaves_no_graph():
    model = make_model()
    planner = Planner(model, **SMALL)
    z, noise = latents(model, 2), draw(planner, 2)
    before = torch.get_rng_state()
    plan = planner.plan(z, noise)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(value.requires_grad for value in plan)
    assert_equal_plans(plan, planner.plan(z, noise))


def test_noise_is_standard_normal_gumbel_and_uniform():
    planner = Planner(make_model(), num_samples=512, num_elites=64, num_prior=24)
    noise = draw(planner, 8)
    assert noise.samples.shape == (6, 3, 8, 488, 2)
    for normal in (noise.prior, noise.samples, noise.terminal):
        assert abs(float(normal.mean())) < 0.05
        assert float(normal.std()) == pytest.approx(1.0, abs=0.05)
    assert float(noise.choice.mean()) == pytest.approx(0.5772, abs=0.2)
    assert float(noise.choice.std()) == pytest.approx(math.pi / math.sqrt(6.0), abs=0.2)
    assert 0.0 <= float(noise.members.min()) <= float(noise.members.max()) < 1.0


# Warm starts


def silent(planner: Planner, num_envs: int) -> PlanNoise:
    """Noise of zeros: every sequence is the mean itself."""
    return PlanNoise(*(torch.zeros_like(value) for value in planner.draw(num_envs)))


def test_a_plan_begins_a_step_on_in_the_last_one_and_at_zero_where_an_episode_starts():
    planner = LinearQuadratic().planner(num_samples=4, num_elites=4, num_prior=0, iterations=1)
    z = torch.zeros(3, 2, dtype=torch.float64)
    previous = torch.arange(9, dtype=torch.float64).reshape(3, 3, 1) / 10.0  # (H, B, A)
    noise = silent(planner, 3)
    begun = planner.plan(z, noise, previous, torch.tensor([False, True, False])).mean[:, :, 0]
    torch.testing.assert_close(
        begun, torch.tensor([[0.3, 0.0, 0.5], [0.6, 0.0, 0.8], [0.0, 0.0, 0.0]], dtype=torch.float64)
    )
    torch.testing.assert_close(planner.plan(z, noise, previous).mean[:, 1, 0], previous.new_tensor([0.4, 0.7, 0.0]))
    assert not planner.plan(z, noise).mean.any()
    torch.testing.assert_close(previous, torch.arange(9, dtype=torch.float64).reshape(3, 3, 1) / 10.0)


def test_exploration_adds_noise_of_the_final_deviation_within_the_bounds():
    planner = LinearQuadratic().planner(num_samples=4, num_elites=4, num_prior=0, iterations=1, min_std=0.2)
    z = torch.zeros(2, 2, dtype=torch.float64)
    noise = silent(planner, 2)._replace(action=torch.tensor([[1.5], [-9.0]], dtype=torch.float64))
    assert not planner.plan(z, noise, deterministic=True).actions.any()
    plan = planner.plan(z, noise)
    torch.testing.assert_close(plan.actions, torch.tensor([[0.3], [-1.0]], dtype=torch.float64))
    torch.testing.assert_close(plan.std, torch.full((3, 2, 1), 0.2, dtype=torch.float64))


# Masks, sizes, ensembles


def test_padding_of_actions_stays_zero_and_a_task_is_planned_as_by_its_own_model():
    model = make_model(
        observation_dim=4,
        action_dim=3,
        tasks=("wide", "narrow"),
        observation_dims=(4, 2),
        action_dims=(3, 1),
        discounts=(0.99, 0.9),
    )
    planner = Planner(model, **SMALL)
    tasks = torch.tensor([1, 0])
    observations = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.5, 0.2, 0.7, -2.0]], dtype=torch.float64)
    noise = draw(planner, 2)
    with torch.no_grad():
        z = model.encode(observations, tasks)
    plan = planner.plan(z, noise, task=tasks)
    for value in (plan.actions[0], plan.mean[:, 0], plan.std[:, 0], plan.elites[:, 0]):
        assert not value[..., 1:].any()
    assert plan.actions[1].abs().min() > 0.0
    for b, (task, own) in enumerate((("narrow", 1), ("wide", 3))):
        single = model.for_task(task)
        with torch.no_grad():
            own_z = single.encode(observations[b : b + 1, : single.config.observation_dim])
        cut = env_of(noise, b)
        fields = {name: getattr(cut, name)[..., :own] for name in ("prior", "samples", "terminal", "action")}
        alone = Planner(single, **SMALL).plan(own_z, cut._replace(**fields))
        torch.testing.assert_close(alone.actions[0], plan.actions[b, :own], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(alone.mean[:, 0], plan.mean[:, b, :own], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(alone.values[0], plan.values[b], rtol=1e-8, atol=1e-9)
        by_index = planner.plan(z[b : b + 1], cut, task=model.config.task_index(task))
        torch.testing.assert_close(by_index.actions[0], plan.actions[b], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("action_dim", "iterations"), [(1, 6), (19, 6), (20, 8), (38, 8)])
def test_twenty_action_dimensions_take_two_more_iterations(action_dim: int, iterations: int):
    planner = Planner(make_model(action_dim=action_dim))
    assert planner.iterations == iterations
    assert len(planner.draw(1).samples) == iterations
    assert Planner(make_model(action_dim=action_dim), iterations=3).iterations == 3


def test_published_settings_are_the_defaults():
    planner = Planner(make_model())
    assert (planner.horizon, planner.num_samples, planner.num_prior, planner.num_elites) == (3, 512, 24, 64)
    assert (planner.min_std, planner.max_std, planner.temperature) == (0.05, 2.0, 0.5)


@pytest.mark.parametrize("count", [2, 5])
def test_each_pair_of_different_members_is_equally_likely(count: int):
    grid = [(i + 0.5) / (count * (count - 1)) for i in range(count * (count - 1))]
    pairs = [tuple(_pair(torch.tensor(uniform), count).tolist()) for uniform in itertools.product(grid, grid)]
    assert set(pairs) == set(itertools.permutations(range(count), 2))
    assert len({pairs.count(pair) for pair in set(pairs)}) == 1
    assert _pair(torch.tensor([0.999999, 0.999999]), 1).tolist() == [0, 0]


def test_the_mean_of_the_two_members_drawn_is_what_counts():
    system = LinearQuadratic()
    planner = system.planner(num_samples=2, num_elites=2, num_prior=0, iterations=1)
    planner.values = lambda z, actions, task: torch.stack(
        [torch.full(z.shape[:-1], v).double() for v in (1.0, 10.0, 100.0)]
    )
    noise = silent(planner, 1)._replace(members=torch.tensor([[0.5, 0.0]], dtype=torch.float64))  # 1, and then 2
    assert planner.plan(torch.zeros(1, 2, dtype=torch.float64), noise).values.tolist() == [[55.0, 55.0]]


def test_the_discount_is_the_models_own_unless_one_is_given():
    model = make_model(discounts=(0.5,))
    z = latents(model, 1)
    own, same, other = (Planner(model, gamma=gamma, **SMALL) for gamma in (None, 0.5, 0.9))
    noise = draw(own, 1)
    torch.testing.assert_close(own.plan(z, noise).values, same.plan(z, noise).values)
    assert not torch.allclose(own.plan(z, noise).values, other.plan(z, noise).values)


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizon": 0}, r"expected `horizon`, `iterations` and `num_elites` >= 1.*got 0, 6, 64, 24 and 512"),
        ({"iterations": 0}, "expected `horizon`, `iterations`"),
        ({"num_elites": 513}, "`num_samples` not below the latter two"),
        ({"num_prior": 600}, "`num_samples` not below the latter two"),
        ({"num_prior": -1}, "`num_prior` >= 0"),
        ({"min_std": 0.0}, "expected 0 < min_std <= max_std"),
        ({"min_std": 3.0}, "expected 0 < min_std <= max_std"),
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"gamma": 1.5}, r"gamma in \[0, 1\]"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Planner(make_model(), **settings)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"policy_prior": False},
            r"expected a world model with a policy prior, got one without. Make it with.*`prior`",
        ),
        (
            {"num_q": 0},
            r"expected a world model with a value ensemble, got one without. Make it with.*or give `values`",
        ),
        ({"reward_in_task_units": False}, "expected rewards in task units"),
    ],
    ids=str,
)
def test_a_model_without_what_planning_needs_is_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Planner(make_model(**fields))


def test_callables_stand_in_for_what_a_model_lacks():
    model = make_model(policy_prior=False, num_q=0)
    calls: list[str] = []

    def prior(z: Tensor, noise: Tensor, task: Any) -> Tensor:
        calls.append("prior")
        return torch.tanh(noise + z[..., :2])

    def values(z: Tensor, actions: Tensor, task: Any) -> Tensor:
        calls.append("values")
        assert actions.shape == (*z.shape[:-1], 2)
        return z.sum(-1).unsqueeze(0)

    planner = Planner(model, prior, values, **SMALL)
    assert planner.plan(latents(model, 2), draw(planner, 2)).actions.shape == (2, 2)
    assert (calls.count("prior"), calls.count("values")) == (3 + 3, 3)


def test_a_mean_of_another_shape_is_refused():
    model = make_model()
    planner: Planner = Planner(model, **SMALL)
    z, noise = latents(model, 2), draw(planner, 2)
    shapes: list[tuple[int, ...]] = [(3, 1, 2), (4, 2, 2), (2, 3, 2)]
    for shape in shapes:
        with pytest.raises(ValueError, match=r"\(H, B, A\) = \(3, 2, 2\), got .*Begin anew with None"):
            planner.plan(z, noise, torch.zeros(shape, dtype=torch.float64))
