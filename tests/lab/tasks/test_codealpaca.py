"""CodeAlpaca from tiny files in the authors' format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flylora.errors import UserError
from flylora.lab.tasks import load_task
from flylora.lab.tasks.base import SPLITS

ROWS: list[dict[str, Any]] = [
    {"instruction": f"Print {i}.", "input": "in C" if i % 2 else "", "output": f"print({i})\n"} for i in range(40)
]

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_disk(rows: Any = ROWS, name: str = "code_alpaca_20k.json") -> Path:
        (tmp_path / name).write_text(json.dumps(rows))
        return tmp_path

    return to_disk


def test_instructions_with_and_without_input(write: Write) -> None:
    task = load_task("codealpaca:paper", write())
    first, second = task.examples("train")[:2]
    assert (task.kind, task.max_length) == ("loss", 512)
    assert first.prompt == "### Instruction:\nPrint 0.\n\n### Response:\n"
    assert second.prompt == "### Instruction:\nPrint 1.\n\n### Input:\nin C\n\n### Response:\n"
    assert second.completion == "print(1)\n"


def test_the_default_holds_prompts_out_and_the_paper_variant_none(write: Write) -> None:
    task = load_task("codealpaca", write(name="code_alpaca_2k.json"))
    assert [len(task.examples(split)) for split in SPLITS] == [34, 2, 4]
    prompts = [{e.prompt for e in task.examples(split)} for split in SPLITS]
    assert len(set.union(*prompts)) == 40
    paper = load_task("codealpaca:paper", write())
    assert len(paper.examples("train")) == 40
    with pytest.raises(UserError, match=r"'codealpaca:paper' has no test split.*humaneval:paper"):
        paper.examples("test")


def test_rows_without_an_output_are_left_out_with_a_warning(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    task = load_task("codealpaca:paper", write([{**ROWS[0], "output": " \n"}, *ROWS[1:]]))
    assert len(task.examples("train")) == 39
    assert task.examples("train")[0].id == "train-1"
    assert "1 of 40 rows" in caplog.text


@pytest.mark.parametrize("column", ["instruction", "input", "output"])
def test_a_missing_column_is_refused_in_a_sentence(write: Write, column: str) -> None:
    bad = {key: value for key, value in ROWS[1].items() if key != column}
    with pytest.raises(UserError, match=rf"Row 2 of .*code_alpaca_20k\.json has no text in the column '{column}'"):
        load_task("codealpaca", write([ROWS[0], bad, *ROWS[2:]])).examples("train")


def test_an_empty_instruction_and_a_missing_file_are_refused(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no code_alpaca_20k\.json or"):
        load_task("codealpaca", tmp_path).examples("train")
    with pytest.raises(UserError, match="nothing in the column 'instruction'"):
        load_task("codealpaca", write([{**ROWS[0], "instruction": ""}])).examples("train")
