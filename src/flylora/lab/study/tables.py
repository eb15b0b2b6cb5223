"""From the records of a study's cells to its tables: Markdown to read, CSV and JSON to go on with.

Every figure is a mean over seeds with its sample standard deviation; differences from the baseline are taken seed by
seed. Nothing is filled in: what has not run, or failed, is said to be missing.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flylora.errors import UserError
from flylora.lab.evaluation.record import EvalRecord
from flylora.lab.study.config import PaperFigures, Study, task_label
from flylora.lab.study.estimates import Estimate, estimate
from flylora.lab.study.plan import Cell, plan
from flylora.lab.study.record import CELL_RECORD, EVAL_RECORD, CellRecord
from flylora.records import read_record, write_text

LOWER_IS_BETTER = frozenset({"loss", "points_lost"})
_COUNTED = ("trainable_parameters", "active_parameters")
_ORDER = ("loss", "retention", "points_lost", "accuracy")  # and pass@k
_UNITS = {"loss": "nats per answer token", "retention": "share"}


@dataclass(frozen=True, order=True)
class Spot:
    """One place in the grid; the same place is measured once a seed. Empty strings where a label means nothing."""

    model: str
    method: str = ""
    merge: str = ""
    task: str = ""
    evaluation: str = ""


@dataclass(frozen=True)
class Figure:
    """One metric at one place.

    Attributes:
        spot: Where.
        metric: loss, accuracy or pass@k (per cent), retention, points_lost (of accuracy or pass@1 by merging).
        values: By seed; the base model has the single seed -1, for it is measured once.
        paper: The paper's figure; ``None`` where there is none or its setup is another.
    """

    spot: Spot
    metric: str
    values: dict[int, float]
    paper: float | None = None

    @property
    def estimate(self) -> Estimate:
        """Over seeds."""
        found = estimate(list(self.values.values()))
        assert found is not None
        return found


@dataclass(frozen=True)
class Difference:
    """One metric of a method less that of the baseline, seed by seed.

    Attributes:
        figure: The differences, at the place of the method.
        item_error: Standard error over the items both were measured on, seeds averaged; ``None`` where items have no
            such metric.
    """

    figure: Figure
    item_error: float | None


@dataclass
class Results:
    """Everything a study has found so far."""

    study: Study
    figures: list[Figure] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    rates: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    parameters: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    routed: dict[tuple[str, str, str], bool] = field(default_factory=dict)
    failed: list[CellRecord] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    cells: int = 0

    def at(self, spot: Spot, metric: str) -> Figure | None:
        """The figure of one place and metric."""
        return next((f for f in self.figures if f.spot == spot and f.metric == metric), None)


def write_tables(study: Study, folder: Path) -> Results:
    """Collects what is in a run folder and writes results.md, results.csv and results.json there."""
    results = collect(study, folder)
    write_text(folder / "results.md", markdown(results))
    write_text(folder / "results.csv", as_csv(results))
    write_text(folder / "results.json", json.dumps(as_json(results), indent=2, ensure_ascii=False) + "\n")
    return results


# --- collecting ------------------------------------------------------------------------------------------------------

Measured = dict[Spot, dict[int, EvalRecord]]
BASE_SEED = -1


def collect(study: Study, folder: Path) -> Results:
    """The figures of every cell of a study that is done."""
    results = Results(study)
    measured: Measured = defaultdict(dict)
    for cell in plan(study):
        results.cells += 1
        place = folder / "cells" / cell.name
        try:
            record = read_record(place / CELL_RECORD, CellRecord)
        except UserError:
            results.missing.append(cell.name)
            continue
        if not record.done:
            results.failed.append(record)
            continue
        results.seconds += record.seconds
        if cell.kind == "eval" and not cell.trial:
            try:
                found = read_record(place / EVAL_RECORD, EvalRecord)
            except UserError:
                results.missing.append(cell.name)
                continue
            measured[_spot(cell)][BASE_SEED if cell.seed is None else cell.seed] = found
            results.notes += [f"{cell.name}: {note}" for note in found.notes]
        elif cell.kind == "choose":
            results.rates[cell.model or "", cell.method or ""] = record.result
        elif cell.kind == "train":
            results.parameters[cell.model or "", cell.method or ""] = {
                name: record.result.get(name) for name in ("trainable_parameters", "active_parameters", "paper_percent")
            }
        elif cell.kind == "merge":
            results.routed[cell.model or "", cell.method or "", cell.merge or ""] = record.result["routed"]
    results.figures = [*_measured_figures(measured), *_merge_figures(measured)]
    results.figures = [dataclasses.replace(f, paper=_paper(study, f)) for f in results.figures]
    results.differences = list(_differences(study, results.figures, measured))
    return results


def _spot(cell: Cell) -> Spot:
    return Spot(cell.model or "", cell.method or "", cell.merge or "", cell.task or "", cell.evaluation or "")


def metrics(record: EvalRecord) -> dict[str, float]:
    """Loss, accuracy and pass@k of an evaluation, shares as per cent."""
    found = {}
    if record.loss is not None:
        found["loss"] = record.loss
    rates = {name: share for name, share in record.accuracies.items() if name.startswith("pass@")}
    if record.accuracy is not None and not rates:
        found["accuracy"] = 100 * record.accuracy
    return found | {name: 100 * share for name, share in sorted(rates.items(), key=lambda rate: int(rate[0][5:]))}


def _measured_figures(measured: Measured) -> Iterator[Figure]:
    for spot, records in measured.items():
        by_metric: dict[str, dict[int, float]] = defaultdict(dict)
        for seed, record in sorted(records.items()):
            for metric, value in metrics(record).items():
                by_metric[metric][seed] = value
        for metric, values in by_metric.items():
            yield Figure(spot, metric, values)


def _merge_figures(measured: Measured) -> Iterator[Figure]:
    """What merges kept of each task, and of all on average."""
    means: dict[Spot, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    tasks = {(spot.task, spot.evaluation) for spot in measured}
    for spot, records in measured.items():
        if not spot.merge:
            continue
        base = measured.get(dataclasses.replace(spot, method="", merge=""), {}).get(BASE_SEED)
        singles = measured.get(dataclasses.replace(spot, merge=""), {})
        kept, lost = {}, {}
        for seed, record in sorted(records.items()):
            if seed not in singles or base is None:
                continue
            value = _retention(base, singles[seed], record)
            if value is not None:
                kept[seed] = value
                means[dataclasses.replace(spot, task="", evaluation="")][seed].append(value)
            for metric in ("accuracy", "pass@1"):
                before, after = metrics(singles[seed]).get(metric), metrics(record).get(metric)
                if before is not None and after is not None:
                    lost[seed] = before - after
        for metric, values in (("retention", kept), ("points_lost", lost)):
            if values:
                yield Figure(spot, metric, values)
    for spot, by_seed in means.items():
        # A mean over some of the tasks would not be comparable with one over all.
        whole = {seed: math.fsum(values) / len(values) for seed, values in by_seed.items() if len(values) == len(tasks)}
        if whole:
            yield Figure(spot, "retention", whole)


def _retention(base: EvalRecord, single: EvalRecord, merged: EvalRecord) -> float | None:
    from flylora.lab.evaluation.retention import losses_of_items, retention

    found = retention(*(losses_of_items(record.items) for record in (base, single, merged)))
    return None if found is None else found[0]


# --- differences -----------------------------------------------------------------------------------------------------


def _differences(study: Study, figures: Sequence[Figure], measured: Measured) -> Iterator[Difference]:
    by_place = {(figure.spot, figure.metric): figure for figure in figures}
    for figure in figures:
        spot = figure.spot
        if study.baseline is None or spot.method in ("", study.baseline):
            continue
        against = dataclasses.replace(spot, method=study.baseline)
        other = by_place.get((against, figure.metric))
        if other is None:
            continue
        shared = sorted(figure.values.keys() & other.values.keys())
        if shared:
            values = {seed: figure.values[seed] - other.values[seed] for seed in shared}
            pairs = [
                (measured[spot][seed], measured[against][seed])
                for seed in shared
                if seed in measured.get(spot, {}) and seed in measured.get(against, {})
            ]
            yield Difference(Figure(spot, figure.metric, values), item_error(figure.metric, pairs))


def item_error(metric: str, pairs: Sequence[tuple[EvalRecord, EvalRecord]]) -> float | None:
    """The standard error over items of a mean difference of two models, items paired and seeds averaged.

    For the loss, a ratio of sums over items (nats by tokens), by the delta method; for accuracy (in points), of a mean.

    Args:
        metric: loss, accuracy or pass@1; others have no value for an item.
        pairs: The two models' records, seed by seed.
    """
    if metric not in ("loss", "accuracy", "pass@1") or not pairs:
        return None
    sums: dict[str, float] = defaultdict(float)
    weights: dict[str, float] = {}
    for ours, theirs in pairs:
        left, right = ({item["id"]: item for item in record.items} for record in (ours, theirs))
        for name in left.keys() & right.keys():
            a, b = left[name], right[name]
            if metric != "loss":
                weights[name] = 1.0
                sums[name] += 100 * ((a["score"] or 0.0) - (b["score"] or 0.0)) / len(pairs)
            elif a["loss"] is not None and b["loss"] is not None:
                weights[name] = a["loss_tokens"]
                sums[name] += (a["loss"] - b["loss"]) * a["loss_tokens"] / len(pairs)
    n, total = len(weights), math.fsum(weights.values())
    if n < 2:
        return None
    ratio = math.fsum(sums[name] for name in weights) / total
    residuals = math.fsum((sums[name] - ratio * weights[name]) ** 2 for name in weights)
    return math.sqrt(n / (n - 1) * residuals) / total


# --- a paper's figures -----------------------------------------------------------------------------------------------


def _paper(study: Study, figure: Figure) -> float | None:
    spot = figure.spot
    for stated in study.paper.figures if study.paper is not None else ():
        place = (stated.model, stated.method, stated.merge or "", stated.metric)
        if place == (spot.model, spot.method, spot.merge, figure.metric) and spot.evaluation in stated.values:
            return stated.values[spot.evaluation] if is_papers_setup(study, stated, spot) else None
    return None


def is_papers_setup(study: Study, stated: PaperFigures, spot: Spot) -> bool:
    """Whether a place was measured as the paper says its figure was: on all data, with the settings it states."""
    assert study.paper is not None
    setup = study.paper.setup
    training = study.train_config(spot.model, spot.method, spot.task, study.seeds[0])
    evaluation = study.eval_config(spot.model, spot.task, spot.evaluation, spot.merge or None)
    settings = {**setup.train, **setup.tasks.get(spot.task, {})}
    adapter = setup.methods.get(stated.method, {})
    return (
        setup.models.get(spot.model) == study.models[spot.model].name
        and training.train_limit is None
        and evaluation.limit is None
        and evaluation.split == "test"
        and all(getattr(training, name, None) == value for name, value in settings.items())
        and all(training.adapter.get(name) == value for name, value in adapter.items())
    )


# --- Markdown --------------------------------------------------------------------------------------------------------


def number(value: float, metric: str) -> str:
    """A value to as many places as its metric deserves."""
    return f"{value:.3f}" if metric in ("loss", "retention") else f"{value:.2f}"


def shown(figure: Figure | None) -> str:
    """Mean ± sample standard deviation, the paper's figure after it, if there is one; a dash for nothing."""
    if figure is None:
        return "–"
    found = figure.estimate
    spread = "" if found.deviation is None else f" ± {number(found.deviation, figure.metric)}"
    paper = "" if figure.paper is None else f" (paper: {figure.paper:g})"
    return f"{number(found.mean, figure.metric)}{spread}{paper}"


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
        lines += _rates_table(results, model)
        lines += _singles_table(results, model)
        lines += _differences_table(results, model, merged=False)
        lines += _merges_table(results, model)
        lines += _differences_table(results, model, merged=True)
    if study.paper is not None:
        lines += _paper_note(results)
    if results.failed:
        lines += ["## Failed", "", *(f"- {record.name}: {record.error}" for record in results.failed), ""]
    if results.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in results.notes), ""]
    return "\n".join(lines)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(headings) + " |",
        "| " + " | ".join("---" for _ in headings) + " |",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def _rates_table(results: Results, model: str) -> list[str]:
    search = results.study.lr_search
    rows = []
    for method in results.study.methods:
        found = results.rates.get((model, method))
        if found is None:
            continue
        tried = [(entry["lr"], entry["validation_loss"]) for entry in found["tried"]]
        losses = ", ".join(f"{lr:g}: {'not finite' if loss is None else f'{loss:.3f}'}" for lr, loss in tried)
        at_edge = len(tried) > 2 and found["lr"] in (tried[0][0], tried[-1][0])
        rows.append([method, losses, f"{found['lr']:g}" + (" (at the edge of those tried)" if at_edge else "")])
    if search is None or not rows:
        return []
    limit = "all" if search.limit is None else str(search.limit)
    return [
        f"## {model}: learning rates",
        "",
        f"Chosen for each method by the validation loss on {search.task} ({limit} items) after {search.steps} steps "
        f"with seed {search.seed}, and used for all tasks and seeds.",
        "",
        *_table(["method", "validation loss by learning rate", "chosen"], rows),
    ]


