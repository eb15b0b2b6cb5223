"""What ``flylora merge`` and ``flylora calibrate`` can be told.

Imports no torch: the command line reads it to print its help.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from flylora.errors import UserError

MethodName = Literal[
    "average",
    "sum",
    "least_squares",
    "ties",
    "dare",
    "dare_ties",
    "magnitude_prune",
    "knots",
    "factor_average",
]
Tokens = Literal["all", "answer", "prompt"]
Split = Literal["train", "validation", "test"]
DType = Literal["auto", "float32", "bfloat16", "float16"]

DEFAULT_TEXTS = 128


@dataclass(frozen=True)
class MergeConfig:
    """Settings of one merge.

    Args:
        adapters: Folders of the adapters to merge, FlyLoRA or plain PEFT LoRA, all of one kind.
        out: Folder for the merged adapter.
        method: How to merge: average, sum, least_squares (routed and exact, or calibrated), ties, dare, dare_ties,
            magnitude_prune or knots (on the updates as matrices).
        weights: One weight for each adapter; 1 each if left out. They are divided by their sum, except for sum, ties,
            dare_ties and knots, which add.
        rank: Limit the rank of a result that does not route (a LoRA); the sum of the inputs' ranks if left out.
        density: Share of each update's entries that the sparsifying methods keep; the method's default if left out.
        ridge: For least_squares: how strongly the weighted average pulls, relative to the codes' mean energy; chosen
            for each module by held-out error if left out.
        calibrate: For least_squares: for each adapter, in order, a task (name or YAML file) or a .safetensors file
            that flylora calibrate wrote.
        texts: Calibration texts of each task, where a task is given.
        tokens: Which tokens of a calibration text count: answer (those that predict it), prompt or all.
        rounds: For least_squares with tasks: passes over the texts; each after the first runs the adapter merged so
            far, so that its own activations are what counts.
        share: Whether adapters that share a projection become one block, with the mean of their routing biases.
        evaluate: Tasks to measure the result on, one for each adapter in order; writes a table of what was kept.
        eval_limit: Measure on this many items of each task, drawn at random; all if left out.
        eval_split: Which part of the tasks' data to measure on.
        search: Tune a shared weight (sum), the density or the ridge on the validation split of the tasks in evaluate.
        search_limit: Search with this many validation items of each task.
        model: Base model, for methods that run it and for evaluate; the adapters' own if left out.
        base_model: The name of the inputs' base model, where their configs give it different names.
        data_dir: Folder that YAML tasks' data files are relative to; each file's own folder if left out.
        batch_size: Items per forward pass.
        dtype: Of the base model; auto is bfloat16 where the device computes in it, else float32.
        device: auto is the first GPU if there is one, else the CPU.
        seed: Of random pruning and of the choice of calibration texts.
        overwrite: Replace an adapter that out already holds.
    """

    adapters: list[str]
    out: str
    method: MethodName = "average"
    weights: list[float] | None = None
    rank: int | None = None
    density: float | None = None
    ridge: float | None = None
    calibrate: list[str] = field(default_factory=list)
    texts: int = DEFAULT_TEXTS
    tokens: Tokens = "answer"
    rounds: int = 1
    share: bool = True
    evaluate: list[str] = field(default_factory=list)
    eval_limit: int | None = None
    eval_split: Split = "test"
    search: bool = False
    search_limit: int = 64
    model: str | None = None
    base_model: str | None = None
    data_dir: str | None = None
    batch_size: int = 8
    dtype: DType = "auto"
    device: str = "auto"
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raises ``UserError`` for values that cannot be meant."""
        if not self.adapters:
            raise UserError("No adapter is given: name the folders of the adapters to merge.")
        if self.weights is not None:
            if len(self.weights) != len(self.adapters):
                raise UserError(
                    f"There are {len(self.weights)} weights for {len(self.adapters)} adapters: give one for each."
                )
            if not all(math.isfinite(weight) for weight in self.weights):
                raise UserError(f"The weights are {self.weights}, but all must be finite numbers.")
        for name in ("rank", "texts", "rounds", "eval_limit", "search_limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}.")
        if self.density is not None and not 0 < self.density <= 1:
            raise UserError(f"density is {self.density}, but the share of entries to keep must lie in (0, 1].")
        if self.ridge is not None and not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise UserError(f"ridge is {self.ridge}, but must be a finite number of at least 0.")
        for name in ("calibrate", "evaluate"):
            given = getattr(self, name)
            if given and len(given) != len(self.adapters):
                raise UserError(
                    f"{name} names {len(given)} tasks for {len(self.adapters)} adapters: give one for each, in order."
                )
        if self.search and not self.evaluate:
            raise UserError("search needs tasks to measure on: name one for each adapter with evaluate.")


@dataclass(frozen=True)
class CalibrateConfig:
    """Settings of one calibration: statistics of one task's tokens under all adapters of a later merge.

    Args:
        adapters: Folders of all adapters that may be merged later.
        task: The task whose texts to use: a built-in name or a YAML file.
        out: The .safetensors file for the statistics.
        run: Adapter folder that is active while the texts are read, e.g. the one trained on the task, or an earlier
            merge; the plain average of the adapters if left out, and none for ``none``.
        texts: How many texts of the task's training split, drawn at random.
        tokens: Which tokens of a text count: answer (those that predict it), prompt or all.
        model: Base model; the adapters' own if left out.
        share: As for the merge.
        base_model: The name of the inputs' base model, where their configs give it different names.
        data_dir: Folder that a YAML task's data files are relative to; the YAML file's own folder if left out.
        batch_size: Texts per forward pass.
        dtype: Of the base model; auto is bfloat16 where the device computes in it, else float32.
        device: auto is the first GPU if there is one, else the CPU.
        overwrite: Replace the file out if it exists.
    """

    adapters: list[str]
    task: str
    out: str
    run: str | None = None
    texts: int = DEFAULT_TEXTS
    tokens: Tokens = "answer"
    model: str | None = None
    share: bool = True
    base_model: str | None = None
    data_dir: str | None = None
    batch_size: int = 8
    dtype: DType = "auto"
    device: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raises ``UserError`` for values that cannot be meant."""
        if not self.adapters:
            raise UserError("No adapter is given: name the folders of the adapters to calibrate for.")
        for name in ("texts", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not self.out.endswith(".safetensors"):
            raise UserError(
                f"out is {self.out}, but the statistics are one file: give a name that ends in .safetensors."
            )
