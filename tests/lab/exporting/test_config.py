"""The options of `flylora export`."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest

from flylora.cli import COMMANDS, EXIT_USER_ERROR
from flylora.errors import UserError
from flylora.lab.exporting.config import ExportConfig
from flylora_cli import main


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"texts": 0}, "texts must be at least 1"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"gap_texts": -1}, "gap_texts must be at least 1"),
        ({"ridge": -0.1}, "ridge must be at least 0, not -0.1"),
        ({"ridge": float("nan")}, "ridge must be a finite number, not NaN"),
        ({"shard_gb": 0.0}, "shard_gb must be above 0, not 0.0"),
        ({"moments_gb": float("inf")}, "moments_gb must be a finite number"),
        ({"to": "full", "rank": 3}, "leave it out, or export to lora"),
        ({"save_dtype": "bfloat16"}, "save_dtype is for full models"),
    ],
)
def test_values_that_cannot_be_meant(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        ExportConfig(**{"adapter": "a", "to": "lora", "out": "b", **changes})


def test_the_command_line_takes_lists_of_texts_and_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ExportConfig] = []
    command = COMMANDS["export"]

    @functools.wraps(command.call)
    def instead(**given: Any) -> None:
        made.append(ExportConfig(**given))

    monkeypatch.setitem(COMMANDS, "export", dataclasses.replace(command, call=instead, show=lambda result: None))
    words = ["--to", "lora", "--out", "b", "--calibrate", "x.txt", "y", "--evaluate", "z", "--gap-texts", "9"]
    assert main(["export", "a", *words]) == 0
    expected = ExportConfig(adapter="a", to="lora", out="b", calibrate=["x.txt", "y"], evaluate=["z"], gap_texts=9)
    assert made == [expected]


def test_an_error_is_one_line_and_exit_code_2(routed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(routed), "--to", "full", "--out", str(tmp_path / "out")]) == EXIT_USER_ERROR
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_what_is_shown(linear: Path, tmp_path: Path, prose: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--calibrate", str(prose), "--out", str(tmp_path / "out"), "--dtype", "float32"]
    assert main(["export", str(linear), "--to", "lora", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "exact" in shown
    assert "KL to the adapter" in shown
