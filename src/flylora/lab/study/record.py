"""What a cell leaves in its folder when it has been tried, and where."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from flylora.errors import UserError
from flylora.lab.study.config import Study, StudyOptions
from flylora.records import Record, read_record

CELLS = "cells"
CELL_RECORD = "cell.json"
EVAL_RECORD = "eval_record.json"
ADAPTER = "adapter"


@dataclass(frozen=True, kw_only=True)
class CellRecord(Record):
    """One cell of a study: done, failed, or skipped because one that it needs failed.

    Attributes:
        name, cell_kind, labels: Which cell.
        inputs: What it was made from besides its config: weights, versions and hashes of tasks, adapters.
        result: Its figures; those of an evaluation's items are in a separate record next to this one.
        error: Why it failed, in one sentence; ``None`` if it did not.
        because_of: The failed cell that it needs; ``None`` if it ran.
        seconds: Time spent, with loading.
    """

    kind: ClassVar[str] = "cell"

    name: str
    cell_kind: str
    labels: dict[str, Any]
    inputs: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    because_of: str | None = None
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        """Whether there is a result."""
        return self.error is None


def run_folder(study: Study, options: StudyOptions) -> Path:
    """Where a study is kept."""
    return Path(options.out) if options.out is not None else Path("runs") / study.name


def cell_folder(run: Path, name: str) -> Path:
    """The folder of one cell."""
    return run / CELLS / name


def read_cell(run: Path, name: str) -> CellRecord | None:
    """The record of a cell; ``None`` if it is missing or cannot be read."""
    try:
        return read_record(cell_folder(run, name) / CELL_RECORD, CellRecord)
    except UserError:
        return None


@dataclass(frozen=True)
class StudyResult:
    """What became of a study.

    Attributes:
        study: At the size that was asked for.
        folder: Of the run, with the tables in it.
        records: Of the cells that were asked for, in their order.
    """

    study: Study
    folder: Path
    records: list[CellRecord]

    @property
    def failed(self) -> list[CellRecord]:
        """Those that have no result."""
        return [record for record in self.records if not record.done]
