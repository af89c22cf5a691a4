"""The benchmark of speed: what it records, replays, compares and reports; and that nothing loops or waits."""

from __future__ import annotations

import importlib
import pathlib
import sys
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from pwm_gym.replay import SequenceReplayBuffer

BENCHMARKS = str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks")
BATCH, HORIZON, ACTION, OBSERVATION = 8, 16, 6, 24


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def pairs(*widths: int) -> list[int]:
    """Multiplications of each layer for one row."""
    return [i * o for i, o in zip(widths, widths[1:], strict=False)]


def flops_of_an_update() -> int:
    """What one update with the released settings and TD-MPC2's 1M takes, counted layer by layer."""
    latent, width = 128, 384
    encoder = sum(pairs(OBSERVATION, 256, latent))
    model = sum(pairs(latent + ACTION, width, width, latent)) + sum(pairs(latent + ACTION, width, width, 101)) + 101
    actor, critic = pairs(latent, 400, 200, 100, ACTION), [3 * pair for pair in pairs(latent, 400, 200, 1)]
    rows = HORIZON * BATCH
    forward = rows * (model + sum(actor)) + BATCH * (sum(critic) + encoder)
    # Back to the actions: through model and values, and into the actor, whose input has no gradient.
    backward = rows * (model - 101 + 2 * sum(actor) - actor[0]) + BATCH * sum(critic)
    targets = rows * sum(critic)
    fit = 8 * rows * (3 * sum(critic) - critic[0])
    return 2 * (forward + backward + targets + fit)


def test_recorded_products_are_all_the_arithmetic_of_an_update(module: Any):
    agent = module("speed_update").make_agent("1M", BATCH)
    agent.train(1, BATCH)
    recording = module("speed_products").record(lambda: agent.train(1, BATCH))
    assert recording.flops == pytest.approx(flops_of_an_update(), rel=0.01)


def test_an_update_reads_at_most_one_number_back(module: Any, monkeypatch: pytest.MonkeyPatch):
    # On the CPU alone, where it stalls nothing, clips look at the norm.
    monkeypatch.setattr("pwm_gym.agents.first_order.clip_gradients", torch.nn.utils.clip_grad_norm_)
    agent = module("speed_update").make_agent("1M", BATCH)
    recording = module("speed_products").record(lambda: agent.train(3, BATCH))
    assert recording.other.get("aten::_local_scalar_dense", 0) <= 3


def test_replay_computes_the_recorded_products_again(module: Any):
    products = module("speed_products")
    weight, bias = torch.randn(5, 3, requires_grad=True), torch.randn(5, requires_grad=True)
    members = torch.randn(2, 3, 4)

    def work() -> None:
        y = torch.nn.functional.linear(torch.randn(7, 3), weight, bias)
        (y @ weight).expand(2, -1, -1).bmm(members).sum().backward()

    first = products.record(work, [weight])
    again = products.record(products.replay(first.products))

    def layouts(recording: Any) -> list[Any]:
        return [
            (p.operator, [(x.shape, x.strides) for x in p.arguments if hasattr(x, "shape")]) for p in recording.products
        ]

    assert layouts(again) == layouts(first)
    linear, small, batched = 7 * 3 * 5, 7 * 5 * 3, 2 * 7 * 3 * 4
    assert again.flops == first.flops == 2 * (2 * linear + 3 * small + 2 * batched)  # forward and backward
    assert not again.other


def test_lasting_tensors_are_tensors_of_their_own_in_a_replay(module: Any):
    products = module("speed_products")
    first, second, x = torch.randn(4, 4), torch.randn(4, 4), torch.randn(2, 4)
    recording = products.record(lambda: (x @ first, x @ second, x @ first.t()), [first, second])
    storages = [product.arguments[1].storage for product in recording.products]
    assert storages[0] == storages[2] != storages[1]
    assert recording.products[0].arguments[0].storage == 0


def test_ratio_is_the_median_over_rounds_with_quartiles(module: Any):
    timing = module("speed_timing")
    found = timing.ratio(np.array([1.0, 2.0, 3.0, 4.0, 10.0]), np.full(5, 2.0))
    assert found == (1.5, 1.0, 2.0)


def test_short_work_is_repeated_until_a_turn_is_long_enough(module: Any):
    now = [0.0]
    calls = {"short": 0, "long": 0}

    def work(name: str, seconds: float) -> Any:
        def run() -> None:
            calls[name] += 1
            now[0] += seconds

        return run

    pieces = {"short": work("short", 0.01), "long": work("long", 0.5)}
    seconds = module("speed_timing").interleave(pieces, 3, lambda: now[0], at_least=0.1)
    assert seconds["short"] == pytest.approx([0.01] * 3)
    assert seconds["long"] == pytest.approx([0.5] * 3)
    assert calls == {"short": 2 + 3 * 10, "long": 2 + 3}


