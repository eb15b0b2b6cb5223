"""Running a study: cell after cell in one process, each done once, each failing alone."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from flylora.errors import UserError
from flylora.lab.study.cells import Cache, run_cell
from flylora.lab.study.config import Study, StudyOptions
from flylora.lab.study.plan import Cell
from flylora.lab.study.record import CellRecord, StudyResult, read_cell, run_folder
from flylora.lab.study.study_file import planned
from flylora.lab.study.tables import write_tables
from flylora.lab.training.interrupt import TrainingInterrupted
from flylora.records import saving, write_text

_SECONDS_BETWEEN_TABLES = 60.0  # there is something to look at while a study runs


def run_study(options: StudyOptions, console: Console | None = None) -> StudyResult:
    """Runs the cells of a study that are not done yet, one after another, and writes its tables.

    Args:
        options: Which study, how much of it, and where to.
        console: Where to say what is done.

    Raises:
        UserError: The study or the options are not what they should be, or nothing can be written.
        TrainingInterrupted: On Ctrl-C or SIGTERM; the same command goes on from there.
    """
    if options.plan:
        raise UserError("plan=True asks for a plan, and this call runs the study: call plan_study, or leave plan out.")
    console = console or Console(stderr=True)
    study, cells = planned(options)
    folder = run_folder(study, options)
    _check_folder(folder, study)
    with _alone_in(folder):
        write_text(folder / "study.json", json.dumps(dataclasses.asdict(study), indent=2) + "\n")
        return StudyResult(study, folder, _run_all(study, cells, folder, options, console))


def _run_all(
    study: Study, cells: Sequence[Cell], folder: Path, options: StudyOptions, console: Console
) -> list[CellRecord]:
    records: list[CellRecord] = []
    cache, written = Cache(), time.monotonic()
    cell = cells[0]
    try:
        for number, cell in enumerate(cells, start=1):
            before = read_cell(folder, cell.name)
            console.print(f"[{number}/{len(cells)}] {cell.name}", markup=False, highlight=False)
            record = run_cell(cell, folder, cache, retry_failed=options.retry_failed)
            records.append(record)
            if not record.done:
                console.print(f"  failed: {record.error}", style="red", markup=False, highlight=False, soft_wrap=True)
            elif record == before:
                console.print("  done already", markup=False, highlight=False)
            if time.monotonic() - written > _SECONDS_BETWEEN_TABLES:
                write_tables(study, folder)
                written = time.monotonic()
    except KeyboardInterrupt as stop:
        raise TrainingInterrupted(
            f"Stopped in {cell.name}, after {len(records)} of {len(cells)} cells; give the same command to go on."
        ) from stop
    finally:
        write_tables(study, folder)
    return records


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """While open, no other study can be run in the folder: two would write the same checkpoints."""
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"Another flylora study is at work in {folder}: wait for it, or choose another folder with --out."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _check_folder(folder: Path, study: Study) -> None:
    file = folder / "study.json"
    if folder.is_dir() and any(folder.iterdir()) and not file.is_file():
        raise UserError(f"The folder {folder} is not empty and holds no study: choose another folder with --out.")
    if file.is_file():
        try:
            name = json.loads(file.read_text(encoding="utf-8")).get("name")
        except (AttributeError, UnicodeDecodeError, json.JSONDecodeError):
            return
        if name != study.name:
            raise UserError(f"The folder {folder} holds the study '{name}': choose another folder with --out.")
