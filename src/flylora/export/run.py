"""One export: an adapter in, a folder that needs no flylora out, and the gap between the two measured."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel

from flylora.activations import features, modules_by_name
from flylora.adapted import adapted, trained_on_other_weights
from flylora.adapter_folder import SavedAdapter, read_adapter
from flylora.errors import UserError
from flylora.export.config import ExportConfig
from flylora.export.factors import LinearFactors, check_method, linear_factors
from flylora.export.full import add_updates, write_full
from flylora.export.gap import Gap, GapMeter
from flylora.export.lora import write_lora
from flylora.export.moments import gather_moments, parts
from flylora.export.record import RECORD_NAME, ExportRecord
from flylora.export.texts import Texts, read_texts
from flylora.lab.evaluation.config import EvalConfig
from flylora.lab.evaluation.record import EvalRecord
from flylora.lab.evaluation.retention import ItemLosses, retention
from flylora.lab.evaluation.run import OTHER_WEIGHTS
from flylora.lab.evaluation.run import run as evaluate
from flylora.lab.tasks import load_task
from flylora.lab.training.record import RECORD_NAME as TRAIN_RECORD
from flylora.lab.training.record import TrainRecord
from flylora.models import LoadedModel, load_base, load_model
from flylora.records import file_sha256, new_folder, now, provenance, read_record, refuse_existing, write_record
from flylora.texts import Encoded

NOT_MEASURED = (
    "The gap between adapter and export was not measured, because there was no text: name a task or a text file with "
    "--calibrate or --evaluate."
)
EXACT = "The adapter does not route, so the export is exact up to rounding and no text was needed for it."
_PREDICTIONS = ".predictions"


@dataclass
class _Export:
    """What the steps of one export share.

    Attributes:
        loaded: the base model as it runs; its place in memory is given up before a full model is written.
    """

    config: ExportConfig
    adapter: SavedAdapter
    linear: bool
    loaded: LoadedModel
    texts: list[Texts]
    notes: list[str] = field(default_factory=list)


def run(config: ExportConfig, loaded: LoadedModel | None = None) -> ExportRecord:
    """Export an adapter to a plain LoRA or to full weights.

    Args:
        config: settings.
        loaded: the base model, to save loading it; given back as it was.

    Returns:
        The record, which is also in the folder written.

    Raises:
        UserError: settings, adapter, text or model are not what they should be, or the result cannot be written;
            nothing is left behind then.
    """
    started, out = time.monotonic(), Path(config.out)
    refuse_existing(out, config.overwrite, RECORD_NAME)
    adapter = read_adapter(config.adapter)
    linear = check_method(adapter, config.method, bool(config.calibrate), config.rank)
    for name in config.evaluate:
        load_task(name, config.data_dir).examples(config.eval_split, 1)
    loaded = loaded or load_base([adapter], config.model, config.dtype, config.device)
    work = _Export(config, adapter, linear, loaded, _read_texts(config, adapter, loaded))
    origin = provenance(
        seeds={"seed": config.seed},
        data_sha256={name: digest for text in work.texts for name, digest in text.sha256.items()},
        model_sha256=loaded.sha256,
    )
    base_dtype = loaded.dtype
    del loaded  # a full export loads its own later; the caller's, if there is one, stays
    with new_folder(out, config.overwrite, RECORD_NAME) as folder:
        factors, meter, before = _measure_before(work, folder)
        dtype, gap, after = _write(work, factors, folder, meter)
        (folder / _PREDICTIONS).unlink(missing_ok=True)
        record = ExportRecord(
            status="complete",
            provenance=dataclasses.replace(origin, finished=now()),
            config=dataclasses.asdict(config),
            adapter={
                "path": str(adapter.path),
                "fingerprint": adapter.fingerprint,
                "kind": adapter.kind,
                "base_model": adapter.base_model,
                "routes": not linear,
                "rank": max(map(adapter.rank, adapter.modules)),
                "blocks": max(len(adapter.blocks(module)) for module in adapter.modules),
            },
            to=config.to,
            method="exact" if linear else config.method,
            rank=max(found.up.shape[1] for found in factors) if config.to == "lora" else None,
            dtype=dtype,
            base_dtype=base_dtype,
            texts=[_described(text) for text in work.texts],
            fit=_mean_errors(factors),
            gap=None if gap is None else dataclasses.asdict(gap),
            evaluation=[_compared(*records) for records in zip(*before, after, strict=True)],
            files={path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.is_file()},
            notes=work.notes,
            seconds=round(time.monotonic() - started, 1),
        )
        write_record(record, folder / RECORD_NAME)
    return record


def _read_texts(config: ExportConfig, adapter: SavedAdapter, loaded: LoadedModel) -> list[Texts]:
    """The text to calibrate on; without any, that of the evaluated tasks or of the adapter's own, to measure on."""
    sources, data_dir = config.calibrate or config.evaluate, config.data_dir
    if not sources and (adapter.path / TRAIN_RECORD).is_file():
        trained = read_record(adapter.path / TRAIN_RECORD, TrainRecord).config
        sources, data_dir = [trained["task"]], data_dir or trained["data_dir"]
        try:
            load_task(sources[0], data_dir).examples("train", 1)
        except UserError:  # its data may be elsewhere now; a note says that nothing was measured
            sources = []
    return [
        read_texts(
            source,
            loaded.tokenizer,
            fit=config.texts if config.calibrate else 0,
            held_out=config.gap_texts,
            data_dir=data_dir,
            max_length=config.max_length,
            seed=config.seed,
        )
        for source in sources
    ]


