"""What ``flylora export`` can be told. Imports no torch: the command line reads it for its help."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from flylora.errors import UserError

Target = Literal["lora", "full"]
Method = Literal["calibrated", "dense", "regression"]
SaveDType = Literal["auto", "float32", "bfloat16", "float16"]

DEFAULT_TEXTS = 128
DEFAULT_GAP_TEXTS = 64


@dataclass(frozen=True)
class ExportConfig:
    """Settings of one export.

    Args:
        adapter: Folder of the adapter: FlyLoRA of one or several blocks, or a plain PEFT LoRA.
        to: lora (a PEFT LoRA folder) or full (a model folder with the update added to the weights).
        out: Folder for the result.
        method: How a routed adapter becomes linear: calibrated (B refitted to text by least squares), regression (A
            refitted, closer but with n x n statistics; both need calibrate) or dense (the product B A with one scale).
            Adapters that do not route are exported exactly and need none of it.
        calibrate: Text to calibrate on: names or YAML files of tasks (their training split), .txt files (one text a
            line) or .jsonl files (a text, or prompt and completion, a line). Labels are not used.
        texts: Use this many texts of each source, drawn at random.
        ridge: How strongly calibrated is pulled towards dense, and regression towards calibrated, relative to the mean
            energy of projections or inputs; the method's own default if left out.
        rank: Cut the LoRA to this rank; the adapter's own rank if left out.
        moments_gb: For regression: memory for the statistics in GB; the texts are read once more for each such part of
            the modules.
        gap_texts: Measure the gap on this many further texts of each source.
        evaluate: Tasks to measure before and after: base, adapter and export.
        eval_limit: Evaluate this many items of each task, drawn at random; all if left out.
        eval_split: Which part of the tasks' data to evaluate on.
        model: Base model; the adapter's own if left out.
        save_dtype: Of a full model's weights; auto is that of the base model's files.
        shard_gb: Largest weight file of a full model in GB.
        data_dir: Folder that YAML tasks' data files are relative to; each file's own folder if left out.
        batch_size: Texts per forward pass.
        max_length: Longest text of a .txt or .jsonl file in tokens; the rest of it is cut off.
        dtype: Of the base model while it runs; auto is bfloat16 where the device computes in it, else float32.
        device: auto is the first GPU if there is one, else the CPU.
        seed: Of the choice of texts from files.
        overwrite: Replace an export that out already holds.
    """

    adapter: str
    to: Target
    out: str
    method: Method = "calibrated"
    calibrate: list[str] = field(default_factory=list)
    texts: int = DEFAULT_TEXTS
    ridge: float | None = None
    rank: int | None = None
    moments_gb: float = 4.0
    gap_texts: int = DEFAULT_GAP_TEXTS
    evaluate: list[str] = field(default_factory=list)
    eval_limit: int | None = None
    eval_split: Literal["train", "validation", "test"] = "test"
    model: str | None = None
    save_dtype: SaveDType = "auto"
    shard_gb: float = 2.0
    data_dir: str | None = None
    batch_size: int = 8
    max_length: int = 512
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raises ``UserError`` for values that cannot be meant."""
        for name in ("texts", "rank", "gap_texts", "eval_limit", "batch_size", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}.")
        if self.ridge is not None and not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise UserError(f"ridge is {self.ridge}, but must be a finite number of at least 0.")
        for name in ("shard_gb", "moments_gb"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} is {value}, but must be a finite number above 0.")
        if self.rank is not None and self.to == "full":
            raise UserError("rank limits a LoRA and a full model has no such limit: leave it out, or export to lora.")
        if self.save_dtype != "auto" and self.to == "lora":
            raise UserError("save_dtype is for full models, a LoRA is always written in float32: leave it out.")
