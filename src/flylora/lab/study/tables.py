"""The figures of a study as tables: Markdown to read, CSV and JSON to go on with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from flylora.lab.study.config import Study, task_label
from flylora.lab.study.results import BASE_SEED, COUNTS, Condition, Figure, Results, collect, verdict
from flylora.records import write_text

_ORDER = ("loss", "retention", "points_lost", "accuracy")  # and pass@k
_UNITS = {"loss": "nats per answer token", "retention": "share", "points_lost": "points"}


def write_tables(study: Study, folder: Path) -> Results:
    """Collects what is in a run folder and writes results.md, results.csv and results.json there."""
    results = collect(study, folder)
    write_text(folder / "results.md", markdown(results))
    write_text(folder / "results.csv", as_csv(results))
    write_text(folder / "results.json", json.dumps(as_json(results), indent=2, ensure_ascii=False) + "\n")
    return results


# --- Markdown --------------------------------------------------------------------------------------------------------


def number(value: float, metric: str) -> str:
    """A value to as many digits as its metric deserves."""
    return f"{value:.3f}" if metric in ("loss", "retention") else f"{value:.2f}"


def shown(figure: Figure | None) -> str:
    """Mean ± sample standard deviation, the paper's figure after it, if there is one; a dash for nothing."""
    if figure is None:
        return "–"
    spread = "" if figure.deviation is None else f" ± {number(figure.deviation, figure.metric)}"
    paper = "" if figure.paper is None else f" (paper: {figure.paper:g})"
    return f"{number(figure.mean, figure.metric)}{spread}{paper}"


def markdown(results: Results) -> str:
    """All tables, with what the figures mean and what is missing."""
    study = results.study
    lines = [f"# {study.name}", "", *([study.description, ""] if study.description else [])]
    lines += [
        f"{results.cells - len(results.missing) - len(results.failed)} of {results.cells} cells are done, "
        f"{len(results.failed)} failed; {results.seconds / 3600:.1f} hours of work. Seeds: "
        f"{', '.join(map(str, study.seeds))}.",
        "",
        "Figures are means over n seeds ± their sample standard deviation, which one seed does not have. Loss is the "
        "mean negative log-likelihood (nats) per answer token on held-out items, lower being better; accuracy and "
        "pass@k are per cent.",
        "",
    ]
    for model in study.models:
        lines += _rates(results, model)
        lines += _singles(results, model)
        lines += _differences(results, model, merged=False)
        lines += _merges(results, model)
        lines += _differences(results, model, merged=True)
    if study.paper is not None:
        compared = any(figure.paper is not None for figure in results.figures)
        said = "Figures in brackets are the paper's, shown where the setup is the same."
        none = "No figure of the paper is shown, because nothing was measured yet with the same setup."
        lines += [f"{said if compared else none} Source: {study.paper.source}.", ""]
    if results.failed:
        lines += ["## Failed", "", *(f"- {record.name}: {record.error}" for record in results.failed), ""]
    if results.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in results.notes), ""]
    return "\n".join(lines)


def _section(title: str, text: str, rows: Sequence[dict[str, str]]) -> list[str]:
    """A heading, a sentence and a table, whose headings are the keys of its rows; nothing without rows."""
    if not rows:
        return []
    table = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return [f"## {title}", "", text, "", *(f"| {' | '.join(cells)} |" for cells in table), ""]


def _rates(results: Results, model: str) -> list[str]:
    search = results.study.lr_search
    if search is None:
        return []
    rows = []
    for method in results.study.methods:
        if (model, method) not in results.rates:
            continue
        chosen, tried = (results.rates[model, method][key] for key in ("lr", "tried"))
        losses = [(one["lr"], one["validation_loss"]) for one in tried]
        at_edge = len(tried) > 2 and chosen in (tried[0]["lr"], tried[-1]["lr"])
        rows.append(
            {
                "method": method,
                "validation loss by learning rate": ", ".join(
                    f"{lr:g}: {'not finite' if loss is None else f'{loss:.3f}'}" for lr, loss in losses
                ),
                "chosen": f"{chosen:g}" + (" (at the edge of those tried)" if at_edge else ""),
            }
        )
    limit = "all" if search.limit is None else str(search.limit)
    text = (
        f"Chosen for each method by the validation loss on {search.task} ({limit} items) after {search.steps} steps "
        f"with seed {search.seed}, and used for all tasks and seeds."
    )
    return _section(f"{model}: learning rates", text, rows)


def _figures_of(results: Results, at: Condition) -> dict[tuple[str, str, str], Figure | None]:
    """The figures of a method or merge, by task, evaluation and metric: everything measured there, metric by metric."""
    tasks = list(results.study.tasks)
    ranks = {metric: rank for rank, metric in enumerate(_ORDER)}
    columns = dict.fromkeys(
        (f.condition.task, f.condition.evaluation, f.metric)
        for f in results.figures
        if f.condition.model == at.model and bool(f.condition.merge) == bool(at.merge) and f.condition.task
    )
    ordered = sorted(columns, key=lambda column: (ranks.get(column[2], len(ranks)), tasks.index(column[0])))
    return {
        (task, evaluation, metric): results.at(dataclasses.replace(at, task=task, evaluation=evaluation), metric)
        for task, evaluation, metric in ordered
    }


def _by_heading(study: Study, figures: dict[tuple[str, str, str], Figure | None]) -> dict[str, str]:
    return {_heading(study, *column): shown(figure) for column, figure in figures.items()}


