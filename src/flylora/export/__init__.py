"""Export: a FlyLoRA adapter as a plain PEFT LoRA or as full weights, with the measured gap; see docs/export.md."""

from __future__ import annotations

from flylora.export.options import ExportOptions
from flylora.export.record import ExportRecord
from flylora.export.run import export

__all__ = ["ExportOptions", "ExportRecord", "export"]
