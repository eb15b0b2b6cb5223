"""How much there is to do: tokens, time at the pace of what is done, and groups that fit a page; without a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flylora.errors import UserError
from flylora.lab.study import StudyOptions
from flylora.lab.study.run import run_study
from flylora.lab.study.workload import plan_study
from flylora.lab.tasks import Task

Save = Callable[..., Path]


def test_tokens(save: Save) -> None:
    tasks = {
        "vowels": {"train": "vowels.yaml", "tokens": 10},
        "others": {"train": "mmlu:paper", "items": {"train": 50, "mmlu": 7}, "settings": {"epochs": 3, "steps": None}},
    }
    tokens = plan_study(StudyOptions(str(save(tasks=tasks)))).amounts.tokens
    assert tokens["seed0/llama/lora/vowels/train"] == 2 * 2 * 10  # steps, items a step, tokens an item
    assert tokens["seed0/llama/lora/others/train"] == 3 * 50 * 128  # all items; as long as they may be
    assert tokens["seed0/llama/lora/vowels/eval-vowels"] == 3 * (10 + 2)  # the limit; two tokens are generated
    assert tokens["base/llama/others/eval-mmlu"] == 3 * (128 + 128)


def test_the_pace_of_finished_cells_is_used(save: Save, put: Callable[..., None], tmp_path: Path) -> None:
    put("seed0/llama/fly/vowels/train")
    plan = plan_study(StudyOptions(str(save(seeds=[0, 1])), out=str(tmp_path / "run")))
    seconds = plan.amounts.seconds
    assert seconds["seed0/llama/fly/vowels/train"] == 1800.0
    assert seconds["seed1/llama/fly/vowels/train"] == 1800.0
    assert math.isnan(seconds["seed1/llama/lora/vowels/train"])  # no cell like it is done
    assert seconds["seed1/llama/fly/merge-average/merge"] == 0.0  # it reads no text


def test_a_plan_sets_off_no_download(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code.yaml").write_text("same_as: codealpaca\n")  # its data would come from the hub
    monkeypatch.setattr(Task, "examples", lambda *_: pytest.fail("data were read"))
    path = save(tasks={"code": {"train": "code.yaml"}, "choice": {"train": "mmlu:paper"}}, merges={})
    tokens = plan_study(StudyOptions(str(path))).amounts.tokens
    assert tokens["seed0/llama/fly/code/train"] > 0
    assert tokens["seed0/llama/fly/code/eval-code"] > 0


def test_a_plan_needs_no_model_and_runs_nothing(save: Save) -> None:
    options = StudyOptions(str(save(models={"absent": {"name": "no/such-model"}})), plan=True)
    plan = plan_study(options)
    assert (len(plan.cells), len(plan.left)) == (16, 16)
    assert not plan.folder.exists()
    with pytest.raises(UserError, match="call plan_study"):
        run_study(options)
    assert not plan.folder.exists()


def test_cells_are_grouped_by_step_method_and_task(save: Save, finished: Path) -> None:
    groups = plan_study(StudyOptions(str(save()), out=str(finished), seeds=[0, 1])).groups()
    rows = {(row["step"], row["method"], row["task"]): row for row in groups.to_dict("records")}
    assert len(rows) == 2 + 2 * (2 + 2 + 1 + 1)
    assert groups.cells.sum() == 30
    assert groups.done.sum() == 16
    training = rows["train", "fly", "vowels"]
    assert (training["cells"], training["done"], training["failed"]) == (2, 1, 0)
    assert training["tokens"] == 2 * 2 * 64
    assert training["seconds"] > 0
    assert rows["merge", "lora", "average"]["tokens"] == 0
    assert rows["evaluate base", "", "others"]["done"] == 1


def test_failed_cells_are_counted(save: Save, content: dict[str, Any]) -> None:
    methods = {"lora": {"method": "lora", "adapter": {"r": 2, "target_modules": ["nothing"]}}}
    path = save(methods=methods)
    run_study(StudyOptions(str(path), out=str(path.parent / "run"), only="seed0/*/vowels/train"))
    groups = plan_study(StudyOptions(str(path), out=str(path.parent / "run"))).groups()
    (row,) = (row for row in groups.to_dict("records") if row["failed"])
    assert (row["step"], row["task"], row["cells"], row["done"]) == ("train", "vowels", 1, 0)


def test_many_groups_are_put_together(save: Save, content: dict[str, Any]) -> None:
    path = save(methods={f"lora{n}": content["methods"]["lora"] for n in range(8)}, baseline=None)
    groups = plan_study(StudyOptions(str(path))).groups()
    assert "task" not in groups
    assert groups.cells.sum() == 2 + 8 * 7
