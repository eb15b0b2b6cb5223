"""Plans: what depends on what, in which order, and how much it is; without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flylora.errors import UserError
from flylora.lab.study import StudyOptions, load_study
from flylora.lab.study.plan import Cell, plan, select
from flylora.lab.study.study_file import planned
from flylora.lab.study.workload import plan_study

Save = Callable[..., Path]


def cells(path: Path) -> dict[str, Cell]:
    return {cell.name: cell for cell in plan(load_study(path))}


def test_each_cell_needs_what_it_uses(save: Save) -> None:
    by_name = cells(save())
    assert by_name["base/llama/vowels/eval-vowels"].needs == ()
    assert by_name["seed0/llama/fly/vowels/train"].needs == ()
    assert by_name["seed0/llama/fly/vowels/eval-vowels"].needs == ("seed0/llama/fly/vowels/train",)
    merge = by_name["seed0/llama/fly/merge-average/merge"]
    assert merge.needs == ("seed0/llama/fly/vowels/train", "seed0/llama/fly/others/train")
    evaluation = by_name["seed0/llama/fly/merge-average/eval-others-others"]
    assert evaluation.needs == (merge.name,)
    assert evaluation.labels == {
        "model": "llama",
        "method": "fly",
        "task": "others",
        "evaluation": "others",
        "merge": "average",
        "seed": 0,
    }
    assert len(by_name) == 2 + 2 * (2 * 2 + 1 + 2)


def test_base_models_once_then_the_search_then_seed_after_seed(save: Save) -> None:
    search = {"task": "vowels", "rates": [0.1, 0.2], "steps": 3}
    names = list(cells(save(seeds=[3, 1], lr_search=search)))
    parts = [name.split("/")[0] for name in names]
    assert list(dict.fromkeys(parts)) == ["base", "lr", "seed3", "seed1"]
    assert parts.count("base") == 2


def test_a_searched_learning_rate_comes_from_its_cell(save: Save) -> None:
    search = {"task": "vowels", "rates": [0.1, 0.2], "steps": 3, "limit": 4, "methods": {"fly": [0.3, 0.4]}}
    by_name = cells(save(lr_search=search))
    choice = by_name["lr/llama/fly/choice"]
    assert choice.needs == ("lr/llama/fly/0.3/validation", "lr/llama/fly/0.4/validation")
    evaluation = by_name["lr/llama/fly/0.4/validation"]
    assert evaluation.needs == ("lr/llama/fly/0.4",)
    assert {key: evaluation.config[key] for key in ("split", "limit", "loss_only")} == {
        "split": "validation",
        "limit": 4,
        "loss_only": True,
    }
    trial = by_name["lr/llama/fly/0.4"].config
    assert (trial["lr"], trial["steps"], trial["eval_steps"], trial["eval_limit"]) == (0.4, 3, 3, 4)
    assert by_name["seed0/llama/fly/others/train"].needs == (choice.name,)
    assert by_name["seed0/llama/lora/others/train"].needs == ()  # it has a rate of its own
    assert not any(name.startswith("lr/llama/lora") for name in by_name)
    drawing = cells(save(lr_search=search, evaluation={"samples": 5, "temperature": 0.8}))
    evaluation = drawing["lr/llama/fly/0.4/validation"]
    assert (evaluation.config["samples"], evaluation.config["temperature"]) == (1, 0.0)


def test_merges_of_some_methods_only(save: Save) -> None:
    by_name = cells(save(merges={"average": {"method": "average", "methods": ["fly"]}}))
    assert {cell.method for cell in by_name.values() if cell.merge} == {"fly"}


def test_merges_may_be_evaluated_otherwise_than_adapters(save: Save) -> None:
    merges = {"average": {"method": "average", "evaluation": {"loss_only": True, "limit": 2}}}
    options = StudyOptions(str(save(merges=merges)))
    _, every = planned(options)
    configs = {cell.name: cell.config for cell in every if cell.kind == "eval"}
    single, merged = (
        configs[f"seed0/llama/fly/{part}-vowels"] for part in ("vowels/eval", "merge-average/eval-vowels")
    )
    assert (single["loss_only"], single["limit"]) == (False, 3)
    assert (merged["loss_only"], merged["limit"]) == (True, 2)
    tokens = plan_study(options).amounts.tokens
    assert tokens["seed0/llama/fly/merge-average/eval-vowels-vowels"] == 2 * 64  # nothing is generated
    _, every = planned(StudyOptions(str(save(merges=merges)), eval_limit=1))
    assert {cell.config["limit"] for cell in every if cell.kind == "eval"} == {1}


def test_a_selection_brings_what_it_needs(save: Save) -> None:
    every = plan(load_study(save()))
    chosen = [cell.name for cell in select(every, "*fly*merge-average/eval-vowels-*")]
    assert chosen == [
        "seed0/llama/fly/vowels/train",
        "seed0/llama/fly/others/train",
        "seed0/llama/fly/merge-average/merge",
        "seed0/llama/fly/merge-average/eval-vowels-vowels",
    ]
    with pytest.raises(UserError, match="No cell matches 'nothing'"):
        select(every, "nothing")
