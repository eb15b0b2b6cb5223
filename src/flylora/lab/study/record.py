"""What a cell leaves in its folder when it has been tried."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from flylora.records import Record

CELL_RECORD = "cell.json"
EVAL_RECORD = "eval_record.json"
ADAPTER = "adapter"


@dataclass(frozen=True, kw_only=True)
class CellRecord(Record):
    """One cell of a study: done, failed, or skipped because one that it needs failed.

    Attributes:
        name, cell_kind, labels: Which cell.
        inputs: What it was made from besides its config: weights, versions and hashes of tasks, adapters.
        result: Its figures; those of an evaluation's items are in a record of their own beside this one.
        error: Why it failed, in one sentence; ``None`` if it did not.
        because_of: The failed cell that it needs; ``None`` if it ran.
        seconds: Time spent, with loading.
    """

    kind: ClassVar[str] = "cell"

    name: str
    cell_kind: str
    labels: dict[str, Any]
    inputs: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    because_of: str | None = None
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        """Whether there is a result."""
        return self.error is None
