"""Studies on the terminal: the plan, and what became of it."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flylora.lab.study.results import Condition, Figure, Results, collect
from flylora.lab.study.run import StudyResult
from flylora.lab.study.workload import StudyPlan

_NAMED_CELLS = 12


def show_plan(plan: StudyPlan, console: Console | None = None) -> None:
    """Prints how much there is to do in a study: one page, whatever its size."""
    console = console or Console()
    groups = plan.groups()
    left = [cell.name for cell in plan.cells if cell not in plan.done]
    timed = [seconds for name in left if (seconds := plan.seconds[name])]
    names = [name for name in ("step", "method", "task") if name in groups and groups[name].any()]
    names += ["cells", "done", *(["failed"] if groups.failed.any() else [])]
    table = _table([*names, "tokens left", *(["time left"] if timed else [])], ("step", "method", "task"))
    for row in groups.to_dict("records"):
        amounts = [_count(row["tokens"]), _duration(row["seconds"])] if row["cells"] > row["done"] else ["–", "–"]
        table.add_row(*(Text(str(row[name])) for name in names), *amounts[: 2 if timed else 1])
    console.print(table)
    unknown = sum(plan.tokens[name] is None for name in left)
    text = f"{len(plan.cells)} cells, {len(plan.done)} done; {_count(sum(plan.tokens[name] or 0.0 for name in left))} "
    text += "tokens left" + (f" and {unknown} cells of unknown size." if unknown else ".")
    if timed:
        untimed = sum(plan.seconds[name] is None for name in left)
        text += f" About {_duration(sum(timed))} left, at the pace of cells of the same kind that are done"
        text += f", without {untimed} cells for which no similar cell is done." if untimed else "."
    elif left:
        text += " Time is known once cells like these are done."
    console.print(Text(text))
    console.print(Text(f"Run folder: {plan.folder}. --only PATTERN runs some cells by their names, such as"))
    shown = plan.cells if len(plan.cells) <= _NAMED_CELLS else [plan.cells[0], plan.cells[-1]]
    for cell in shown:
        console.print(Text(f"  {cell.name}"), overflow="fold")


def show_study(result: StudyResult, console: Console | None = None) -> None:
    """Prints the figures of a study and where its tables are."""
    console = console or Console()
    results = collect(result.study, result.folder)
    for model in result.study.models:
        labels = ("method", "task", "adapter")
        table = _table([*labels, "loss", "accuracy, %", "retention"], labels, model)
        for row in _rows(results, model):
            table.add_row(*map(Text, row))
        console.print(table)
    console.print(
        Text(
            "Means over seeds ± standard deviation; loss is per answer token. All tables, with differences from the "
            f"baseline: results.md, results.csv and results.json in {result.folder}."
        )
    )
    if result.failed:
        text = f"{len(result.failed)} of {len(result.records)} cells failed; --retry-failed tries them again."
        console.print(Text(text, style="red"))


def _rows(results: Results, model: str) -> list[list[str]]:
    study = results.study
    methods, tasks, merges = ["", *study.methods], list(study.tasks), ["", *study.merges]
    groups: dict[Condition, dict[str, Figure]] = {}
    for figure in results.figures:
        at = figure.condition
        if at.model == model and at.task:
            groups.setdefault(at, {})[figure.metric] = figure
    rows = []
    for at in sorted(groups, key=lambda at: (methods.index(at.method), tasks.index(at.task), merges.index(at.merge))):
        figures = groups[at]
        adapter = f"merged: {at.merge}" if at.merge else "own adapter" if at.method else "none"
        label = at.task if len(study.tasks[at.task].evaluations) == 1 else at.evaluation
        shown = (figures.get("loss"), figures.get("accuracy") or figures.get("pass@1"), figures.get("retention"))
        rows.append([at.method or "base model", label, adapter, *map(_brief, shown)])
    return rows


def _brief(figure: Figure | None) -> str:
    if figure is None:
        return "–"
    digits = 1 if figure.metric not in ("loss", "retention") else 3
    spread = "" if figure.deviation is None else f" ± {figure.deviation:.{digits}f}"
    return f"{figure.mean:.{digits}f}{spread}"


def _table(headings: list[str], labels: tuple[str, ...], title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1))
    for heading in headings:
        table.add_column(heading, justify="left" if heading in labels else "right", overflow="fold")
    return table


def _count(value: float) -> str:
    """A number with a unit, such as 1.2 M."""
    if math.isnan(value):
        return "unknown"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    """A time with a unit, such as 1.5 h."""
    if math.isnan(seconds):
        return "unknown"
    for limit, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= limit:
            return f"{seconds / limit:.1f} {unit}"
    return f"{seconds:.0f} s"
