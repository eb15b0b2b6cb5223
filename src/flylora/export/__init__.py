"""Export: a FlyLoRA adapter as a plain PEFT LoRA or as full weights, with the measured gap; see docs/export.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flylora.export.config import ExportConfig

if TYPE_CHECKING:
    from flylora.export.record import ExportRecord
    from flylora.models import LoadedModel

__all__ = ["ExportConfig", "export"]


def export(config: ExportConfig, loaded: LoadedModel | None = None) -> ExportRecord:
    """Exports an adapter; see ``flylora.export.run.run``."""
    # torch is imported only now, so that reading a config or asking for help stays quick.
    from flylora.export.run import run

    return run(config, loaded)
