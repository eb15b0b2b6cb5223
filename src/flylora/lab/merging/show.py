"""Merges and calibrations on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from flylora.adapter_folder import KINDS
from flylora.lab.merging.config import CalibrateConfig
from flylora.merging.calibration import TaskStatistics
from flylora.merging.record import MergeRecord


def show_merge(record: MergeRecord) -> None:
    """Prints what a merge did and, if it was measured, what was kept."""
    rows = {
        "adapter": str(record.config["out"]),
        "method": record.method + (" (exact)" if record.exact else ""),
        "inputs": ", ".join(f"{entry['weight']:.3g} x {entry['path']}" for entry in record.inputs),
        "sum of weights": f"{record.weight_sum:.3g}",
        "kind": f"{KINDS[record.inputs[0]['kind']].title}, every input's routing kept"
        if record.routed
        else "plain LoRA",
        **{name.replace("_", " "): f"{value:.3g}" for name, value in record.measured.items()},
        "time": f"{record.seconds:,.1f} s",
    }
    _show("merge", rows)
    if record.evaluation:
        Console().print(retention_table(record))


def retention_table(record: MergeRecord) -> Table:
    """Base, single and merged loss per answer token, accuracy and retention, one row a task, with standard errors."""
    table = Table(title="loss per answer token, and what was kept", title_justify="left")
    for column in ("task", "items", "base", "single", "merged", "retention", "accuracy base / single / merged"):
        table.add_column(column)
    for row in record.evaluation:
        losses = [f"{row[who]:.3f} ± {row[who + '_stderr']:.3f}" for who in ("base", "single", "merged")]
        kept = "–" if row["retention"] is None else f"{row['retention']:.3f} ± {row['retention_stderr']:.3f}"
        shares = (row["accuracy"] or {}).values()
        accuracy = " / ".join(f"{100 * share:.1f} ± {100 * error:.1f} %" for share, error in shares) or "–"
        table.add_row(row["task"], f"{row['items']:,}", *losses, kept, accuracy)
    if record.mean_retention is not None:
        mean, error = record.mean_retention
        table.add_row("mean", "", "", "", "", f"{mean:.3f} ± {error:.3f}", "")
    return table


def show_calibration(statistics: TaskStatistics, config: CalibrateConfig) -> None:
    """Prints what a calibration read and where its statistics are."""
    origin = statistics.origin
    rows = {
        "statistics": config.out,
        "task": origin["task"],
        "texts": f"{origin['texts']:,}",
        "tokens counted": f"{origin['token_count']:,.0f} ({origin['tokens']})",
        "adapter that ran": origin["run"],
    }
    _show("calibration", rows)


def _show(title: str, rows: dict[str, str]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
