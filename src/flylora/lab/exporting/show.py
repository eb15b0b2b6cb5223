"""An export's record on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from flylora.export.record import ExportRecord
from flylora.lab.show import number, percent

_WHO = ("base", "adapter", "export")


def show_export(record: ExportRecord) -> None:
    """Prints what was written, from which text, and what the export lost."""
    console = Console()
    console.print(_summary(record))
    if record.evaluation:
        console.print(_evaluation(record))
    for note in record.notes:
        console.print(f"Note: {note}", style="yellow", markup=False)


def _summary(record: ExportRecord) -> Table:
    adapter, gap = record.adapter, record.gap
    title = "LoRA" if record.to == "lora" else "full model"
    table = Table(title=f"{title} from {adapter['path']}", show_header=False, title_justify="left")
    table.add_row("result", f"{record.config['out']} ({record.dtype})")
    table.add_row("method", record.method)
    if record.rank is not None:
        table.add_row("rank", f"{record.rank} of {adapter['rank']}")
    for text in record.texts:
        if text["texts"]:
            used = f"{text['texts']:,} texts, {text['tokens']:,} tokens ({text['calibrated_on']})"
            table.add_row(f"calibrated on {text['source']}", used)
    for name, what in (("dense", "the best single scale"), ("fit", "this method"), ("cut", "the rank limit")):
        if name in record.fit:
            table.add_row(f"update missed by {what}", percent(record.fit[name]))
    if gap is not None:
        table.add_row("KL to the adapter", f"{gap['kl']:.2g} ± {gap['kl_stderr']:.1g} nats per token")
        if gap["kl_answer"] is not None:
            table.add_row("KL on answers", f"{gap['kl_answer']:.2g} nats per token")
        table.add_row("same most likely token", percent(gap["agreement"]))
        held_out = ", ".join(f"{text['source']} ({text['held_out']})" for text in record.texts)
        table.add_row("measured on", f"{gap['tokens']:,} tokens of {held_out}")
    return table


def _evaluation(record: ExportRecord) -> Table:
    table = Table(title="Loss per answer token, and accuracy", title_justify="left")
    for column in ("task", "base", "adapter", "export", "gain kept"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for row in record.evaluation:
        cells = [number(row["loss"][who]) for who in _WHO]
        if row["accuracy"]["base"] is not None:
            shares = [percent(row["accuracy"][who], row["accuracy_stderr"][who]) for who in _WHO]
            cells = [f"{loss}, {share}" for loss, share in zip(cells, shares, strict=True)]
        table.add_row(f"{row['task']} ({row['items']:,} items)", *cells, percent(row["kept"], row["kept_stderr"]))
    return table
