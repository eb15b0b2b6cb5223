"""MMLU: four-way multiple choice over 57 subjects.

Train is the authors' auxiliary training set, which is made of other multiple-choice data sets and covers no subject by
name; validation is their val and dev files together; test is the 57 subjects, which results are broken down by.

``mmlu`` compares the log-likelihoods of the four letters. ``mmlu:paper`` follows the FlyLoRA paper: an instruction,
answered zero-shot by generating the number of the option, from 0.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from flylora.errors import UserError
from flylora.lab.tasks.base import Example, Split, Task
from flylora.lab.tasks.published import index_of, no_split, options_of, question, question_task, text_of
from flylora.lab.tasks.tables import find, hub_rows

VERSION = "1"
LETTERS = ("A", "B", "C", "D")
HUB = "cais/mmlu"

_FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("auxiliary_train",),
    "validation": ("val", "dev"),
    "test": ("test",),
}
_HUB_SPLITS = {"auxiliary_train": "auxiliary_train", "val": "validation", "dev": "dev", "test": "test"}
_COLUMNS = ("question", *LETTERS, "letter")


def make(data_dir: Path | None, paper: bool) -> Task:
    """The task, from the authors' CSV folders in ``data_dir`` or from the hub."""
    name = "mmlu:paper" if paper else "mmlu"

    @cache
    def load(split: Split) -> list[Example]:
        return _load(name, data_dir, split, paper)

    return question_task(
        paper=paper,
        max_length=128 if paper else 1024,
        name=name,
        version=VERSION,
        description="Multiple choice over 57 subjects (MMLU)" + ", paper's form" * paper,
        load=load,
        sources=("Measuring Massive Multitask Language Understanding (Hendrycks et al., 2021)",),
        licence="MIT",
    )


def _load(name: str, data_dir: Path | None, split: Split, paper: bool) -> list[Example]:
    return [example for folder in _FOLDERS[split] for example in _load_folder(name, data_dir, split, folder, paper)]


def _load_folder(name: str, data_dir: Path | None, split: Split, folder: str, paper: bool) -> list[Example]:
    if data_dir is None:
        return [
            _from_hub(row, folder, number, paper)
            for number, row in enumerate(hub_rows(HUB, "all", _HUB_SPLITS[folder]))
        ]
    root = find(data_dir, ("data", "mmlu", "mmlu/data"), ("test", "val", "dev", "auxiliary_train")).parent
    if split == "train" and not (root / folder).is_dir():
        raise no_split(
            name, split, f"{root} has no folder {folder}, so add the authors' auxiliary training set or evaluate only"
        )
    files = sorted((root / folder).glob("*.csv"))
    if not files:
        raise UserError(f"There are no CSV files in {root / folder}: put the authors' files there, one a subject.")
    return [example for path in files for example in _from_csv(path, folder, paper)]


def _from_csv(path: Path, folder: str, paper: bool) -> list[Example]:
    subject = path.stem.removesuffix(f"_{folder}").replace("_", " ")
    examples = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.reader(file, strict=True)):
                examples.append(_from_row(row, f"Row {number + 1} of {path}", folder, subject, number, paper))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a CSV file ({error}): copy it again.") from error
    if not examples:
        raise UserError(f"The data file {path} is empty: give one that holds at least one question.")
    return examples


def _from_row(row: Sequence[str], where: str, folder: str, subject: str, number: int, paper: bool) -> Example:
    if len(row) != len(_COLUMNS):
        raise UserError(
            f"{where} has {len(row)} columns instead of the {len(_COLUMNS)} of MMLU ({', '.join(_COLUMNS)}): correct "
            "or remove it."
        )
    answer = row[5].strip()
    if answer not in LETTERS:
        raise UserError(f"{where} has the answer '{row[5]}', which is not one of {', '.join(LETTERS)}: correct it.")
    if not row[0].strip():
        raise UserError(f"{where} has nothing in the column 'question': fill or remove it.")
    options = options_of(row[1:5], where)
    # The auxiliary training set is filed by its origin, which says nothing about a question.
    known = "" if folder == "auxiliary_train" else subject
    name, index = f"{folder}/{subject}/{number}", LETTERS.index(answer)
    return question(name, row[0], options, index, paper=paper, subject=known, group=subject)


def _from_hub(row: dict[str, Any], folder: str, number: int, paper: bool) -> Example:
    where = f"Row {number + 1} of the hub's {HUB}, {folder}"
    options = options_of(row.get("choices"), where)
    index = index_of(row.get("answer"), len(options), where)
    subject = text_of(row, "subject", where, may_be_empty=True).replace("_", " ") or folder
    known = "" if folder == "auxiliary_train" else subject
    text = text_of(row, "question", where)
    return question(f"{folder}/{number}", text, options, index, paper=paper, subject=known, group=subject)
