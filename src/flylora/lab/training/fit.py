"""One training run, as a thin layer over TRL's SFTTrainer."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import ProgressCallback
from trl import SFTConfig, SFTTrainer

from flylora.errors import UserError
from flylora.lab.baselines.counts import ParameterCount, count_adapter
from flylora.lab.data import EncodedSet, encode_all, sorted_micro_batches
from flylora.lab.labelled import labelled_logits
from flylora.lab.tasks import Split, Task, load_task
from flylora.lab.training.callbacks import LossBar, RunCallback
from flylora.lab.training.config import DEFAULT_EPOCHS, TrainConfig
from flylora.lab.training.interrupt import TrainingInterrupted, catching_interrupts
from flylora.lab.training.methods import Setup, method_config, needs_flylora, set_up
from flylora.lab.training.presets import Run, preset
from flylora.lab.training.record import TrainRecord
from flylora.lab.training.run_folder import RunFolder, checkpoint_step
from flylora.models import LoadedModel, first_line, load_model, take_off
from flylora.records import Status, adapter_fingerprint, is_disk_full, now, provenance, write_record
from flylora.texts import CompletionCollator

logger = logging.getLogger(__name__)


def fit(config: TrainConfig, loaded: LoadedModel | None = None) -> TrainRecord:
    """Trains one adapter and writes its folder: adapter_config.json, adapter_model.safetensors, train_record.json,
    metrics.jsonl and README.md.

    Resuming after an interruption gives, on a CPU, bit for bit the adapter that an uninterrupted run gives.

    Args:
        config: Settings; ``config.out`` must be empty or hold the same run with ``config.resume``.
        loaded: The model that ``config.model`` names, to save loading it; given back without an adapter.

    Returns:
        The record, which is also in the folder. A run that is complete already is returned as it is.

    Raises:
        UserError: Settings, data or model are not what they should be, or the disk is full.
        TrainingInterrupted: Stopped by SIGINT or SIGTERM, after saving a checkpoint.
    """
    folder = RunFolder(Path(config.out))
    earlier = folder.earlier_run(config)
    if earlier is not None and earlier.status == "complete":
        logger.warning("The run in %s is complete already; nothing to do.", folder.path)
        return earlier
    _check_method(config, folder)
    task = load_task(config.task, config.data_dir)
    loaded = loaded or load_model(config.model, config.dtype, config.device)
    train_set = _encoded(task, "train", config.train_limit, config, loaded)
    validation = _encoded(task, "validation", config.eval_limit, config, loaded) if config.eval_steps else None
    run = Run(_total_steps(config, len(train_set.items)), loaded.model)
    method = method_config(config.method, config.adapter, run)
    base_parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    with set_up(loaded.model, config.method, method, config.seed, config.lr, config.weight_decay) as setup:
        try:
            count = count_adapter(setup.model, base_parameters)
            record = _new_record(config, loaded, task, train_set, count, earlier)
            return _run(config, folder, loaded, setup, train_set, validation, record)
        finally:
            _give_back(loaded, setup.model)


def _check_method(config: TrainConfig, folder: RunFolder) -> None:
    """Refuse a method's options, and a continuation it is not capable of, before anything is loaded."""
    method_config(config.method, config.adapter, Run(config.steps or sys.maxsize))
    if config.resume and not preset(config.method).resumable and folder.last_checkpoint() is not None:
        raise UserError(
            f"A run of {config.method} cannot go on from a checkpoint, which does not hold all of the method's state: "
            "add --overwrite instead of --resume to start again."
        )


def _encoded(task: Task, split: Split, limit: int | None, config: TrainConfig, loaded: LoadedModel) -> EncodedSet:
    chat = task.chat_template if config.chat_template is None else config.chat_template
    length = config.max_length or task.max_length
    found = encode_all(task.examples(split, limit), loaded.tokenizer, length, chat, task.truncate_prompt)
    if found.dropped:
        logger.warning(
            "%d of %d %s items do not fit in %d tokens and are left out.",
            found.dropped,
            found.dropped + len(found.items),
            split,
            length,
        )
    return found


def _new_record(
    config: TrainConfig,
    loaded: LoadedModel,
    task: Task,
    train_set: EncodedSet,
    count: ParameterCount,
    earlier: TrainRecord | None,
) -> TrainRecord:
    splits: tuple[Split, ...] = ("train", "validation") if config.eval_steps else ("train",)
    origin = provenance(
        seeds={"seed": config.seed},
        data_sha256={split: task.data_hash(split) for split in splits},
        model_sha256=loaded.sha256,
    )
    if earlier is not None:
        _check_same_inputs(earlier, origin.data_sha256, origin.model_sha256, loaded.dtype)
        origin = dataclasses.replace(origin, started=earlier.provenance.started)
    return TrainRecord(
        status="running",
        provenance=origin,
        config=dataclasses.asdict(config),
        task={"name": task.name, "version": task.version},
        dtype=loaded.dtype,
        examples=len(train_set.items),
        dropped=train_set.dropped,
        dropped_ids=train_set.dropped_ids,
        learnt_tokens=train_set.trained_tokens,
        trainable_parameters=count.trained,
        active_parameters=count.active,
        paper_percent=round(count.paper_percent, 4),
        total_steps=_total_steps(config, len(train_set.items)),
        steps=0 if earlier is None else earlier.steps,
        seconds=0.0 if earlier is None else earlier.seconds,
    )


