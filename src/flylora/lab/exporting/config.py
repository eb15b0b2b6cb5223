"""Options of ``flylora export``."""

from __future__ import annotations

from dataclasses import dataclass, field

from flylora.export.options import ExportOptions
from flylora.export.run import GAP_TEXTS
from flylora.lab.tasks.base import Split
from flylora.options import Count, options


@options
@dataclass(frozen=True, kw_only=True)
class ExportConfig(ExportOptions):
    """Options of one export, with tasks and text files.

    Args:
        calibrate: Text to calibrate on: names or YAML files of tasks (their training split), .txt files (one text a
            line) or .jsonl files (a text, or prompt and completion, a line).
        texts: Use this many texts of each source, drawn at random.
        gap_texts: Measure the gap on this many further texts of each source.
        evaluate: Tasks to measure before and after: base, adapter and export.
        eval_limit: Evaluate this many items of each task, drawn at random; all if left out.
        eval_split: Which part of the tasks' data to evaluate on.
        data_dir: Folder that YAML tasks' data files are relative to; each file's own folder if left out.
    """

    calibrate: list[str] = field(default_factory=list)
    texts: Count = 128
    gap_texts: Count = GAP_TEXTS
    evaluate: list[str] = field(default_factory=list)
    eval_limit: Count | None = None
    eval_split: Split = "test"
    data_dir: str | None = None