def _interleaved(lists: Sequence[Sequence[Encoded]]) -> list[Encoded]:
    """One of each in turn, so that whatever is cut off at the end is cut off all of them."""
    return [row for rows in itertools.zip_longest(*lists) for row in rows if row is not None]


# --- before ------------------------------------------------------------------------------------------------------


def _measure_before(
    work: _Export, folder: Path
) -> tuple[list[LinearFactors], GapMeter | None, tuple[list[EvalRecord], list[EvalRecord]]]:
    """Fit the linear maps, and measure base model and adapter."""
    config, held_out = work.config, _interleaved([text.held_out for text in work.texts])
    meter = GapMeter(held_out, config.batch_size, folder / _PREDICTIONS) if held_out else None
    with adapted(work.loaded, work.adapter.path) as (model, _):
        factors = _fit(work, model)
        if meter is not None:
            meter.record(model)
    before = _evaluated(work, work.loaded, None), _evaluated(work, work.loaded, work.adapter.path)
    work.notes += [EXACT] if work.linear else []
    work.notes += [NOT_MEASURED] if meter is None else []
    work.notes += [OTHER_WEIGHTS] if trained_on_other_weights(work.adapter.path, work.loaded) else []
    return factors, meter, before


def _fit(work: _Export, model: PeftModel) -> list[LinearFactors]:
    """The linear map of every module; with moments of the inputs, some modules at a time."""
    config, adapter = work.config, work.adapter
    rows = _interleaved([text.fit for text in work.texts])
    needs_text = config.rank is not None if work.linear else True
    inputs = config.method == "regression" and not work.linear
    found = []
    for names in parts(adapter, model, inputs, config.moments_gb):
        moments = {}
        if config.calibrate and needs_text:
            moments = gather_moments(model, adapter, names, rows, config.batch_size, inputs=inputs)
        for name, module in modules_by_name(model, names).items():
            factors = adapter.with_in_features(adapter.factors(name), features(module)[0])
            found.append(linear_factors(factors, config.method, config.ridge, config.rank, moments.pop(name, None)))
    return found


# --- writing and after -------------------------------------------------------------------------------------------


def _write(
    work: _Export, factors: list[LinearFactors], folder: Path, meter: GapMeter | None
) -> tuple[str, Gap | None, list[EvalRecord]]:
    """Write the result, load it as anybody would, and measure it: its dtype, the gap and the evaluations."""
    config, loaded = work.config, work.loaded
    if config.to == "lora":
        write_lora(folder, work.adapter, factors, loaded.model)
        with adapted(loaded, folder) as (model, _):
            gap = None if meter is None else meter.compare(model)
        return "float32", gap, _evaluated(work, loaded, folder)
    source, dtype, device = loaded.source, config.dtype, config.device
    del loaded, work.loaded  # one copy of the model at a time
    stored = load_model(source, "stored", "cpu")
    add_updates(stored.model, factors)
    write_full(folder, stored.model, stored.tokenizer, config.save_dtype, config.shard_gb)
    written = stored.dtype
    del stored
    if meter is None and not config.evaluate:
        return written, None, []
    exported = load_model(str(folder), dtype, device)
    return written, None if meter is None else meter.compare(exported.model), _evaluated(work, exported, None)


def _evaluated(work: _Export, loaded: LoadedModel, adapter: Path | None) -> list[EvalRecord]:
    config = work.config
    return [
        evaluate(
            EvalConfig(
                model=loaded.source,
                task=task,
                adapter=None if adapter is None else str(adapter),
                data_dir=config.data_dir,
                split=config.eval_split,
                limit=config.eval_limit,
                batch_size=config.batch_size,
            ),
            loaded,
        )
        for task in config.evaluate
    ]


# --- the record --------------------------------------------------------------------------------------------------


def _described(text: Texts) -> dict[str, Any]:
    return {
        "source": text.name,
        "calibrated_on": text.fit_from if text.fit else None,
        "texts": len(text.fit),
        "tokens": sum(len(row.input_ids) for row in text.fit),
        "held_out": text.held_out_from,
        "held_out_texts": len(text.held_out),
    }


def _mean_errors(factors: Sequence[LinearFactors]) -> dict[str, float]:
    names = dict.fromkeys(name for found in factors for name in found.errors)
    values = {name: [found.errors[name] for found in factors if name in found.errors] for name in names}
    return {name: math.fsum(found) / len(found) for name, found in values.items()}


def _compared(base: EvalRecord, adapter: EvalRecord, export: EvalRecord) -> dict[str, Any]:
    """One row of the table: the same items under the three models."""
    records = {"base": base, "adapter": adapter, "export": export}
    losses = [_item_losses(record) for record in records.values()]
    kept = retention(*losses) if all(found.tokens for found in losses) else None
    return {
        "task": base.task["name"],
        "split": base.split,
        "items": base.items_scored,
        "loss_tokens": base.loss_tokens,
        "loss": {who: record.loss for who, record in records.items()},
        "accuracy": {who: record.accuracy for who, record in records.items()},
        "accuracy_stderr": {who: record.accuracy_stderr for who, record in records.items()},
        "kept": None if kept is None else kept[0],
        "kept_stderr": None if kept is None else kept[1],
    }


def _item_losses(record: EvalRecord) -> ItemLosses:
    measured = [(item["loss"], item["loss_tokens"]) for item in record.items if item["loss"] is not None]
    return ItemLosses([loss * count for loss, count in measured], [count for _, count in measured])
