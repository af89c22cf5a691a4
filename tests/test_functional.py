"""Symlog, two-hot regression and TD(λ) returns against numbers worked by hand."""

import math

import pytest
import torch
from torch import Tensor

from pwm_gym.functional import clip_gradients, symexp, symlog, td_lambda_returns, two_hot_cross_entropy, two_hot_decode

# One rollout of H = 3 steps: r = (1, 2, 3) and V(z_{t+1}) = (10, 20, 30), with γ = 1/2.
REWARDS, NEXT_VALUES, GAMMA = (1.0, 2.0, 3.0), (10.0, 20.0, 30.0), 0.5


def column(*values: float) -> Tensor:
    """(H, 1)."""
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def ends_at(*steps: int, horizon: int = 3) -> Tensor:
    """(H, 1), True at the given steps and at the last."""
    return torch.tensor([[t in steps or t == horizon - 1] for t in range(horizon)])


def returns(ends: Tensor, td_lambda: float, continues: Tensor | None = None) -> list[float]:
    targets = td_lambda_returns(column(*REWARDS), column(*NEXT_VALUES), ends, GAMMA, td_lambda, continues)
    assert targets.shape == (3, 1)
    return targets[:, 0].tolist()


def test_lambda_0_is_the_one_step_target() -> None:
    # 1 + 10/2, 2 + 20/2, 3 + 30/2
    assert returns(ends_at(), td_lambda=0.0) == [6.0, 12.0, 18.0]


def test_lambda_1_is_the_discounted_sum_with_one_bootstrap() -> None:
    # G_2 = 3 + 30/2 = 18,  G_1 = 2 + 18/2 = 11,  G_0 = 1 + 11/2 = 6.5
    assert returns(ends_at(), td_lambda=1.0) == [6.5, 11.0, 18.0]


def test_lambda_mixes_value_and_return_of_the_next_state() -> None:
    # G_2 = 18,  G_1 = 2 + (20/2 + 18/2)/2 = 11.5,  G_0 = 1 + (10/2 + 11.5/2)/2 = 6.375
    assert returns(ends_at(), td_lambda=0.5) == [6.375, 11.5, 18.0]


@pytest.mark.parametrize("td_lambda", [0.0, 0.5, 1.0])
def test_one_step_rollout_has_the_one_step_target(td_lambda: float) -> None:
    # 1 + 10/2 = 6 and, where the episode goes on with probability 1/5, 1 + 10/10 = 2
    end = ends_at(horizon=1)
    assert td_lambda_returns(column(1.0), column(10.0), end, GAMMA, td_lambda).item() == 6.0
    assert td_lambda_returns(column(1.0), column(10.0), end, GAMMA, td_lambda, column(0.2)).item() == 2.0


def test_return_stops_at_an_end_in_the_middle() -> None:
    # Step 1 ends its segment: G_1 = 2 + 20/2 = 12, whatever follows; G_0 = 1 + 12/2 = 7; G_2 = 18 is a new segment.
    assert returns(ends_at(1), td_lambda=1.0) == [7.0, 12.0, 18.0]


def test_truncation_keeps_bootstrap() -> None:
    # As above with c = 1 written out: V(z_2) = 20 stands in for what the time limit cut off.
    assert returns(ends_at(1), 1.0, column(1.0, 1.0, 1.0)) == [7.0, 12.0, 18.0]


def test_termination_drops_bootstrap() -> None:
    # c_1 = 0: G_1 = 2, G_0 = 1 + 2/2 = 2
    assert returns(ends_at(1), 1.0, column(1.0, 0.0, 1.0)) == [2.0, 2.0, 18.0]


def test_continue_probability_discounts_everything_after_its_step() -> None:
    # c = (1, 1/2, 0), λ = 1/2:  G_2 = 3,  G_1 = 2 + 1/4 (20/2 + 3/2) = 4.875,  G_0 = 1 + 1/2 (10/2 + 4.875/2) = 4.71875
    assert returns(ends_at(), 0.5, column(1.0, 0.5, 0.0)) == [4.71875, 4.875, 3.0]


