"""A policy for each task out of one world model."""

from pwm_gym.extraction.report import TaskResult, published_scores, write_report
from pwm_gym.extraction.run import SETTINGS, extract

__all__ = ["SETTINGS", "TaskResult", "extract", "published_scores", "write_report"]
