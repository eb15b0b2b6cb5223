"""From a study to its cells: what is to be done, in which order, and what each needs to be done before.

Imports no torch: a plan is made without a model at hand.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from flylora.errors import UserError
from flylora.lab.study.config import LrSearch, MergeSpec, Study, StudyOptions, load_study, narrowed
from flylora.lab.tasks import Split, load_task, published_task_names

CellKind = Literal["train", "choose", "eval", "merge"]


@dataclass(frozen=True)
class Cell:
    """One piece of work of a study, complete in itself: it can be run in any process that sees the run folder.

    Attributes:
        name: Unique in the study; also the cell's folder under RUN/cells.
        kind: ``train`` an adapter, ``choose`` a learning rate among trials, ``eval`` a model, ``merge`` adapters.
        config: Fields of that kind's config; folders are left to be filled in where it runs.
        needs: Names of the cells whose results this one uses, in the order in which it uses them.
        model, method, task, evaluation, merge, seed: Where in the grid it is; ``None`` where that means nothing.
        trial: Whether it belongs to the search for a learning rate.
    """

    name: str
    kind: CellKind
    config: dict[str, Any]
    needs: tuple[str, ...] = ()
    model: str | None = None
    method: str | None = None
    task: str | None = None
    evaluation: str | None = None
    merge: str | None = None
    seed: int | None = None
    trial: bool = field(default=False, kw_only=True)

    @property
    def labels(self) -> dict[str, Any]:
        """Where in the grid it is."""
        names = ("model", "method", "task", "evaluation", "merge", "seed")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def plan(study: Study) -> list[Cell]:
    """All cells in an order in which each comes after what it needs.

    Base models come first, then the search for learning rates, then seed after seed, so that a study that is stopped
    early has whole tables for the seeds it got to.
    """
    cells = [*_base(study), *(cell for model in study.models for cell in _search(study, model))]
    for seed in study.seeds:
        for model in study.models:
            for method in study.methods:
                cells += _singles(study, model, method, seed)
            for method in study.methods:
                cells += _merges(study, model, method, seed)
    return cells


def planned(options: StudyOptions) -> tuple[Study, list[Cell]]:
    """The study that the options ask for and those of its cells they select.

    Raises:
        UserError: The file or the options are not what they should be, or no cell matches ``only``.
    """
    study = narrowed(load_study(options.study), options)
    cells = plan(study)
    return study, cells if options.only is None else select(cells, options.only)


def select(cells: Sequence[Cell], pattern: str) -> list[Cell]:
    """The cells whose name matches a pattern, and all that they need, in the order given."""
    by_name = {cell.name: cell for cell in cells}
    wanted: set[str] = set()
    waiting = [name for name in by_name if fnmatch.fnmatchcase(name, pattern)]
    if not waiting:
        raise UserError(f"No cell matches '{pattern}': flylora study --plan lists their names.")
    while waiting:
        name = waiting.pop()
        if name not in wanted:
            wanted.add(name)
            waiting += by_name[name].needs
    return [cell for cell in cells if cell.name in wanted]


def _base(study: Study) -> Iterator[Cell]:
    for model in study.models:
        for task, evaluation in _evaluations(study):
            yield Cell(
                f"base/{model}/{task}/eval-{evaluation}",
                "eval",
                dataclasses.asdict(study.eval_config(model, task, evaluation)),
                model=model,
                task=task,
                evaluation=evaluation,
            )


def _search(study: Study, model: str) -> Iterator[Cell]:
    search = study.lr_search
    if search is None:
        return
    for method in study.methods:
        if all(study.has_own_lr(model, method, task) for task in study.tasks):
            continue
        evaluations = []
        for rate in search.candidates(method):
            name = f"lr/{model}/{method}/{rate:g}"
            config = _trial(study, search, model, method, rate)
            yield Cell(
                name, "train", config, model=model, method=method, task=search.task, seed=search.seed, trial=True
            )
            evaluations.append(f"{name}/validation")
            yield Cell(
                evaluations[-1],
                "eval",
                dataclasses.asdict(study.trial_eval_config(model)),
                (name,),
                model=model,
                method=method,
                task=search.task,
                seed=search.seed,
                trial=True,
            )
        yield Cell(
            _choice(model, method),
            "choose",
            {},
            tuple(evaluations),
            model=model,
            method=method,
            task=search.task,
            trial=True,
        )


def _trial(study: Study, search: LrSearch, model: str, method: str, rate: float) -> dict[str, Any]:
    config = study.train_config(model, method, search.task, search.seed)
    changes = {
        **search.settings,
        "lr": rate,
        "steps": search.steps,
        "epochs": None,
        "eval_steps": search.steps,  # once, at the end, for the run's own record: of items short enough to train on
        "eval_limit": search.limit,
    }
    return dataclasses.asdict(dataclasses.replace(config, **changes))


def _choice(model: str, method: str) -> str:
    return f"lr/{model}/{method}/choice"


def _singles(study: Study, model: str, method: str, seed: int) -> Iterator[Cell]:
    for task in study.tasks:
        place = f"seed{seed}/{model}/{method}/{task}"
        searched = study.lr_search is not None and not study.has_own_lr(model, method, task)
        yield Cell(
            f"{place}/train",
            "train",
            dataclasses.asdict(study.train_config(model, method, task, seed)),
            (_choice(model, method),) if searched else (),
            model,
            method,
            task,
            seed=seed,
        )
        for evaluation in study.tasks[task].evaluations:
            yield Cell(
                f"{place}/eval-{evaluation}",
                "eval",
                dataclasses.asdict(study.eval_config(model, task, evaluation)),
                (f"{place}/train",),
                model,
                method,
                task,
                evaluation,
                seed=seed,
            )


def _merges(study: Study, model: str, method: str, seed: int) -> Iterator[Cell]:
    for label, spec in study.merges.items():
        if not _is_merged(spec, method):
            continue
        place = f"seed{seed}/{model}/{method}/merge-{label}"
        inputs = tuple(f"seed{seed}/{model}/{method}/{task}/train" for task in study.tasks)
        config = dataclasses.asdict(study.merge_config(model, label, seed))
        yield Cell(f"{place}/merge", "merge", config, inputs, model, method, merge=label, seed=seed)
        for task, evaluation in _evaluations(study):
            yield Cell(
                f"{place}/eval-{task}-{evaluation}",
                "eval",
                dataclasses.asdict(study.eval_config(model, task, evaluation, label)),
                (f"{place}/merge",),
                model,
                method,
                task,
                evaluation,
                label,
                seed,
            )


def _is_merged(spec: MergeSpec, method: str) -> bool:
    return spec.methods is None or method in spec.methods


def _evaluations(study: Study) -> Iterator[tuple[str, str]]:
    for task, spec in study.tasks.items():
        for evaluation in spec.evaluations:
            yield task, evaluation


# --- how much it is --------------------------------------------------------------------------------------------------

TRAIN_PASSES = 4
"""Floating-point operations per parameter and token: 2 forward, 2 for the gradient of the activations. A frozen base
needs no gradient of its weights (2 more), and the adapter's own are small."""
RECOMPUTED_PASSES = 6
"""With gradient checkpointing, which runs the forward pass twice."""
READ_PASSES = 2
CHOICES = 4
"""Candidate answers of an item, each of which is read, where the data are not counted."""