def _columns(results: Results, model: str, merge: bool) -> list[tuple[str, str, str]]:
    """Task, evaluation and metric of everything measured there, metric by metric."""
    found = dict.fromkeys(
        (f.spot.task, f.spot.evaluation, f.metric)
        for f in results.figures
        if f.spot.model == model and bool(f.spot.merge) == merge and f.spot.task
    )
    order = list(results.study.tasks)
    ranks = {metric: rank for rank, metric in enumerate(_ORDER)}
    return sorted(found, key=lambda column: (ranks.get(column[2], len(ranks)), order.index(column[0])))


def _heading(study: Study, task: str, evaluation: str, metric: str) -> str:
    own = evaluation in (task, task_label(study.tasks[task].train))
    return f"{task}{'' if own else f' → {evaluation}'}: {metric.replace('_', ' ')}"


def _counts(figures: Sequence[Figure | None]) -> str:
    counts = sorted({len(figure.values) for figure in figures if figure is not None})
    return "–" if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"


def _singles_table(results: Results, model: str) -> list[str]:
    columns = _columns(results, model, merge=False)
    if not columns:
        return []
    rows = []
    for method in ("", *results.study.methods):
        figures = [
            results.at(Spot(model, method, "", task, evaluation), metric) for task, evaluation, metric in columns
        ]
        if any(figures):
            counts = results.parameters.get((model, method), {})
            percent = counts.get("paper_percent")
            rows.append(
                [
                    method or "base model",
                    *("–" if counts.get(name) is None else f"{counts[name]:,}" for name in _COUNTED),
                    "–" if percent is None else f"{percent:.2f}",
                    _counts(figures) if method else "–",
                    *map(shown, figures),
                ]
            )
    headings = ["method", "trained parameters", "active ones", "Param%", "n"]
    headings += [_heading(results.study, *column) for column in columns]
    return [
        f"## {model}: one adapter for each task",
        "",
        "Active parameters are those that act on one token; Param% is the paper's count of them, in per cent of all.",
        "",
        *_table(headings, rows),
    ]


