"""How much of a study there is to do: cells, tokens, and time at the pace of the cells that are done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from flylora.errors import UserError
from flylora.lab.study.config import Study, StudyOptions
from flylora.lab.study.plan import Cell, planned
from flylora.lab.study.record import CellRecord, read_cell, run_folder
from flylora.lab.tasks import load_task, published_task_names

CHOICES = 4
"""Candidate answers of an item, each of which is read, where the data are not counted."""
_MOST_ROWS = 31  # a plan is a page of 40 lines


@dataclass(frozen=True)
class StudyPlan:
    """What there is to do in a study.

    Attributes:
        study: At the size that the options ask for.
        folder: Of the run.
        cells: In the order in which they run.
        records: Of the cells that were tried before, by name.
        tokens: What each cell reads and generates, padding left out; ``None`` if the data are not at hand and the study
            does not state their number.
        seconds: What each cell took, or takes at the pace of cells like it; ``None`` before one like it is done.
    """

    study: Study
    folder: Path
    cells: list[Cell]
    records: dict[str, CellRecord]
    tokens: dict[str, float | None]
    seconds: dict[str, float | None]

    @property
    def done(self) -> list[Cell]:
        """The cells that have a result."""
        return [cell for cell in self.cells if cell.name in self.records and self.records[cell.name].done]

    def groups(self) -> pd.DataFrame:
        """One row for each step, method and task (or merge), by fewer of these where there are many.

        Columns: cells, done and failed are counts; tokens and seconds are what is left, NaN if any of it is unknown.
        """
        done = {cell.name for cell in self.done}
        rows = [
            {
                "step": _step(cell),
                "method": cell.method or "",
                "task": cell.merge or cell.task or "",
                "cells": 1,
                "done": int(cell.name in done),
                "failed": int(cell.name in self.records and cell.name not in done),
                "tokens": 0.0 if cell.name in done else self.tokens[cell.name],
                "seconds": 0.0 if cell.name in done else self.seconds[cell.name],
            }
            for cell in self.cells
        ]
        frame = pd.DataFrame(rows).astype({"tokens": float, "seconds": float})
        for keys in (["step", "method", "task"], ["step", "method"], ["step"]):
            groups = frame.groupby(keys, sort=False)
            if groups.ngroups <= _MOST_ROWS:
                break
        counts = groups[["cells", "done", "failed"]].sum()
        amounts = groups[["tokens", "seconds"]].agg(lambda column: column.sum(skipna=False))
        return counts.join(amounts).reset_index()


def plan_study(options: StudyOptions) -> StudyPlan:
    """What a study would do, without a model and without running anything.

    Raises:
        UserError: The study or the options are not what they should be.
    """
    study, cells = planned(options)
    folder = run_folder(study, options)
    tried = {cell.name: read_cell(folder, cell.name) for cell in cells}
    records = {name: record for name, record in tried.items() if record is not None}
    tokens = tokens_of(study, cells)
    # A training that was resumed took longer than its last part.
    done = {name: max(r.seconds, r.result.get("seconds", 0.0)) for name, r in records.items() if r.done}
    return StudyPlan(study, folder, cells, records, tokens, seconds_of(cells, tokens, done))


def _step(cell: Cell) -> str:
    if cell.trial:
        return "search lr"
    if cell.kind != "eval":
        return cell.kind
    return "evaluate merge" if cell.merge else "evaluate" if cell.method else "evaluate base"


def seconds_of(
    cells: Sequence[Cell], tokens: Mapping[str, float | None], done: Mapping[str, float]
) -> dict[str, float | None]:
    """What each cell took, or takes at the mean pace of cells like it that are done."""
    paces: dict[tuple[Any, ...], list[float]] = {}
    for cell in cells:
        amount = tokens[cell.name]
        if cell.name in done and amount:
            paces.setdefault(_like(cell), []).append(done[cell.name] / amount)
    seconds: dict[str, float | None] = {}
    for cell in cells:
        amount, pace = tokens[cell.name], paces.get(_like(cell))
        estimate = 0.0 if amount == 0 else amount * sum(pace) / len(pace) if amount and pace else None
        seconds[cell.name] = done.get(cell.name, estimate)
    return seconds


def _like(cell: Cell) -> tuple[Any, ...]:
    """Cells with the same of these take as long per token."""
    return cell.kind, cell.model, cell.method if cell.kind != "eval" else None, cell.task, cell.evaluation


# --- tokens ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Items:
    """The items of one split of a task: how many, tokens of one, how often each is read, tokens generated for it."""

    number: float | None = None
    tokens: float | None = None
    readings: int = 1
    generated: int = 0


def tokens_of(study: Study, cells: Sequence[Cell]) -> dict[str, float | None]:
    """Tokens that each cell reads and generates; ``None`` where that is not known."""
    items = cache(lambda task, evaluation: _items(study, task, evaluation))
    return {cell.name: _tokens(cell, items, list(study.tasks)) for cell in cells}


def _tokens(cell: Cell, items_of: Callable[[str, str | None], _Items], tasks: list[str]) -> float | None:
    config = cell.config
    if cell.kind == "choose":
        return 0.0
    if cell.kind == "merge":
        texts = config["texts"] * config["rounds"] if config["calibrate"] else 0
        lengths = [items_of(task, None).tokens for task in tasks]
        return None if texts and None in lengths else texts * sum(length or 0.0 for length in lengths)
    assert cell.task is not None
    if cell.kind == "train":
        items = items_of(cell.task, None)
        length, number = _least(items.tokens, config["max_length"]), _least(items.number, config["train_limit"])
        if length is None:
            return None
        if config["steps"] is not None:
            return float(config["steps"] * config["batch_size"] * length)
        return None if number is None else (config["epochs"] or 1.0) * number * length
    items = items_of(cell.task, cell.evaluation)
    number = _least(items.number, config["limit"])
    if number is None or items.tokens is None:
        return None
    if config["loss_only"]:
        return number * items.tokens
    generated = items.generated and (config["max_new_tokens"] or items.generated)
    return number * (items.tokens * items.readings + generated * config["samples"])


def _items(study: Study, label: str, evaluation: str | None) -> _Items:
    """What the study states, else what the task and its data say if they are on this machine."""
    spec = study.tasks[label]
    number = spec.items.get(evaluation or "train")
    name = spec.train if evaluation is None else spec.evaluations[evaluation]
    data_dir = spec.data_dir or study.data_dir
    readings, generated = 1, 0
    try:
        task = load_task(name, data_dir)
        if evaluation is not None:
            readings = CHOICES if task.kind == "choice" else 1
            generated = task.max_new_tokens if task.kind in ("generate", "code") else 0
        # Without a folder published data would come from the hub, and a plan must not set off a download.
        if number is None and (data_dir is not None or name not in published_task_names()):
            model = next(iter(study.models))
            split = "train" if evaluation is None else study.eval_config(model, label, evaluation).split
            number = len(task.examples(split))
        return _Items(number, spec.tokens or task.max_length, readings, generated)
    except UserError:
        return _Items(number, spec.tokens, readings, generated)


def _least(value: float | None, limit: float | None) -> float | None:
    return value if limit is None else limit if value is None else min(value, limit)
