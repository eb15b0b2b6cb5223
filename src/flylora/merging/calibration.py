"""Statistics of a task's tokens under the codes of a merged adapter: what least squares needs to know of a task.

For each module the mean of z z^T over the task's tokens, z being the routed codes of all adapters side by side. They
are gathered while some adapter runs, in one pass over the texts, in O(R^2) memory a module and float64.
"""

from __future__ import annotations

import dataclasses
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from flylora import activations
from flylora.activations import Accumulator, Tokens, features, modules_by_name, wide
from flylora.adapted import adapted
from flylora.adapter_folder import TensorFile, read_adapter
from flylora.errors import UserError
from flylora.lab.data import encode
from flylora.lab.tasks import Task, load_task
from flylora.merging.config import CalibrateConfig
from flylora.merging.engine import MergeSpec, merge_to
from flylora.merging.layout import Codes, Layout, check_compatible, codes, plan
from flylora.models import LoadedModel, load_base
from flylora.records import provenance, saving
from flylora.texts import Encoded

FORMAT_VERSION = 1


# --- gathering ---------------------------------------------------------------------------------------------------


@dataclass
class TaskStatistics:
    """Sums over one task's tokens, in two halves by text, so that a ridge can be chosen by held-out error.

    Attributes:
        grams: for each module sum z z^T over the tokens of each half, (2, R, R) float64.
        tokens: how many tokens each half has, (2,) float64.
        slots: what each part of the rank axis is, see [`slot_keys`].
        origin: where the statistics come from.
    """

    grams: dict[str, Tensor]
    tokens: Tensor
    slots: dict[str, list[tuple[str, int]]]
    origin: dict[str, Any] = field(default_factory=dict)


def gather(
    model: nn.Module,
    layout: Layout,
    rows: Sequence[Encoded],
    tokens: Tokens = "all",
    batch_size: int = 8,
    quiet: bool = False,
) -> TaskStatistics:
    """Run texts through a model, whatever adapter is active on it, and sum z z^T at every module of a merge.

    Args:
        model: in evaluation mode. layout: the merge. rows: the texts.
        tokens: which positions count: all, those that predict the answer, or those of the prompt before them.
        batch_size: texts per forward pass.
        quiet: show no progress.

    Raises:
        UserError: the model lacks a module, or no token counts.
    """
    ranks = {name: layout.at(name).rank for name in layout.modules}
    grams = {name: torch.zeros(2, rank, rank, dtype=torch.float64) for name, rank in ranks.items()}
    accumulators = {
        name: _accumulator(codes(layout, name, features(module)[0]), grams[name])
        for name, module in modules_by_name(model, layout.modules).items()
    }
    counts = activations.gather(model, accumulators, rows, tokens=tokens, parts=2, batch_size=batch_size, quiet=quiet)
    return TaskStatistics(grams, counts, {name: slot_keys(layout, name) for name in layout.modules})


def _accumulator(function: Codes, gram: Tensor) -> Accumulator:
    """Adds z z^T of a module's tokens to one half of its ``gram``, (2, R, R)."""

    def add(x: Tensor, half: int) -> None:
        function.to(x.device)
        z = wide(function(x))
        gram[half] += (z.t() @ z).cpu()

    return add


def slot_keys(layout: Layout, module: str) -> list[tuple[str, int]]:
    """What each part of the rank axis is, and its width: the inputs' blocks by fingerprint, with their routing."""
    local = layout.at(module)
    keys = []
    for slot, rank in zip(local.slots, local.ranks, strict=True):
        members = sorted(f"{layout.adapters[t].fingerprint}/{j}" for t, j in slot.sources)
        routing = "" if slot.block is None else f"{slot.block.k}/{slot.block.selection}/{slot.block.balance_rate}:"
        keys.append((routing + "+".join(members), rank))
    return keys


# --- files -------------------------------------------------------------------------------------------------------


