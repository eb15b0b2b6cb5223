"""Records on the terminal."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from flylora.lab.evaluation.record import EvalRecord
from flylora.lab.examples import Preview, PreviewedExample
from flylora.lab.training.record import TrainRecord


def percent(share: float | None, error: float | None = None) -> str:
    """A share as a percentage with its standard error, such as ``81.2 ± 1.7 %``; a dash for none."""
    if share is None:
        return "–"
    return f"{100 * share:.1f} %" if error is None else f"{100 * share:.1f} ± {100 * error:.1f} %"


def number(value: float | None) -> str:
    """A loss to three decimals; a dash for none."""
    return "–" if value is None else f"{value:.3f}"


def show_training(record: TrainRecord) -> None:
    """Prints what a training run did."""
    config = record.config
    _show(
        f"{config['method']} on {record.task['name']}",
        {
            "adapter": str(config["out"]),
            "base model": f"{config['model']} ({record.dtype})",
            "trained parameters": _parameters(record),
            "items": f"{record.examples:,}" + (f" ({record.dropped:,} too long, left out)" if record.dropped else ""),
            "steps": f"{record.steps:,} in {record.seconds:,.0f} s",
            "loss per answer token": number(record.final_loss),
            **({} if record.validation_loss is None else {"validation loss": number(record.validation_loss)}),
        },
    )


def _parameters(record: TrainRecord) -> str:
    trained, active = record.trainable_parameters, record.active_parameters
    return f"{trained:,}" if active in (None, trained) else f"{trained:,}, of which {active:,} act on a token"


def show_evaluation(record: EvalRecord) -> None:
    """Prints the figures of an evaluation."""
    config = record.config
    rows = {
        "model": f"{config['model']} ({record.dtype})",
        "adapter": str(config["adapter"] or "none"),
        "items": f"{record.items_scored:,} in {record.seconds:,.0f} s",
    }
    if record.accuracy is not None:
        rows["accuracy"] = percent(record.accuracy, record.accuracy_stderr)
    if record.task.get("kind") == "code":
        rows |= {way: percent(share) for way, share in record.accuracies.items()}
    elif len(record.accuracies) > 1:
        rows |= {f"accuracy by {way}": percent(share) for way, share in record.accuracies.items()}
    rows["loss per answer token"] = f"{number(record.loss)} over {record.loss_tokens:,} tokens"
    rows |= {
        f"accuracy on {name}": f"{percent(group['accuracy'])} of {group['items']:,.0f}"
        for name, group in record.groups.items()
    }
    if config["out"] is not None:
        rows["result"] = str(config["out"])
    _show(f"{record.task['name']}, {record.split} split", rows)
    for note in record.notes:
        Console().print(f"Note: {note}", style="yellow", markup=False)


def _show(title: str, rows: dict[str, str]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))  # not markup: names and paths may hold brackets
    Console().print(table)


def preview_panels(preview: Preview) -> RenderableType:
    """Examples in panels, the trained tokens in colour, and a line about all of the split.

    Neighbouring trained tokens differ in shade, so that their boundaries can be seen.
    """
    lengths, dropped = preview.lengths, preview.dropped_ids
    summary = Text(
        f"{preview.task}, {preview.split}: {len(lengths)} examples, {sum(lengths)} tokens "
        f"({sum(lengths) / len(lengths):.1f} each, at most {max(lengths)}), {preview.trained_tokens} of them trained"
    )
    if dropped:
        names = ", ".join(dropped[:5]) + (", …" if len(dropped) > 5 else "")
        summary.append(
            f"\n{len(dropped)} do not fit in {preview.max_length} tokens and are dropped: {names}", style="red"
        )
    return Group(*(_example_panel(example, preview.max_length) for example in preview.shown), summary)


def _example_panel(example: PreviewedExample, max_length: int) -> Panel:
    if not example.tokens:
        return Panel(Text(f"does not fit in {max_length} tokens", style="red"), title=Text(example.id))
    body = Text().append(example.prompt, style="dim")
    shades = ("bold black on green", "bold black on bright_green")
    for number, piece in enumerate(example.trained):
        body.append(piece, style=shades[number % 2])
    counts = f"{example.tokens} tokens, {example.trained_tokens} trained"
    return Panel(body, title=Text(example.id), subtitle=counts, title_align="left", subtitle_align="right")
