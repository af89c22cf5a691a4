"""Network blocks against TD-MPC2's and torch's own, and against separate evaluations."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pwm_gym.networks import EnsembleMLP, Mish, NormedLinear, SimNorm, Stacked, mlp


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def contiguous_simnorm(x: Tensor, group_size: int) -> Tensor:
    """TD-MPC2's SimNorm: features 0..V-1 are the first group, and so on."""
    return x.reshape(*x.shape[:-1], -1, group_size).softmax(-1).reshape(x.shape)


def test_simnorm_of_known_numbers() -> None:
    # Two groups of 2: features 0 and 2, features 1 and 3. softmax(0, ln 3) = (1/4, 3/4).
    x = torch.tensor([[0.0, 5.0, torch.tensor(3.0).log(), 5.0]])
    torch.testing.assert_close(SimNorm(2)(x), torch.tensor([[0.25, 0.5, 0.75, 0.5]]))


@pytest.mark.parametrize("shape", [(1, 24), (2, 24), (3, 2, 24)])
def test_simnorm_groups_are_points_of_a_simplex(shape: tuple[int, ...]) -> None:
    z = SimNorm(8)(5 * random(*shape))
    assert z.shape == shape
    assert (z >= 0).all()
    groups = z.unflatten(-1, (8, 3))  # (..., V, G): feature i is in group i mod G
    torch.testing.assert_close(groups.sum(-2), torch.ones(*shape[:-1], 3, dtype=torch.float64))


def test_simnorm_is_tdmpc2s_up_to_a_fixed_permutation_of_features() -> None:
    x = random(3, 2, 24)
    # Contiguous feature g V + v stands here at v G + g.
    permutation = torch.arange(24).reshape(3, 8).T.flatten()
    torch.testing.assert_close(SimNorm(8)(x[..., permutation]), contiguous_simnorm(x, 8)[..., permutation])


def test_simnorm_refuses_features_that_do_not_divide() -> None:
    with pytest.raises(RuntimeError):
        SimNorm(8)(torch.zeros(1, 12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mish_is_torchs_mish(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-30, 30, 601, dtype=dtype), torch.tensor([-1e4, 0.0, 1e4], dtype=dtype)])
    x.requires_grad_()
    ours, theirs = Mish()(x), F.mish(x)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_mish_gradient_is_that_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(Mish(), (3 * random(2, 20)).requires_grad_())


def test_mish_leaves_its_input_as_it_is_and_needs_no_gradient() -> None:
    x = random(2, 5)
    before = x.clone()
    with torch.no_grad():
        without = Mish()(x)
    with_gradient = Mish()(x.requires_grad_())
    assert torch.equal(x, before)
    assert torch.equal(without, with_gradient)


