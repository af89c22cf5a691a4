"""Networks with bf16 products: what they compute, when they are used, and when they step aside."""

import gc
import os
import subprocess
import sys
import weakref

import gymnasium as gym
import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from pwm_gym import PWM, bf16, kernels
from pwm_gym.kernels import Block, Kind
from pwm_gym.networks import EnsembleLinear, Layers, Mish, SimNorm, mlp
from pwm_gym.training import fast_matmul
from tests.test_kernels import NETWORKS, gradients, randomised

amx = pytest.mark.skipif(not bf16.available(), reason="this processor, system or build has no AMX products")


@pytest.fixture(autouse=True)
def _used_under_medium(monkeypatch):
    """Allow bf16 factors, and take the measurement of speed, which a busy machine may spoil, as passed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    monkeypatch.setattr(bf16, "_pays", lambda: True)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def runs(monkeypatch):
    """List the calls of `bf16.run`."""
    calls = []
    run = bf16.run
    monkeypatch.setattr(bf16, "run", lambda *args: calls.append(args) or run(*args))
    return calls


def _norm_error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm().clamp(min=1e-9)).item()


def _integers(*shape, seed):
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


# bf16 and fp32 hold small integers and their sums, so here the products have to be exact.


@amx
@pytest.mark.parametrize("rows", [16, 33, 300, 1100])
@pytest.mark.parametrize("widths", [(1, 1), (31, 33), (64, 96), (101, 6), (512, 17)])
def test_products_of_integers_are_exact(widths, rows, runs):
    linear = nn.Linear(*widths)
    with torch.no_grad():
        linear.weight.copy_(_integers(*linear.weight.shape, seed=0))
        linear.bias.copy_(_integers(*linear.bias.shape, seed=1))
    x, direction = _integers(rows, widths[0], seed=2), _integers(rows, widths[1], seed=3)
    network = Layers(linear)
    assert torch.equal(network(x), (x.double() @ linear.weight.double().t() + linear.bias.double()).float())
    ours = gradients(network, x, direction)
    linear.zero_grad()
    assert len(runs) == 2
    theirs = gradients(nn.Sequential(linear).double(), x.double(), direction.double())
    assert all(torch.equal(a.double(), b) for a, b in zip(ours, theirs, strict=True))


@amx
@pytest.mark.parametrize("rows", [16, 300, 600])
@pytest.mark.parametrize("shared", [True, False])
def test_products_of_integers_are_exact_for_each_member(shared, rows, runs):
    linear = EnsembleLinear(3, 40, 50)
    with torch.no_grad():
        linear.weight.copy_(_integers(3, 40, 50, seed=0))
        linear.bias.copy_(_integers(3, 1, 50, seed=1))
    x = _integers(rows, 40, seed=2).expand(3, -1, -1) if shared else _integers(3, rows, 40, seed=2)
    x = x.detach().requires_grad_()
    direction = _integers(3, rows, 50, seed=3)
    network, inputs = Layers(linear), [x, linear.weight, linear.bias]
    y = network(x)
    assert len(runs) == 1
    exact = torch.baddbmm(linear.bias.double(), x.double(), linear.weight.double())
    assert torch.equal(y.double(), exact)
    ours, theirs = (torch.autograd.grad(y, inputs, d) for y, d in ((y, direction), (exact, direction.double())))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@amx
@pytest.mark.parametrize("rows", [16, 37, 300, 1100])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_values_and_all_gradients_are_those_of_float64_to_the_rounding_of_factors(make, rows, runs):
    network, exact = randomised(make), randomised(make).double()
    x = torch.randn(rows, 7)
    y = network(x)
    assert runs
    assert _norm_error(y, exact(x.double())) < bf16.MAX_ERROR
    direction = torch.randn_like(y)
    ours = gradients(network, x, direction)
    theirs = gradients(exact, x.double(), direction.double())
    for a, b in zip(ours, theirs, strict=True):
        assert _norm_error(a, b) < 2 * bf16.MAX_ERROR  # of whole updates it is half of that: small networks cancel less
    with torch.no_grad():
        assert torch.equal(network(x), y)


@amx
def test_two_threads_give_what_one_gives(monkeypatch):
    monkeypatch.setattr(bf16, "_PARALLEL", 0)
    threads = torch.get_num_threads()
    for make in NETWORKS.values():
        network, x = randomised(make), torch.randn(330, 7)
        found = []
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                network.zero_grad()
                found.append(gradients(network, x, 1.0))
        finally:
            torch.set_num_threads(threads)
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@amx
def test_frozen_parameters_get_no_gradient_but_pass_it_on():
    network, x = randomised(NETWORKS["model"]), torch.randn(64, 7)
    learned = gradients(network, x, 1.0)[0]
    network.zero_grad()
    network.requires_grad_(False)
    assert torch.equal(gradients(network, x, 1.0)[0], learned)
    assert all(parameter.grad is None for parameter in network.parameters())


@amx
def test_parameters_of_upper_layers_alone_get_the_gradients_they_get_together():
    network, x = randomised(NETWORKS["actor"]), torch.randn(64, 7)
    network(x).square().sum().backward()
    together = {name: parameter.grad for name, parameter in network.named_parameters()}
    network.zero_grad()
    network[0].requires_grad_(False)
    network(x).square().sum().backward()
    assert network[0].weight.grad is None
    for name, parameter in list(network.named_parameters())[2:]:
        assert torch.equal(parameter.grad, together[name])


@amx
def test_a_second_backward_through_a_kept_graph_gives_the_same():
    network, x = randomised(NETWORKS["critic"]), torch.randn(64, 7, requires_grad=True)
    loss = network(x).square().sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@amx
def test_nan_and_infinity_stay_in_their_rows():
    network, x = randomised(NETWORKS["model"]), torch.randn(40, 7)
    clean = network(x)
    x[3, 2], x[17, 0] = float("nan"), float("inf")
    y = network(x)
    assert y[3].isnan().all()
    assert y[17].isnan().all()
    keep = [i for i in range(40) if i not in (3, 17)]
    assert torch.equal(y[keep], clean[keep])


@amx
def test_weights_changed_between_the_ways_are_noticed():
    network, x = randomised(NETWORKS["actor"]), torch.randn(64, 7)
    loss = network(x).sum()
    with torch.no_grad():
        network[3].weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# When weights are packed


@amx
def test_weights_are_packed_once_while_they_are_fixed_and_anew_afterwards(monkeypatch):
    packed = []
    init = bf16._Packed.__init__
    monkeypatch.setattr(bf16._Packed, "__init__", lambda self, given: packed.append(self) or init(self, given))
    network, x = randomised(NETWORKS["model"]), torch.randn(64, 7, requires_grad=True)
    before = network(x)
    assert not packed
    with bf16.fixed_weights():
        inside = [network(x) for _ in range(3)]
        with bf16.fixed_weights():
            inside.append(network(x))
    assert len(packed) == 1
    for y in inside:
        assert torch.equal(y, before)
    for parameter in network.parameters():
        parameter.data.mul_(0.5)  # of which no version tells
    after = network(x)
    assert not torch.equal(after, before)
    with bf16.fixed_weights():
        assert torch.equal(network(x), after)
    assert len(packed) == 2


@amx
def test_gradients_are_the_same_within_fixed_weights():
    network, x = randomised(NETWORKS["critic"]), torch.randn(64, 7)
    without = gradients(network, x, 1.0)
    network.zero_grad()
    with bf16.fixed_weights():
        within = gradients(network, x, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(without, within, strict=True))


@amx
def test_packed_weights_are_freed_with_the_scope_even_after_an_error():
    network, x = randomised(NETWORKS["model"]), torch.randn(64, 7)
    with pytest.raises(KeyError), torch.no_grad(), bf16.fixed_weights():
        network(x)
        (packed,) = bf16._scope.packed.values()
        alive = weakref.ref(packed)
        del packed
        raise KeyError
    gc.collect()
    assert alive() is None
    assert bf16._scope.packed is None


# When others compute


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_only_mediums_promise_allows_it(precision, runs):
    torch.set_float32_matmul_precision(precision)
    randomised(NETWORKS["model"])(torch.randn(64, 7))
    assert not runs


@pytest.mark.parametrize("reason", ["no library", "not faster"])
def test_without_it_the_kernels_compute(reason, runs, monkeypatch):
    if reason == "no library":
        monkeypatch.setattr(bf16, "_library", None)
    else:
        monkeypatch.setattr(bf16, "_pays", lambda: False)
    network, x = randomised(NETWORKS["model"]), torch.randn(64, 7)
    calls, run = [], kernels.run
    monkeypatch.setattr(kernels, "run", lambda *args: calls.append(args) or run(*args))
    y = network(x)
    assert not runs
    assert len(calls) == kernels.available()
    assert _norm_error(y, nn.Sequential(*network)(x).double()) < bf16.MAX_ERROR


@pytest.mark.parametrize(
    ("network", "x"),
    [
        (mlp(7, [8], 8, Mish), torch.randn(1, 7)),
        (Layers(nn.Linear(7, 8), nn.LayerNorm(8), SimNorm(4), nn.Linear(8, 2)), torch.randn(64, 7)),
        (mlp(7, [8] * 12, 8, Mish), torch.randn(64, 7)),
        (mlp(7, [8], 8, Mish), torch.randn(64, 7).double()),
    ],
    ids=["one row", "SimNorm inside", "many layers", "float64"],
)
def test_what_it_does_not_know_is_left_to_others(network, x, runs):
    network = network.to(x.dtype)
    y = network(x)
    assert not runs
    torch.testing.assert_close(y, nn.Sequential(*network)(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "layers",
    [Layers(nn.Linear(6, 8)), Layers(nn.Linear(7, 8), nn.Linear(9, 2)), Layers(EnsembleLinear(2, 6, 8))],
    ids=["input", "inside", "members"],
)
def test_sizes_that_do_not_fit_are_refused_by_pytorch(layers):
    x = torch.randn(3, 64, 7) if isinstance(layers[0], EnsembleLinear) else torch.randn(64, 7)
    with pytest.raises(RuntimeError):
        layers(x)


def test_transforms_go_past_it(runs):
    members = [randomised(NETWORKS["actor"], seed) for seed in range(2)]
    parameters, buffers = stack_module_state(members)
    x = torch.randn(2, 64, 7)
    stacked = vmap(lambda p, b, x: functional_call(members[0], (p, b), (x,)))(parameters, buffers, x)
    assert not runs
    for k, member in enumerate(members):
        assert _norm_error(stacked[k], member(x[k]).double()) < 2 * bf16.MAX_ERROR


def test_our_own_choice_of_library_never_allows_bf16(monkeypatch):
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr("pwm_gym.training.fitting._fast_matmul_is_exact", lambda: True)
    with fast_matmul(torch.device("cpu")):
        allowed = torch.get_float32_matmul_precision() == "medium"
    assert allowed != bf16.available()


def test_the_library_can_be_left_alone():
    code = "from pwm_gym import bf16; assert not bf16.available()"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PWM_GYM_EAGER": "1"}, check=True)


@amx
def test_the_measurement_asks_for_accuracy_and_speed(monkeypatch):
    monkeypatch.undo()
    measure = bf16._pays.__wrapped__
    torch.set_float32_matmul_precision("medium")
    assert measure() in (True, False)
    monkeypatch.setattr(bf16, "run", lambda blocks, x: 1.01 * kernels.run(blocks, x))
    assert not measure()


@amx
def test_an_agents_update_takes_it_and_stays_finite(runs):
    agent = PWM("MlpPolicy", gym.make("Pendulum-v1"), seed=0, device="cpu", learning_starts=30, batch_size=16)
    agent.learn(34)
    assert any(len(blocks) == 3 and blocks[-1].kind == Kind.NORM_SIMNORM for blocks, _ in runs)
    assert all(torch.isfinite(p).all() for p in agent.policy.parameters())


def test_a_block_of_a_network_can_be_run_alone():
    block = Block(Kind.NOTHING, weight=torch.eye(20), bias=torch.ones(20))
    x = _integers(32, 20, seed=0)
    assert bf16.usable(x, [block]) == bf16.available()
    if bf16.available():
        assert torch.equal(bf16.run([block], x), x + 1)