@dataclass(frozen=True)
class Size:
    """How much a cell has to do.

    Attributes:
        tokens: Read or generated, padding left out; ``None`` if the data are not at hand and nothing is stated.
        operations: Floating-point operations; ``None`` without tokens or the model's parameters.
        seconds: ``None`` without operations or a throughput.
        measured: Whether the seconds are those of this cell, or of one like it, in the run folder.
    """

    tokens: float | None = None
    operations: float | None = None
    seconds: float | None = None
    measured: bool = False


class Sizes:
    """Sizes of the cells of one study.

    Args:
        study: Whose.
        done: Seconds that finished cells took, by name.
    """

    def __init__(self, study: Study, done: Mapping[str, float]) -> None:
        self.study = study
        self.done = done
        self._shapes: dict[tuple[str, str | None], _Shape] = {}
        self._rates: dict[tuple[Any, ...], list[float]] = {}

    def of(self, cells: Sequence[Cell]) -> dict[str, Size]:
        """The size of every cell, with the pace of finished ones where there are any like it."""
        tokens = {cell.name: self._tokens(cell) for cell in cells}
        for cell in cells:
            amount = tokens[cell.name]
            if cell.name in self.done and amount:
                self._rates.setdefault(_like(cell), []).append(self.done[cell.name] / amount)
        return {cell.name: self._size(cell, tokens[cell.name]) for cell in cells}

    def _size(self, cell: Cell, tokens: float | None) -> Size:
        model = self.study.models[cell.model or next(iter(self.study.models))]
        passes = READ_PASSES
        if cell.kind == "train":
            passes = RECOMPUTED_PASSES if cell.config["gradient_checkpointing"] else TRAIN_PASSES
        operations = None if tokens is None or model.parameters is None else passes * model.parameters * tokens
        if cell.name in self.done:
            return Size(tokens, operations, self.done[cell.name], True)
        rates = self._rates.get(_like(cell))
        if rates and tokens is not None:
            return Size(tokens, operations, tokens * sum(rates) / len(rates), True)
        seconds = None if operations is None or model.throughput is None else operations / model.throughput
        return Size(tokens, operations, seconds)

    def _tokens(self, cell: Cell) -> float | None:
        if cell.kind == "choose":
            return 0.0
        if cell.kind == "merge":
            texts = cell.config["texts"] * cell.config["rounds"] if cell.config["calibrate"] else 0
            lengths = [self._shape(task, None).tokens for task in self.study.tasks]
            return None if texts and None in lengths else texts * sum(length or 0.0 for length in lengths)
        assert cell.task is not None
        return self._training(cell) if cell.kind == "train" else self._evaluation(cell)

    def _training(self, cell: Cell) -> float | None:
        shape, config = self._shape(cell.task or "", None), cell.config
        length = _shorter(shape.tokens, config["max_length"])
        if length is None:
            return None
        if config["steps"] is not None:
            return config["steps"] * config["batch_size"] * length
        items = _shorter(shape.items, config["train_limit"])
        return None if items is None else (config["epochs"] or 1.0) * items * length

    def _evaluation(self, cell: Cell) -> float | None:
        shape = self._shape(cell.task or "", cell.evaluation)
        items = _shorter(shape.items, cell.config["limit"])
        if items is None or shape.tokens is None:
            return None
        if cell.config["loss_only"]:
            return items * shape.tokens
        generated = shape.generated and (cell.config["max_new_tokens"] or shape.generated)
        return items * (shape.tokens * shape.readings + generated * cell.config["samples"])

    def _shape(self, task: str, evaluation: str | None) -> _Shape:
        key = task, evaluation
        if key not in self._shapes:
            self._shapes[key] = _shape_of(self.study, task, evaluation)
        return self._shapes[key]


