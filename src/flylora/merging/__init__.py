"""Merging saved adapters into one; see docs/merging.md."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flylora.merging.config import CalibrateConfig, MergeConfig

if TYPE_CHECKING:
    from flylora.adapter_folder import SavedAdapter, read_adapter, write_adapter
    from flylora.merging.calibration import calibrate
    from flylora.merging.merge import merge_adapters
    from flylora.merging.record import MergeRecord

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