def test_mish_refuses_a_second_derivative_instead_of_giving_a_wrong_one() -> None:
    x = random(3).requires_grad_()
    slope = torch.autograd.grad(Mish()(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_normed_linear_is_linear_then_layer_norm_then_activation() -> None:
    block = NormedLinear(4, 6, nn.ReLU()).double()
    x = random(2, 4)
    linear = block[0]
    expected = F.relu(F.layer_norm(x @ linear.weight.T + linear.bias, (6,)))
    torch.testing.assert_close(block(x), expected)


def test_spectral_norm_bounds_the_largest_singular_value_by_1() -> None:
    block = NormedLinear(20, 30, nn.ReLU(), spectral_norm=True)
    assert not any(isinstance(module, nn.LayerNorm) for module in block.modules())
    with torch.no_grad():
        block[0].parametrizations.weight.original.mul_(50.0)
        for _ in range(100):  # each evaluation in training mode is a step of the power iteration
            block(torch.zeros(1, 20))
    assert torch.linalg.matrix_norm(block[0].weight, 2).item() == pytest.approx(1.0, rel=1e-2)


def test_mlp_ends_in_a_plain_linear_layer_or_in_a_normed_one() -> None:
    plain = mlp(3, [8, 9], 4, nn.ReLU)
    assert [type(layer) for layer in plain] == [NormedLinear, NormedLinear, nn.Linear]
    normed = mlp(3, [], 8, nn.ReLU, SimNorm(4))
    assert [type(layer) for layer in normed] == [NormedLinear]
    torch.testing.assert_close(normed(torch.randn(2, 3)).sum(-1), torch.full((2,), 2.0))  # two groups


@pytest.mark.parametrize("hidden", [[], [16], [16, 8]])
@pytest.mark.parametrize("shape", [(1,), (2,), (3, 2)])
def test_ensemble_equals_separate_evaluations(hidden: list[int], shape: tuple[int, ...]) -> None:
    ensemble = EnsembleMLP(3, 5, hidden, nn.Mish).double()
    with torch.no_grad():
        for i, parameter in enumerate(ensemble.parameters()):  # no bias or scale is at its default
            parameter.add_(0.3 * random(*parameter.shape, seed=i))
    x = random(*shape, 5)
    members = []
    for e in range(3):
        y = x
        for layer in ensemble:
            weights = [parameter[e] for parameter in layer.parameters()]
            if not weights:
                y = F.mish(y)
            elif weights[0].shape[0] == 1:  # LayerNorm: scale and shift
                y = F.layer_norm(y, y.shape[-1:], weights[0][0], weights[1][0])
            else:
                y = y @ weights[0] + weights[1][0]
        members.append(y.squeeze(-1))
    values = ensemble(x)
    assert values.shape == (3, *shape)
    torch.testing.assert_close(values, torch.stack(members))


def test_ensemble_members_differ_and_learn_apart() -> None:
    ensemble = EnsembleMLP(2, 5, [16], nn.Mish)
    values = ensemble(torch.ones(1, 5))
    assert values[0].item() != values[1].item()
    values[0].sum().backward()
    for parameter in ensemble.parameters():
        assert parameter.grad is not None
        assert parameter.grad[0].abs().sum() > 0
        assert parameter.grad[1].abs().sum() == 0


def test_ensemble_weights_are_orthogonal_with_gain_sqrt_2() -> None:
    # WᵀW = 2 I for a square layer
    ensemble = EnsembleMLP(2, 8, [8], nn.Mish)
    for weight in ensemble[0].weight.detach():
        torch.testing.assert_close(weight.T @ weight, 2 * torch.eye(8), atol=1e-5, rtol=0)
    assert all(bool((layer.bias == 0).all()) for layer in (ensemble[0], ensemble[-1]))


def test_ensemble_copies_are_independent() -> None:
    ensemble = EnsembleMLP(2, 5, [16], nn.Mish)
    target = copy.deepcopy(ensemble)
    with torch.no_grad():
        ensemble[0].weight.zero_()
    assert target[0].weight.abs().sum() > 0


def nets(outputs: tuple[int, ...]) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(3, 5), Mish(), nn.LayerNorm(5), nn.Linear(5, out)) for out in outputs]


def test_stacked_modules_answer_and_learn_as_each_does_alone() -> None:
    members = nets((2, 1, 4))
    stacked, x = Stacked(members), random(3, 7, 3).float()
    answers = stacked(x)  # (3, 7, 4)
    answers.square().sum().backward()
    for k, member in enumerate(members):
        alone = member(x[k])
        torch.testing.assert_close(answers[k, :, : alone.shape[-1]], alone)
        assert not answers[k, :, alone.shape[-1] :].any()  # the padding has no weights
        alone.square().sum().backward()
    for together, own in stacked.pairs():
        for k, parameter in enumerate(own):
            inside = together.grad[k][tuple(slice(0, n) for n in parameter.shape)]
            torch.testing.assert_close(inside, parameter.grad)


def test_stacked_parameters_go_back_into_the_members() -> None:
    members = nets((2, 1))
    stacked = Stacked(members)
    before = [parameter.clone() for member in members for parameter in member.parameters()]
    with torch.no_grad():
        for parameter in stacked.parameters():
            parameter.add_(1.0)
    stacked.write()
    after = [parameter for member in members for parameter in member.parameters()]
    assert all(torch.equal(new, old + 1.0) for new, old in zip(after, before, strict=True))


def test_stacked_ensembles_put_the_members_where_they_are_wanted() -> None:
    members = [EnsembleMLP(2, 3, [4], Mish) for _ in range(3)]
    x = random(6, 3, 7, 3).float()  # (H, K, N, in)
    values = Stacked(members, -3, -2)(x)
    assert values.shape == (2, 6, 3, 7)  # (E, H, K, N)
    for k, member in enumerate(members):
        torch.testing.assert_close(values[:, :, k], member(x[:, k]))
