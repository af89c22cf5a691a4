"""Offline data: one form for all of it, importers and exporters."""

from pwm_gym.datasets.offline import Episode, OfflineDataset

__all__ = ["Episode", "OfflineDataset"]
