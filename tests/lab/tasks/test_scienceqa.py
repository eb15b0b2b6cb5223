"""ScienceQA from tiny files in the authors' format, and from rows as the hub gives them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flylora.errors import UserError
from flylora.lab.tasks import load_task

Write = Callable[..., Path]

PROBLEM = {
    "question": "Which is a solid?",
    "choices": ["ice", "rain"],
    "answer": 0,
    "hint": "",
    "image": None,
    "task": "closed choice",
    "grade": "grade2",
    "subject": "natural science",
    "topic": "physics",
    "category": "Materials",
    "skill": "Identify solids",
    "lecture": "",
    "solution": "",
    "split": "train",
}
PICTURED = {**PROBLEM, "question": "What is shown?", "hint": "Look.", "image": "image.png", "answer": 1}
PROBLEMS: dict[str, Any] = {"1": PROBLEM, "2": PICTURED, "3": {**PROBLEM, "choices": ["a", "b", "c"], "answer": 2}}
SPLITS: dict[str, Any] = {"train": ["1", "2"], "val": [], "test": ["3"], "minitest": ["3"], "trainval": ["1", "2"]}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_disk(problems: Any = PROBLEMS, splits: Any = SPLITS) -> Path:
        for name, body in (("problems", problems), ("pid_splits", splits)):
            (tmp_path / f"{name}.json").write_text(body if isinstance(body, str) else json.dumps(body))
        return tmp_path

    return to_disk


def test_questions_without_an_image_are_answered_by_letter(write: Write) -> None:
    task = load_task("scienceqa", write())
    (only,) = task.examples("train")
    assert only.id == "1"
    assert only.prompt == "Question: Which is a solid?\nA. ice\nB. rain\nAnswer:"
    assert (only.completion, only.answer, only.answer_index, only.group) == (" A", "A", 0, "natural science")
    (test,) = task.examples("test")
    assert (test.choices, test.answer_index) == ((" A", " B", " C"), 2)


def test_the_paper_variant_keeps_all_questions_and_generates_a_number(write: Write) -> None:
    task = load_task("scienceqa:paper", write())
    first, pictured = task.examples("train")
    assert (task.kind, task.max_length) == ("generate", 256)
    assert (first.completion, first.answer) == ("0", "0")
    assert task.score("0", first) == 1.0
    assert "### Input:\nLook.\nWhat is shown?\n0: ice\n1: rain\n\n" in pictured.prompt
    assert pictured.answer == "1"


def test_a_split_without_questions_is_refused(write: Write) -> None:
    with pytest.raises(UserError, match="no validation examples"):
        load_task("scienceqa", write()).examples("validation")


def changed(**changes: Any) -> dict[str, Any]:
    return {**PROBLEMS, "1": {key: value for key, value in {**PROBLEM, **changes}.items() if value != "left out"}}


@pytest.mark.parametrize(
    ("problems", "said"),
    [
        (changed(question="left out"), "Question 1 of .*no text in the column 'question'"),
        (changed(choices="left out"), "does not have at least two choices"),
        (changed(choices=["ice"]), "does not have at least two choices"),
        (changed(choices=["ice", ""]), "has nothing in choice 2 of 2"),
        (changed(answer="left out"), "has the answer None, which is not one of 0 to 1"),
        (changed(answer=2), "has the answer 2"),
        (changed(answer=-1), "has the answer -1"),
        (changed(answer="A"), "has the answer 'A'"),
        (changed(answer=True), "has the answer True"),
        ({"3": PROBLEM}, "names the question '1', which .*problems.json lacks"),
        ('{"1": {}, "1": {}}', "The id '1' occurs twice in .*problems.json"),
        ("{", "Could not read .*problems.json as JSON"),
        ([PROBLEM], "is not a JSON object"),
    ],
)
def test_malformed_problems_are_refused_in_a_sentence(write: Write, problems: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_task("scienceqa", write(problems)).examples("train")


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        ({**SPLITS, "test": ["3", "1"]}, "The id '1' occurs twice in .*pid_splits.json"),
        ({**SPLITS, "train": ["1", "1"]}, "The id '1' occurs twice"),
        ({"train": ["1"], "test": []}, "names no 'val' questions"),
    ],
)
def test_malformed_splits_are_refused_in_a_sentence(write: Write, splits: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_task("scienceqa", write(splits=splits)).examples("train")


def test_both_files_are_needed(write: Write) -> None:
    folder = write()
    (folder / "pid_splits.json").unlink()
    with pytest.raises(UserError, match=r"There is no pid_splits\.json"):
        load_task("scienceqa", folder).examples("test")


def test_the_hubs_images_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    columns = ("question", "choices", "answer", "hint", "image", "subject")
    features = datasets.Features(
        {
            **dict.fromkeys(("question", "hint", "subject"), datasets.Value("string")),
            "choices": datasets.List(datasets.Value("string")),
            "answer": datasets.Value("int8"),
            "image": datasets.Image(decode=False),
        }
    )
    rows = [
        {c: p[c] for c in columns} for p in (PROBLEM, {**PICTURED, "image": {"bytes": b"not an image", "path": None}})
    ]
    data = datasets.Dataset.from_list(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data.cast_column("image", datasets.Image()))
    assert [e.id for e in load_task("scienceqa").examples("validation")] == ["validation-0"]
    assert [e.answer for e in load_task("scienceqa:paper").examples("test")] == ["0", "1"]
