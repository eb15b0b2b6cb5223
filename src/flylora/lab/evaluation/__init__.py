"""Evaluation: a base model, a task and perhaps an adapter in, a result with every item's output out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flylora.lab.evaluation.config import EvalConfig

if TYPE_CHECKING:
    from flylora.lab.evaluation.harness import HarnessRecord
    from flylora.lab.evaluation.record import EvalRecord
    from flylora.models import LoadedModel

__all__ = ["EvalConfig", "evaluate", "evaluate_with_harness"]


def evaluate(config: EvalConfig, loaded: LoadedModel | None = None) -> EvalRecord:
    """Evaluates a model on a task; see ``flylora.lab.evaluation.run.run``."""
    # torch is imported only now, so that reading a config or asking for help stays quick.
    from flylora.lab.evaluation.run import run

    return run(config, loaded)


def evaluate_with_harness(config: EvalConfig, loaded: LoadedModel | None = None) -> HarnessRecord:
    """Evaluates a model on tasks of lm-evaluation-harness; see ``flylora.lab.evaluation.harness``."""
    from flylora.lab.evaluation.harness import evaluate_with_harness as run

    return run(config, loaded)
