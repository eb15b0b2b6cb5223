"""What an evaluation config accepts."""

from __future__ import annotations

from typing import Any

import pytest

from flylora.errors import UserError
from flylora.lab.evaluation import EvalConfig


@pytest.mark.parametrize("name", ["limit", "batch_size", "max_new_tokens", "samples"])
def test_counts_must_be_positive(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} must be at least 1, not 0"):
        EvalConfig(model="m", task="t", **{name: 0})  # type: ignore[arg-type]
    assert getattr(EvalConfig(model="m", task="t", **{name: 1}), name) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, r"No task is given: name one with --task, or .* with --lm-eval\."),
        ({"task": "t", "lm_eval": "u"}, "Both task and lm_eval are given"),
        ({"lm_eval": "u", "loss_only": True}, "loss_only is for tasks of ours"),
        ({"task": "t", "temperature": -0.1}, "temperature must be at least 0, not -0.1"),
        ({"task": "t", "temperature": float("nan")}, "temperature must be a finite number"),
        ({"task": "t", "samples": 5}, "5 samples would all be the same at temperature 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        EvalConfig(model="m", **settings)


def test_samples_need_a_temperature() -> None:
    assert EvalConfig(model="m", task="t", samples=5, temperature=0.8).samples == 5
