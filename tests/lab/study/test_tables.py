"""The tables of a study: Markdown, CSV and JSON agree, from records written by hand."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flylora.lab.study import load_study
from flylora.lab.study.tables import write_tables
from lab.study.handmade import evaluation

Save = Callable[..., Path]
FLY = "llama/fly/vowels/eval-vowels"
LORA = "llama/lora/vowels/eval-vowels"


def test_files_agree_and_tell_what_is_missing(save: Save, put: Callable[..., None], tmp_path: Path) -> None:
    study = load_study(save(seeds=[0, 1]))
    for seed in (0, 1):
        put(f"seed{seed}/{FLY}", evaluation([1.0, 1.0 + seed]))
        put(f"seed{seed}/{LORA}", evaluation([2.0, 2.0]))
        put(f"seed{seed}/llama/fly/vowels/train")
    put("seed0/llama/lora/others/train", error="It was not its day.")
    results = write_tables(study, tmp_path / "run")
    body = json.loads((tmp_path / "run/results.json").read_text())
    rows = list(csv.DictReader((tmp_path / "run/results.csv").read_text().splitlines()))
    assert body["failed"] == [{"cell": "seed0/llama/lora/others/train", "error": "It was not its day."}]
    assert body["cells"]["all"] == results.cells == 30
    assert len(body["missing"]) == 30 - 7
    figures = [row for row in rows if not row["baseline"]]
    assert [float(row["mean"]) for row in figures] == [figure["mean"] for figure in body["figures"]]
    (row,) = (row for row in rows if row["baseline"])
    (difference,) = body["differences"]
    assert float(row["interval_low"]) == difference["interval_low"]
    assert difference["seeds"] == pytest.approx({"0": -1.0, "1": -1 / 3})
    text = (tmp_path / "run/results.md").read_text()
    assert "6 of 30 cells are done, 1 failed; 3.0 hours" in text
    assert "- seed0/llama/lora/others/train: It was not its day." in text
    assert "| fly | 1,234 | 400 | 0.13 | 2 | 1.333 ± 0.471 |" in text
