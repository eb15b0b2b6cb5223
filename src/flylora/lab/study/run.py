"""Running a study: cell after cell in one process, each done once, each failing alone.

``run_cell`` is a plain function of a cell and a folder. It keeps nothing in the process, so whatever starts functions
elsewhere, with the folder shared, can run the cells of a plan in any order that respects what they need.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console

from flylora.errors import UserError
from flylora.lab.evaluation import EvalConfig, evaluate
from flylora.lab.evaluation.record import EvalRecord
from flylora.lab.study.config import Study, StudyOptions
from flylora.lab.study.plan import Cell, planned
from flylora.lab.study.record import ADAPTER, CELL_RECORD, EVAL_RECORD, CellRecord
from flylora.lab.study.tables import write_tables
from flylora.lab.tasks import Task, load_task
from flylora.lab.training import TrainConfig, train
from flylora.lab.training.interrupt import TrainingInterrupted
from flylora.lab.training.record import RECORD_NAME, TrainRecord
from flylora.merging import merge_adapters
from flylora.merging.config import MergeConfig
from flylora.models import LoadedModel, first_line, load_model, resolve_model
from flylora.records import (
    adapter_fingerprint,
    file_sha256,
    is_disk_full,
    now,
    provenance,
    read_record,
    saving,
    write_record,
    write_text,
)

logger = logging.getLogger(__name__)

CELLS = "cells"
TRACEBACK = "traceback.txt"
_SECONDS_BETWEEN_TABLES = 60.0  # there is something to look at while a study runs
_CONFIGS: dict[str, type[Any]] = {"train": TrainConfig, "eval": EvalConfig, "merge": MergeConfig}

# Fields that say where things are, not what they are (their contents are compared instead), or what is allowed.
_PLACES = frozenset(
    {"out", "task", "data_dir", "adapters", "calibrate", "resume", "overwrite", "report_to", "save_steps"}
    | {"logging_steps", "allow_code_execution"}
)


# --- what cells share ------------------------------------------------------------------------------------------------


@dataclass
class Workbench:
    """What cells run in one process can share to save time; it decides no result."""

    _loaded: tuple[tuple[str, str, str], LoadedModel, list[int]] | None = None
    _tasks: dict[tuple[str, str | None], Task] = field(default_factory=dict)
    _weights: dict[str, str] = field(default_factory=dict)
    _hashes: dict[tuple[str, str | None, str], str] = field(default_factory=dict)

    def model(self, name: str, dtype: str, device: str) -> LoadedModel:
        """The base model, loaded unless the last cell left it exactly as it was loaded."""
        key = (name, dtype, device)
        if self._loaded is not None:
            held, loaded, before = self._loaded
            if held == key and checksums(loaded) == before:
                return loaded
            # Some methods write to the base model's own weights, and no two models need be in memory.
            self.drop_model()
        loaded = load_model(name, dtype, device)  # type: ignore[arg-type]
        self._loaded = (key, loaded, checksums(loaded))
        return loaded

    def drop_model(self) -> None:
        """Forgets the base model: the next cell loads it anew."""
        self._loaded = None

    def weights(self, name: str) -> str:
        """What stands for a model's weights: the hash of local files, else its name on the hub."""
        if name not in self._weights:
            source = resolve_model(name)
            folder = source.folder
            files = [] if folder is None else sorted(folder.glob(source.gguf_file or "*.safetensors"))
            self._weights[name] = file_sha256(*files) if files else source.path_or_hub_name
        return self._weights[name]

    def task(self, name: str, data_dir: str | None) -> Task:
        """A task, read once."""
        key = (name, data_dir)
        if key not in self._tasks:
            self._tasks[key] = load_task(name, data_dir)
        return self._tasks[key]

    def task_inputs(self, name: str, data_dir: str | None, *splits: str) -> dict[str, Any]:
        """What stands for a task in a record: its name, version and hashes of its data."""
        task = self.task(name, data_dir)
        for split in splits:
            if (name, data_dir, split) not in self._hashes:
                self._hashes[name, data_dir, split] = task.data_hash(split)  # type: ignore[arg-type]
        hashes = {split: self._hashes[name, data_dir, split] for split in splits}
        return {"name": task.name, "version": task.version, "data": hashes}


def checksums(loaded: LoadedModel) -> list[int]:
    """A number for the names of a model's modules, and one for each tensor: they differ when the model does."""
    found = [hash(tuple(name for name, _ in loaded.model.named_modules()))]
    for name, tensor in loaded.model.state_dict().items():
        data = tensor.detach().reshape(-1).view(torch.uint8)
        whole = len(data) - len(data) % 8
        # As wide integers, whose overflow wraps, nothing has to be copied.
        total = int(data[:whole].view(torch.int64).sum()) + int(data[whole:].sum())
        found.append(hash((name, tensor.dtype, tensor.shape, total)))
    return found


