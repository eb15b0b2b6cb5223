"""CodeAlpaca: instructions to write code, with answers; for training, and measured by the loss alone.

``codealpaca`` holds out 5% of the prompts for validation and 10% for testing; ``codealpaca:paper`` trains on all of
them, and its adapters are tested on HumanEval. Rows without an answer are left out, with a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from flylora.lab.tasks.base import Example, Split, Task
from flylora.lab.tasks.prompts import instruction
from flylora.lab.tasks.published import hold_out, no_split, rows_of, text_of

logger = logging.getLogger(__name__)

VERSION = "1"
HUB = "sahil2801/CodeAlpaca-20k"

_FILES = (
    ("codealpaca", "code_alpaca", "data"),
    ("code_alpaca_20k.json", "CodeAlpaca-20k.json", "code_alpaca_2k.json"),
)


def make(data_dir: Path | None, paper: bool) -> Task:
    """The task, from code_alpaca_20k.json (or the sample of 2k) in ``data_dir`` or from the hub."""
    name = "codealpaca:paper" if paper else "codealpaca"

    @cache
    def everything() -> dict[Split, list[Example]]:
        rows, source = rows_of(data_dir, _FILES, (HUB, None, "train"))
        found = [_example(row, f"train-{i}", f"Row {i + 1} of {source}") for i, row in enumerate(rows)]
        whole = [example for example in found if example.completion.strip()]
        if len(whole) < len(found):
            logger.warning(
                "%d of %d rows of %s have no output and are left out.", len(found) - len(whole), len(found), source
            )
        return {"train": whole} if paper else hold_out(whole, validation=0.05, test=0.1)

    def load(split: Split) -> list[Example]:
        if split not in everything():
            raise no_split(name, split, "it trains on everything, so test on humaneval:paper or take codealpaca")
        return everything()[split]

    return Task(
        name=name,
        version=VERSION,
        load=load,
        kind="loss",
        prompt="instruction-v1",
        metric="loss",
        max_length=512,
        sources=("CodeAlpaca, github.com/sahil280114/codealpaca",),
        licence="CC BY-NC 4.0",
    )


def _example(row: Mapping[str, Any], name: str, where: str) -> Example:
    given = text_of(row, "input", where, may_be_empty=True)
    output = text_of(row, "output", where, may_be_empty=True)
    return Example(name, instruction(text_of(row, "instruction", where), given), output, output.strip())