def test_stopwatch_tells_inner_functions_apart(module: Any):
    now = [0.0]

    class Loop:
        def inner(self) -> None:
            now[0] += 2.0

        def outer(self) -> None:
            now[0] += 1.0
            self.inner()

    stopwatch, loop = module("speed_loop").Stopwatch(lambda: now[0]), Loop()
    with stopwatch.watch(loop, "inner", "inner"), stopwatch.watch(loop, "outer", "outer"):
        loop.outer()
        loop.outer()
    assert stopwatch.seconds == {"inner": 4.0, "outer": 2.0}
    assert "outer" not in vars(loop)


def row(ratio: float, better: str = "higher", **changed: Any) -> dict[str, Any]:
    base = {"part": "update", "case": "5M, batch 64", "measure": "products / update", "threads": 1}
    base |= {"ratio": f"{ratio:.3f}", "low": f"{ratio:.3f}", "high": f"{ratio:.3f}", "goal": 0.75, "better": better}
    base |= {
        "denominator_ms": "1",
        "rounds": 5,
        "processor": "X",
        "torch": "2.13.0",
        "date": "2026-11-21",
        "load": "1.0",
    }
    return base | changed


@pytest.mark.parametrize(
    ("stored", "new", "better", "is_worse"),
    [(0.8, 0.7, "higher", False), (0.8, 0.6, "higher", True), (1.1, 1.2, "lower", False), (1.1, 1.4, "lower", True),
     (0.8, 0.9, "higher", False), (1.1, 0.5, "lower", False)],
)  # fmt: skip
def test_only_what_got_worse_beyond_the_tolerance_fails(
    module: Any, stored: float, new: float, better: str, is_worse: bool
):
    lines, compared = module("speed").worse([row(stored, better)], [row(new, better)], 0.15)
    assert (len(lines), compared) == (int(is_worse), 1)


def test_other_processors_threads_and_sizes_are_not_compared(module: Any):
    stored = [row(0.9, processor="Y"), row(0.9, threads=2), row(0.9, case="48M, batch 64")]
    assert module("speed").worse(stored, [row(0.1)], 0.15) == ([], 0)


def test_ratios_read_from_a_file_compare_as_measured_ones(module: Any, tmp_path: pathlib.Path):
    speed = module("speed")
    module("tables").put_row(tmp_path / "ratios.csv", row(0.8), speed.KEYS["ratios"])
    assert speed.worse(speed.read(tmp_path / "ratios.csv"), [row(0.5)], 0.15)[1] == 1


def test_report_shows_every_row_and_whether_its_goal_is_met(module: Any, tmp_path: pathlib.Path):
    ratios = [row(0.8), row(0.6, case="5M, batch 512"), row(0.3, "lower", part="memory", measure="update / reference")]
    ratios = [{k: str(v) for k, v in r.items()} for r in ratios]
    growth = [{"varied": name, "num_envs": "4", "horizon": "4", "latent_dim": "64", "forward_ms": "1.0",
               "with gradients_ms": "2.0"} for name in ("num_envs", "horizon", "latent_dim")]  # fmt: skip
    loop = [{"envs": "1", "part": "model fit", "share": "0.25", "ms_per_decision": "10.0"}]
    accuracy = [{"what": "gradient", "arithmetic": "fp32", "relative_error": "1e-7", "one_minus_cosine": ""}]
    module("speed_report").write_report(
        tmp_path, {"ratios": ratios, "growth": growth, "loop": loop, "accuracy": accuracy}
    )
    page = (tmp_path / "speed.md").read_text()
    assert "| 5M, batch 64 | 1 | products / update | 0.80 (0.80 to 0.80) | ≥ 0.75 | yes | 1 |" in page
    assert "| 0.60 (0.60 to 0.60) | ≥ 0.75 | **no** |" in page
    assert "| 0.30 (0.30 to 0.30) | ≤ 0.75 | yes |" in page
    assert "| model fit | 25.0 % | 10.00 |" in page
    for name in ("updates.png", "growth.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_report_draws_nothing_that_was_not_measured(module: Any, tmp_path: pathlib.Path):
    module("speed_report").write_report(tmp_path, {"ratios": [], "growth": [], "loop": [], "accuracy": []})
    assert [path.name for path in tmp_path.iterdir()] == ["speed.md"]


def calls_made(work: Any) -> int:
    """Count the Python functions that a piece of work calls."""
    count = 0

    def see(_: Any, event: str, __: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_sampling_has_no_loop_over_windows():
    space = spaces.Box(-1, 1, (3,))
    buffer = SequenceReplayBuffer(400, space, spaces.Box(-1, 1, (1,)), "cpu")
    for t in range(300):
        o = np.full((1, 3), t), np.full((1, 3), t + 1)
        buffer.add(*o, np.zeros((1, 1)), np.ones(1), np.array([False]), [{}])
    rng = np.random.default_rng(0)
    few, many = (calls_made(lambda n=n: buffer.sample_windows(n, 5, rng)) for n in (8, 512))
    assert few == many
    few, many = (calls_made(lambda n=n: buffer.sample_starts(n, rng)) for n in (8, 512))
    assert few == many
