"""The page of results and the README show what was recorded, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
RECORDS = ROOT / "benchmarks" / "records"
TABLES = {
    "rates": "smollm2/results.md",
    "more_rates": "smollm2_rates/results.md",
    "singles": "smollm2/results.md",
    "differences": "smollm2/results.md",
    "from_flylora": "smollm2/from_flylora.md",
    "merges": "smollm2/results.md",
    "merged_differences": "smollm2/results.md",
    "norms": "smollm2/overshoot.md",
    "overshoot": "smollm2/overshoot.md",
    "variants": "smollm2_variants/results.md",
    "variant_differences": "smollm2_variants/results.md",
    "smaller_singles": "smollm2_rates/results.md",
    "smaller_merges": "smollm2_rates/results.md",
}
README_METHODS = {
    "LoRA r 8": "lora_r8",
    "LoRA r 32": "lora_r32",
    "LoRA-FA r 32": "lora_fa",
    "Split-LoRA 4 × 8": "split_lora_4x8",
    "FlyLoRA r 32, k 8": "flylora",
}


def test_every_table_on_the_page_of_results_is_in_its_record() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    tables = dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- /\1 -->", page, flags=re.DOTALL))
    assert list(tables) == list(TABLES)
    for name, table in tables.items():
        assert re.match(r"\| .*\n\| --- .*\n\| ", table), name
        assert table in (RECORDS / TABLES[name]).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("label", README_METHODS)
def test_the_table_of_the_readme_is_in_the_record(label: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = (line for line in readme.splitlines() if re.match(rf"\| {re.escape(label)} \| \d", line))
    record = json.loads((RECORDS / "smollm2" / "results.json").read_text(encoding="utf-8"))

    def said(merge: str, task: str, metric: str, digits: int) -> str:
        labels = (README_METHODS[label], merge, task, metric)
        figures = [x for x in record["figures"] if (x["method"], x["merge"], x["task"], x["metric"]) == labels]
        return "–" if not figures else with_spread(figures[0], digits)

    losses = [said("", task, "loss", 3) for task in ("arc_easy", "gsm8k", "code_alpaca")]
    kept = [said(merge, "", "retention", 2) for merge in ("average", "least_squares", "ties", "ties_half")]
    assert row.strip("| ").split(" | ")[3:] == [*losses, *kept]


def with_spread(figure: dict[str, Any], digits: int) -> str:
    """A mean as tables show it, with its standard deviation where there is more than one seed."""
    spread = figure["standard_deviation"]
    return f"{figure['mean']:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")
