"""The demonstration: one FlyLoRA adapter per built-in task on a real language model, measured before and after, then
all of them merged into one and measured again.

Run by ``make demo``. Everything lands in runs/demo; what is finished and unchanged there is used again.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.table import Table

from flylora.adapter_folder import read_adapter
from flylora.errors import UserError
from flylora.lab.evaluation import EvalConfig, evaluate
from flylora.lab.evaluation.record import EvalRecord
from flylora.lab.evaluation.retention import losses_of_items, retention
from flylora.lab.show import number, percent
from flylora.lab.tasks import load_task, task_names
from flylora.lab.training import TrainConfig, train
from flylora.lab.training.record import RECORD_NAME, TrainRecord
from flylora.merging import merge_adapters
from flylora.merging.config import MergeConfig
from flylora.merging.record import RECORD_NAME as MERGE_RECORD
from flylora.merging.record import MergeRecord
from flylora.records import Record, adapter_fingerprint, read_record, write_text

if TYPE_CHECKING:
    from flylora.models import LoadedModel

MODEL = "smollm2-135m"
STEPS = {"capitals": 50, "elements": 70, "arithmetic": 45, "python_output": 45}
"""Optimizer steps of 8 items: chosen so that all tasks together take a few minutes on two cores."""
TEST_LIMIT = 64
"""Test items per task: enough for a standard error of 6 points, few enough to generate in seconds."""
EVAL_BATCH = 100
MERGES = ("average", "least_squares")
"""How the adapters are merged at the end; least squares reads CALIBRATION_TEXTS training items of each task."""
CALIBRATION_TEXTS = 64


@dataclass(frozen=True)
class Row:
    """One task's figures, before and after."""

    task: str
    base: EvalRecord
    adapted: EvalRecord
    training: TrainRecord
    merged: dict[str, EvalRecord] = field(default_factory=dict)

    def kept(self, method: str) -> tuple[float, float] | None:
        """Retention of a merge, (base - merged) / (base - adapter) of the loss, with its standard error."""
        records = (self.base, self.adapted, self.merged[method])
        return retention(*(losses_of_items(record.items) for record in records))

    @property
    def gain(self) -> float:
        """Points of accuracy that the adapter adds."""
        return 100 * ((self.adapted.accuracy or 0.0) - (self.base.accuracy or 0.0))


