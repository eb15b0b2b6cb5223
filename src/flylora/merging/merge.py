"""``flylora merge``: load, check, merge, write, record, and measure what was kept."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flylora.adapter_folder import Kind, SavedAdapter, read_adapter
from flylora.errors import UserError
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
from flylora.merging.calibration import GramTable, Running, TaskStatistics, read_statistics, task_statistics
from flylora.merging.config import MergeConfig
from flylora.merging.engine import RIDGES, MergeReport, MergeSpec, Statistics, check_method, merge_to
from flylora.merging.layout import Layout, check_compatible, plan
from flylora.merging.record import RECORD_NAME, MergeRecord
from flylora.merging.table import Method, effective_weights, method
from flylora.models import LoadedModel, load_base
from flylora.records import new_folder, now, provenance, refuse_existing, saving, write_record, write_text

TABLE_NAME = "retention.md"

MERGED_KINDS: tuple[Kind, ...] = ("flylora", "lora", "splitlora")

SEARCH_SCALES = (0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
SEARCH_DENSITIES = (0.1, 0.2, 0.5, 0.9)


@dataclass
class _Job:
    """One merge under way."""

    config: MergeConfig
    row: Method
    adapters: list[SavedAdapter]
    layout: Layout
    loaded: LoadedModel | None

    def base(self) -> LoadedModel:
        """The base model, loaded when it is first needed."""
        if self.loaded is None:
            name = self.config.model or self.config.base_model
            self.loaded = load_base(self.adapters, name, self.config.dtype, self.config.device)
        return self.loaded


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
    started = time.monotonic()
    row = method(config.method)
    _check_options(config, row)
    out = Path(config.out)
    refuse_existing(out, config.overwrite)
    adapters = [read_adapter(path, MERGED_KINDS) for path in config.adapters]
    check_compatible(adapters, config.base_model)
    check_method(row, adapters[0].kind, config.rank)
    job = _Job(config, row, adapters, plan(adapters, config.share), loaded)
    origin = provenance(seeds={"seed": config.seed}, data_sha256={}, model_sha256=loaded.sha256 if loaded else "")
    spec = MergeSpec(
        config.method,
        None if config.weights is None else tuple(config.weights),
        config.rank,
        config.density,
        config.ridge,
        config.share,
        config.seed,
    )
    with _scratch_beside(out) as scratch, ThreadPoolExecutor(max_workers=2) as pool:
        # Hashing takes longer than an average does, and leaves Python's lock to others.
        hashing = [pool.submit(lambda adapter: adapter.fingerprint, adapter) for adapter in adapters]
        statistics, sources = _statistics(job, spec, scratch)
        tried: list[dict[str, Any]] = []
        if config.search:
            spec, tried = _search(job, spec, statistics, scratch)
        merged = scratch / "merged"
        report = merge_to(merged, adapters, spec, statistics, base_model=config.base_model)
        rows = _evaluation(job, merged)
        for future in hashing:
            future.result()
        record = MergeRecord(
            status="complete",
            provenance=dataclasses.replace(
                origin, finished=now(), model_sha256=job.loaded.sha256 if job.loaded else origin.model_sha256
            ),
            config=dataclasses.asdict(config),
            method=row.name,
            exact=row.exact and _exact(job, report),
            inputs=_inputs(adapters, report.weights),
            weight_sum=sum(report.weights),
            routed=report.routed,
            shared=report.shared,
            adapter_fingerprint=read_adapter(merged, MERGED_KINDS).fingerprint,
            parameters=_parameters(row, spec, report),
            measured=_measured(report),
            calibration=sources,
            search=tried,
            evaluation=as_json(rows),
            mean_retention=mean_retention(rows) if rows else None,
            seconds=round(time.monotonic() - started, 2),
        )
        write_record(record, merged / RECORD_NAME)
        if rows:
            write_text(merged / TABLE_NAME, markdown(rows))
        with new_folder(out, config.overwrite) as folder:
            for file in merged.iterdir():
                file.rename(folder / file.name)
    return record


@contextmanager
def _scratch_beside(out: Path) -> Iterator[Path]:
    """A scratch folder on the same disk as the result, so that moving into place copies nothing; removed at the end."""
    with saving(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".work", dir=out.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check_options(config: MergeConfig, row: Method) -> None:
    """Options that the method does not read are refused rather than ignored."""
    if config.density is not None and row.density is None:
        raise UserError(f"density means nothing to {row.name}, which prunes nothing: leave it out.")
    for name, given in (("calibrate", bool(config.calibrate)), ("ridge", config.ridge is not None)):
        if given and not row.calibrated:
            raise UserError(f"{name} means nothing to {row.name}, which uses no text: leave it out.")
    if config.rounds > 1 and not row.calibrated:
        raise UserError(f"rounds means nothing to {row.name}, which uses no text: leave it out.")
    if row.calibrated and not config.calibrate and len(config.adapters) > 1:
        raise UserError(
            f"{row.name} needs text of each task: name one task or calibration file for each adapter with calibrate."
        )
    if config.search and row.name == "average":
        raise UserError("average has nothing to search: use sum, whose weights may add up to anything.")


def _exact(job: _Job, report: MergeReport) -> bool:
    """Blocks that several inputs share have one routing bias in place of theirs, and a rank limit cuts."""
    return not report.rank_error and all(len(slot.sources) == 1 for slot in job.layout.slots)


# --- statistics ------------------------------------------------------------------------------------------------------


def _statistics(job: _Job, spec: MergeSpec, scratch: Path) -> tuple[Statistics | None, list[dict[str, Any]]]:
    """Read or gather what least squares needs, in as many rounds as asked for."""
    config = job.config
    if not job.row.calibrated or not config.calibrate:
        return None, []
    files = [name.endswith(".safetensors") for name in config.calibrate]
    if config.rounds > 1 and any(files):
        raise UserError("rounds runs the merged adapter on the tasks' texts: name tasks with calibrate, not files.")
    run: Running = "average"
    for number in range(config.rounds):
        tasks = [
            read_statistics(Path(name)) if is_file else _gather(job, name, run)
            for name, is_file in zip(config.calibrate, files, strict=True)
        ]
        table = GramTable(job.layout, tasks, config.calibrate)
        if number + 1 < config.rounds:
            run = scratch / f"round_{number}"
            merge_to(run, job.adapters, spec, table, base_model=config.base_model)
    return table, [task.origin for task in tasks]


def _gather(job: _Job, task: str, run: Running) -> TaskStatistics:
    config = job.config
    return task_statistics(
        job.base(),
        job.layout,
        task,
        data_dir=config.data_dir,
        texts=config.texts,
        tokens=config.tokens,
        batch_size=config.batch_size,
        run=run,
    )


# --- search and evaluation -------------------------------------------------------------------------------------------


def candidates(row: Method, spec: MergeSpec, count: int) -> list[MergeSpec]:
    """The grid of a search: a common factor on the weights, densities or ridges, whichever the method has."""
    if row.calibrated:
        return [replace(spec, ridge=ridge) for ridge in RIDGES]
    densities: Sequence[float | None] = (
        (None,) if row.density is None else (spec.density,) if spec.density is not None else SEARCH_DENSITIES
    )
    if row.normalises:
        return [replace(spec, density=density) for density in densities]
    weights = spec.weights or (1.0,) * count
    scaled = [tuple(scale * weight for weight in weights) for scale in SEARCH_SCALES]
    return [replace(spec, density=density, weights=given) for density in densities for given in scaled]


def _search(
    job: _Job, spec: MergeSpec, statistics: Statistics | None, scratch: Path
) -> tuple[MergeSpec, list[dict[str, Any]]]:
    """The candidate with the best mean retention on the validation split; every one tried is kept for the record."""
    config = job.config
    if config.eval_split == "validation":
        raise UserError(
            "search tunes on the validation split, so the result cannot be reported on it: evaluate on test."
        )
    references = [
        (_validation_losses(job, None, task), _validation_losses(job, adapter.path, task))
        for task, adapter in zip(config.evaluate, job.adapters, strict=True)
    ]
    tried, best = [], (float("-inf"), spec)
    for number, candidate in enumerate(candidates(job.row, spec, len(job.adapters))):
        folder = scratch / f"candidate_{number}"
        merge_to(folder, job.adapters, candidate, statistics, base_model=config.base_model, quiet=True)
        kept = []
        for task, (base, single) in zip(config.evaluate, references, strict=True):
            found = retention(base, single, _validation_losses(job, folder, task))
            if found is None:
                raise UserError(
                    f"The adapter for {task} is no better than the base model on its validation split, so there is "
                    "nothing to keep: check the order of adapters and tasks."
                )
            kept.append(found[0])
        shutil.rmtree(folder)
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


def _validation_losses(job: _Job, adapter: Path | None, task: str) -> ItemLosses:
    config = job.config
    return item_losses(
        job.base(),
        adapter,
        task,
        "validation",
        config.search_limit,
        data_dir=config.data_dir,
        batch_size=config.batch_size,
    )


def _evaluation(job: _Job, merged: Path) -> list[TaskRetention]:
    config = job.config
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


# --- the record ------------------------------------------------------------------------------------------------------


def _inputs(adapters: Sequence[SavedAdapter], weights: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {
            "path": str(adapter.path),
            "fingerprint": adapter.fingerprint,
            "kind": adapter.kind,
            "weight": weight,
            "base_model": adapter.base_model,
            "modules": len(adapter.modules),
        }
        for adapter, weight in zip(adapters, weights, strict=True)
    ]


def _parameters(row: Method, spec: MergeSpec, report: MergeReport) -> dict[str, Any]:
    parameters: dict[str, Any] = {"share": spec.share, "seed": spec.seed}
    if row.density is not None:
        parameters["density"] = row.density if spec.density is None else spec.density
    if spec.rank is not None:
        parameters["rank"] = spec.rank
    if report.ridge:
        parameters["ridge"] = {f"{ridge:g}": count for ridge, count in sorted(Counter(report.ridge.values()).items())}
    return parameters


def _measured(report: MergeReport) -> dict[str, float]:
    measured = {}
    for name, values in (("rank_error", report.rank_error), ("least_squares_error_ratio", report.objective)):
        if values:
            measured[f"{name}_mean"] = sum(values.values()) / len(values)
            measured[f"{name}_max"] = max(values.values())
    return measured