def test_envs_have_returns_of_their_own() -> None:
    # B = 2: the left env runs through, the right one ends at step 1 (numbers of the tests above).
    rewards, values = column(*REWARDS).expand(3, 2), column(*NEXT_VALUES).expand(3, 2)
    targets = td_lambda_returns(rewards, values, torch.cat([ends_at(), ends_at(1)], 1), GAMMA, 1.0)
    assert targets.tolist() == [[6.5, 7.0], [11.0, 12.0], [18.0, 18.0]]


def test_returns_have_no_gradient_and_keep_the_dtype() -> None:
    rewards, values = column(*REWARDS).float().requires_grad_(), column(*NEXT_VALUES).float().requires_grad_()
    targets = td_lambda_returns(rewards, values, ends_at(), GAMMA, 0.95)
    assert not targets.requires_grad
    assert targets.dtype == torch.float32


def test_returns_refuse_different_shapes() -> None:
    with pytest.raises(ValueError, match=r"one shape \(H, B\), got \[\(2, 1\), \(3, 1\)\]"):
        td_lambda_returns(column(1, 2, 3), column(1, 2), ends_at(), GAMMA, 1.0)
    with pytest.raises(ValueError, match="one shape"):
        td_lambda_returns(column(1, 2, 3), column(1, 2, 3), ends_at(), GAMMA, 1.0, continues=torch.ones(3, 2))
    with pytest.raises(ValueError, match="one shape"):
        td_lambda_returns(torch.ones(3), torch.ones(3), torch.ones(3, dtype=torch.bool), GAMMA, 1.0)


def test_returns_refuse_a_last_step_that_ends_nothing() -> None:
    with pytest.raises(ValueError, match=r"`ends\[-1\]` must be True"):
        td_lambda_returns(column(1, 2, 3), column(1, 2, 3), torch.zeros(3, 1, dtype=torch.bool), GAMMA, 1.0)


def test_symlog_of_known_numbers() -> None:
    # ln(1 + e - 1) = 1 and -ln(1 + e² - 1) = -2
    x = torch.tensor([0.0, math.e - 1, 1 - math.e**2], dtype=torch.float64)
    torch.testing.assert_close(symlog(x), torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64))


