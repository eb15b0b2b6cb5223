"""Merging saved adapters into one; see docs/merging.md."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import CalibrateConfig, MergeConfig

if TYPE_CHECKING:
    from .adapters import SavedAdapter, read_adapter, write_adapter
    from .calibration import calibrate
    from .merge import merge_adapters
    from .record import MergeRecord

_LAZY = {
    "SavedAdapter": ".adapters",
    "read_adapter": ".adapters",
    "write_adapter": ".adapters",
    "calibrate": ".calibration",
    "merge_adapters": ".merge",
    "MergeRecord": ".record",
}

__all__ = [
    "CalibrateConfig",
    "MergeConfig",
    "MergeRecord",
    "SavedAdapter",
    "calibrate",
    "merge_adapters",
    "read_adapter",
    "write_adapter",
]


def __getattr__(name: str) -> Any:
    """The command line reads the configs alone, so torch is imported only with what needs it."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name], __name__), name)
