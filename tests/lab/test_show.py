"""Figures as a reader sees them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from flylora.lab.evaluation.record import EvalRecord
from flylora.lab.show import number, percent, show_evaluation
from flylora.records import provenance


@pytest.mark.parametrize(
    ("share", "error", "shown"),
    [(None, None, "–"), (0.0, None, "0.0 %"), (0.8125, 0.017, "81.2 ± 1.7 %"), (1.0, 0.0, "100.0 ± 0.0 %")],
)
def test_percent(share: float | None, error: float | None, shown: str) -> None:
    assert percent(share, error) == shown


def test_number() -> None:
    assert (number(None), number(0.0), number(1.23456)) == ("–", "0.000", "1.235")


def record(**changes: Any) -> EvalRecord:
    made = EvalRecord(
        status="complete",
        provenance=provenance(seeds={}, data_sha256={}, model_sha256="ab"),
        config={"model": "m", "adapter": None, "out": None},
        task={"name": "letters"},
        split="test",
        dtype="float32",
        adapter_fingerprint=None,
        adapter_active=None,
        items_scored=4,
        accuracy=0.0,
        accuracy_stderr=0.0,
        loss=1.5,
        loss_tokens=12,
    )
    return dataclasses.replace(made, **changes)


def test_an_accuracy_of_zero_is_shown_and_none_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    show_evaluation(record())
    assert "0.0 ± 0.0 %" in capsys.readouterr().out
    show_evaluation(record(accuracy=None, accuracy_stderr=None))
    shown = capsys.readouterr().out
    assert "accuracy" not in shown
    assert "1.500 over 12 tokens" in shown


def test_readings_groups_and_notes_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    groups = {"[easy]": {"accuracy": 0.5, "items": 2}}
    show_evaluation(record(accuracies={"strict": 0.25, "loose": 0.75}, groups=groups, notes=["Beware [of] this."]))
    shown = capsys.readouterr().out
    for words in ("accuracy by strict", "25.0 %", "75.0 %", "accuracy on [easy]", "50.0 % of 2", "Beware [of] this."):
        assert words in shown


def test_pass_at_k_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    task = {"name": "humaneval", "kind": "code"}
    show_evaluation(record(task=task, accuracy=0.25, accuracies={"pass@1": 0.25, "pass@5": 0.75}))
    shown = capsys.readouterr().out
    for words in ("pass@1", "25.0 %", "pass@5", "75.0 %"):
        assert words in shown
    assert "accuracy by" not in shown
