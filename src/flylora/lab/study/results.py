"""From the records of a study's cells to its figures: means over seeds, and differences from the baseline.

Nothing is filled in: what has not run, or failed, is listed as missing.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from flylora.errors import UserError
from flylora.lab.evaluation.record import EvalRecord
from flylora.lab.evaluation.retention import losses_of_items, retention
from flylora.lab.study.config import PaperFigures, Study
from flylora.lab.study.plan import plan
from flylora.lab.study.record import EVAL_RECORD, CellRecord, cell_folder, read_cell
from flylora.records import read_record

LOWER_IS_BETTER = frozenset({"loss", "points_lost"})
BASE_SEED = -1
"""The base model is measured once; this stands for its seed."""
COUNTS = ("trainable_parameters", "active_parameters", "paper_percent")


@dataclass(frozen=True, order=True)
class Condition:
    """What is measured once a seed. Empty strings where a label means nothing: the base model has no method."""

    model: str
    method: str = ""
    merge: str = ""
    task: str = ""
    evaluation: str = ""


@dataclass(frozen=True)
class Figure:
    """One metric under one condition, or its difference from the baseline.

    Attributes:
        condition: What was measured; of a difference, that of the method which is compared.
        metric: loss, accuracy or pass@k (per cent), retention, points_lost (of accuracy or pass@1 by merging).
        values: By seed.
        paper: The paper's figure; ``None`` if there is none or its setup differs.
        item_error: Of a difference, the standard error over the items both were measured on, seeds averaged; ``None``
            where items have no such metric.
    """

    condition: Condition
    metric: str
    values: dict[int, float]
    paper: float | None = None
    item_error: float | None = None

    @property
    def n(self) -> int:
        """How many seeds."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.values.values())

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation (n - 1) over seeds; one seed has none."""
        return statistics.stdev(self.values.values()) if self.n > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval of the mean by Student's t over seeds; one seed has none."""
        if self.deviation is None:
            return None
        half = float(stats.t.ppf(0.975, self.n - 1)) * self.deviation / math.sqrt(self.n)
        return self.mean - half, self.mean + half


@dataclass
class Results:
    """All figures of a study so far."""

    study: Study
    figures: list[Figure] = field(default_factory=list)
    differences: list[Figure] = field(default_factory=list)
    rates: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    parameters: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    routed: dict[tuple[str, str, str], bool] = field(default_factory=dict)
    failed: list[CellRecord] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    cells: int = 0

    def at(self, condition: Condition, metric: str) -> Figure | None:
        """The figure of one condition and metric."""
        return next((f for f in self.figures if f.condition == condition and f.metric == metric), None)


Measured = Mapping[Condition, Mapping[int, EvalRecord]]


def collect(study: Study, folder: Path) -> Results:
    """The figures of every cell of a study that is done."""
    results = Results(study)
    measured: dict[Condition, dict[int, EvalRecord]] = defaultdict(dict)
    for cell in plan(study):
        results.cells += 1
        record = read_cell(folder, cell.name)
        if record is None:
            results.missing.append(cell.name)
            continue
        if not record.done:
            results.failed.append(record)
            continue
        results.seconds += record.seconds
        model, method, merge = cell.model or "", cell.method or "", cell.merge or ""
        if cell.kind == "choose":
            results.rates[model, method] = record.result
        elif cell.kind == "train":
            results.parameters[model, method] = {name: record.result.get(name) for name in COUNTS}
        elif cell.kind == "merge":
            results.routed[model, method, merge] = record.result["routed"]
        elif not cell.trial:
            try:
                evaluation = read_record(cell_folder(folder, cell.name) / EVAL_RECORD, EvalRecord)
            except UserError:
                results.missing.append(cell.name)
                continue
            condition = Condition(model, method, merge, cell.task or "", cell.evaluation or "")
            measured[condition][BASE_SEED if cell.seed is None else cell.seed] = evaluation
            results.notes += [f"{cell.name}: {note}" for note in evaluation.notes]
    figures = [*_measured_figures(measured), *_merge_figures(measured)]
    results.figures = [dataclasses.replace(figure, paper=_paper(study, figure)) for figure in figures]
    results.differences = list(_differences(study, results.figures, measured))
    return results


def metrics(record: EvalRecord) -> dict[str, float]:
    """Loss, accuracy and pass@k of an evaluation, shares as per cent."""
    values = {} if record.loss is None else {"loss": record.loss}
    rates = {name: 100 * share for name, share in record.accuracies.items() if name.startswith("pass@")}
    if record.accuracy is not None and not rates:
        values["accuracy"] = 100 * record.accuracy
    return values | dict(sorted(rates.items(), key=lambda rate: int(rate[0][5:])))


def _measured_figures(measured: Measured) -> Iterator[Figure]:
    for condition, records in measured.items():
        by_metric: dict[str, dict[int, float]] = defaultdict(dict)
        for seed, record in sorted(records.items()):
            for metric, value in metrics(record).items():
                by_metric[metric][seed] = value
        for metric, values in by_metric.items():
            yield Figure(condition, metric, values)


