"""Tensor mathematics: symlog, two-hot regression, returns and gradient clips. No module state, no randomness."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "clip_gradients",
    "frozen",
    "symexp",
    "symlog",
    "td_lambda_returns",
    "two_hot_cross_entropy",
    "two_hot_decode",
]

_HALF = (torch.bfloat16, torch.float16)  # of logits under autocast


def symlog(x: Tensor) -> Tensor:
    """Compress magnitudes: sign(x) ln(1 + |x|), any shape (DreamerV3, arXiv:2301.04104, eq. 9).

    Its slope at 0 is 1, also for autograd.
    """
    return torch.where(x >= 0, torch.log1p(x.clamp(min=0)), -torch.log1p((-x).clamp(min=0)))


def symexp(x: Tensor) -> Tensor:
    """Invert `symlog`: sign(x) (exp|x| - 1), any shape. Its slope at 0 is 1, also for autograd."""
    return torch.where(x >= 0, torch.expm1(x.clamp(min=0)), -torch.expm1((-x).clamp(min=0)))


def _full_precision(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _HALF else x


def two_hot_cross_entropy(logits: Tensor, target: Tensor, vmin: float, vmax: float) -> Tensor:
    """Compute the cross-entropy between a categorical over symlog bins and a two-hot scalar target.

    The bins are K points b_k spaced evenly over [vmin, vmax] in symlog space. With y = symlog(target) between
    b_k and b_{k+1}, the target puts weight w = (y - b_k) / (b_{k+1} - b_k) on k + 1 and 1 - w on k, so

        loss = logsumexp(logits) - (1 - w) logits_k - w logits_{k+1}

    DreamerV3 (arXiv:2301.04104), eq. 10; the reward loss of TD-MPC2 (arXiv:2310.16828), eq. 3.

    One bin is no categorical: its logit is the prediction, in task units, and the loss is the squared error (PWM's
    single-task models).

    Args:
        logits: (..., K).
        target: (...), in task units; beyond the outer bins it counts as the outer bin.
        vmin: Lowest bin, in symlog units.
        vmax: Highest bin, in symlog units.

    Returns:
        The loss of each element, (...).
    """
    logits, num_bins = _full_precision(logits), logits.shape[-1]
    if num_bins == 1:
        return (logits.squeeze(-1) - target).square()
    position = (symlog(target).clamp(vmin, vmax) - vmin) * ((num_bins - 1) / (vmax - vmin))
    lower = position.floor().clamp(max=num_bins - 2)
    weight = (position - lower).unsqueeze(-1)  # (..., 1)
    index = lower.long().clamp_(0, num_bins - 2).unsqueeze(-1)  # (..., 1); a NaN is no index but a NaN in the loss
    picked = (1 - weight) * logits.gather(-1, index) + weight * logits.gather(-1, index + 1)
    return torch.logsumexp(logits, -1) - picked.squeeze(-1)


def two_hot_decode(logits: Tensor, bins: Tensor, in_task_units: bool = True) -> Tensor:
    """Read a scalar out of a categorical over symlog bins: E[b], or symexp(E[b]) in task units.

    TD-MPC2 decodes with symexp; the released PWM code leaves it out and so maximises an expectation in bin space.
    One bin is no categorical: its logit is the scalar, in task units.

    Args:
        logits: (..., K).
        bins: The K bin positions b_k, in symlog units, (K,).
        in_task_units: Apply symexp to the expectation.

    Returns:
        The decoded scalar, (...).
    """
    if len(bins) == 1:
        return _full_precision(logits).squeeze(-1)
    if logits.dtype in _HALF:  # under autocast, where a product would be rounded again
        with torch.autocast(logits.device.type, enabled=False):
            expectation = F.softmax(_full_precision(logits), -1) @ bins
    else:
        expectation = F.softmax(logits, -1) @ bins
    return symexp(expectation) if in_task_units else expectation


def td_lambda_returns(
    rewards: Tensor,
    next_values: Tensor,
    ends: Tensor,
    gamma: float,
    td_lambda: float,
    continues: Tensor | None = None,
) -> Tensor:
    """Compute TD(λ) targets for a critic from one fixed-length rollout.

        G_t = r_t + γ c_t V_{t+1}                              if step t ends its segment
        G_t = r_t + γ c_t [(1 - λ) V_{t+1} + λ G_{t+1}]        otherwise

    Sutton & Barto (2018), ch. 12; the critic target of SHAC (Xu et al. 2022) and PWM (arXiv:2407.02466).

    Args:
        rewards: r_t, (H, B), in the units of the env that produced them.
        next_values: V(z_{t+1}), (H, B), of the state that step t led to, before any reset.
        ends: (H, B), bool. True at the last step of a segment: terminated, truncated, or the horizon (row H-1).
        gamma: Discount γ, in (0, 1].
        td_lambda: Mix λ of one-step (0) and full-segment (1) targets.
        continues: c_t, (H, B), in [0, 1]: the probability that the episode goes on after step t. 0 where it
            terminated, 1 where it was only truncated. None means 1 everywhere.

    Returns:
        G_t, (H, B), without gradient.

    Raises:
        ValueError: If the tensors differ in shape, or `ends[-1]` is not all True.
    """
    shapes = {tuple(x.shape) for x in (rewards, next_values, ends, continues) if x is not None}
    if len(shapes) != 1 or rewards.ndim < 2:
        raise ValueError(f"expected tensors of one shape (H, B), got {sorted(shapes)}. Stack them time first.")
    if not bool(ends[-1].all()):
        raise ValueError("`ends[-1]` must be True for every env: the rollout's last step ends all segments.")
    with torch.no_grad():
        discounts = torch.full_like(rewards, gamma) if continues is None else gamma * continues
        mix = td_lambda * (~ends).to(rewards.dtype)  # (H, B), 0 at the end of a segment
        one_step = rewards + discounts * (1 - mix) * next_values
        targets = torch.empty_like(rewards)
        running = torch.zeros_like(rewards[0])
        for t in range(rewards.shape[0] - 1, -1, -1):
            running = one_step[t] + discounts[t] * mix[t] * running
            targets[t] = running
    return targets


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients down to a total norm of at most `max_norm`, as `torch.nn.utils.clip_grad_norm_`.

    On the CPU, where asking is free, gradients that are clearly short enough are not multiplied by 1.

    Args:
        parameters: Those without a gradient are passed over.
        max_norm: Greatest norm.

    Returns:
        The norm before, ().

    Example:
        >>> parameter = torch.zeros(2, requires_grad=True)
        >>> parameter.grad = torch.tensor([3.0, 4.0])
        >>> clip_gradients([parameter], max_norm=1.0), parameter.grad
        (tensor(5.), tensor([0.6000, 0.8000]))
    """
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if norm.device.type != "cpu" or not norm.item() < 0.999 * max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let gradients pass through a module without computing those of its parameters."""
    flags = [(p, p.requires_grad) for p in module.parameters()]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
