from __future__ import annotations

import pytest

from flylora.errors import UserError
from flylora.lab.tasks import describe_tasks, load_task, published_task_names, task_names


def test_every_built_in_task_loads_by_its_name() -> None:
    assert [load_task(name).name for name in task_names()] == ["capitals", "elements", "arithmetic", "python_output"]


def test_every_published_task_has_two_variants_and_reads_nothing_until_asked() -> None:
    names = ["mmlu", "scienceqa", "gsm8k", "codealpaca", "humaneval"]
    assert published_task_names() == [name for task in names for name in (task, f"{task}:paper")]
    assert [load_task(name, "/no/such/folder").name for name in published_task_names()] == published_task_names()


@pytest.mark.parametrize("name", ["mmlu:papers", "mmlu:"])
def test_an_unknown_variant_is_refused_with_those_that_exist(name: str) -> None:
    with pytest.raises(UserError, match=r"The task mmlu has no variant .*: give mmlu or mmlu:paper\."):
        load_task(name)


def test_an_unknown_task_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(UserError, match=r"Unknown task 'capital'.*did you mean 'capitals'\?"):
        load_task("capital")
    with pytest.raises(UserError, match=r"Unknown task 'x'.*capitals, elements, arithmetic, python_output, mmlu"):
        load_task("x")


def test_every_built_in_task_is_described_in_a_few_words() -> None:
    described = describe_tasks()
    assert list(described) == [*task_names(), *published_task_names()]
    assert all(0 < len(words) <= 62 and "\n" not in words for words in described.values())


def test_a_missing_task_file_is_named() -> None:
    with pytest.raises(UserError, match=r"There is no task file nowhere/mine\.yaml"):
        load_task("nowhere/mine.yaml")
