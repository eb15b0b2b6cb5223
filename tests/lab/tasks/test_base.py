from __future__ import annotations

import dataclasses

import pytest

from flylora.errors import UserError
from flylora.lab.tasks.base import REGEX, Example, Split, Task


def _load(split: Split) -> list[Example]:
    sizes = {"train": 50, "validation": 0, "test": 5}
    return [Example(f"{split}-{i}", f"{i}?", f" {i}", str(i)) for i in range(sizes[split])]


@pytest.fixture
def task() -> Task:
    return Task(name="numbers", version="1", load=_load, kind="generate", max_length=8, max_new_tokens=4)


def test_a_limit_draws_a_sample_in_order_and_always_the_same(task: Task) -> None:
    whole, drawn = task.examples("train"), task.examples("train", 10)
    assert whole == _load("train")
    assert len(drawn) == 10
    assert drawn == [example for example in whole if example in drawn]
    assert drawn != whole[:10]
    assert drawn == task.examples("train", 10)
    assert drawn != dataclasses.replace(task, version="2").examples("train", 10)


def test_a_limit_above_the_size_gives_everything(task: Task) -> None:
    assert task.examples("test", 99) == task.examples("test")


@pytest.mark.parametrize(
    ("split", "limit", "message"),
    [("dev", None, "Unknown split 'dev'"), ("validation", None, "no validation examples"), ("test", 0, "at least 1")],
)
def test_splits_and_limits_that_make_no_sense_are_refused(
    task: Task, split: Split, limit: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        task.examples(split, limit)


def test_the_hash_covers_every_field_and_the_order(task: Task) -> None:
    def hashed(examples: list[Example]) -> str:
        return dataclasses.replace(task, load=lambda split: examples).data_hash("test")

    examples = _load("test")
    changed: dict[str, object] = {
        "id": "x", "prompt": "x", "completion": "x", "answer": "x", "choices": ("x",), "answer_index": 0, "group": "x",
    }  # fmt: skip
    assert set(changed) == {field.name for field in dataclasses.fields(Example)}
    others = [
        [dataclasses.replace(examples[0], **{name: value}), *examples[1:]]  # type: ignore[arg-type]
        for name, value in changed.items()
    ]
    hashes = {hashed(found) for found in (examples, examples[::-1], *others)}
    assert len(hashes) == 2 + len(others)
    assert task.data_hash("test") == hashed(list(examples))


def test_output_is_cut_at_the_first_stop_before_it_is_read(task: Task) -> None:
    stopping = dataclasses.replace(task, stop=("\nQuestion:", "\n\n"), extractor="last_number")
    assert stopping.extract(" 3 + 4 = 7\n\nQuestion: 5?\nQuestion: 6") == "7"
    assert stopping.extract(" 3 + 4 = 7\nQuestion: 5?\n\n8") == "7"
    assert stopping.extract(" 3 + 4 = 7") == "7"


def test_score_applies_extractor_and_metric(task: Task) -> None:
    example = _load("test")[3]
    marked = dataclasses.replace(
        task, extractor="strict_number", also_extractors=("last_number",), metric="numeric_match"
    )
    assert marked.score("#### 3.0", example) == 1.0
    assert marked.score("it is 3", example) == 0.0
    assert marked.score("it is 3", example, "last_number") == 1.0


def test_a_task_can_read_answers_by_its_own_pattern(task: Task) -> None:
    own = dataclasses.replace(task, extractor=REGEX, pattern=r"= (\d)")
    assert own.extract("1 = 1; 2 = 2") == "2"
    assert own.extract("none") is None
