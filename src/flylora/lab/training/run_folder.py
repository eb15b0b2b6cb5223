"""The folder of a training run, and the promise that nothing half-written in it looks finished.

While a run goes on the folder holds its record (status ``running`` or ``interrupted``), metrics and checkpoints. The
adapter's files appear only at the end, adapter_config.json last: no loader takes the folder for an adapter before.
"""

from __future__ import annotations

import json
import shutil
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel

from flylora.errors import UserError
from flylora.inspection import EXPERT_LOAD_FILE
from flylora.lab.training.config import TrainConfig
from flylora.lab.training.record import RECORD_NAME, TrainRecord
from flylora.records import read_record, saving, write_record, write_text
from flylora.tuner.balance import expert_shares

_COMPLETE_MARK = "complete"
_CONFIG_NAME = "adapter_config.json"
# The config comes first because it is removed first and written last.
_ADAPTER_FILES = (_CONFIG_NAME, "adapter_model.safetensors", "README.md", EXPERT_LOAD_FILE)


@dataclass(frozen=True)
class RunFolder:
    """Paths and state of one run."""

    path: Path

    @property
    def record_path(self) -> Path:
        return self.path / RECORD_NAME

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def earlier_run(self, config: TrainConfig) -> TrainRecord | None:
        """The record of the run this one continues; ``None`` if this one starts afresh.

        Raises:
            UserError: The folder holds another run, or other files, and the config does not say to replace the run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file, but training writes a folder: choose another place.")
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return None
        if not self.record_path.is_file():
            raise UserError(
                f"The folder {self.path} is not empty and holds no training run of flylora: choose another folder."
            )
        if config.overwrite:
            return None
        record = read_record(self.record_path, TrainRecord)
        if not config.resume:
            held, go_on = "a finished run", ""
            if record.status != "complete":
                held = f"a run that got to step {record.steps} of {record.total_steps}"
                go_on = "add --resume to go on, "
            raise UserError(
                f"The folder {self.path} already holds {held}: choose another folder, {go_on}or add --overwrite to "
                "replace it."
            )
        asked = json.loads(json.dumps(config.deciding()))
        stored = {key: value for key, value in record.config.items() if key in asked}
        differing = sorted(key for key in asked if asked[key] != stored.get(key))
        if differing:
            raise UserError(
                f"The run in {self.path} cannot be resumed with other settings ({', '.join(differing)}): give the same "
                "ones, or another folder."
            )
        return record

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end."""
        whole = [mark.parent for mark in self.checkpoints.glob(f"checkpoint-*/{_COMPLETE_MARK}")]
        return max(whole, key=checkpoint_step, default=None)

    def mark_complete(self, step: int) -> None:
        """Says that the checkpoint of a step is whole."""
        write_text(self.checkpoints / f"checkpoint-{step}" / _COMPLETE_MARK, "")

    def begin(self, checkpoint: Path | None) -> None:
        """Clears what does not belong to a run that starts from ``checkpoint`` (``None``: from the beginning)."""
        with saving(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for folder in self.checkpoints.iterdir():
                if checkpoint is None or not (folder / _COMPLETE_MARK).is_file():
                    shutil.rmtree(folder)
            for name in _ADAPTER_FILES:
                (self.path / name).unlink(missing_ok=True)
            step = 0 if checkpoint is None else checkpoint_step(checkpoint)
            kept = [line for line in self.metrics() if line["step"] <= step]
            self.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl that are whole."""
        lines = []
        if self.metrics_path.is_file():
            for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
                with suppress(json.JSONDecodeError):  # a killed process may leave half a line
                    lines.append(json.loads(line))
        return lines

    def discard_unless_resumable(self) -> None:
        """After a failure: leaves nothing of a run that has no checkpoint to resume from."""
        if self.last_checkpoint() is not None:
            return
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        for path in (self.record_path, self.metrics_path):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty: something else was put there
            self.path.rmdir()

    def save_adapter(self, model: PeftModel, card: str, initial: Path | None = None) -> None:
        """Writes the adapter beside its place and moves it in, the config last.

        ``initial`` is the untrained adapter of a method that changed the base weights: the difference is written.
        """
        partial = self.path / ".adapter.partial"
        with saving(self.path):
            try:
                # Asking whether the vocabulary changed would look the base model up on the hub.
                with warnings.catch_warnings():
                    # PEFT puts the untrained adapter beside the trained one for a moment, and warns of having done so.
                    warnings.filterwarnings("ignore", message=".* changes the base weights of the model")
                    model.save_pretrained(
                        str(partial),
                        save_embedding_layers=False,
                        path_initial_model_for_weight_conversion=None if initial is None else str(initial),
                    )
                write_text(partial / "README.md", card)
                shares = expert_shares(model)
                if shares:
                    write_text(partial / EXPERT_LOAD_FILE, json.dumps(shares) + "\n")
                for name in reversed(_ADAPTER_FILES):
                    with suppress(FileNotFoundError):  # only flylora has expert loads
                        (partial / name).replace(self.path / name)
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def finish(self, record: TrainRecord) -> None:
        """Writes the final record and removes the checkpoints, which nothing needs any more."""
        write_record(record, self.record_path)
        shutil.rmtree(self.checkpoints, ignore_errors=True)


def checkpoint_step(checkpoint: Path) -> int:
    """The step a checkpoint was written after."""
    return int(checkpoint.name.rpartition("-")[2])