def write_statistics(path: Path, statistics: TaskStatistics) -> None:
    """Write statistics to a safetensors file, whole or not at all."""
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"{name}.gram": (torch.float64, tuple(gram.shape)) for name, gram in statistics.grams.items()
    }
    layout["tokens"] = (torch.float64, (2,))
    body = {"format_version": FORMAT_VERSION, "slots": statistics.slots, "origin": statistics.origin}
    partial = path.with_name(f".{path.name}.partial")
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with TensorFile(partial, layout, {"flylora_calibration": json.dumps(body)}) as file:
                file.write("tokens", statistics.tokens)
                for name, gram in statistics.grams.items():
                    file.write(f"{name}.gram", gram)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def read_statistics(path: Path) -> TaskStatistics:
    """Statistics from a file.

    Raises:
        UserError: there is none, or it is damaged, of another kind or of a newer version.
    """
    if not path.is_file():
        raise UserError(f"There is no calibration file {path}: make one with flylora calibrate, or name a task.")
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("flylora_calibration")
            if text is None:
                raise UserError(f"{path} is no calibration file: give one that flylora calibrate wrote.")
            body = json.loads(text)
            if body["format_version"] > FORMAT_VERSION:
                raise UserError(
                    f"{path} has format version {body['format_version']}, but this flylora reads up to "
                    f"{FORMAT_VERSION}: "
                    "upgrade flylora to read it."
                )
            slots = {name: [(key, int(rank)) for key, rank in found] for name, found in body["slots"].items()}
            grams = {name: file.get_tensor(f"{name}.gram") for name in slots}
            return TaskStatistics(grams, file.get_tensor("tokens"), slots, body["origin"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged or cut off ({error}): make it again with flylora calibrate.") from error


class GramTable:
    """The statistics of all tasks of a merge, with their rank axes brought to the merge's own."""

    def __init__(self, layout: Layout, tasks: Sequence[TaskStatistics], names: Sequence[str]) -> None:
        self._tasks = list(tasks)
        self._columns: dict[str, list[Tensor]] = {}
        for module in layout.modules:
            wanted = slot_keys(layout, module)
            self._columns[module] = [
                _columns(wanted, task.slots.get(module, []), module, name)
                for task, name in zip(tasks, names, strict=True)
            ]

    def grams(self, task: int, module: str) -> tuple[Tensor, Tensor]:
        """The mean of z z^T, (R, R), over each half of a task's texts; zero for a half without tokens."""
        statistics, columns = self._tasks[task], self._columns[module][task]
        halves = []
        for gram, count in zip(statistics.grams[module], statistics.tokens.tolist(), strict=True):
            halves.append(gram[columns][:, columns] / max(count, 1.0))
        return halves[0], halves[1]

    def share(self, task: int) -> tuple[float, float]:
        """The share of a task's tokens in each half."""
        first, second = (self._tasks[task].tokens / self._tasks[task].tokens.sum()).tolist()
        return first, second


def _columns(wanted: list[tuple[str, int]], found: list[tuple[str, int]], module: str, name: str) -> Tensor:
    starts, at = {}, 0
    for key, rank in found:
        starts[key] = (at, rank)
        at += rank
    parts = []
    for key, rank in wanted:
        if starts.get(key, (0, -1))[1] != rank:
            raise UserError(
                f"The calibration file {name} was not made for these adapters (it knows nothing of one of them in "
                f"{module}): "
                "run flylora calibrate for all adapters of the merge together."
            )
        parts.append(torch.arange(starts[key][0], starts[key][0] + rank))
    return torch.cat(parts)


# --- the command ---------------------------------------------------------------------------------------------------


def calibrate(config: CalibrateConfig, loaded: LoadedModel | None = None) -> TaskStatistics:
    """Gather the statistics of one task for a later merge and write them to ``config.out``.

    Raises:
        UserError: adapters, task or model do not fit, or the file cannot be written.
    """
    out = Path(config.out)
    if out.exists() and not config.overwrite:
        raise UserError(f"The file {out} exists already: choose another name, or allow it to be overwritten.")
    adapters = [read_adapter(path) for path in config.adapters]
    check_compatible(adapters, config.base_model)
    loaded = loaded or load_base(adapters, config.model or config.base_model, config.dtype, config.device)
    statistics = task_statistics(
        loaded,
        plan(adapters, config.share),
        config.task,
        data_dir=config.data_dir,
        texts=config.texts,
        tokens=config.tokens,
        batch_size=config.batch_size,
        run=_running(config.run),
    )
    write_statistics(out, statistics)
    return statistics


Running = Path | Literal["none", "average"]


def _running(given: str | None) -> Running:
    if given is None:
        return "average"
    return "none" if given == "none" else Path(given)


def task_statistics(
    loaded: LoadedModel,
    layout: Layout,
    task_name: str,
    *,
    data_dir: str | None,
    texts: int,
    tokens: Tokens,
    batch_size: int,
    run: Running,
) -> TaskStatistics:
    """One task's statistics from its training split while an adapter runs; see [`calibrate`]."""
    assert tokens in get_args(Tokens)
    task = load_task(task_name, data_dir)
    rows = _texts(task, loaded.tokenizer, texts)
    with active_adapter(loaded, layout, run) as model:
        statistics = gather(model, layout, rows, tokens, batch_size)
    origin = provenance(seeds={}, data_sha256={"train": task.data_hash("train")}, model_sha256=loaded.sha256)
    statistics.origin = {
        "task": task.name,
        "task_version": task.version,
        "texts": len(rows),
        "tokens": tokens,
        "token_count": float(statistics.tokens.sum()),
        "run": str(run),
        "adapters": [adapter.fingerprint for adapter in layout.adapters],
        "provenance": dataclasses.asdict(origin),
    }
    return statistics


def _texts(task: Task, tokenizer: PreTrainedTokenizerBase, wanted: int) -> list[Encoded]:
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


@contextmanager
def active_adapter(loaded: LoadedModel, layout: Layout, run: Running) -> Iterator[nn.Module]:
    """The base model with an adapter on it while texts are read: a saved one, the plain average, or none."""
    if run == "none":
        yield loaded.model
    elif run == "average":
        with tempfile.TemporaryDirectory() as folder:
            average = Path(folder) / "average"
            merge_to(average, layout.adapters, MergeSpec("average"), base_model=loaded.source, quiet=True)
            with adapted(loaded, average) as (model, _):
                yield model
    else:
        assert isinstance(run, Path)
        with adapted(loaded, run) as (model, _):
            yield model
