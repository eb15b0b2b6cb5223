"""The demonstration: one FlyLoRA adapter per built-in task on a real language model, measured before and after.

Run by ``make demo``. Everything lands in runs/demo; what is finished and unchanged there is used again.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from flylora.errors import UserError
from flylora.evaluation import EvalConfig, evaluate
from flylora.evaluation.record import EvalRecord
from flylora.records import Record, read_record, write_text
from flylora.show import number, percent
from flylora.tasks import load_task, task_names
from flylora.training import TrainConfig, train
from flylora.training.record import RECORD_NAME, TrainRecord

if TYPE_CHECKING:
    from flylora.models import LoadedModel

MODEL = "smollm2-135m"
STEPS = {"capitals": 120, "elements": 120, "arithmetic": 120, "python_output": 120}
"""Optimizer steps of 8 items: chosen so that all tasks together take a few minutes on two cores."""
TEST_LIMIT = 100
"""Test items per task: enough for a standard error of 5 points, few enough to generate in seconds."""
EVAL_BATCH = 32


@dataclass(frozen=True)
class Row:
    """One task's figures, before and after."""

    task: str
    base: EvalRecord
    adapted: EvalRecord
    training: TrainRecord

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
        self._report(rows)
        self.console.print(f"Done in {time.monotonic() - started:.0f} s; everything is in {self.out}.")
        return rows

    def _task(self, name: str, index: int) -> Row:
        self.console.rule(f"{index}/{len(self.steps)}  {name}")
        folder = self.out / name
        base = self._evaluated(name, folder / "base.json", None)
        training = self._trained(name, folder / "adapter")
        adapted = self._evaluated(name, folder / "adapted.json", training)
        row = Row(name, base, adapted, training)
        self.console.print(f"{name}: accuracy {percent(base.accuracy)} before, {percent(adapted.accuracy)} after")
        return row

    def _trained(self, name: str, out: Path) -> TrainRecord:
        config = TrainConfig(model=self.model, task=name, out=str(out), steps=self.steps[name])
        earlier = _record(out / RECORD_NAME, TrainRecord)
        same = earlier is not None and _same(earlier, name, "train") and _agrees(earlier.config, config.deciding())
        if same and earlier is not None and earlier.status == "complete":
            self.console.print("The adapter is trained already.")
            return earlier
        self.console.print(f"Training for {config.steps} steps of {config.batch_size} items ...")
        return train(dataclasses.replace(config, resume=same, overwrite=not same), self.loaded)

    def _evaluated(self, name: str, out: Path, training: TrainRecord | None) -> EvalRecord:
        config = EvalConfig(
            model=self.model,
            task=name,
            adapter=None if training is None else str(training.config["out"]),
            out=str(out),
            limit=self.test_limit,
            batch_size=EVAL_BATCH,
            overwrite=True,
        )
        what = "the base model" if training is None else "the adapter"
        earlier = _record(out, EvalRecord)
        if (
            earlier is not None
            and _same(earlier, name, config.split)
            and _agrees(earlier.config, dataclasses.asdict(config))
            and earlier.adapter_fingerprint == (training.adapter_fingerprint if training else None)
        ):
            self.console.print(f"{what.capitalize()} is evaluated already.")
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
        f"![accuracy before and after]({'results.png'})",
        "",
    ]
    return "\n".join(lines)


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
            }
            for row in rows
        },
    }


def plot(rows: list[Row], path: Path, model: str) -> None:
    """Draws accuracy before and after as bars with one standard error each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    width = 0.38
    for offset, label, colour, records in (
        (-width / 2, "base model", "#b0b7c3", [row.base for row in rows]),
        (width / 2, "with FlyLoRA adapter", "#2a6fbb", [row.adapted for row in rows]),
    ):
        heights = [100 * (record.accuracy or 0.0) for record in records]
        errors = [100 * (record.accuracy_stderr or 0.0) for record in records]
        places = [index + offset for index in range(len(rows))]
        bars = axes.bar(places, heights, width, yerr=errors, capsize=4, label=label, color=colour)
        axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_xticks(range(len(rows)), [row.task for row in rows])
    axes.set_ylabel("accuracy on held-out items (%)")
    axes.set_ylim(0, 110)
    axes.set_title(f"{model}: before and after (bars: one standard error)")
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