@dataclass(frozen=True)
class _Shape:
    """Items of one split of a task, tokens of one, how often each is read, and tokens generated for it."""

    items: float | None = None
    tokens: float | None = None
    readings: int = 1
    generated: int = 0


def _shape_of(study: Study, label: str, evaluation: str | None) -> _Shape:
    """What the study states, else what the task and its data say if they are on this machine."""
    spec = study.tasks[label]
    items = spec.items.get(evaluation or "train")
    name = spec.train if evaluation is None else spec.evaluations[evaluation]
    data_dir = spec.data_dir or study.data_dir
    readings, generated = 1, 0
    try:
        task = load_task(name, data_dir)
        if evaluation is not None:
            readings = CHOICES if task.kind == "choice" else 1
            generated = task.max_new_tokens if task.kind in ("generate", "code") else 0
        # Without a folder published data would come from the hub, and a plan must not set off a download.
        if items is None and (data_dir is not None or name not in published_task_names()):
            split = "train" if evaluation is None else _split(study, label, evaluation)
            items = len(task.examples(split))
        return _Shape(items, spec.tokens or task.max_length, readings, generated)
    except UserError:
        return _Shape(items, spec.tokens, readings, generated)


def _split(study: Study, label: str, evaluation: str) -> Split:
    return study.eval_config(next(iter(study.models)), label, evaluation).split


def _shorter(value: float | None, limit: float | None) -> float | None:
    return value if limit is None else limit if value is None else min(value, limit)


def _like(cell: Cell) -> tuple[Any, ...]:
    """Cells with the same of these take as long per token."""
    return cell.kind, cell.model, cell.method if cell.kind != "eval" else None, cell.task, cell.evaluation
