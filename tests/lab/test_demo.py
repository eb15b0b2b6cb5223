"""The demonstration, on a tiny model and two tasks."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from flylora.lab import demo
from flylora.lab.demo import STEPS, Demo, Row
from flylora.lab.evaluation.record import EvalRecord
from flylora.lab.tasks import arithmetic, python_output, task_names
from flylora.records import adapter_fingerprint, read_record

TASKS = {"python_output": 2, "arithmetic": 2}


@pytest.fixture
def make(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Demo:
    for module in (arithmetic, python_output):  # the tiny model's tokens are bytes, so items are long
        monkeypatch.setattr(module, "TASK", dataclasses.replace(module.TASK, max_length=300))
    monkeypatch.setattr(demo, "CALIBRATION_TEXTS", 4)
    console = Console(file=io.StringIO(), width=200)
    return Demo(tmp_path / "demo", str(tiny_model_dir), dict(TASKS), test_limit=4, console=console)


def shown(made: Demo) -> str:
    assert isinstance(made.console.file, io.StringIO)
    return made.console.file.getvalue()


def check(rows: list[Row], out: Path) -> None:
    assert [row.task for row in rows] == list(TASKS)
    results = json.loads((out / "results.json").read_text())
    for row in rows:
        for name, record in (("base", row.base), ("adapted", row.adapted)):
            assert read_record(out / row.task / f"{name}.json", EvalRecord) == record
        assert row.adapted.adapter_fingerprint == adapter_fingerprint(out / row.task / "adapter")
        told = results["tasks"][row.task]
        assert (told["base_accuracy"], told["adapter_accuracy"]) == (row.base.accuracy, row.adapted.accuracy)
        assert told["test_items"] == 4
        assert told["adapter_loss"] != told["base_loss"]
        assert set(told["merged"]) == set(row.merged) == set(demo.MERGES)
        for method, record in row.merged.items():
            assert record.adapter_fingerprint == adapter_fingerprint(out / f"merged_{method}")
            assert told["merged"][method]["accuracy"] == record.accuracy
    table = (out / "results.md").read_text()
    assert all(f"| {name} |" in table for name in TASKS)
    assert "results.png" in table
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")


def test_every_built_in_task_is_shown() -> None:
    assert set(STEPS) == set(task_names())


def test_results_are_those_of_the_records(make: Demo) -> None:
    rows = make.run()
    check(rows, make.out)
    assert all(name in shown(make) for name in (*TASKS, "with adapter", "gain (points)"))


def test_a_second_run_computes_nothing(make: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make.run()
    for name in ("train", "evaluate"):
        monkeypatch.setattr(demo, name, lambda *arguments: pytest.fail("computed again"))
    monkeypatch.setattr("flylora.models.load_model", lambda name: pytest.fail("loaded again"))
    again = Demo(make.out, make.model, make.steps, make.test_limit, make.console).run()
    assert again == first


def test_a_stopped_run_goes_on_where_it_was(make: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = demo.evaluate, []

    def stopping(config: object, loaded: object) -> EvalRecord:
        calls.append(config)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(config, loaded)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(demo, "evaluate", stopping)
        with pytest.raises(KeyboardInterrupt):
            make.run()
    check(make.run(), make.out)
    assert shown(make).count("The base model is evaluated already.") == 1
    assert shown(make).count("The adapter is trained already.") == 1


def test_other_settings_are_computed_anew(make: Demo) -> None:
    first = make.run()
    changed = Demo(make.out, make.model, {**TASKS, "arithmetic": 3}, make.test_limit, make.console)
    second = changed.run()
    check(second, make.out)
    assert (second[0].base, second[0].training) == (first[0].base, first[0].training)
    assert second[0].merged != first[0].merged
    assert second[1].training.steps == 3
    assert second[1].adapted.adapter_fingerprint != first[1].adapted.adapter_fingerprint


def test_other_data_are_computed_anew(make: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make.run()
    monkeypatch.setattr(demo, "_same", lambda record, task, split: False)
    second = make.run()
    assert [row.adapted.adapter_fingerprint for row in second] == [row.adapted.adapter_fingerprint for row in first]
    assert "evaluated already" not in shown(make)
    assert "trained already" not in shown(make)


@pytest.mark.parametrize(("error", "code"), [(demo.UserError("Bad."), 2), (KeyboardInterrupt(), 130)])
def test_errors_become_exit_codes(error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Demo) -> list[Row]:
        raise error

    monkeypatch.setattr(Demo, "run", fail)
    assert demo.main() == code
