"""Side by side: algorithms x tasks x seeds under one protocol, resumable, with honest statistics and a report."""

from pwm_gym.benchmark.algorithms import ALGORITHMS, Algorithm
from pwm_gym.benchmark.intervals import Interval, Statistics, statistics
from pwm_gym.benchmark.reporting import report
from pwm_gym.benchmark.results import Results, published
from pwm_gym.benchmark.runner import Outcome, run
from pwm_gym.benchmark.study import Cell, Study

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Cell",
    "Interval",
    "Outcome",
    "Results",
    "Statistics",
    "Study",
    "published",
    "report",
    "run",
    "statistics",
]
