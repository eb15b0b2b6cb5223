"""MMLU from tiny folders in the authors' format, and from rows as the hub gives them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flylora.errors import UserError
from flylora.lab.tasks import Task, load_task
from flylora.lab.tasks.base import SPLITS

Write = Callable[..., Path]

ROWS = '"How, much?",1,2,3,4,A\nWho?,None,"a ""b""",NA, 007,D\n'


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes one subject's rows into folders of the archive's layout and returns the data folder."""

    def to_disk(rows: str = ROWS, folders: tuple[str, ...] = ("dev", "val", "test"), below: str = "") -> Path:
        for folder in folders:
            inside = tmp_path / below / folder
            inside.mkdir(parents=True, exist_ok=True)
            name = "race.csv" if folder == "auxiliary_train" else f"us_law_{folder}.csv"
            (inside / name).write_text(rows, encoding="utf-8")
        return tmp_path

    return to_disk


def test_rows_become_questions_with_letters(write: Write) -> None:
    first, last = load_task("mmlu", write()).examples("test")
    assert first.id == "test/us law/0"
    assert first.prompt == "Subject: us law\nQuestion: How, much?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    assert (first.completion, first.answer, first.answer_index) == (" A", "A", 0)
    assert first.choices == (" A", " B", " C", " D")
    assert (last.answer_index, last.group) == (3, "us law")
    assert 'A. None\nB. a "b"\nC. NA\nD. 007' in last.prompt


def test_the_paper_variant_generates_the_number_of_the_option(write: Write) -> None:
    task = load_task("mmlu:paper", write())
    first, last = task.examples("test")
    assert (task.name, task.kind, task.max_length, task.max_new_tokens) == ("mmlu:paper", "generate", 128, 128)
    assert (first.completion, first.answer, last.answer) == ("0", "0", "3")
    assert "0: 1\n1: 2\n2: 3\n3: 4\n" in first.prompt
    assert task.score("0", first) == 1.0
    assert task.score("0, not 3", last) == 0.0


def test_validation_is_val_and_dev_and_train_is_the_auxiliary_set(write: Write) -> None:
    task = load_task("mmlu", write(folders=("auxiliary_train", "dev", "val", "test")))
    assert [e.id for e in task.examples("validation")] == [f"{f}/us law/{i}" for f in ("val", "dev") for i in (0, 1)]
    train = task.examples("train")
    assert [(e.id, e.group) for e in train] == [("auxiliary_train/race/0", "race"), ("auxiliary_train/race/1", "race")]
    assert train[0].prompt.startswith("Question: How, much?")
    ids = [e.id for split in SPLITS for e in task.examples(split)]
    assert len(set(ids)) == len(ids) == 8


@pytest.mark.parametrize("below", ["data", "mmlu", "mmlu/data"])
def test_folders_may_lie_a_little_deeper(write: Write, below: str) -> None:
    assert len(load_task("mmlu", write(below=below)).examples("test")) == 2


@pytest.mark.parametrize("name", ["mmlu", "mmlu:paper"])
def test_without_the_auxiliary_set_training_is_refused_in_a_sentence(write: Write, name: str) -> None:
    with pytest.raises(UserError, match=rf"The task '{name}' has no train split.*auxiliary_train"):
        load_task(name, write()).examples("train")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("Who?,1,2,3,A\n", r"Row 1 of .*us_law_test\.csv has 5 columns instead of the 6"),
        (ROWS + "Who?,1,2,3,4,5,A\n", r"Row 3 of .* has 7 columns"),
        (ROWS + "Who?,1,2,3,4,E\n", r"Row 3 of .* has the answer 'E', which is not one of A, B, C, D"),
        ("Who?,1,2,3,4,\n", "has the answer ''"),
        ("Who?,1,2,3,4,0\n", "has the answer '0'"),
        ("Who?,1,,3,4,A\n", "has nothing in choice 2 of 4"),
        (" ,1,2,3,4,A\n", "has nothing in the column 'question'"),
        ("", r"us_law_test\.csv is empty"),
        ('Who?,1,2,3,4,"A', "is not a CSV file"),
    ],
)
def test_malformed_rows_are_refused_in_a_sentence(write: Write, rows: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load_task("mmlu", write(rows)).examples("test")
    assert re.search(r"\.$", str(caught.value))


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no data folder .*nowhere"):
        load_task("mmlu", tmp_path / "nowhere").examples("test")
    with pytest.raises(UserError, match="There is no test or val or dev or auxiliary_train in"):
        load_task("mmlu", tmp_path).examples("test")
    (tmp_path / "test").mkdir()
    with pytest.raises(UserError, match="no CSV files in"):
        load_task("mmlu", tmp_path).examples("test")


HUB_ROW = {"question": "Who?", "subject": "us_law", "choices": ["w", "x", "y", "z"], "answer": 0}


def hub_task(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[Task, list[Any]]:
    import datasets

    asked: list[Any] = []

    def load_dataset(*words: Any, **options: Any) -> datasets.Dataset:
        asked.append((*words, options["split"]))
        return datasets.Dataset.from_list([{**HUB_ROW, **changes}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return load_task("mmlu"), asked


def test_the_hub_gives_the_same_prompts_as_the_files(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    task, asked = hub_task(monkeypatch)
    (example,) = task.examples("test")
    (expected,) = load_task("mmlu", write("Who?,w,x,y,z,A\n")).examples("test")
    assert (example.prompt, example.answer_index, example.group) == (expected.prompt, 0, expected.group)
    assert len(task.examples("validation")) == 2
    assert len(task.examples("train")) == 1
    splits = ("test", "validation", "dev", "auxiliary_train")
    assert asked == [("cais/mmlu", "all", split) for split in splits]


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"answer": 4}, "has the answer 4, which is not one of 0 to 3"), ({"choices": ["a", ""]}, "choice 2 of 2")],
)
def test_malformed_hub_rows_are_refused(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        hub_task(monkeypatch, **changes)[0].examples("test")