# --- one cell --------------------------------------------------------------------------------------------------------


def run_cell(cell: Cell, folder: Path, bench: Workbench | None = None, *, retry_failed: bool = True) -> CellRecord:
    """Runs one cell, unless its record says that it is done.

    Args:
        cell: What to do.
        folder: Of the run; the cell works in cells/NAME there, and reads what it needs in those of other cells.
        bench: What to share with other cells of this process.
        retry_failed: Whether to try again what failed before and has not changed since.

    Returns:
        The record, which is also in the cell's folder, written when all else is. An error is recorded and not raised,
        except that nothing can be written any more.

    Raises:
        TrainingInterrupted: On SIGINT or SIGTERM while training, with a checkpoint to go on from.
    """
    bench = bench or Workbench()
    place = folder / CELLS / cell.name
    started, timer = now(), time.monotonic()
    work = _Work(cell, folder, bench)
    config, found, result = cell.config, {}, {}
    error = because_of = None
    try:
        because_of = work.broken_need()
        if because_of is not None:
            raise UserError(f"It needs {because_of}, which failed.")
        config, found = work.config(), work.inputs()
        earlier = stored(place)
        if earlier is not None and work.settled(earlier, config, found, retry_failed):
            return earlier
        for name in (CELL_RECORD, TRACEBACK):
            (place / name).unlink(missing_ok=True)
        result = work.run(dict(config))
    except Exception as problem:
        if because_of is None:
            bench.drop_model()  # what an error leaves on it is anybody's guess
        error = _sentence(problem)
        if not isinstance(problem, UserError):
            write_text(place / TRACEBACK, traceback.format_exc())
    origin = provenance(
        seeds={} if cell.seed is None else {"seed": cell.seed},
        data_sha256={},
        model_sha256=result.get("model_sha256", ""),
    )
    record = CellRecord(
        status="complete",
        provenance=dataclasses.replace(origin, started=started, finished=now()),
        config=_without_folders(config),
        name=cell.name,
        cell_kind=cell.kind,
        labels=cell.labels,
        inputs=found,
        result=result,
        error=error,
        because_of=because_of,
        seconds=round(time.monotonic() - timer, 1),
    )
    write_record(record, place / CELL_RECORD)
    return record


def stored(place: Path) -> CellRecord | None:
    """The record in a cell's folder; ``None`` if there is none that can be read."""
    try:
        return read_record(place / CELL_RECORD, CellRecord)
    except UserError:
        return None


def _without_folders(config: dict[str, Any]) -> dict[str, Any]:
    """A config as it is recorded: readable on other machines."""
    return {name: value for name, value in config.items() if name not in ("out", "data_dir", "adapters")}