def _merges_table(results: Results, model: str) -> list[str]:
    columns = _columns(results, model, merge=True)
    if not columns:
        return []
    rows = []
    for method in results.study.methods:
        for merge in results.study.merges:
            figures = [
                results.at(Spot(model, method, merge, task, evaluation), metric) for task, evaluation, metric in columns
            ]
            if any(figures):
                mean = results.at(Spot(model, method, merge), "retention")
                routed = results.routed.get((model, method, merge))
                kind = "–" if routed is None else "routed" if routed else "LoRA"
                rows.append([method, merge, kind, _counts(figures), shown(mean), *map(shown, figures)])
    headings = [
        "method",
        "merge",
        "result",
        "n",
        "mean retention",
        *(_heading(results.study, *column) for column in columns),
    ]
    return [
        f"## {model}: all tasks merged into one adapter",
        "",
        "Retention is (base loss − merged loss) / (base loss − single adapter's loss); points lost are the single "
        "adapter's accuracy less the merged one's. A result that is a LoRA has no routing left: the updates of routed "
        "adapters are replaced by their best linear part where a merge works on matrices.",
        "",
        *_table(headings, rows),
    ]


def verdict(difference: Difference) -> str:
    """What a difference says: apart from 0 both over seeds and, where items have an error, by two of these over items.

    The seeds alone are not enough: all are measured on the same items, and accuracies, which come in steps of one item,
    can differ by the same step at every seed, which leaves an interval of no width.
    """
    figure, error = difference.figure, difference.item_error
    interval = figure.estimate.interval
    if interval is None:
        return "one seed: no interval"
    low, high = interval
    if low <= 0 <= high or (error is not None and abs(figure.estimate.mean) <= 2 * error):
        return "not told apart"
    return "better" if (high < 0) == (figure.metric in LOWER_IS_BETTER) else "worse"


