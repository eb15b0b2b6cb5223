"""Text to calibrate on and to measure the gap on: from tasks, or from files of plain text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from flylora.errors import UserError
from flylora.export.run import Source
from flylora.lab.data import encode_all
from flylora.lab.tasks import Example, Task, load_task
from flylora.lab.tasks.base import Split
from flylora.records import file_sha256
from flylora.texts import TEXT_FILES, Encoded, encode_texts, hold_out, read_text_file


def read_source(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    fit: int,
    held_out: int,
    data_dir: str | None = None,
    max_length: int = 512,
    seed: int = 0,
) -> Source:
    """The texts of one source as token ids.

    A task gives ``fit`` items of its training split and ``held_out`` items of its validation split (of its test split
    where it has none), prompt and completion together. A file is shuffled; a fifth of it, or ``held_out`` texts where
    that is less, are held out.

    Args:
        name: name or YAML file of a task, or a .txt or .jsonl file.
        fit: how many texts to calibrate on at most; may be 0.
        held_out: how many other texts to hold out at most.
        data_dir: folder that a YAML task's data files are relative to.
        max_length: tokens of a file's text that are kept.
        seed: of the shuffle.

    Raises:
        UserError: there is no such source, or nothing readable in it.
    """
    if Path(name).suffix in TEXT_FILES:
        rows = encode_texts(read_text_file(name), tokenizer, max_length)
        if not rows:
            raise UserError(f"{name} holds no text: give a file with one text a line.")
        fitted, other = hold_out(rows, fit, held_out, seed)
        return Source(name, fitted, other, "lines", "other lines", {name: file_sha256(Path(name))})
    task = load_task(name, data_dir)
    try:
        task.examples("validation", 1)
        measured: Split = "validation"
    except UserError:
        measured = "test"
    hashes = {f"{name} ({measured})": task.data_hash(measured)}
    fitted = []
    if fit:
        hashes[f"{name} (train)"] = task.data_hash("train")
        fitted = _encoded(task, task.examples("train", fit), tokenizer)
    other = _encoded(task, task.examples(measured, held_out), tokenizer)
    return Source(name, fitted, other, "training split", f"{measured} split", hashes)


def _encoded(task: Task, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    return encode_all(examples, tokenizer, task.max_length, task.chat_template, task.truncate_prompt).items