def _sentence(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"It stopped with {type(error).__name__}: {first_line(error)} (the traceback is in its folder)."


@dataclass
class _Work:
    """One cell where it runs."""

    cell: Cell
    folder: Path
    bench: Workbench

    @property
    def place(self) -> Path:
        return self.folder / CELLS / self.cell.name

    def needed(self, name: str) -> Path:
        return self.folder / CELLS / name

    def broken_need(self) -> str | None:
        """The first cell this one needs that has no result, traced back to the one that failed itself."""
        for name in self.cell.needs:
            record = stored(self.needed(name))
            if record is None:
                raise UserError(f"It needs {name}, which has not run: run that first.")
            if not record.done:
                return record.because_of or name
        return None

    def config(self) -> dict[str, Any]:
        """The cell's config with everything known that decides its result."""
        config = dict(self.cell.config)
        for name in self.cell.needs if self.cell.kind == "train" else ():
            record = stored(self.needed(name))
            assert record is not None
            config["lr"] = record.result["lr"]
        return config

    def inputs(self) -> dict[str, Any]:
        """What stands for the weights, data and adapters that the cell reads."""
        config, bench = self.cell.config, self.bench
        found: dict[str, Any] = {}
        if self.cell.kind in ("train", "eval", "merge"):
            found["model"] = bench.weights(config["model"])
        if self.cell.kind == "train":
            splits = ("train", "validation") if config["eval_steps"] else ("train",)
            found["task"] = bench.task_inputs(config["task"], config["data_dir"], *splits)
        elif self.cell.kind == "eval":
            found["task"] = bench.task_inputs(config["task"], config["data_dir"], config["split"])
        elif self.cell.kind == "merge":
            found["texts"] = [bench.task_inputs(name, config["data_dir"], "train") for name in config["calibrate"]]
        for name in self.cell.needs:
            record = stored(self.needed(name))
            assert record is not None
            keys = ("adapter_fingerprint", "lr") if self.cell.kind != "choose" else ("loss",)
            found.setdefault("needs", []).append({key: record.result.get(key) for key in keys})
        return json.loads(json.dumps(found))

    def settled(self, earlier: CellRecord, config: dict[str, Any], found: dict[str, Any], retry_failed: bool) -> bool:
        """Whether an earlier record is this cell's, and its result is still there or it is not to be tried again."""
        if earlier.because_of is not None or earlier.inputs != found:
            return False
        if not earlier.done:
            # A failure may be due to anything, so anything that is different now is a reason to try again.
            return not retry_failed and earlier.config == json.loads(json.dumps(_without_folders(config)))
        if not same_settings(earlier.config, config, _CONFIGS.get(self.cell.kind)):
            return False
        if self.cell.kind in ("train", "merge"):
            with suppress(UserError):
                return adapter_fingerprint(self.place / ADAPTER) == earlier.result["adapter_fingerprint"]
            return False
        return self.cell.kind != "eval" or (self.place / EVAL_RECORD).is_file()

    def run(self, config: dict[str, Any]) -> dict[str, Any]:
        """Does the work and returns its figures."""
        runs: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "train": self._train,
            "choose": self._choose,
            "eval": self._eval,
            "merge": self._merge,
        }
        return runs[self.cell.kind](config)

    def _loaded(self, config: dict[str, Any]) -> LoadedModel:
        return self.bench.model(config["model"], config["dtype"], config["device"])

    def _train(self, config: dict[str, Any]) -> dict[str, Any]:
        out = self.place / ADAPTER
        asked = TrainConfig(**{**config, "out": str(out)})
        loaded = self._loaded(config)
        done = _go_on(out, asked, loaded)
        if done is None:
            shutil.rmtree(out, ignore_errors=True)
            done = train(asked, loaded)
        return {
            "adapter_fingerprint": done.adapter_fingerprint,
            "trainable_parameters": done.trainable_parameters,
            "active_parameters": done.active_parameters,
            "paper_percent": done.paper_percent,
            "lr": asked.lr,
            "final_loss": done.final_loss,
            "validation_loss": done.validation_loss,
            "examples": done.examples,
            "dropped": done.dropped,
            "learnt_tokens": done.learnt_tokens,
            "steps": done.steps,
            "seconds": done.seconds,
            "dtype": done.dtype,
            "model_sha256": done.provenance.model_sha256,
        }

    def _choose(self, config: dict[str, Any]) -> dict[str, Any]:
        tried = {}
        for name in self.cell.needs:
            record = stored(self.needed(name))
            assert record is not None
            (trial,), loss = record.inputs["needs"], record.result["loss"]
            tried[trial["lr"]] = float("inf") if loss is None else loss
        best = min(tried, key=tried.__getitem__)
        if tried[best] == float("inf"):
            raise UserError("The loss was not a finite number at any of the learning rates: try smaller ones.")
        return {"lr": best, "tried": [{"lr": lr, "validation_loss": loss} for lr, loss in sorted(tried.items())]}

    def _eval(self, config: dict[str, Any]) -> dict[str, Any]:
        adapter = str(self.needed(self.cell.needs[0]) / ADAPTER) if self.cell.needs else None
        out = self.place / EVAL_RECORD
        asked = EvalConfig(**{**config, "adapter": adapter, "out": str(out), "overwrite": True})
        done: EvalRecord = evaluate(asked, self._loaded(config))
        return {
            "accuracy": done.accuracy,
            "accuracies": done.accuracies,
            "loss": done.loss,
            "loss_tokens": done.loss_tokens,
            "items": done.items_scored,
            "notes": done.notes,
            "seconds": done.seconds,
            "dtype": done.dtype,
            "model_sha256": done.provenance.model_sha256,
        }

    def _merge(self, config: dict[str, Any]) -> dict[str, Any]:
        adapters = [str(self.needed(name) / ADAPTER) for name in self.cell.needs]
        asked = MergeConfig(**{**config, "adapters": adapters, "out": str(self.place / ADAPTER), "overwrite": True})
        done = merge_adapters(asked, self._loaded(config) if asked.calibrate else None)
        return {
            "adapter_fingerprint": adapter_fingerprint(self.place / ADAPTER),
            "exact": done.exact,
            "routed": done.routed,
            "parameters": done.parameters,
            "measured": done.measured,
            "seconds": done.seconds,
        }


def _go_on(out: Path, asked: TrainConfig, loaded: LoadedModel) -> TrainRecord | None:
    """The end of an unfinished run of the same settings; ``None`` if there is none that can be gone on with."""
    try:
        earlier = read_record(out / RECORD_NAME, TrainRecord)
    except UserError:
        return None
    wanted = json.loads(json.dumps(asked.deciding()))
    if earlier.status == "complete" or any(earlier.config.get(key) != value for key, value in wanted.items()):
        return None
    try:
        return train(dataclasses.replace(asked, resume=True), loaded)
    except UserError as error:
        if is_disk_full(error.__cause__ or error):
            raise
        # Other data or weights than before, or a method whose checkpoints do not hold all of its state.
        logger.warning("%s It is started again.", error)
        return None


