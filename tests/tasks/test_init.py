from __future__ import annotations

import pytest

from flylora.errors import UserError
from flylora.tasks import load_task, task_names


def test_every_built_in_task_loads_by_its_name() -> None:
    assert [load_task(name).name for name in task_names()] == ["capitals", "elements", "arithmetic", "python_output"]


def test_an_unknown_task_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(UserError, match=r"Unknown task 'capital'.*capitals, elements, arithmetic, python_output"):
        load_task("capital")


def test_a_missing_task_file_is_named() -> None:
    with pytest.raises(UserError, match=r"There is no task file nowhere/mine\.yaml"):
        load_task("nowhere/mine.yaml")
