"""GSM8K from tiny files in the authors' format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flylora.errors import UserError
from flylora.lab.tasks import load_task

Write = Callable[..., Path]


def row(number: int, **changes: Any) -> dict[str, Any]:
    worked = f"{number} + 1 = <<{number}+1={number + 1}>>{number + 1}\n#### {number + 1:,}"
    return {"question": f"{number} and 1?", "answer": worked, **changes}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_disk(rows: list[dict[str, Any]] | None = None) -> Path:
        for split, written in (("train", rows or [row(n) for n in range(40)]), ("test", rows or [row(5000), row(0)])):
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in written))
        return tmp_path

    return to_disk


def test_the_answer_is_the_number_after_the_mark(write: Write) -> None:
    task = load_task("gsm8k", write())
    first, last = task.examples("test")
    assert first.prompt == "Question: 5000 and 1?\nAnswer:"
    assert first.completion == " 5000 + 1 = <<5000+1=5001>>5001\n#### 5,001"
    assert (first.answer, last.answer) == ("5001", "1")
    assert task.score(first.completion, first) == 1.0


def test_strict_and_flexible_readings_differ(write: Write) -> None:
    for name in ("gsm8k", "gsm8k:paper"):
        task = load_task(name, write())
        (example, _) = task.examples("test")
        assert task.score("It is 5,001.", example) == 0.0
        assert task.score("It is 5,001.", example, "last_number") == 1.0
        assert task.also_extractors == ("last_number",)


def test_validation_is_held_out_of_train(write: Write) -> None:
    task = load_task("gsm8k", write())
    train, validation = task.examples("train"), task.examples("validation")
    assert (len(train), len(validation)) == (38, 2)
    assert not {e.prompt for e in train} & {e.prompt for e in validation}


def test_the_paper_variant_trains_on_everything(write: Write) -> None:
    task = load_task("gsm8k:paper", write())
    assert len(task.examples("train")) == 40
    assert task.examples("test")[0].prompt == "### Instruction:\n5000 and 1?\n\n### Response:\n"
    assert task.max_length == 512
    with pytest.raises(UserError, match="'gsm8k:paper' has no validation split"):
        task.examples("validation")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"answer": "It is 3."}, r"Row 2 of .*test\.jsonl: strict_number finds no gold answer"),
        ({"answer": None}, "no text in the column 'answer'"),
        ({"question": " "}, "nothing in the column 'question'"),
        ({"question": 3}, "no text in the column 'question'"),
    ],
)
def test_malformed_rows_are_refused_in_a_sentence(write: Write, bad: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_task("gsm8k", write([row(1), row(2, **bad)])).examples("test")


def test_a_missing_column_is_named(write: Write) -> None:
    with pytest.raises(UserError, match=r"no text in the column 'answer' \(it has question\)"):
        load_task("gsm8k", write([{"question": "1?"}])).examples("test")


def test_the_hub_is_asked_by_its_usual_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(*words: Any, **options: Any) -> datasets.Dataset:
        asked.append((*words, options["split"]))
        return datasets.Dataset.from_list([row(1)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_task("gsm8k").examples("test")[0].answer == "2"
    assert asked == [("openai/gsm8k", "main", "test")]