def _check_same_inputs(earlier: TrainRecord, data_sha256: dict[str, str], model_sha256: str, dtype: str) -> None:
    for what, was, is_ in (
        ("data", earlier.provenance.data_sha256, data_sha256),
        ("base model", earlier.provenance.model_sha256, model_sha256),
        ("dtype", earlier.dtype, dtype),
    ):
        if was != is_:
            raise UserError(
                f"The run cannot be resumed because its {what} is not what it was: restore it, or add --overwrite "
                "instead of --resume to start again."
            )


def _total_steps(config: TrainConfig, items: int) -> int:
    if config.steps is not None:
        return config.steps
    per_epoch = math.ceil(items / config.batch_size)
    return max(1, math.ceil((config.epochs or DEFAULT_EPOCHS) * per_epoch))


def _run(
    config: TrainConfig,
    folder: RunFolder,
    loaded: LoadedModel,
    setup: Setup,
    train_set: EncodedSet,
    validation: EncodedSet | None,
    record: TrainRecord,
) -> TrainRecord:
    checkpoint = folder.last_checkpoint() if config.resume else None
    if _is_main_process():
        folder.begin(checkpoint)
    seconds_before, started = record.seconds, time.monotonic()

    def note(steps: int, status: Status) -> None:
        nonlocal record
        seconds = round(seconds_before + time.monotonic() - started, 1)
        record = dataclasses.replace(record, steps=steps, seconds=seconds, status=status)
        write_record(record, folder.record_path)

    try:
        with _explaining_full_disk(folder), catching_interrupts() as interrupt:
            if _is_main_process():
                note(checkpoint_step(checkpoint) if checkpoint else 0, "running")
            callback = RunCallback(folder, interrupt, lambda steps: note(steps, "running"))
            trainer = _trainer(config, folder, loaded, setup, train_set, validation, record.total_steps, callback)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            steps = trainer.state.global_step
            if interrupt.requested and steps < record.total_steps:
                note(steps, "interrupted")
                raise TrainingInterrupted(
                    f"Stopped at step {steps} of {record.total_steps}; the checkpoint is in {folder.checkpoints}. "
                    + _how_to_go_on(config)
                )
            if not _is_main_process():
                return record
            note(steps, "running")
            folder.save_adapter(trainer.model, _card(config, record), setup.initial)
            record = _finished(record, folder)
            folder.finish(record)
            return record
    except BaseException:
        if _is_main_process():
            folder.discard_unless_resumable()
        raise


def _how_to_go_on(config: TrainConfig) -> str:
    if preset(config.method).resumable:
        return "To go on, give the same command with --resume."
    return f"A run of {config.method} cannot be resumed: to start again, give the same command with --overwrite."


class _AdapterTrainer(SFTTrainer):
    """SFTTrainer that writes the adapter alone: no pickled arguments, no copies of the tokenizer, no model card."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            # Asking whether the vocabulary changed would look the base model up on the hub.
            self.model.save_pretrained(output_dir or self.args.output_dir, save_embedding_layers=False)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The micro-batches of one step. Which of its items share one decides nothing but how much padding there is."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        return sorted_micro_batches(batches), items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss. Where there is no Triton, TRL scores every position of a batch, prompts and padding too; on a CPU
        the same number is computed from the labelled ones alone."""
        elsewhere = inputs["input_ids"].device.type != "cpu" or self.accelerator.num_processes > 1
        if elsewhere or return_outputs or self.aux_loss_enabled:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        logits, labels, _ = labelled_logits(model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
        total = cross_entropy(logits, labels, reduction="sum")
        return total / max(1, len(labels) if num_items_in_batch is None else int(num_items_in_batch))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The run folder has its own card."""

    def _send_telemetry(self) -> None:
        """Training on one's own machine tells nobody."""


def _trainer(
    config: TrainConfig,
    folder: RunFolder,
    loaded: LoadedModel,
    setup: Setup,
    train_set: EncodedSet,
    validation: EncodedSet | None,
    total_steps: int,
    callback: RunCallback,
) -> SFTTrainer:
    try:
        trainer = _AdapterTrainer(
            model=setup.model,
            args=_arguments(config, folder, loaded, total_steps),
            data_collator=CompletionCollator(),
            train_dataset=_dataset(train_set),
            eval_dataset=None if validation is None else _dataset(validation),
            processing_class=loaded.tokenizer,
            callbacks=[callback, *setup.callbacks],
            optimizers=(setup.optimizer, None),
        )
    except UserError:
        raise
    except (ImportError, RuntimeError, ValueError) as error:  # a tracker that is not installed, an adapted lm_head
        raise UserError(f"The trainer refuses these settings ({first_line(error)}): change them.") from error
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossBar())
    return trainer


