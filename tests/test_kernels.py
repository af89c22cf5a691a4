"""The compiled kernels give what PyTorch's own modules give, and step aside where they can't."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from pwm_gym import kernels
from pwm_gym.networks import (
    EnsembleLayerNorm,
    EnsembleLinear,
    EnsembleMLP,
    Layers,
    Mish,
    NormedEnsemble,
    PartDropout,
    SimNorm,
    mlp,
)

compiled = pytest.mark.skipif(not kernels.available(), reason="the kernels were not compiled on this machine")


def _mlp():
    return mlp(7, [32, 24], 16, Mish, SimNorm(4))


def _actor():
    return Layers(nn.Linear(7, 32), Mish(), nn.LayerNorm(32), nn.Linear(32, 3))


def _critic():
    return EnsembleMLP(3, 7, [32, 24], Mish)


def _values():
    return NormedEnsemble(3, 7, [32, 24], 5, nn.Mish, dropout=0.1).eval()


class _Repeatable(NormedEnsemble):
    """Values that draw the same dropout at every call."""

    def forward(self, x):
        torch.manual_seed(5)
        return super().forward(x)


def _dropping():
    return _Repeatable(3, 7, [32, 24], 5, nn.Mish, dropout=0.3)


NETWORKS = {"model": _mlp, "actor": _actor, "critic": _critic, "values": _values, "values in training": _dropping}


def randomised(make, seed=0):
    torch.manual_seed(seed)
    network = make()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network


def gradients(network, x, direction):
    x = x.clone().requires_grad_()
    (network(x) * direction).sum().backward()
    return [x.grad, *(p.grad for p in network.parameters())]


def _watched(monkeypatch):
    calls = []
    run = kernels.run
    monkeypatch.setattr(kernels, "run", lambda *args: calls.append(args) or run(*args))
    return calls


def _error(ours, exact):
    return ((ours.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-6)).item()


@compiled
@pytest.mark.parametrize("rows", [1, 5, 4096])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_values_and_all_gradients_equal_those_of_pytorch_in_float64(make, rows, monkeypatch):
    network = randomised(make)
    x = 3 * torch.randn(rows, 7)
    exact = randomised(make).double()  # in float64 the modules compute
    calls = _watched(monkeypatch)
    y = network(x)
    assert calls
    assert _error(y, exact(x.double())) < 2e-6
    direction = torch.randn_like(y)
    for ours, theirs in zip(
        gradients(network, x, direction), gradients(exact, x.double(), direction.double()), strict=True
    ):
        assert _error(ours, theirs) < 2e-5


@compiled
def test_two_threads_give_what_one_gives():
    network, x = randomised(_mlp), torch.randn(8192, 7)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gradients(network, x, 1.0)
        network.zero_grad()
        torch.set_num_threads(2)
        two = gradients(network, x, 1.0)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, two, strict=True):
        assert _error(a, b.double()) < 1e-5


@compiled
def test_extreme_inputs_neither_overflow_nor_hide_a_nan():
    layers = Layers(nn.Linear(1, 4), Mish(), nn.LayerNorm(4))
    with torch.no_grad():
        layers[0].weight.copy_(torch.tensor([[1.0], [-1.0], [0.5], [2.0]]))
        layers[0].bias.zero_()
    for size in (50.0, 1e4, -1e4, 1e-30):
        x = torch.tensor([[size]])
        assert _error(layers(x), Layers(*layers).double()(x.double())) < 1e-5
        layers.float()
    assert layers(torch.tensor([[float("nan")]])).isnan().all()


@compiled
def test_vmap_over_stacked_parameters_gives_each_members_result_and_gradient():
    members = [randomised(_actor, seed) for seed in range(3)]
    parameters, buffers = stack_module_state(members)
    x = torch.randn(3, 6, 7)
    stacked = vmap(lambda p, b, x: functional_call(members[0], (p, b), (x,)))(parameters, buffers, x)
    stacked.square().sum().backward()
    for k, member in enumerate(members):
        alone = member(x[k])
        torch.testing.assert_close(stacked[k], alone)
        alone.square().sum().backward()
        for name, parameter in member.named_parameters():
            torch.testing.assert_close(parameters[name].grad[k], parameter.grad, rtol=1e-4, atol=1e-5)


@compiled
def test_vmap_over_inputs_of_an_ensemble_keeps_each_members_parameters():
    critic, x = randomised(_critic), torch.randn(4, 5, 7)
    torch.testing.assert_close(vmap(critic)(x), torch.stack([critic(rows) for rows in x]), rtol=1e-5, atol=1e-6)


@compiled
def test_frozen_parameters_get_no_gradient_but_pass_it_on():
    network = randomised(_mlp)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(5, 7, requires_grad=True)
    network(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in network.parameters())


@compiled
def test_second_derivatives_are_refused_rather_than_wrong():
    network, x = randomised(_mlp), torch.randn(5, 7, requires_grad=True)
    (grad,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda network, x: (network.double(), x.double()),
        lambda network, x: (nn.Sequential(network[0], nn.Identity(), *network[1:]), x),
        lambda network, x: (network, x[:0]),
    ],
    ids=["float64", "an unknown layer", "no rows"],
)
def test_what_the_kernels_do_not_know_is_left_to_pytorch(spoil, monkeypatch):
    network, x = spoil(randomised(_mlp), torch.randn(5, 7))
    network = Layers(*network)
    calls = _watched(monkeypatch)
    torch.testing.assert_close(network(x), nn.Sequential(*network)(x), rtol=1e-5, atol=1e-6)
    assert not [call for call in calls if len(call[0]) == 3]


@pytest.mark.parametrize("path", ["0", "0.1"], ids=["a block", "a layer of a block"])
def test_a_hook_is_called(path):
    network, seen = randomised(_mlp), []
    network.get_submodule(path).register_forward_hook(lambda module, inputs, output: seen.append(output))
    network(torch.randn(5, 7))
    assert len(seen) == 1


@pytest.mark.parametrize(
    "network",
    [
        Layers(nn.Linear(7, 8), nn.LayerNorm(16), Mish()),
        Layers(nn.Linear(7, 8), nn.LayerNorm((2, 4)), Mish()),
        Layers(nn.Linear(7, 10), nn.LayerNorm(10), SimNorm(4)),
    ],
    ids=["norm of another width", "norm over two axes", "groups that don't divide"],
)
def test_sizes_that_do_not_fit_are_refused_by_pytorch(network):
    with pytest.raises(RuntimeError):
        network(torch.randn(1, 7))


def test_dropout_in_training_mode_drops():
    values = NormedEnsemble(2, 7, [64], 5, nn.Mish, dropout=0.5)
    x = torch.randn(5, 7)
    assert not torch.equal(values(x), values(x))
    assert torch.equal(values.eval()(x), values(x))


@compiled
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_dropout_in_training_mode_is_left_to_the_kernels(p, monkeypatch):
    values, calls = NormedEnsemble(2, 7, [64, 64], 5, nn.Mish, dropout=p), _watched(monkeypatch)
    values(torch.randn(5, 7))
    assert len(calls) == 1


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9])
def test_dropped_entries_are_independent_and_of_that_share(p):
    torch.manual_seed(0)
    dropout, count = PartDropout(p), 200_000
    kept = dropout.draw((2, count // 200, 100)).flatten().double()
    dropped = 1.0 - kept
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert abs(dropped.mean() - p) < 4.0 * math.sqrt(p * (1.0 - p) / count)
    for lag in (1, 2, 100):
        both = (dropped[lag:] * dropped[:-lag]).mean()
        assert abs(both - p * p) < 5.0 * math.sqrt(p * p * (1.0 - p * p) / count)
    ends = torch.stack([dropout.draw((1, 1, 3)).flatten() for _ in range(2_000)]).double()  # first and last count, too
    assert ((1.0 - ends).mean(0) - p).abs().max() < 4.5 * math.sqrt(p * (1.0 - p) / 2_000)
    assert PartDropout(1e-30).draw((1, 10, 10)).all()
    x = torch.randn(2, 500, 100)
    assert abs((dropout(x) * x).sum() / x.square().sum() - 1.0) < 5.0 * math.sqrt(p / (1.0 - p) * 3.0 / x.numel())


def test_ensemble_layers_are_linear_maps_and_norms_of_each_member():
    linear, norm, x = EnsembleLinear(2, 3, 4), EnsembleLayerNorm(2, 4), torch.randn(2, 5, 3)
    nn.init.normal_(linear.weight)
    for k in range(2):
        mapped = x[k] @ linear.weight[k] + linear.bias[k]
        torch.testing.assert_close(linear(x)[k], mapped)
        torch.testing.assert_close(norm(linear(x))[k], nn.functional.layer_norm(mapped, (4,)))


def test_without_the_library_pytorch_computes_the_same():
    code = (
        "import sys, torch; from pwm_gym import kernels; from pwm_gym.networks import Mish, SimNorm, mlp; "
        "assert not kernels.available() or sys.argv[1] == '0'; torch.manual_seed(0); "
        "net = mlp(7, [32], 16, Mish, SimNorm(4)); print(net(torch.randn(3, 7)).flatten().tolist())"
    )
    outputs = []
    for eager in "01":
        run = subprocess.run(
            [sys.executable, "-c", code, eager],
            env=os.environ | {"PWM_GYM_EAGER": eager},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.append(torch.tensor([float(v) for v in run.stdout.strip("[]\n").split(",")]))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-7)
