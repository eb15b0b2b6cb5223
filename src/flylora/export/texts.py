"""Text to calibrate on and to measure the gap on: from tasks, or from files of plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from flylora.errors import UserError
from flylora.lab.data import encode_all
from flylora.lab.tasks import Example, Task, load_task
from flylora.records import file_sha256
from flylora.texts import TEXT_FILES, Encoded, encode_texts, hold_out, read_text_file


@dataclass(frozen=True)
class Texts:
    """Token rows of one source, in two parts without a text in common.

    Attributes:
        name: of the source, as the user gave it.
        fit: what to calibrate on. held_out: what to measure the gap on.
        fit_from, held_out_from: which part of the source they are, for people.
        sha256: of the data of each.
    """

    name: str
    fit: list[Encoded]
    held_out: list[Encoded]
    fit_from: str
    held_out_from: str
    sha256: dict[str, str]


def read_texts(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    fit: int,
    held_out: int,
    data_dir: str | None = None,
    max_length: int = 512,
    seed: int = 0,
) -> Texts:
    """The texts of one source as token ids.

    A task gives ``fit`` items of its training split and ``held_out`` items of its validation split (of its test split
    where it has none), prompt and completion together. A file is shuffled; a fifth of it, or ``held_out`` texts where
    that is less, are held out.

    Args:
        source: name or YAML file of a task, or a .txt or .jsonl file.
        fit: how many texts to calibrate on at most; may be 0.
        held_out: how many other texts to hold out at most.
        data_dir: folder that a YAML task's data files are relative to.
        max_length: tokens of a file's text that are kept.
        seed: of the shuffle.

    Raises:
        UserError: there is no such source, or nothing readable in it.
    """
    if Path(source).suffix in TEXT_FILES:
        return _from_file(Path(source), tokenizer, fit, held_out, max_length, seed)
    return _from_task(source, load_task(source, data_dir), tokenizer, fit, held_out)


def _from_task(source: str, task: Task, tokenizer: PreTrainedTokenizerBase, fit: int, held_out: int) -> Texts:
    try:
        task.examples("validation", 1)
        other: Any = "validation"
    except UserError:
        other = "test"
    hashes = {f"{source} ({other})": task.data_hash(other)}
    fitted: list[Encoded] = []
    if fit:
        hashes[f"{source} (train)"] = task.data_hash("train")
        fitted = _encoded(task, task.examples("train", fit), tokenizer)
    return Texts(
        source,
        fitted,
        _encoded(task, task.examples(other, held_out), tokenizer),
        "training split",
        f"{other} split",
        hashes,
    )


def _encoded(task: Task, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    return encode_all(examples, tokenizer, task.max_length, task.chat_template, task.truncate_prompt).items


def _from_file(
    path: Path, tokenizer: PreTrainedTokenizerBase, fit: int, held_out: int, max_length: int, seed: int
) -> Texts:
    rows = encode_texts(read_text_file(path), tokenizer, max_length)
    if not rows:
        raise UserError(f"{path} holds no text: give a file with one text a line.")
    fitted, other = hold_out(rows, fit, held_out, seed)
    return Texts(str(path), fitted, other, "lines", "other lines", {str(path): file_sha256(path)})