def _merge_figures(measured: Measured) -> Iterator[Figure]:
    """What merges kept of each task, and of all on average."""
    means: dict[Condition, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    tasks = {(condition.task, condition.evaluation) for condition in measured}
    for condition, records in measured.items():
        if not condition.merge:
            continue
        base = measured.get(dataclasses.replace(condition, method="", merge=""), {}).get(BASE_SEED)
        singles = measured.get(dataclasses.replace(condition, merge=""), {})
        shares, lost = {}, {}
        for seed, record in sorted(records.items()):
            if seed not in singles or base is None:
                continue
            share = retention(*(losses_of_items(one.items) for one in (base, singles[seed], record)))
            if share is not None:
                shares[seed] = share[0]
                means[dataclasses.replace(condition, task="", evaluation="")][seed].append(share[0])
            for metric in ("accuracy", "pass@1"):
                before, after = metrics(singles[seed]).get(metric), metrics(record).get(metric)
                if before is not None and after is not None:
                    lost[seed] = before - after
        for metric, values in (("retention", shares), ("points_lost", lost)):
            if values:
                yield Figure(condition, metric, values)
    for condition, by_seed in means.items():
        # A mean over some of the tasks would not be comparable with one over all.
        whole = {seed: statistics.fmean(values) for seed, values in by_seed.items() if len(values) == len(tasks)}
        if whole:
            yield Figure(condition, "retention", whole)


# --- differences from the baseline -----------------------------------------------------------------------------------


def _differences(study: Study, figures: Sequence[Figure], measured: Measured) -> Iterator[Figure]:
    by_condition = {(figure.condition, figure.metric): figure.values for figure in figures}
    baseline = study.baseline or ""
    for figure in figures:
        if not baseline or figure.condition.method in ("", baseline):
            continue
        against = dataclasses.replace(figure.condition, method=baseline)
        other = by_condition.get((against, figure.metric), {})
        values = {seed: value - other[seed] for seed, value in sorted(figure.values.items()) if seed in other}
        if values:
            ours, theirs = measured.get(figure.condition, {}), measured.get(against, {})
            pairs = [(ours[seed], theirs[seed]) for seed in values if seed in ours and seed in theirs]
            yield Figure(figure.condition, figure.metric, values, item_error=item_error(figure.metric, pairs))


def item_error(metric: str, pairs: Sequence[tuple[EvalRecord, EvalRecord]]) -> float | None:
    """The standard error over items of a mean difference of two models, items paired and seeds averaged.

    For the loss, a ratio of sums over items (nats by tokens), by the delta method; for accuracy (in points), of a mean.

    Args:
        metric: loss, accuracy or pass@1; others have no value for an item.
        pairs: The two models' records, seed by seed.
    """
    if metric not in ("loss", "accuracy", "pass@1") or not pairs:
        return None
    column = "loss" if metric == "loss" else "score"
    parts = []
    for pair in pairs:
        ours, theirs = (pd.DataFrame(r.items, columns=["id", "loss", "loss_tokens", "score"]) for r in pair)
        both = ours.merge(theirs, on="id", suffixes=("", "_base"))
        values = both[[column, f"{column}_base"]].astype(float)
        values = values.fillna(0.0) if column == "score" else values
        both["weight"] = both.loss_tokens if metric == "loss" else 1.0
        both["difference"] = (values[column] - values[f"{column}_base"]) * (both.weight if metric == "loss" else 100)
        parts.append(both.dropna(subset="difference"))
    items = pd.concat(parts).groupby("id").agg(weight=("weight", "last"), difference=("difference", "sum"))
    n, total = len(items), float(items.weight.sum())
    if n < 2:
        return None
    differences = items.difference / len(pairs)
    residuals = differences - differences.sum() / total * items.weight
    return math.sqrt(n / (n - 1) * float((residuals**2).sum())) / total


def verdict(difference: Figure) -> str:
    """What a difference says: apart from 0 both over seeds and, where items have an error, by two of these over items.

    The seeds alone are not enough: all are measured on the same items, and accuracies, which come in steps of one item,
    can differ by the same step at every seed, which leaves an interval of no width.
    """
    if difference.interval is None:
        return "one seed: no interval"
    (low, high), error = difference.interval, difference.item_error
    if low <= 0 <= high or (error is not None and abs(difference.mean) <= 2 * error):
        return "not told apart"
    return "better" if (high < 0) == (difference.metric in LOWER_IS_BETTER) else "worse"


# --- a paper's figures -----------------------------------------------------------------------------------------------


def _paper(study: Study, figure: Figure) -> float | None:
    at = figure.condition
    for stated in study.paper.figures if study.paper is not None else ():
        labels = (stated.model, stated.method, stated.merge or "", stated.metric)
        if labels == (at.model, at.method, at.merge, figure.metric) and at.evaluation in stated.values:
            return stated.values[at.evaluation] if is_papers_setup(study, stated, at) else None
    return None


def is_papers_setup(study: Study, stated: PaperFigures, at: Condition) -> bool:
    """Whether a figure was measured as the paper says its own was: on all data, with the settings it states."""
    assert study.paper is not None
    setup = study.paper.setup
    training = dataclasses.asdict(study.train_config(at.model, at.method, at.task, study.seeds[0]))
    evaluation = study.eval_config(at.model, at.task, at.evaluation, at.merge or None)
    settings = {"train_limit": None, **setup.train, **setup.tasks.get(at.task, {})}
    return (
        setup.models.get(at.model) == study.models[at.model].name
        and (evaluation.limit, evaluation.split) == (None, "test")
        and settings.items() <= training.items()
        and setup.methods.get(stated.method, {}).items() <= training["adapter"].items()
    )
