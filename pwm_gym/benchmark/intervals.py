"""Statistics over few seeds, by rliable (Agarwal et al., NeurIPS 2021, arXiv:2108.13264)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Interval", "Statistics", "statistics"]

_TAUS = np.linspace(0.0, 1.0, 51)
_REPS = 2_000  # bootstrap samples of an interquartile mean; of everything else a tenth as many


class Interval(NamedTuple):
    """An estimate with its 95 % interval; numbers, or (T,) of a curve."""

    value: Any
    low: Any
    high: Any


class Statistics(NamedTuple):
    """What can be said of several algorithms over several tasks.

    Attributes:
        evaluations: How many all algorithms have; those behind it are left out where algorithms are compared.
        iqm: Interquartile mean of the scores after so many evaluations, by algorithm.
        iqm_last: The same after each algorithm's own last evaluation.
        iqm_curve: The same after each of its evaluations, (T,).
        profile: Share of runs whose score after so many evaluations is above each of `taus`.
        taus: Scores that the profiles are evaluated at.
        improvement: Probability that after so many evaluations a run of the first algorithm scores higher than one of
            the second on the same task, averaged over tasks, by pair.
    """

    evaluations: int
    iqm: dict[str, Interval]
    iqm_last: dict[str, Interval]
    iqm_curve: dict[str, Interval]
    profile: dict[str, Interval]
    taus: np.ndarray
    improvement: dict[tuple[str, str], Interval]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator, which rliable draws from, and give the caller its old state back."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def statistics(scores: Mapping[str, np.ndarray], seed: int = 0, reps: int = _REPS) -> Statistics:
    """Compute IQM, performance profiles and probabilities of improvement, with stratified bootstrap intervals.

    Args:
        scores: {algorithm: (seeds, tasks, T)} of comparable scores, as `Results.scores` gives them. T may differ.
        seed: Of the bootstrap.
        reps: Bootstrap samples of an interquartile mean; everything else gets a tenth as many.

    Raises:
        ImportError: If rliable is missing.
        ValueError: If there are no scores.

    Example:
        >>> scores = {"PWM": np.array([[[0.5], [0.7]], [[0.6], [0.8]]]), "SAC": np.array([[[0.1], [0.2]]])}
        >>> found = statistics(scores, reps=100)
        >>> round(float(found.iqm["PWM"].value), 3), found.improvement["PWM", "SAC"].value
        (0.65, 1.0)
    """
    try:
        from rliable import library, metrics
    except ImportError as error:
        raise ImportError('statistics need rliable: pip install "pwm-gym[benchmark]"') from error
    if not scores:
        raise ValueError("expected scores of at least one algorithm, got none.")

    def intervals(of: Mapping[Any, Any], function: Callable[..., Any], reps: int) -> dict[Any, Interval]:
        # rliable calls a pair's function with an array for each, a single one's with its array.
        values, bounds = library.get_interval_estimates(of, function, reps=reps)
        return {key: Interval(values[key], *np.asarray(bounds[key])) for key in values}

    def first(found: dict[Any, Interval]) -> dict[Any, Interval]:
        return {key: Interval(*(float(np.ravel(part)[0]) for part in interval)) for key, interval in found.items()}

    def iqm_along(values: np.ndarray) -> np.ndarray:
        return np.array([metrics.aggregate_iqm(values[..., t]) for t in range(values.shape[-1])])

    def above(values: np.ndarray) -> np.ndarray:
        return (values.reshape(1, -1) > _TAUS[:, None]).mean(1)  # as library.score_distributions, but at once

    few = max(reps // 10, 1)

    def iqm(values: np.ndarray) -> np.ndarray:
        return np.array([metrics.aggregate_iqm(values)])

    count = min(values.shape[-1] for values in scores.values())
    equal = {name: values[..., count - 1] for name, values in scores.items()}
    pairs = {pair: [equal[pair[0]], equal[pair[1]]] for pair in combinations(equal, 2)}
    with _seeded(seed):
        return Statistics(
            count,
            first(intervals(equal, iqm, reps)),
            first(intervals({name: values[..., -1] for name, values in scores.items()}, iqm, reps)),
            intervals(scores, iqm_along, few),
            intervals(equal, above, few),
            _TAUS,
            first(intervals(pairs, _improvement(metrics.probability_of_improvement), few)) if pairs else {},
        )


def _improvement(probability: Callable[[np.ndarray, np.ndarray], Any]) -> Callable[..., np.ndarray]:
    return lambda x, y: np.array([probability(x, y)])