def test_symexp_inverts_symlog() -> None:
    magnitudes = torch.logspace(-9, 9, 50, dtype=torch.float64)
    x = torch.cat([-magnitudes, torch.zeros(1, dtype=torch.float64), magnitudes])
    torch.testing.assert_close(symexp(symlog(x)), x, rtol=1e-12, atol=0.0)
    y = torch.linspace(-10, 10, 101, dtype=torch.float64)
    torch.testing.assert_close(symlog(symexp(y)), y, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("function", [symlog, symexp])
def test_slope_at_0_is_1(function) -> None:
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(function(x), x)[0].item() == 1.0
    step = 1e-6
    assert (function(x + step) - function(x - step)).item() / (2 * step) == pytest.approx(1.0, rel=1e-6)


def test_slopes_elsewhere_are_those_of_log_and_exp() -> None:
    x = torch.tensor([-3.0, -1.0, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(symlog(x).sum(), x)[0]
    torch.testing.assert_close(slope, 1 / (1 + x.detach().abs()))
    slope = torch.autograd.grad(symexp(x).sum(), x)[0]
    torch.testing.assert_close(slope, x.detach().abs().exp())


def test_symexp_has_finite_gradients_wherever_it_is_finite() -> None:
    x = torch.tensor([-85.0, 85.0], requires_grad=True)
    assert torch.autograd.grad(symexp(x).sum(), x)[0].isfinite().all()


def dense_two_hot(target: Tensor, num_bins: int, vmin: float, vmax: float) -> Tensor:
    """Write the two-hot vector out, one element at a time: (...) -> (..., K)."""
    bins = torch.linspace(vmin, vmax, num_bins, dtype=torch.float64)
    result = torch.zeros(*target.shape, num_bins, dtype=torch.float64)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in target.shape)).reshape(-1, target.ndim):
        place = tuple(index.tolist())
        y = min(max(float(symlog(target[place])), vmin), vmax)
        k = max(j for j in range(num_bins - 1) if float(bins[j]) <= y + 1e-12)
        w = (y - float(bins[k])) / float(bins[k + 1] - bins[k])
        result[(*place, k)], result[(*place, k + 1)] = 1 - w, w
    return result


def test_one_bin_is_a_plain_scalar_with_a_squared_error() -> None:
    logits = torch.tensor([[2.0], [-30_000.0]])
    bins = torch.zeros(1)
    assert two_hot_decode(logits, bins).tolist() == two_hot_decode(logits, bins, False).tolist() == [2.0, -30_000.0]
    assert two_hot_cross_entropy(logits, torch.tensor([5.0, -30_000.0]), -10.0, 10.0).tolist() == [9.0, 0.0]


def test_two_hot_loss_of_known_numbers() -> None:
    # Bins -2..2. symlog(target) = 1/4 puts 3/4 on bin 0 and 1/4 on bin 1. Logits (0, 0, ln 2, 0, 0): the sum of
    # exponentials is 6 and the picked logit 3/4 ln 2.
    logits = torch.tensor([[0.0, 0.0, math.log(2), 0.0, 0.0]], dtype=torch.float64)
    target = torch.tensor([math.expm1(0.25)], dtype=torch.float64)
    loss = two_hot_cross_entropy(logits, target, -2.0, 2.0)
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(math.log(6) - 0.75 * math.log(2), rel=1e-12)


@pytest.mark.parametrize("shape", [(1,), (2,), (3, 2)])
def test_two_hot_loss_is_the_cross_entropy_of_the_dense_vector(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, 101, generator=generator, dtype=torch.float64, requires_grad=True)
    target = 30 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    two_hot = dense_two_hot(target, 101, -10.0, 10.0)
    loss = two_hot_cross_entropy(logits, target, -10.0, 10.0)
    torch.testing.assert_close(loss, -(two_hot * logits.log_softmax(-1)).sum(-1))
    # d loss / d logits = softmax(logits) - two_hot
    gradient = torch.autograd.grad(loss.sum(), logits)[0]
    torch.testing.assert_close(gradient, logits.detach().softmax(-1) - two_hot)


def test_targets_on_a_bin_and_beyond_the_outer_bins_count_as_that_bin() -> None:
    logits = torch.arange(5, dtype=torch.float64).expand(4, 5)
    # symlog = -2 (lowest bin), 1 (fourth bin), and two beyond the outer bins
    target = torch.tensor([-math.expm1(2.0), math.expm1(1.0), -1e6, 1e6], dtype=torch.float64)
    picked = torch.tensor([0.0, 3.0, 0.0, 4.0], dtype=torch.float64)
    loss = two_hot_cross_entropy(logits, target, -2.0, 2.0)
    torch.testing.assert_close(loss, torch.logsumexp(logits, -1) - picked)


@pytest.mark.parametrize("shape", [(1,), (2,), (3, 2)])
def test_decoding_a_two_hot_vector_gives_the_target_back(shape: tuple[int, ...]) -> None:
    target = 50 * torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = dense_two_hot(target, 101, -10.0, 10.0).log()  # -inf where the weight is 0
    bins = torch.linspace(-10, 10, 101, dtype=torch.float64)
    torch.testing.assert_close(two_hot_decode(logits, bins), target)
    torch.testing.assert_close(two_hot_decode(logits, bins, in_task_units=False), symlog(target))


def test_flat_logits_decode_to_0_with_a_gradient() -> None:
    # E[b] = 0 by symmetry; d E[b] / d logits_k = (b_k - 0)/K, and symexp has slope 1 there.
    logits = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    bins = torch.linspace(-2, 2, 5, dtype=torch.float64)
    decoded = two_hot_decode(logits, bins)
    assert decoded.item() == pytest.approx(0.0, abs=1e-15)
    torch.testing.assert_close(torch.autograd.grad(decoded.sum(), logits)[0], bins[None] / 5)


@pytest.mark.parametrize("size", [0.1, 0.99999, 1.0, 5.0, float("nan")])
def test_gradients_are_clipped_as_pytorch_clips_them(size):
    direction = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        [torch.zeros(3, 4), torch.zeros(2)],
        [torch.zeros(3, 4), torch.zeros(2)],
    )  # the second has no gradient
    for parameters in (ours, theirs):
        parameters[0].grad = size * direction / direction.norm()
    norms = clip_gradients(iter(ours), 1.0), torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.testing.assert_close(*norms, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, rtol=0, atol=0, equal_nan=True)
