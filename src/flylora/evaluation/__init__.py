"""Evaluation: a base model, a task and perhaps an adapter in, a result with every item's output out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flylora.evaluation.config import EvalConfig

if TYPE_CHECKING:
    from flylora.evaluation.record import EvalRecord
    from flylora.models import LoadedModel

__all__ = ["EvalConfig", "evaluate"]


def evaluate(config: EvalConfig, loaded: LoadedModel | None = None) -> EvalRecord:
    """Evaluates a model on a task; see ``flylora.evaluation.run.run``."""
    # torch is imported only now, so that reading a config or asking for help stays quick.
    from flylora.evaluation.run import run

    return run(config, loaded)
