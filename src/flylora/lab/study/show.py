"""Studies on the terminal: the plan, and what became of it. Imports no torch for the plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markdown import Markdown

from flylora.errors import UserError
from flylora.lab.study.config import Study, StudyOptions
from flylora.lab.study.plan import READ_PASSES, TRAIN_PASSES, Cell, Size, Sizes, planned
from flylora.lab.study.record import CELL_RECORD, CellRecord
from flylora.records import read_record

if TYPE_CHECKING:
    from flylora.lab.study.run import StudyResult


def show_plan(options: StudyOptions, console: Console | None = None) -> None:
    """Prints the cells of a study, how much each has to do and how long it may take, and runs nothing."""
    console = console or Console(soft_wrap=True)
    study, cells = planned(options)
    folder = Path(options.out) if options.out is not None else Path("runs") / study.name
    records = _records(folder, cells)
    # A training that was resumed took longer than its last part.
    done = {name: max(r.seconds, r.result.get("seconds", 0.0)) for name, r in records.items() if r.done}
    sizes = Sizes(study, done).of(cells)
    for cell in cells:
        record = records.get(cell.name)
        state = "" if record is None else "  done" if record.done else "  failed"
        console.print(f"{cell.name}  {_size(sizes[cell.name])}{state}", markup=False, highlight=False)
    left = [cell for cell in cells if cell.name not in done]
    console.print(_total(cells, left, sizes), markup=False, highlight=False)
    for line in _assumptions(study, sizes):
        console.print(line, markup=False, highlight=False)


def show_study(result: StudyResult) -> None:
    """Prints the tables of a study and where they are."""
    console = Console()
    console.print(Markdown((result.folder / "results.md").read_text(encoding="utf-8")))
    console.print(f"The tables are in {result.folder}: results.md, results.csv and results.json.", markup=False)
    if result.failed:
        console.print(
            f"{len(result.failed)} of {len(result.records)} cells failed; --retry-failed tries them again.",
            style="red",
            markup=False,
        )


def _records(folder: Path, cells: list[Cell]) -> dict[str, CellRecord]:
    found = {}
    for cell in cells:
        path = folder / "cells" / cell.name / CELL_RECORD
        if path.is_file():
            try:
                found[cell.name] = read_record(path, CellRecord)
            except UserError:
                continue  # it will be done again
    return found


def _size(size: Size) -> str:
    if size.tokens is None:
        return "tokens unknown"
    if size.tokens == 0:
        return "no tokens"
    time = "" if size.seconds is None else f", {duration(size.seconds)}" + (" (measured)" if size.measured else "")
    return f"{count(size.tokens)} tokens{time}"


def _total(cells: list[Cell], left: list[Cell], sizes: dict[str, Size]) -> str:
    known = [sizes[cell.name].tokens or 0.0 for cell in left]
    unknown = sum(sizes[cell.name].tokens is None for cell in left)
    times = [sizes[cell.name].seconds for cell in left]
    time = sum(seconds for seconds in times if seconds is not None)
    untimed = sum(seconds is None for seconds in times)
    text = f"{len(cells)} cells, {len(cells) - len(left)} done; {count(sum(known))} tokens left"
    text += f" and {unknown} cells of unknown size" if unknown else ""
    if untimed == len(left) > 0:
        return f"{text}; how long that takes is not known."
    return f"{text}; about {duration(time)}" + (f" without {untimed} cells of unknown length" if untimed else "") + "."


def _assumptions(study: Study, sizes: dict[str, Size]) -> list[str]:
    lines = [
        f"Assumed: {TRAIN_PASSES} floating-point operations per parameter and token in training, {READ_PASSES} in "
        "evaluation; every item as long as it may be unless the study states its mean length; generated text as long "
        "as it may be and at the pace of reading, which is too fast for generation; nothing for loading, and for "
        "merges that read no text."
    ]
    for label, model in study.models.items():
        if model.parameters is None or model.throughput is None:
            lines.append(
                f"{label}: the study does not state its parameters and throughput, so its times are those of cells "
                "that are done, where there are any."
            )
        else:
            lines.append(
                f"{label}: {model.parameters:.3g} parameters at {model.throughput:.3g} floating-point operations a "
                "second, as the study states."
            )
    if any(size.measured for size in sizes.values()):
        lines.append("Times marked measured are those of this cell, or at the pace of cells like it that are done.")
    return lines


def count(value: float) -> str:
    """A number with a unit, such as 1.2 M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """A time with a unit, such as 1.5 h."""
    for limit, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= limit:
            return f"{seconds / limit:.1f} {unit}"
    return f"{seconds:.0f} s"