def _heading(study: Study, task: str, evaluation: str, metric: str) -> str:
    if not task:
        return f"mean {metric}"
    own = evaluation in (task, task_label(study.tasks[task].train))
    return f"{task}{'' if own else f' → {evaluation}'}: {metric.replace('_', ' ')}"


def _counts(figures: Iterator[Figure | None]) -> str:
    counts = sorted({figure.n for figure in figures if figure is not None})
    return "–" if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"


def _singles(results: Results, model: str) -> list[str]:
    rows = []
    for method in ("", *results.study.methods):
        figures = _figures_of(results, Condition(model, method))
        if any(figures.values()):
            trained, active, percent = (results.parameters.get((model, method), {}).get(name) for name in COUNTS)
            rows.append(
                {
                    "method": method or "base model",
                    "trained parameters": "–" if trained is None else f"{trained:,}",
                    "active ones": "–" if active is None else f"{active:,}",
                    "Param%": "–" if percent is None else f"{percent:.2f}",
                    "n": _counts(iter(figures.values())) if method else "–",
                    **_by_heading(results.study, figures),
                }
            )
    text = "Active parameters are those that act on one token; Param% is the paper's count of them, in per cent of all."
    return _section(f"{model}: one adapter for each task", text, rows)


def _merges(results: Results, model: str) -> list[str]:
    rows = []
    for method in results.study.methods:
        for merge in results.study.merges:
            figures = _figures_of(results, Condition(model, method, merge))
            if any(figures.values()):
                routed = results.routed.get((model, method, merge))
                rows.append(
                    {
                        "method": method,
                        "merge": merge,
                        "result": "–" if routed is None else "routed" if routed else "LoRA",
                        "n": _counts(iter(figures.values())),
                        "mean retention": shown(results.at(Condition(model, method, merge), "retention")),
                        **_by_heading(results.study, figures),
                    }
                )
    text = (
        "Retention is (base loss − merged loss) / (base loss − single adapter's loss); points lost are the single "
        "adapter's accuracy less the merged one's. A result that is a LoRA has no routing left: the updates of routed "
        "adapters are replaced by their best linear part where a merge works on matrices."
    )
    return _section(f"{model}: all tasks merged into one adapter", text, rows)


def _differences(results: Results, model: str, merged: bool) -> list[str]:
    study, rows = results.study, []
    for difference in results.differences:
        at, metric, error = difference.condition, difference.metric, difference.item_error
        if at.model != model or bool(at.merge) != merged:
            continue
        interval = "–"
        if difference.interval is not None:
            interval = " to ".join(number(end, metric) for end in difference.interval)
        rows.append(
            {
                "method": at.method,
                **({"merge": at.merge} if merged else {}),
                "figure": _heading(study, at.task, at.evaluation, metric),
                "n": str(difference.n),
                "difference": f"{'+' if difference.mean >= 0 else ''}{number(difference.mean, metric)}",
                "95 % interval over seeds": interval,
                "standard error over items": "–" if error is None else number(error, metric),
                "verdict": verdict(difference),
            }
        )
    text = (
        f"The method's figure less that of {study.baseline}, seed by seed; the interval is Student's t over seeds, and "
        "the standard error is over the items that both were measured on, seeds averaged. Better and worse need an "
        "interval without 0 and, where there is a standard error, a difference of more than two."
    )
    what = "merged adapters" if merged else "single adapters"
    return _section(f"{model}: differences from {study.baseline}, {what}", text, rows)


# --- CSV and JSON ----------------------------------------------------------------------------------------------------


def _plain(figure: Figure, baseline: str | None = None) -> dict[str, Any]:
    plain = {
        **dataclasses.asdict(figure.condition),
        "metric": figure.metric,
        "unit": _UNITS.get(figure.metric, "per cent"),
        "n": figure.n,
        "mean": figure.mean,
        "standard_deviation": figure.deviation,
    }
    if baseline is None:
        return {**plain, "paper": figure.paper}
    low, high = figure.interval or (None, None)
    error = figure.item_error
    return {
        **plain,
        "baseline": baseline,
        "interval_low": low,
        "interval_high": high,
        "item_standard_error": error,
    }


def as_csv(results: Results) -> str:
    """One line a figure and one a difference (those with a baseline)."""
    rows = [_plain(figure) for figure in results.figures]
    rows += [_plain(difference, results.study.baseline) for difference in results.differences]
    text: str = pd.DataFrame(rows, columns=None if rows else ["model"]).to_csv(index=False, lineterminator="\n")
    return text


def as_json(results: Results) -> dict[str, Any]:
    """Everything, with the value of every seed."""
    study = results.study
    return {
        "study": study.name,
        "seeds": study.seeds,
        "baseline": study.baseline,
        "cells": {"all": results.cells, "failed": len(results.failed), "missing": len(results.missing)},
        "seconds": results.seconds,
        "learning_rates": [{"model": m, "method": name, **rate} for (m, name), rate in results.rates.items()],
        "parameters": [{"model": m, "method": name, **counts} for (m, name), counts in results.parameters.items()],
        "figures": [{**_plain(figure), "seeds": _by_seed(figure)} for figure in results.figures],
        "differences": [
            {**_plain(difference, study.baseline), "seeds": _by_seed(difference)} for difference in results.differences
        ],
        "failed": [{"cell": record.name, "error": record.error} for record in results.failed],
        "missing": results.missing,
        "paper": None if study.paper is None else study.paper.source,
    }


def _by_seed(figure: Figure) -> dict[str, float]:
    return {"base" if seed == BASE_SEED else str(seed): value for seed, value in figure.values.items()}
