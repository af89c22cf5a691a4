"""Offline data: one form for all of it, importers and exporters."""

from pwm_gym.datasets.offline import OfflineDataset
from pwm_gym.datasets.storage import Episode

__all__ = ["Episode", "OfflineDataset"]
