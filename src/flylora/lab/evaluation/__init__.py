"""Evaluation: a base model, a task and perhaps an adapter in, a result with every item's output out."""

from flylora.lab.evaluation.config import EvalConfig
from flylora.lab.evaluation.harness import evaluate_with_harness
from flylora.lab.evaluation.run import run as evaluate

__all__ = ["EvalConfig", "evaluate", "evaluate_with_harness"]