@dataclass
class Demo:
    """What is trained on what, and where to.

    Args:
        out: Folder for everything.
        model: Name of the base model.
        steps: Optimizer steps of each task; also which tasks there are.
        test_limit: Test items per task.
        console: Where to print.
    """

    out: Path
    model: str = MODEL
    steps: dict[str, int] = field(default_factory=lambda: dict(STEPS))
    test_limit: int = TEST_LIMIT
    console: Console = field(default_factory=Console)

    @cached_property
    def loaded(self) -> LoadedModel:
        """The base model, loaded once and only if something is left to do."""
        from flylora.models import load_model

        self.console.print(f"Loading {self.model} (the first time, its weights are unpacked: half a minute) ...")
        return load_model(self.model)

    def run(self) -> list[Row]:
        """Trains and evaluates what is not done yet, then prints and writes the results."""
        started = time.monotonic()
        rows = [self._task(name, index) for index, name in enumerate(self.steps, start=1)]
        if len(rows) > 1:
            rows = self._merged(rows)
        self._report(rows)
        self.console.print(f"Done in {time.monotonic() - started:.0f} s; everything is in {self.out}.")
        return rows

    def _task(self, name: str, index: int) -> Row:
        self.console.rule(f"{index}/{len(self.steps)}  {name}")
        folder = self.out / name
        base = self._evaluated(name, folder / "base.json", None)
        training = self._trained(name, folder / "adapter", index)
        adapted = self._evaluated(name, folder / "adapted.json", folder / "adapter")
        row = Row(name, base, adapted, training)
        self.console.print(f"{name}: accuracy {percent(base.accuracy)} before, {percent(adapted.accuracy)} after")
        return row

    def _merged(self, rows: list[Row]) -> list[Row]:
        """The rows with every merge of all their adapters, evaluated on each task."""
        folders = [str(self.out / row.task / "adapter") for row in rows]
        found: list[dict[str, EvalRecord]] = [{} for _ in rows]
        for method in MERGES:
            self.console.rule(f"merging {len(rows)} adapters: {method}")
            out = self.out / f"merged_{method}"
            self._merge(method, folders, [row.task for row in rows], out)
            for row, records in zip(rows, found, strict=True):
                self.console.print(f"{row.task}:")
                records[method] = self._evaluated(row.task, self.out / row.task / f"merged_{method}.json", out)
        return [dataclasses.replace(row, merged=records) for row, records in zip(rows, found, strict=True)]

    def _merge(self, method: str, folders: list[str], tasks: list[str], out: Path) -> None:
        calibrated = method == "least_squares"
        config = MergeConfig(
            adapters=folders,
            out=str(out),
            method=cast(Any, method),
            calibrate=tasks if calibrated else [],
            texts=CALIBRATION_TEXTS,
            model=self.model,
            overwrite=True,
        )
        earlier = _record(out / MERGE_RECORD, MergeRecord)
        inputs = [read_adapter(folder).fingerprint for folder in folders]
        same = earlier is not None and [entry["fingerprint"] for entry in earlier.inputs] == inputs
        if same and _agrees(earlier.config, dataclasses.asdict(config)):
            self.console.print("The adapters are merged already.")
            return
        merge_adapters(config, self.loaded if calibrated else None)

    def _trained(self, name: str, out: Path, projection_seed: int) -> TrainRecord:
        config = TrainConfig(
            model=self.model,
            task=name,
            out=str(out),
            steps=self.steps[name],
            adapter={"projection_seed": projection_seed},  # independent projections leave merging the most room
        )
        earlier = _record(out / RECORD_NAME, TrainRecord)
        same = earlier is not None and _same(earlier, name, "train") and _agrees(earlier.config, config.deciding())
        if same and earlier is not None and earlier.status == "complete":
            self.console.print("The adapter is trained already.")
            return earlier
        self.console.print(f"Training for {config.steps} steps of {config.batch_size} items ...")
        return train(dataclasses.replace(config, resume=same, overwrite=not same), self.loaded)

    def _evaluated(self, name: str, out: Path, adapter: Path | None) -> EvalRecord:
        config = EvalConfig(
            model=self.model,
            task=name,
            adapter=None if adapter is None else str(adapter),
            out=str(out),
            limit=self.test_limit,
            batch_size=EVAL_BATCH,
            overwrite=True,
        )
        what = "the base model" if adapter is None else f"the adapter in {adapter}"
        earlier = _record(out, EvalRecord)
        if (
            earlier is not None
            and _same(earlier, name, config.split)
            and _agrees(earlier.config, dataclasses.asdict(config))
            and earlier.adapter_fingerprint == (adapter_fingerprint(adapter) if adapter else None)
        ):
            self.console.print(f"{what[0].upper()}{what[1:]} is evaluated already.")
            return earlier
        self.console.print(f"Evaluating {what} on {self.test_limit} test items ...")
        return evaluate(config, self.loaded)

    def _report(self, rows: list[Row]) -> None:
        table = Table(title=f"{self.model}: FlyLoRA adapters on held-out test items", title_justify="left")
        for heading in _HEADINGS:
            table.add_column(heading, justify="left" if heading == _HEADINGS[0] else "right")
        for row in rows:
            table.add_row(*_cells(row))
        self.console.rule("results")
        self.console.print(table)
        if rows[0].merged:
            kept = Table(title="All adapters merged into one: what each task kept", title_justify="left")
            for heading in _kept_headings():
                kept.add_column(heading, justify="left" if heading == _HEADINGS[0] else "right")
            for cells in _kept_cells(rows):
                kept.add_row(*cells)
            self.console.print(kept)
        write_text(self.out / "results.md", _markdown(self.model, rows))
        write_text(self.out / "results.json", json.dumps(_as_json(self.model, rows), indent=2) + "\n")
        plot(rows, self.out / "results.png", self.model)


_HEADINGS = ("task", "base", "with adapter", "gain (points)", "loss before", "loss after", "training")


def _cells(row: Row) -> list[str]:
    return [
        row.task,
        percent(row.base.accuracy, row.base.accuracy_stderr),
        percent(row.adapted.accuracy, row.adapted.accuracy_stderr),
        f"{row.gain:+.1f}",
        number(row.base.loss),
        number(row.adapted.loss),
        f"{row.training.seconds:.0f} s",
    ]


def _kept_headings() -> list[str]:
    return ["task", "with adapter", *(f"{method}: {what}" for method in MERGES for what in ("accuracy", "retention"))]


def _kept_cells(rows: list[Row]) -> list[list[str]]:
    """A line a task and one for the mean: accuracy and retention under each merge."""
    lines = [[row.task, percent(row.adapted.accuracy, row.adapted.accuracy_stderr)] for row in rows]
    lines.append(["mean", percent(_mean([row.adapted.accuracy or 0.0 for row in rows]))])
    for method in MERGES:
        kept = [row.kept(method) for row in rows]
        for line, row, value in zip(lines, rows, kept, strict=False):
            line.append(percent(row.merged[method].accuracy, row.merged[method].accuracy_stderr))
            line.append("–" if value is None else f"{value[0]:.2f} ± {value[1]:.2f}")
        lines[-1].append(percent(_mean([row.merged[method].accuracy or 0.0 for row in rows])))
        lines[-1].append("–" if None in kept else f"{_mean([value[0] for value in kept if value]):.2f}")
    return lines


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _markdown(model: str, rows: list[Row]) -> str:
    lines = [
        f"# FlyLoRA adapters on {model}, before and after",
        "",
        "| " + " | ".join(_HEADINGS) + " |",
        "| --- |" + " ---: |" * (len(_HEADINGS) - 1),
        *("| " + " | ".join(_cells(row)) + " |" for row in rows),
        "",
        "Accuracy is over held-out test items with greedy decoding, ± one standard error; loss is the mean negative "
        "log-likelihood (nats) per answer token on the same items.",
        "These tasks are for demonstration; results meant to persuade use real benchmarks.",
        "",
        *(
            f"- {row.task}: {row.adapted.items_scored} test items, {row.training.examples} training items, "
            f"{row.training.steps} steps, {row.training.trainable_parameters:,} trained parameters"
            for row in rows
        ),
        "",
        *_kept_markdown(rows),
        f"![accuracy before and after]({'results.png'})",
        "",
    ]
    return "\n".join(lines)