def _dataset(encoded: EncodedSet) -> Dataset:
    return Dataset.from_list([dataclasses.asdict(item) for item in encoded.items])


def _arguments(config: TrainConfig, folder: RunFolder, loaded: LoadedModel, total_steps: int) -> SFTConfig:
    device = loaded.model.device.type
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch_size % (config.micro_batch * processes):
        raise UserError(
            f"batch_size {config.batch_size} is not a multiple of micro_batch_size {config.micro_batch} times "
            f"{processes} processes: choose one that is."
        )
    return SFTConfig(
        output_dir=str(folder.checkpoints),
        max_steps=total_steps,
        per_device_train_batch_size=config.micro_batch,
        per_device_eval_batch_size=config.micro_batch,
        gradient_accumulation_steps=config.batch_size // (config.micro_batch * processes),
        learning_rate=config.lr,
        # A number below 1 is read as a share of all steps.
        warmup_steps=config.warmup_ratio,
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.gradient_checkpointing,
        seed=config.seed,
        # The base already has its dtype and adapters compute in theirs; only float16 gradients need scaling.
        bf16=False,
        fp16=loaded.dtype == "float16" and device == "cuda",
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        save_strategy="steps",
        save_steps=config.save_steps,
        # Two, so that a checkpoint is never the only one while it is being written.
        save_total_limit=2,
        eval_strategy="steps" if config.eval_steps else "no",
        eval_steps=config.eval_steps,
        logging_steps=config.logging_steps,
        # A loss that is not a number must be seen, not replaced by the mean of those before.
        logging_nan_inf_filter=False,
        report_to=config.report_to or "none",
        disable_tqdm=False,
        # Items come encoded, with labels, none longer than they may be.
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


@contextmanager
def _explaining_full_disk(folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_disk_full(error) and not (error.__cause__ is not None and is_disk_full(error.__cause__)):
            raise
        kept = folder.last_checkpoint()
        going_on = (
            "then give the same command again"
            if kept is None
            else f"then give the same command with --resume to go on from step {checkpoint_step(kept)}"
        )
        raise UserError(f"No space is left on the disk for {folder.path}: free some, {going_on}.") from error


def _finished(record: TrainRecord, folder: RunFolder) -> TrainRecord:
    lines = folder.metrics()
    losses = [
        line["loss"] for line in lines if line.get("loss") is not None and line["step"] > 0.9 * record.total_steps
    ]
    validation = [line["eval_loss"] for line in lines if line.get("eval_loss") is not None]
    if any("loss" in line and line["loss"] is None for line in lines):
        logger.warning("The loss was not a finite number at some steps, so the adapter is no good: lower lr.")
    return dataclasses.replace(
        record,
        status="complete",
        provenance=dataclasses.replace(record.provenance, finished=now()),
        final_loss=sum(losses) / len(losses) if losses else None,
        validation_loss=validation[-1] if validation else None,
        adapter_fingerprint=adapter_fingerprint(folder.path),
    )


def _card(config: TrainConfig, record: TrainRecord) -> str:
    name = preset(config.method).kind.upper()
    needs = f"import flylora  # makes {name} known to PEFT; without it loading stops with KeyError: '{name}'\n"
    return f"""---
library_name: peft
tags:
- {config.method.lower()}
---

# {config.method.lower()} adapter for {config.model}, trained on {record.task["name"]}

| | |
| --- | --- |
| base model | {config.model} (sha256 of its weights {record.provenance.model_sha256[:16]}) |
| task | {record.task["name"]}, version {record.task["version"]} |
| trainable parameters | {record.trainable_parameters:,} |
| steps | {record.steps} of {config.batch_size} items |

```python
{needs if needs_flylora(config.method) else ""}from flylora.models import load_model
from peft import PeftModel

model = PeftModel.from_pretrained(load_model({config.model!r}).model, "path/of/this/folder")
```

Settings, versions and hashes are in train_record.json, the course of training in metrics.jsonl.
"""


def _give_back(loaded: LoadedModel, model: PeftModel) -> None:
    """Takes the adapter and the trainer's changes off the base model, for whoever uses it next."""
    base = loaded.model
    take_off(model)
    vars(base).pop("forward", None)  # TRL sets a forward of its own on the instance
    base.gradient_checkpointing_disable()
    base.disable_input_require_grads()
    base.eval()


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