def _differences_table(results: Results, model: str, merged: bool) -> list[str]:
    study = results.study
    rows = []
    for difference in results.differences:
        figure, spot = difference.figure, difference.figure.spot
        if spot.model != model or bool(spot.merge) != merged:
            continue
        found = figure.estimate
        interval, error = found.interval, difference.item_error
        rows.append(
            [
                spot.method,
                *([spot.merge] if merged else []),
                _heading(study, spot.task, spot.evaluation, figure.metric) if spot.task else "mean retention",
                str(found.n),
                f"{found.mean:+.3f}" if figure.metric in ("loss", "retention") else f"{found.mean:+.2f}",
                "–"
                if interval is None
                else f"{number(interval[0], figure.metric)} to {number(interval[1], figure.metric)}",
                "–" if error is None else number(error, figure.metric),
                verdict(difference),
            ]
        )
    if not rows:
        return []
    what = "merged adapters" if merged else "single adapters"
    headings = ["method", *(["merge"] if merged else []), "figure", "n", "difference"]
    headings += ["95 % interval over seeds", "standard error over items", "verdict"]
    return [
        f"## {model}: differences from {study.baseline}, {what}",
        "",
        f"The method's figure less that of {study.baseline}, seed by seed; the interval is Student's t over seeds, and "
        "the standard error is over the items that both were measured on, seeds averaged. Better and worse need an "
        "interval without 0 and, where there is a standard error, a difference of more than two.",
        "",
        *_table(headings, rows),
    ]


