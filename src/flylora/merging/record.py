"""What a merge did: inputs, method, parameters, and what was kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from flylora.records import Record

RECORD_NAME = "merge_record.json"


@dataclass(frozen=True, kw_only=True)
class MergeRecord(Record):
    """One merge.

    Attributes:
        method: its name. exact: whether the output is exactly the weighted sum of the inputs' outputs.
        inputs: path, fingerprint, kind, weight and base model of each input.
        weight_sum: of the weights as applied.
        routed: whether the result routes (FlyLoRA) or is a plain LoRA.
        shared: whether the inputs shared one projection.
        adapter_fingerprint: of the result.
        parameters: density, rank or ridge as they were used.
        measured: mean and largest relative error of a rank limit; least squares' error relative to the average's.
        calibration: where each task's statistics come from.
        search: what was tried on the validation split, with the retention there.
        evaluation: one row a task, see `retention.TaskRetention`. mean_retention: value and standard error.
    """

    kind: ClassVar[str] = "merge"

    method: str
    exact: bool
    inputs: list[dict[str, Any]]
    weight_sum: float
    routed: bool
    shared: bool
    adapter_fingerprint: str
    parameters: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    calibration: list[dict[str, Any]] = field(default_factory=list)
    search: list[dict[str, Any]] = field(default_factory=list)
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    mean_retention: tuple[float, float] | None = None
    seconds: float = 0.0
