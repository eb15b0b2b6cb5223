"""What lm-evaluation-harness measured, on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flylora.lab.evaluation.harness import HarnessRecord


def show_harness(record: HarnessRecord) -> None:
    """Prints every metric of every task with its standard error."""
    config = record.config
    table = Table(
        title=f"lm-evaluation-harness {record.harness}: {config['model']}, adapter {config['adapter'] or 'none'}",
        title_justify="left",
    )
    for heading in ("task", "shots", "items", "metric", "value"):
        table.add_column(heading)
    for task, metrics in record.results.items():
        for name, value in metrics.items():
            metric, _, chosen = name.partition(",")
            if metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            shown = f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
            label = metric if chosen == "none" else f"{metric} ({chosen})"
            counts = (str(found.get(task, "–")) for found in (record.few_shot, record.items_scored))
            table.add_row(*map(Text, (task, *counts, label, shown)))
    console = Console()
    console.print(table)
    for note in record.notes:
        console.print(f"Note: {note}", style="yellow", markup=False)
    if config["out"] is not None:
        console.print(f"Result: {config['out']}", markup=False)
