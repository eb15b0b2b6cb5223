"""A study small enough to run whole in a test: two tasks, two methods, one merge, on a model of two layers."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from flylora.lab.evaluation.record import EvalRecord
from flylora.lab.study import StudyOptions
from flylora.lab.study.plan import CELL_RECORD, EVAL_RECORD, CellRecord
from flylora.lab.study.run import run_study
from flylora.records import write_record
from lab.study.handmade import ORIGIN


def write_task(folder: Path, name: str, letters: str) -> None:
    for split, numbers in {"train": range(12), "validation": range(12, 16), "test": range(16, 20)}.items():
        rows = (f'{{"question": "{number}", "letter": "{letters[number % len(letters)]}"}}\n' for number in numbers)
        (folder / f"{name}_{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(
        f"name: {name}\nversion: '1'\n"
        f"data: {{train: {name}_train.jsonl, validation: {name}_validation.jsonl, test: {name}_test.jsonl}}\n"
        "prompt: 'Item {question}:'\ncompletion: ' {letter}'\nanswer: '{letter}'\n"
        "kind: generate\nextractor: text\nmetric: exact_match\nmax_length: 64\nmax_new_tokens: 2\n",
        encoding="utf-8",
    )


def study_content(model: Path) -> dict[str, Any]:
    return {
        "name": "tiny",
        "models": {"llama": {"name": str(model), "dtype": "float32", "device": "cpu"}},
        "methods": {
            "lora": {"method": "lora", "adapter": {"r": 2, "target_modules": ["q_proj", "down_proj"]}, "lr": 0.01},
            "fly": {
                "method": "flylora",
                "adapter": {"r": 4, "k": 2, "target_modules": ["q_proj", "down_proj"]},
                "seed_per_task": ["projection_seed"],
            },
        },
        "tasks": {"vowels": {"train": "vowels.yaml"}, "others": {"train": "others.yaml"}},
        "seeds": [0],
        "baseline": "lora",
        "train": {"steps": 2, "batch_size": 2, "lr": 0.02},
        "evaluation": {"limit": 3},
        "merges": {"average": {"method": "average"}},
    }


def write_study(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def content(tiny_model_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """The keys of the study; its task files lie in ``tmp_path``."""
    write_task(tmp_path, "vowels", "aeiou")
    write_task(tmp_path, "others", "bcd")
    return study_content(tiny_model_dir)


@pytest.fixture
def save(tmp_path: Path, content: dict[str, Any]) -> Callable[..., Path]:
    """Writes the study file, after changes to its keys."""

    def write(**changes: Any) -> Path:
        return write_study(tmp_path, {**copy.deepcopy(content), **changes})

    return write


@pytest.fixture(scope="session")
def finished_run(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the study, run to its end; read it, do not write into it."""
    folder = tmp_path_factory.mktemp("finished")
    write_task(folder, "vowels", "aeiou")
    write_task(folder, "others", "bcd")
    path = write_study(folder, study_content(tiny_model_dir))
    run_study(StudyOptions(str(path), out=str(folder / "run")), Console(quiet=True))
    return folder / "run"


@pytest.fixture
def finished(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of it, where ``save`` puts its study."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., None]:
    """Writes the records of a cell."""

    def write(name: str, record: EvalRecord | None = None, result: Any = None, **fields: Any) -> None:
        folder = tmp_path / "run/cells" / name
        kind = "eval" if record is not None else "train"
        cell = CellRecord(
            status="complete",
            provenance=ORIGIN,
            name=name,
            cell_kind=kind,
            labels={},
            result=result or {"trainable_parameters": 1234, "active_parameters": 400, "paper_percent": 0.126},
            seconds=1800.0,
            **fields,
        )
        write_record(cell, folder / CELL_RECORD)
        if record is not None:
            write_record(record, folder / EVAL_RECORD)

    return write
