"""The demonstration: a study that comes with flylora, and a picture of its accuracies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from flylora.errors import UserError
from flylora.lab.evaluation.record import EvalRecord
from flylora.lab.study.config import DemoOptions, Study, StudyOptions
from flylora.lab.study.plan import plan
from flylora.lab.study.record import EVAL_RECORD, StudyResult, cell_folder
from flylora.lab.study.run import run_study
from flylora.lab.study.study_file import PACKAGED
from flylora.records import read_record, saving, write_text

STUDY = PACKAGED / "demo.yaml"
PICTURE = "results.png"
_COLOURS = ("#b0b7c3", "#2a6fbb", "#e0a33a", "#3f9b5f", "#9a5fb0", "#c44e52")


def run_demo(options: DemoOptions, console: Console | None = None) -> StudyResult:
    """Runs the study of the demonstration, or what is not done of it, and draws its accuracies into results.png.

    Raises:
        UserError: The options do not fit, or nothing can be written.
        TrainingInterrupted: On Ctrl-C or SIGTERM; the same call goes on from there.
    """
    console = console or Console(stderr=True)
    study = StudyOptions(
        str(STUDY),
        out=options.out,
        retry_failed=True,
        model=options.model,
        steps=options.steps,
        eval_limit=options.eval_limit,
    )
    result = run_study(study, console)
    try:
        draw(bars(result.study, result.folder), result.folder / PICTURE, next(iter(result.study.models)))
    except ImportError:
        console.print("There is no picture without matplotlib: pip install 'flylora[plot]'.", markup=False)
    else:
        page = result.folder / "results.md"
        write_text(
            page, page.read_text(encoding="utf-8") + f"\n![accuracy of base model, adapters and merges]({PICTURE})\n"
        )
    return result


@dataclass(frozen=True)
class Bar:
    """The accuracy of one task's items and its standard error over items, in per cent."""

    task: str
    accuracy: float
    error: float


def bars(study: Study, folder: Path) -> dict[str, list[Bar]]:
    """The accuracies of the first method and seed, by what they are of: base model, own adapters, each merge."""
    first = (next(iter(study.methods)), study.seeds[0])
    series: dict[str, list[Bar]] = {}
    for cell in plan(study):
        if cell.kind == "eval" and (cell.method, cell.seed) in ((None, None), first):
            try:
                record = read_record(cell_folder(folder, cell.name) / EVAL_RECORD, EvalRecord)
            except UserError:
                continue  # it failed, which the tables say
            own = "its own adapter" if cell.method else "base model"
            label = f"all merged: {cell.merge.replace('_', ' ')}" if cell.merge else own
            if record.accuracy is not None:
                bar = Bar(cell.task or "", 100 * record.accuracy, 100 * (record.accuracy_stderr or 0.0))
                series.setdefault(label, []).append(bar)
    return series


def draw(series: dict[str, list[Bar]], path: Path, model: str) -> None:
    """Draws accuracies as grouped bars with whiskers of one standard error."""
    import matplotlib  # an extra

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(bar.task for group in series.values() for bar in group))
    width = 0.8 / max(1, len(series))
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for index, (label, group) in enumerate(series.items()):
        drawn = axes.bar(
            [tasks.index(bar.task) + (index - (len(series) - 1) / 2) * width for bar in group],
            [bar.accuracy for bar in group],
            width,
            yerr=[bar.error for bar in group],
            capsize=3,
            label=label,
            color=_COLOURS[index % len(_COLOURS)],
        )
        axes.bar_label(drawn, fmt="%.0f", padding=3, fontsize=8)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylabel("accuracy on held-out items (%)")
    axes.set_ylim(0, 110)
    axes.set_title(f"{model}: held-out accuracy (whiskers: one standard error)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    partial = path.with_name(f".{path.name}")
    with saving(path):
        figure.savefig(partial, format="png", dpi=150)
        partial.replace(path)
    pyplot.close(figure)
