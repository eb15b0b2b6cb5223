"""From a study to its cells: what is to be done, in which order, and what each needs to be done before."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from flylora.errors import UserError
from flylora.lab.study.config import Study, StudyOptions
from flylora.lab.study.study_file import load_study, narrowed

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
    cells = [cell for model in study.models for cell in _base(study, model)]
    cells += [cell for model in study.models for method in study.methods for cell in _search(study, model, method)]
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
        raise UserError(f"No cell matches '{pattern}': names look like '{cells[-1].name}', and * stands for any text.")
    while waiting:
        name = waiting.pop()
        if name not in wanted:
            wanted.add(name)
            waiting += by_name[name].needs
    return [cell for cell in cells if cell.name in wanted]


def _base(study: Study, model: str) -> Iterator[Cell]:
    for task, evaluation in _evaluations(study):
        config = dataclasses.asdict(study.eval_config(model, task, evaluation))
        name = f"base/{model}/{task}/eval-{evaluation}"
        yield Cell(name, "eval", config, model=model, task=task, evaluation=evaluation)


def _search(study: Study, model: str, method: str) -> Iterator[Cell]:
    search = study.lr_search
    if search is None or all(study.has_own_lr(model, method, task) for task in study.tasks):
        return
    labels: dict[str, Any] = {"model": model, "method": method, "task": search.task, "trial": True}
    training = study.train_config(model, method, search.task, search.seed)
    evaluations = []
    for rate in search.candidates(method):
        name = f"lr/{model}/{method}/{rate:g}"
        changes = {
            **search.settings,
            "lr": rate,
            "steps": search.steps,
            "epochs": None,
            "eval_steps": search.steps,  # once, at the end, for the run's own record: of items short enough to train on
            "eval_limit": search.limit,
        }
        config = dataclasses.asdict(dataclasses.replace(training, **changes))
        yield Cell(name, "train", config, seed=search.seed, **labels)
        config = dataclasses.asdict(study.trial_eval_config(model))
        yield Cell(f"{name}/validation", "eval", config, (name,), seed=search.seed, **labels)
        evaluations.append(f"{name}/validation")
    yield Cell(_choice(model, method), "choose", {}, tuple(evaluations), **labels)


def _choice(model: str, method: str) -> str:
    return f"lr/{model}/{method}/choice"


def _singles(study: Study, model: str, method: str, seed: int) -> Iterator[Cell]:
    for task, spec in study.tasks.items():
        folder = f"seed{seed}/{model}/{method}/{task}"
        labels: dict[str, Any] = {"model": model, "method": method, "task": task, "seed": seed}
        searched = study.lr_search is not None and not study.has_own_lr(model, method, task)
        config = dataclasses.asdict(study.train_config(model, method, task, seed))
        yield Cell(f"{folder}/train", "train", config, (_choice(model, method),) if searched else (), **labels)
        for evaluation in spec.evaluations:
            config = dataclasses.asdict(study.eval_config(model, task, evaluation))
            name = f"{folder}/eval-{evaluation}"
            yield Cell(name, "eval", config, (f"{folder}/train",), evaluation=evaluation, **labels)


def _merges(study: Study, model: str, method: str, seed: int) -> Iterator[Cell]:
    for label, spec in study.merges.items():
        if spec.methods is not None and method not in spec.methods:
            continue
        folder = f"seed{seed}/{model}/{method}/merge-{label}"
        labels: dict[str, Any] = {"model": model, "method": method, "merge": label, "seed": seed}
        adapters = tuple(f"seed{seed}/{model}/{method}/{task}/train" for task in study.tasks)
        config = dataclasses.asdict(study.merge_config(model, label, seed))
        yield Cell(f"{folder}/merge", "merge", config, adapters, **labels)
        for task, evaluation in _evaluations(study):
            config = dataclasses.asdict(study.eval_config(model, task, evaluation, label))
            name = f"{folder}/eval-{task}-{evaluation}"
            yield Cell(name, "eval", config, (f"{folder}/merge",), task=task, evaluation=evaluation, **labels)


def _evaluations(study: Study) -> Iterator[tuple[str, str]]:
    for task, spec in study.tasks.items():
        for evaluation in spec.evaluations:
            yield task, evaluation
