"""Plans: what depends on what, in which order, and how much it is; without a model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flylora.cli import main
from flylora.errors import UserError
from flylora.lab.study import StudyOptions, load_study
from flylora.lab.study.plan import Cell, Sizes, plan, planned, select

Save = Callable[..., Path]


def cells(path: Path) -> dict[str, Cell]:
    return {cell.name: cell for cell in plan(load_study(path))}


def test_each_cell_needs_what_it_uses(save: Save) -> None:
    found = cells(save())
    assert found["base/llama/vowels/eval-vowels"].needs == ()
    assert found["seed0/llama/fly/vowels/train"].needs == ()
    assert found["seed0/llama/fly/vowels/eval-vowels"].needs == ("seed0/llama/fly/vowels/train",)
    merge = found["seed0/llama/fly/merge-average/merge"]
    assert merge.needs == ("seed0/llama/fly/vowels/train", "seed0/llama/fly/others/train")
    evaluation = found["seed0/llama/fly/merge-average/eval-others-others"]
    assert evaluation.needs == (merge.name,)
    assert evaluation.labels == {
        "model": "llama",
        "method": "fly",
        "task": "others",
        "evaluation": "others",
        "merge": "average",
        "seed": 0,
    }
    assert len(found) == 2 + 2 * (2 * 2 + 1 + 2)


def test_base_models_once_then_the_search_then_seed_after_seed(save: Save) -> None:
    search = {"task": "vowels", "rates": [0.1, 0.2], "steps": 3}
    names = list(cells(save(seeds=[3, 1], lr_search=search)))
    parts = [name.split("/")[0] for name in names]
    assert list(dict.fromkeys(parts)) == ["base", "lr", "seed3", "seed1"]
    assert parts.count("base") == 2


def test_a_searched_learning_rate_comes_from_its_cell(save: Save) -> None:
    search = {"task": "vowels", "rates": [0.1, 0.2], "steps": 3, "limit": 4, "methods": {"fly": [0.3, 0.4]}}
    found = cells(save(lr_search=search))
    choice = found["lr/llama/fly/choice"]
    assert choice.needs == ("lr/llama/fly/0.3/validation", "lr/llama/fly/0.4/validation")
    evaluation = found["lr/llama/fly/0.4/validation"]
    assert evaluation.needs == ("lr/llama/fly/0.4",)
    assert {key: evaluation.config[key] for key in ("split", "limit", "loss_only")} == {
        "split": "validation",
        "limit": 4,
        "loss_only": True,
    }
    trial = found["lr/llama/fly/0.4"].config
    assert (trial["lr"], trial["steps"], trial["eval_steps"], trial["eval_limit"]) == (0.4, 3, 3, 4)
    assert found["seed0/llama/fly/others/train"].needs == (choice.name,)
    assert found["seed0/llama/lora/others/train"].needs == ()  # it has a rate of its own
    assert not any(name.startswith("lr/llama/lora") for name in found)
    drawing = cells(save(lr_search=search, evaluation={"samples": 5, "temperature": 0.8}))
    evaluation = drawing["lr/llama/fly/0.4/validation"]
    assert (evaluation.config["samples"], evaluation.config["temperature"]) == (1, 0.0)


def test_merges_of_some_methods_only(save: Save) -> None:
    found = cells(save(merges={"average": {"method": "average", "methods": ["fly"]}}))
    assert {cell.method for cell in found.values() if cell.merge} == {"fly"}


def test_merges_may_be_evaluated_otherwise_than_adapters(save: Save) -> None:
    merges = {"average": {"method": "average", "evaluation": {"loss_only": True, "limit": 2}}}
    study, found = planned(StudyOptions(str(save(merges=merges))))
    configs = {cell.name: cell.config for cell in found if cell.kind == "eval"}
    single, merged = (
        configs[f"seed0/llama/fly/{place}-vowels"] for place in ("vowels/eval", "merge-average/eval-vowels")
    )
    assert (single["loss_only"], single["limit"]) == (False, 3)
    assert (merged["loss_only"], merged["limit"]) == (True, 2)
    tokens = Sizes(study, {}).of(found)
    assert tokens["seed0/llama/fly/merge-average/eval-vowels-vowels"].tokens == 2 * 64  # nothing is generated
    _, found = planned(StudyOptions(str(save(merges=merges)), eval_limit=1))
    assert {cell.config["limit"] for cell in found if cell.kind == "eval"} == {1}


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


def test_tokens_and_time(save: Save, content: dict[str, Any]) -> None:
    models = {"llama": {**content["models"]["llama"], "parameters": 1e6, "throughput": 1e9}}
    tasks = {
        "vowels": {"train": "vowels.yaml", "tokens": 10},
        "others": {"train": "mmlu:paper", "items": {"train": 50, "mmlu": 7}, "settings": {"epochs": 3, "steps": None}},
    }
    study, found = planned(StudyOptions(str(save(models=models, tasks=tasks))))
    sizes = Sizes(study, {}).of(found)
    training = sizes["seed0/llama/lora/vowels/train"]
    assert training.tokens == 2 * 2 * 10  # steps, items a step, tokens an item
    assert training.operations == 4 * 1e6 * 40
    assert training.seconds == pytest.approx(0.16)
    assert sizes["seed0/llama/lora/others/train"].tokens == 3 * 50 * 128  # all items; as long as they may be
    evaluation = sizes["seed0/llama/lora/vowels/eval-vowels"]
    assert evaluation.tokens == 3 * (10 + 2)  # the limit; two tokens are generated
    assert evaluation.operations == 2 * 1e6 * 36
    assert sizes["base/llama/others/eval-mmlu"].tokens == 3 * (128 + 128)


def test_the_pace_of_finished_cells_is_used(save: Save) -> None:
    study, found = planned(StudyOptions(str(save(seeds=[0, 1], lr_search=None))))
    sizes = Sizes(study, {"seed0/llama/fly/vowels/train": 50.0}).of(found)
    assert sizes["seed0/llama/fly/vowels/train"].seconds == 50.0
    other = sizes["seed1/llama/fly/vowels/train"]
    assert (other.seconds, other.measured) == (50.0, True)
    assert sizes["seed1/llama/lora/vowels/train"].seconds is None  # no throughput is stated


def test_a_plan_needs_no_model_and_loads_nothing_heavy(save: Save, content: dict[str, Any]) -> None:
    models = {"absent": {"name": "no/such-model", "parameters": 1e9, "throughput": 1e12}}
    path = save(models=models)
    code = (
        "import sys\nfrom flylora.cli import main\ncode = main(sys.argv[1:])\n"
        "heavy = [m for m in ('torch', 'transformers', 'peft', 'trl') if m in sys.modules]\nprint(code, heavy)"
    )
    words = ["study", str(path), "--plan", "--out", str(path.parent / "run")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "0 []"
    assert [line.split()[0] for line in lines[:16]] == [cell.name for cell in plan(load_study(path))]
    assert "16 cells, 0 done" in done.stdout
    assert "1e+09 parameters at 1e+12" in done.stdout
    assert not (path.parent / "run").exists()


def test_a_plan_without_a_throughput_guesses_no_time(save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(save(merges={})), "--plan"]) == 0
    shown = capsys.readouterr().out
    assert "how long that takes is not known" in shown
    assert "does not state its parameters and throughput" in shown


def test_a_plan_says_what_is_done(save: Save, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(save()), "--plan", "--out", str(finished), "--seeds", "0", "1"]) == 0
    shown = capsys.readouterr().out
    assert "30 cells, 16 done" in shown
    assert shown.count("  done\n") == 16
    assert "no tokens" in shown  # a merge that reads no text
