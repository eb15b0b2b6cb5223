"""Records of evaluations written by hand."""

from __future__ import annotations

from typing import Any

from flylora.lab.evaluation.record import EvalRecord
from flylora.records import Provenance

ORIGIN = Provenance({}, None, None, {}, {}, "", started="2000-01-01T00:00:00+00:00")


def evaluation(losses: list[float], scores: list[float] | None = None, **fields: Any) -> EvalRecord:
    """A record of items of one and two tokens in turn."""
    tokens = [1 + i % 2 for i in range(len(losses))]
    items = [
        {"id": str(i), "loss": loss, "loss_tokens": n, "score": None if scores is None else scores[i]}
        for i, (loss, n) in enumerate(zip(losses, tokens, strict=True))
    ]
    values: dict[str, Any] = {
        "status": "complete",
        "provenance": ORIGIN,
        "task": {},
        "split": "test",
        "dtype": "float32",
        "adapter_fingerprint": None,
        "adapter_active": None,
        "items_scored": len(losses),
        "accuracy": None if scores is None else sum(scores) / len(scores),
        "accuracy_stderr": None,
        "loss": sum(loss * n for loss, n in zip(losses, tokens, strict=True)) / sum(tokens),
        "loss_tokens": sum(tokens),
        "items": items,
    }
    return EvalRecord(**{**values, **fields})
