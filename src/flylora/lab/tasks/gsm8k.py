"""GSM8K: grade-school word problems with worked answers that end in ``#### number``.

Both variants report a strict reading (the number after ``####``) and a flexible one (the last number). The authors
publish no validation split: ``gsm8k`` holds out 5% of the training problems; ``gsm8k:paper`` trains on all 7,473 of
them, from an instruction.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from flylora.errors import UserError
from flylora.lab.tasks.base import Example, Split, Task
from flylora.lab.tasks.prompts import instruction, question
from flylora.lab.tasks.published import hold_out, no_split, rows_of, text_of
from flylora.lab.tasks.scoring import strict_number

VERSION = "1"
HUB = "openai/gsm8k"
HELD_OUT = 0.05


def make(data_dir: Path | None, paper: bool) -> Task:
    """The task, from train.jsonl and test.jsonl in ``data_dir`` or from the hub."""
    name = "gsm8k:paper" if paper else "gsm8k"

    @cache
    def published(split: Split) -> list[Example]:
        files = (("gsm8k", "grade_school_math/data"), (f"{split}.jsonl",))
        rows, source = rows_of(data_dir, files, (HUB, "main", split))
        return [
            _example(row, f"{split}-{number}", f"Row {number + 1} of {source}", paper)
            for number, row in enumerate(rows)
        ]

    @cache
    def load(split: Split) -> list[Example]:
        if split == "test":
            return published(split)
        if not paper:
            return hold_out(published("train"), validation=HELD_OUT)[split]
        if split == "train":
            return published(split)
        raise no_split(name, split, "it trains on all of the authors' training problems, so take gsm8k for one")

    return Task(
        name=name,
        version=VERSION,
        load=load,
        kind="generate",
        prompt="instruction-v1" if paper else "question-v1",
        extractor="strict_number",
        also_extractors=("last_number",),
        metric="numeric_match",
        stop=("\n### ",) if paper else ("\nQuestion:",),
        max_length=512,
        max_new_tokens=256,
        sources=("Training Verifiers to Solve Math Word Problems (Cobbe et al., 2021)",),
        licence="MIT",
    )


def _example(row: Mapping[str, Any], name: str, where: str, paper: bool) -> Example:
    text, worked = text_of(row, "question", where), text_of(row, "answer", where)
    gold = strict_number(worked)
    if gold is None:
        raise UserError(f"{where} has an answer that does not end in '#### number': correct or remove it.")
    if paper:
        return Example(name, instruction(text), worked, gold)
    return Example(name, question(text), f" {worked}", gold)
