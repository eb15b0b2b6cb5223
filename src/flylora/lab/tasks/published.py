"""What the published data sets have in common: where their files are, rows that must be whole, held-out prompts."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flylora.errors import UserError
from flylora.lab.tasks.base import Example, Split
from flylora.lab.tasks.tables import DataSource, hub_rows, read_table


def find(data_dir: Path, folders: Sequence[str], names: Sequence[str]) -> Path:
    """The first of ``names`` that is in ``data_dir`` or in one of its ``folders``.

    Raises:
        UserError: The folder is missing or holds none of them.
    """
    if not data_dir.is_dir():
        raise UserError(f"There is no data folder {data_dir}: check the path given as the data directory.")
    for folder in (data_dir, *(data_dir / name for name in folders)):
        for name in names:
            if (folder / name).exists():
                return folder / name
    places = " or ".join(str(folder) for folder in (data_dir, *(data_dir / name for name in folders)))
    raise UserError(f"There is no {' or '.join(names)} in {places}: put the published files there.")


def file_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON list or of JSON lines; every column is in every row, ``None`` where it was missing."""
    return read_table(DataSource(train=path.name), path.name, path.parent).rows


def rows_of(data_dir: Path | None, path: tuple[Sequence[str], Sequence[str]], hub: tuple[str, str | None, str]) -> Any:
    """Rows and what to call their source: from a file if there is a data folder, else from the hub.

    Args:
        data_dir: The folder; ``None`` for the hub.
        path: ``folders`` and ``names`` as in ``find``.
        hub: Data set, configuration and split.
    """
    if data_dir is None:
        return hub_rows(*hub), f"the hub's data set {hub[0]}"
    found = find(data_dir, *path)
    return file_rows(found), str(found)


def text_of(row: Mapping[str, Any], column: str, where: str, may_be_empty: bool = False) -> str:
    """The text in one column of a row.

    Raises:
        UserError: The row lacks the column, or it holds no text, or (unless it may) nothing but white space.
    """
    value = row.get(column)
    if not isinstance(value, str):
        has = ", ".join(name for name, held in row.items() if held is not None)
        raise UserError(f"{where} has no text in the column '{column}' (it has {has}): correct or remove it.")
    if not may_be_empty and not value.strip():
        raise UserError(f"{where} has nothing in the column '{column}': fill or remove it.")
    return value


def options_of(options: Any, where: str) -> tuple[str, ...]:
    """Candidate answers as they stand, at least two of them and none empty; ``UserError`` otherwise."""
    if not isinstance(options, Sequence) or isinstance(options, str) or len(options) < 2:
        raise UserError(f"{where} does not have at least two choices: correct or remove it.")
    for number, option in enumerate(options):
        if not isinstance(option, str) or not option.strip():
            raise UserError(f"{where} has nothing in choice {number + 1} of {len(options)}: fill or remove it.")
    return tuple(options)


def index_of(answer: Any, count: int, where: str) -> int:
    """An answer given as the index of a choice, from 0; ``UserError`` if there is no such choice."""
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < count:
        raise UserError(f"{where} has the answer {answer!r}, which is not one of 0 to {count - 1}: correct it.")
    return answer


def refuse_repeated(ids: Iterable[str], where: str) -> None:
    """Raises a ``UserError`` that names the first id which occurs twice."""
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise UserError(f"The id '{name}' occurs twice in {where}: ids must be unique, so remove one of them.")
        seen.add(name)


def no_split(task: str, split: Split, instead: str) -> UserError:
    """What to say when the authors publish no such split."""
    return UserError(f"The task '{task}' has no {split} split: {instead}.")


def hold_out(
    examples: Sequence[Example], validation: float = 0.0, test: float = 0.0, seed: int = 0
) -> dict[Split, list[Example]]:
    """Deals out whole prompts, so that two rows with the same prompt never end up on both sides.

    Args:
        examples: What is to be divided; what is not held out is the training split.
        validation: Share of the different prompts; 0 for none, else at least one prompt.
        test: Likewise.
        seed: Fixes which.
    """
    prompts = list(dict.fromkeys(example.prompt for example in examples))
    random.Random(f"hold out/{seed}").shuffle(prompts)
    shares: dict[Split, float] = {"test": test, "validation": validation}
    owner: dict[str, Split] = {}
    for split, share in shares.items():
        count = max(1, round(share * len(prompts))) if share else 0
        owner |= dict.fromkeys(prompts[len(owner) : len(owner) + count], split)
    if len(owner) == len(prompts):
        raise UserError(f"{len(prompts)} different prompts are too few to hold some out: give more rows.")
    found: dict[Split, list[Example]] = {"train": [], **{split: [] for split, share in shares.items() if share}}
    for example in examples:
        found[owner.get(example.prompt, "train")].append(example)
    return found
