"""The page of results shows what was recorded, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_table_on_the_page_of_results_is_in_the_record() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    record = (ROOT / "benchmarks" / "records" / "smollm2" / "results.md").read_text(encoding="utf-8")
    tables = re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- /\1 -->", page, flags=re.DOTALL)
    assert [name for name, _ in tables] == ["rates", "singles", "differences", "merges", "merged_differences"]
    for name, table in tables:
        assert table.startswith("| method |"), name
        assert table in record, name
