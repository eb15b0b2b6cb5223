"""Merges with tasks by name: calibration on their training texts, search, and what the merge keeps of each."""

from __future__ import annotations

from flylora.lab.merging.config import CalibrateConfig, MergeConfig
from flylora.lab.merging.run import calibrate_adapters, merge_adapters

__all__ = ["CalibrateConfig", "MergeConfig", "calibrate_adapters", "merge_adapters"]
