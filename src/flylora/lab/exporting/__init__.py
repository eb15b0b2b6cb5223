"""`flylora export` with tasks: their texts to calibrate on, and their items to evaluate before and after."""

from __future__ import annotations

from flylora.lab.exporting.config import ExportConfig
from flylora.lab.exporting.run import export

__all__ = ["ExportConfig", "export"]
