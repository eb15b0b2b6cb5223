"""Training: a base model and a task in, an adapter folder and its record out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flylora.lab.training.config import TrainConfig

if TYPE_CHECKING:
    from flylora.lab.training.record import TrainRecord
    from flylora.models import LoadedModel

__all__ = ["TrainConfig", "train"]


def train(config: TrainConfig, loaded: LoadedModel | None = None) -> TrainRecord:
    """Trains one adapter; see ``flylora.lab.training.fit.fit``."""
    # torch and the trainer are imported only now, so that reading a config or asking for help stays quick.
    from flylora.lab.training.fit import fit

    return fit(config, loaded)
