"""``flylora merge`` and ``flylora calibrate``: the library's merge with the texts, items and losses of tasks."""

from __future__ import annotations

import dataclasses
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from flylora.adapter_folder import read_adapter
from flylora.errors import UserError
from flylora.lab.data import encode
from flylora.lab.evaluation.retention import (
    ItemLosses,
    TaskRetention,
    as_json,
    item_losses,
    markdown,
    mean_retention,
    retention,
    retention_table,
)
from flylora.lab.merging import split_lora  # noqa: F401  lets Split-LoRA adapters be read and merged
from flylora.lab.merging.config import CalibrateConfig, MergeConfig
from flylora.lab.tasks import Task, load_task
from flylora.merging.calibration import GramTable, TaskStatistics
from flylora.merging.engine import RESULTS, RIDGES
from flylora.merging.merge import CalibrationTexts, MergeJob, calibrate, check_options
from flylora.merging.options import MergeOptions
from flylora.merging.record import RECORD_NAME, MergeRecord
from flylora.merging.table import Method, effective_weights
from flylora.models import LoadedModel, load_base
from flylora.records import new_folder, write_record, write_text
from flylora.texts import Encoded

TABLE_NAME = "retention.md"

SEARCH_SCALES = (0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
SEARCH_DENSITIES = (0.1, 0.2, 0.5, 0.9)


def merge_adapters(config: MergeConfig, loaded: LoadedModel | None = None) -> MergeRecord:
    """Merge adapters into ``config.out``, which appears when all is done: adapter, record and, if asked for, a table.

    Args:
        config: settings.
        loaded: the base model, to save loading it; needed only for calibration and evaluation.

    Returns:
        The record, which is also in the folder.

    Raises:
        UserError: the adapters cannot be merged so, or something cannot be read or written; nothing is left behind.
    """
    check_options(config, len(config.adapters), bool(config.calibrate))
    out = Path(config.out)
    with new_folder(out, config.overwrite) as folder:
        job = MergeJob(config.adapters, config, loaded)
        statistics = job.statistics([_source(job, name, config) for name in config.calibrate])
        options: MergeOptions = config
        tried: list[dict[str, Any]] = []
        if config.search:
            options, tried = _search(job, config, statistics)
        report = job.write(folder, statistics, options)
        rows = _evaluation(job, config, folder)
        record = job.record(
            folder,
            report,
            statistics,
            dataclasses.asdict(config),
            parameters=job.parameters(options, report),
            search=tried,
            evaluation=as_json(rows),
            mean_retention=mean_retention(rows) if rows else None,
        )
        write_record(record, folder / RECORD_NAME)
        if rows:
            write_text(folder / TABLE_NAME, markdown(rows))
    return record


def calibrate_adapters(config: CalibrateConfig, loaded: LoadedModel | None = None) -> TaskStatistics:
    """Gather the statistics of one task for a later merge and write them to ``config.out``.

    Raises:
        UserError: adapters, task or model do not fit, or the file cannot be written.
    """
    if loaded is None:
        adapters = [read_adapter(path, tuple(RESULTS)) for path in config.adapters]
        loaded = load_base(adapters, config.model or config.base_model, config.dtype, config.device)
    return calibrate(
        config.adapters,
        task_texts(config.task, loaded, config.texts, config.data_dir),
        config.out,
        run=config.run,
        tokens=config.tokens,
        share=config.share,
        model=loaded,
        base_model=config.base_model,
        batch_size=config.batch_size,
        overwrite=config.overwrite,
    )


# --- texts -----------------------------------------------------------------------------------------------------------


def _source(job: MergeJob, name: str, config: MergeConfig) -> CalibrationTexts | Path:
    """A file of statistics, or the texts of a task."""
    if name.endswith(".safetensors"):
        return Path(name)
    return task_texts(name, job.base(), config.texts, config.data_dir)


def task_texts(name: str, loaded: LoadedModel, wanted: int, data_dir: str | None) -> CalibrationTexts:
    """Training texts of a task for a calibration."""
    task = load_task(name, data_dir)
    data = {"train": task.data_hash("train")}
    origin = {"task": task.name, "task_version": task.version, "data_sha256": data}
    return CalibrationTexts(calibration_rows(task, loaded.tokenizer, wanted), origin)


def calibration_rows(task: Task, tokenizer: PreTrainedTokenizerBase, wanted: int) -> list[Encoded]:
    """Training texts in a seeded order that depends on the task alone, until so many of them have fitted.

    A larger number so begins with the texts of a smaller one, and long texts do not make the number smaller.
    """
    examples = task.examples("train")
    random.Random(f"{task.name}/{task.version}/calibration").shuffle(examples)
    rows: list[Encoded] = []
    for example in examples:
        row = encode(example, tokenizer, task.max_length, task.chat_template, task.truncate_prompt)
        if row is not None:
            rows.append(row)
        if len(rows) == wanted:
            break
    if not rows:
        raise UserError(
            f"None of the {len(examples)} training examples of '{task.name}' fits in {task.max_length} tokens: raise "
            "its max_length."
        )
    return rows


# --- search and evaluation -------------------------------------------------------------------------------------------


def candidates(row: Method, options: MergeOptions, count: int) -> list[MergeOptions]:
    """The grid of a search: a common factor on the weights, densities or ridges, whichever the method has."""
    if row.calibrated:
        return [dataclasses.replace(options, ridge=ridge) for ridge in RIDGES]
    densities: Sequence[float | None] = (options.density,)
    if row.density is not None and options.density is None:
        densities = SEARCH_DENSITIES
    if row.normalises:
        return [dataclasses.replace(options, density=density) for density in densities]
    weights = options.weights or [1.0] * count
    scaled = [[scale * weight for weight in weights] for scale in SEARCH_SCALES]
    return [dataclasses.replace(options, density=density, weights=given) for density in densities for given in scaled]


def _search(
    job: MergeJob, config: MergeConfig, statistics: GramTable | None
) -> tuple[MergeOptions, list[dict[str, Any]]]:
    """The candidate with the best mean retention on the validation split; every one tried is kept for the record."""
    references = [
        (_validation_losses(job, config, None, task), _validation_losses(job, config, adapter.path, task))
        for task, adapter in zip(config.evaluate, job.adapters, strict=True)
    ]
    tried: list[dict[str, Any]] = []
    best: tuple[float, MergeOptions] = (float("-inf"), config)
    for candidate in candidates(job.row, config, len(job.adapters)):
        with tempfile.TemporaryDirectory() as scratch:
            job.write(Path(scratch), statistics, candidate, quiet=True)
            kept = []
            for task, (base, single) in zip(config.evaluate, references, strict=True):
                share = retention(base, single, _validation_losses(job, config, Path(scratch), task))
                if share is None:
                    raise UserError(
                        f"The adapter for {task} is no better than the base model on its validation split, so there is "
                        "nothing to keep: check the order of adapters and tasks."
                    )
                kept.append(share[0])
        mean = sum(kept) / len(kept)
        tried.append(
            {
                "weights": effective_weights(job.row, candidate.weights, len(job.adapters)),
                "density": candidate.density,
                "ridge": candidate.ridge,
                "retention": kept,
                "mean": mean,
            }
        )
        best = max(best, (mean, candidate), key=lambda pair: pair[0])
    return best[1], tried


def _validation_losses(job: MergeJob, config: MergeConfig, adapter: Path | None, task: str) -> ItemLosses:
    return item_losses(
        job.base(),
        adapter,
        task,
        "validation",
        config.search_limit,
        data_dir=config.data_dir,
        batch_size=config.batch_size,
    )


def _evaluation(job: MergeJob, config: MergeConfig, merged: Path) -> list[TaskRetention]:
    if not config.evaluate:
        return []
    return retention_table(
        job.base(),
        [adapter.path for adapter in job.adapters],
        merged,
        config.evaluate,
        config.eval_split,
        config.eval_limit,
        data_dir=config.data_dir,
        batch_size=config.batch_size,
    )
