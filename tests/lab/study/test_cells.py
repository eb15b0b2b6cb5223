"""One cell: it runs alone in any process, shares the base model, and knows which settings decide its result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flylora.lab.evaluation import EvalConfig
from flylora.lab.study import cells as working
from flylora.lab.study import load_study
from flylora.lab.study.cells import Cache, checksums, run_cell, same_settings
from flylora.lab.study.plan import plan, read_cell
from flylora.lab.training.config import TrainConfig
from flylora.models import load_model

Save = Callable[..., Path]


def test_a_cell_runs_alone_in_any_process(save: Save, tmp_path: Path) -> None:
    cells = {cell.name: cell for cell in plan(load_study(save()))}
    folder = tmp_path / "elsewhere"
    name = "seed0/llama/fly/vowels"
    early = run_cell(cells[f"{name}/eval-vowels"], folder)
    assert early.error == f"It needs {name}/train, which has not run: run that first."
    assert run_cell(cells[f"{name}/train"], folder).done
    record = run_cell(cells[f"{name}/eval-vowels"], folder)
    assert record.done
    assert read_cell(folder, f"{name}/eval-vowels") == record


def test_the_base_model_is_loaded_once_and_again_when_something_changed_it(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    monkeypatch.setattr(working, "load_model", lambda *name: loads.append(name) or load_model(*name))
    cache = Cache()
    asked = (str(tiny_model_dir), "float32", "cpu")
    loaded = cache.model(*asked)
    assert cache.model(*asked) is loaded
    assert len(loads) == 1
    before = checksums(loaded)
    weight = loaded.model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[0, 0] += 1
    assert checksums(loaded) != before
    again = cache.model(*asked)
    assert again is not loaded
    assert len(loads) == 2
    assert checksums(again) == before


def test_settings_are_the_same_when_their_results_are() -> None:
    recorded = {"model": "m", "task": "old/place.yaml", "lr": 0.1}
    assert same_settings(recorded, {**recorded, "task": "new/place.yaml", "seed": 0}, TrainConfig)
    assert not same_settings(recorded, {**recorded, "seed": 1}, TrainConfig)
    assert not same_settings(recorded, {**recorded, "lr": 0.2}, TrainConfig)
    sized = {**recorded, "batch_size": 4}
    assert not same_settings(sized, {**sized, "batch_size": 2}, TrainConfig)
    assert same_settings(sized, {**sized, "batch_size": 2}, EvalConfig)