def same_settings(earlier: dict[str, Any], asked: dict[str, Any], cls: type[Any] | None) -> bool:
    """Whether two configs mean the same result.

    A setting that a newer version of the package knows and the earlier record does not is the same if it has its
    default value; where things are (as opposed to what they are) does not matter, nor how many items share a forward
    pass that trains nothing.
    """
    defaults = {} if cls is None else _defaults(cls)
    asked = json.loads(json.dumps(asked))
    ignored = _PLACES if cls is TrainConfig else _PLACES | {"batch_size"}
    return all(earlier.get(name, defaults.get(name)) == value for name, value in asked.items() if name not in ignored)


def _defaults(cls: type[Any]) -> dict[str, Any]:
    found = {}
    for key in dataclasses.fields(cls):
        if key.default is not dataclasses.MISSING:
            found[key.name] = key.default
        elif key.default_factory is not dataclasses.MISSING:
            found[key.name] = key.default_factory()
    return found


# --- the whole study -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudyResult:
    """What became of a study.

    Attributes:
        folder: Of the run, with the tables in it.
        records: Of the cells that were asked for, in their order.
    """

    folder: Path
    records: list[CellRecord]

    @property
    def failed(self) -> list[CellRecord]:
        """Those that have no result."""
        return [record for record in self.records if not record.done]


def run_folder(study: Study, options: StudyOptions) -> Path:
    """Where a study is kept."""
    return Path(options.out) if options.out is not None else Path("runs") / study.name


def run_study(options: StudyOptions, console: Console | None = None) -> StudyResult:
    """Runs the cells of a study that are not done yet, one after another, and writes its tables.

    Args:
        options: Which study, how much of it, and where to.
        console: Where to say what is done.

    Raises:
        UserError: The study or the options are not what they should be, or nothing can be written.
        TrainingInterrupted: On Ctrl-C or SIGTERM; the same command goes on from there.
    """
    console = console or Console(stderr=True)
    study, cells = planned(options)
    folder = run_folder(study, options)
    _check_folder(folder, study)
    with _alone_in(folder):
        write_text(folder / "study.json", json.dumps(dataclasses.asdict(study), indent=2) + "\n")
        return StudyResult(folder, _run_all(study, cells, folder, options, console))


def _run_all(
    study: Study, cells: Sequence[Cell], folder: Path, options: StudyOptions, console: Console
) -> list[CellRecord]:
    records: list[CellRecord] = []
    bench, written = Workbench(), time.monotonic()
    cell = cells[0]
    try:
        for number, cell in enumerate(cells, start=1):
            records.append(_told(cell, f"{number}/{len(cells)}", folder, bench, options, console))
            if time.monotonic() - written > _SECONDS_BETWEEN_TABLES:
                write_tables(study, folder)
                written = time.monotonic()
    except KeyboardInterrupt as stop:
        raise TrainingInterrupted(
            f"Stopped in {cell.name}, after {len(records)} of {len(cells)} cells; give the same command to go on."
        ) from stop
    finally:
        write_tables(study, folder)
    return records


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """While open, no other study can be run in the folder: two would write the same checkpoints."""
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"Another flylora study is at work in {folder}: wait for it, or choose another folder with --out."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _told(
    cell: Cell, where: str, folder: Path, bench: Workbench, options: StudyOptions, console: Console
) -> CellRecord:
    before = stored(folder / CELLS / cell.name)
    console.print(f"[{where}] {cell.name}", markup=False, highlight=False)
    record = run_cell(cell, folder, bench, retry_failed=options.retry_failed)
    if not record.done:
        console.print(f"  failed: {record.error}", style="red", markup=False, highlight=False, soft_wrap=True)
    elif record == before:
        console.print("  done already", markup=False, highlight=False)
    return record


def _check_folder(folder: Path, study: Study) -> None:
    held = folder / "study.json"
    if folder.is_dir() and any(folder.iterdir()) and not held.is_file():
        raise UserError(f"The folder {folder} is not empty and holds no study: choose another folder with --out.")
    if held.is_file():
        try:
            name = json.loads(held.read_text(encoding="utf-8")).get("name")
        except (AttributeError, UnicodeDecodeError, json.JSONDecodeError):
            return
        if name != study.name:
            raise UserError(f"The folder {folder} holds the study '{name}': choose another folder with --out.")


def cells_of(folder: Path, cells: Sequence[Cell]) -> dict[str, CellRecord]:
    """The records of those cells that have one."""
    found = {cell.name: stored(folder / CELLS / cell.name) for cell in cells}
    return {name: record for name, record in found.items() if record is not None}