def _kept_markdown(rows: list[Row]) -> list[str]:
    if not rows[0].merged:
        return []
    headings = _kept_headings()
    return [
        "## All adapters merged into one",
        "",
        "| " + " | ".join(headings) + " |",
        "| --- |" + " ---: |" * (len(headings) - 1),
        *("| " + " | ".join(cells) + " |" for cells in _kept_cells(rows)),
        "",
        "Retention is (base loss − merged loss) / (base loss − adapter loss) per answer token, ± one standard error "
        f"over items; least squares read {CALIBRATION_TEXTS} training items of each task and trained nothing.",
        "",
    ]


def _as_json(model: str, rows: list[Row]) -> dict[str, Any]:
    return {
        "model": model,
        "versions": rows[0].adapted.provenance.versions,
        "git_commit": rows[0].adapted.provenance.git_commit,
        "git_dirty": rows[0].adapted.provenance.git_dirty,
        "tasks": {
            row.task: {
                "base_accuracy": row.base.accuracy,
                "base_stderr": row.base.accuracy_stderr,
                "adapter_accuracy": row.adapted.accuracy,
                "adapter_stderr": row.adapted.accuracy_stderr,
                "gain_points": row.gain,
                "base_loss": row.base.loss,
                "adapter_loss": row.adapted.loss,
                "test_items": row.adapted.items_scored,
                "steps": row.training.steps,
                "train_seconds": row.training.seconds,
                "adapter_fingerprint": row.training.adapter_fingerprint,
                "merged": {
                    method: {"accuracy": record.accuracy, "loss": record.loss, "retention": row.kept(method)}
                    for method, record in row.merged.items()
                },
            }
            for row in rows
        },
    }


def plot(rows: list[Row], path: Path, model: str) -> None:
    """Draws accuracy before, after and merged as bars with one standard error each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    series = [
        ("base model", "#b0b7c3", [row.base for row in rows]),
        ("its own adapter", "#2a6fbb", [row.adapted for row in rows]),
    ]
    colours = ("#e0a33a", "#3f9b5f")
    series += [
        (f"all merged: {method.replace('_', ' ')}", colour, [row.merged[method] for row in rows])
        for method, colour in zip(MERGES, colours, strict=True)
        if rows[0].merged
    ]
    width = 0.8 / len(series)
    for index, (label, colour, records) in enumerate(series):
        heights = [100 * (record.accuracy or 0.0) for record in records]
        errors = [100 * (record.accuracy_stderr or 0.0) for record in records]
        places = [place + (index - (len(series) - 1) / 2) * width for place in range(len(rows))]
        bars = axes.bar(places, heights, width, yerr=errors, capsize=3, label=label, color=colour)
        axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    axes.set_xticks(range(len(rows)), [row.task for row in rows])
    axes.set_ylabel("accuracy on held-out items (%)")
    axes.set_ylim(0, 110)
    axes.set_title(f"{model}: held-out accuracy (whiskers: one standard error)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, format="png", dpi=150)
    pyplot.close(figure)
    partial.replace(path)


def _record(path: Path, cls: type[Any]) -> Any:
    try:
        return read_record(path, cls)
    except UserError:
        return None


def _same(record: Record, task: str, split: Any) -> bool:
    """Whether a record was made from the data as they are now."""
    return record.provenance.data_sha256.get(split) == load_task(task).data_hash(split)


def _agrees(stored: dict[str, Any], asked: dict[str, Any]) -> bool:
    return all(stored.get(key) == value for key, value in asked.items())


def main() -> int:
    """Runs the demonstration on every built-in task."""
    assert set(STEPS) == set(task_names())
    try:
        with warnings.catch_warnings():
            # Libraries announce to one another what they will rename; whoever watches can do nothing about it.
            warnings.simplefilter("ignore", FutureWarning)
            Demo(Path("runs/demo")).run()
    except UserError as error:
        print(f"flylora demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; make demo goes on where it stopped.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