def _paper_note(results: Results) -> list[str]:
    assert results.study.paper is not None
    compared = any(figure.paper is not None for figure in results.figures)
    said = (
        "Figures in brackets are the paper's, shown where the setup is the same."
        if compared
        else "No figure of the paper is shown, because nothing was measured yet with the same setup."
    )
    return [f"{said} Source: {results.study.paper.source}.", ""]


# --- CSV and JSON ----------------------------------------------------------------------------------------------------


def _plain(figure: Figure) -> dict[str, Any]:
    found = figure.estimate
    return {
        **dataclasses.asdict(figure.spot),
        "metric": figure.metric,
        "unit": _UNITS.get(figure.metric, "per cent" if figure.metric != "points_lost" else "points"),
        "n": found.n,
        "mean": found.mean,
        "standard_deviation": found.deviation,
        "paper": figure.paper,
    }


def _plain_difference(study: Study, difference: Difference) -> dict[str, Any]:
    plain = _plain(difference.figure)
    del plain["paper"]
    low, high = difference.figure.estimate.interval or (None, None)
    return {
        **plain,
        "baseline": study.baseline,
        "interval_low": low,
        "interval_high": high,
        "item_standard_error": difference.item_error,
    }


def as_csv(results: Results) -> str:
    """One line a figure and one a difference (those with a baseline)."""
    rows = [_plain(figure) for figure in results.figures]
    rows += [_plain_difference(results.study, difference) for difference in results.differences]
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["model"]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def as_json(results: Results) -> dict[str, Any]:
    """Everything, with the value of every seed."""
    study = results.study
    return {
        "study": study.name,
        "seeds": study.seeds,
        "baseline": study.baseline,
        "cells": {"all": results.cells, "failed": len(results.failed), "missing": len(results.missing)},
        "seconds": results.seconds,
        "learning_rates": [
            {"model": model, "method": method, **found} for (model, method), found in results.rates.items()
        ],
        "parameters": [
            {"model": model, "method": method, **counts} for (model, method), counts in results.parameters.items()
        ],
        "figures": [{**_plain(figure), "seeds": _by_seed(figure.values)} for figure in results.figures],
        "differences": [
            {**_plain_difference(study, difference), "seeds": _by_seed(difference.figure.values)}
            for difference in results.differences
        ],
        "failed": [{"cell": record.name, "error": record.error} for record in results.failed],
        "missing": results.missing,
        "paper": None if study.paper is None else study.paper.source,
    }


def _by_seed(values: Mapping[int, float]) -> dict[str, float]:
    return {"base" if seed == BASE_SEED else str(seed): value for seed, value in values.items()}
