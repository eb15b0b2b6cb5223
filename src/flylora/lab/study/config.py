"""What a study file can say, and what ``flylora study`` can be told. Imports no torch: a plan needs none."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from flylora.errors import UserError
from flylora.lab.evaluation.config import EvalConfig
from flylora.lab.training.config import TrainConfig
from flylora.merging.config import MergeConfig, MethodName

DType = Literal["auto", "float32", "bfloat16", "float16"]
Metric = Literal["accuracy", "pass@1", "pass@5", "pass@10", "points_lost"]
C = TypeVar("C")

CALIBRATED_MERGES: frozenset[str] = frozenset({"least_squares"})
"""Merges that read texts of each task. The table of merges says so too, but importing it imports torch."""

# What the cells of a study set themselves.
_PLACED = frozenset({"model", "task", "out", "adapter", "data_dir", "seed", "resume", "overwrite", "dtype", "device"})
_NOT_TRAIN = _PLACED | {"method", "report_to"}
_NOT_EVALUATION = _PLACED | {"lm_eval"}
_NOT_MERGE = _PLACED | {"adapters", "method", "calibrate", "evaluate", "eval_limit", "eval_split", "search", "model"}

_LABEL = re.compile(r"[A-Za-z0-9][\w.+-]*")


@dataclass(frozen=True)
class ModelSpec:
    """A base model.

    Args:
        name: A folder, a .gguf file, a name on the hub, or smollm2-135m.
        parameters: How many it has, for estimates of time.
        throughput: Floating-point operations a second that training it achieves, for estimates of time.
        dtype: Of its weights; auto is bfloat16 where the device computes in it, else float32.
        device: auto is the first GPU if there is one, else the CPU.
    """

    name: str
    parameters: float | None = None
    throughput: float | None = None
    dtype: DType = "auto"
    device: str = "auto"


@dataclass(frozen=True)
class MethodSpec:
    """A way of adapting, with its options.

    Args:
        method: flylora, or any PEFT method by its name.
        adapter: Options of the method.
        lr: Peak learning rate; that of the study, or the search's choice, if left out.
        train: Other settings of training that this method alone has.
        seed_per_task: Options of the adapter that get a number of their own for every task and seed, such as
            projection_seed: independent projections.
        seed_per_run: Options of the adapter that get the seed itself, the same for every task.
    """

    method: str
    adapter: dict[str, Any] = field(default_factory=dict)
    lr: float | None = None
    train: dict[str, Any] = field(default_factory=dict)
    seed_per_task: list[str] = field(default_factory=list)
    seed_per_run: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TaskSpec:
    """A task to train on, and what to evaluate the result on.

    Args:
        train: Name of a built-in task, or path of a task's YAML file, relative to the study file.
        eval: Tasks to evaluate on; the training task's own held-out items if left out.
        data_dir: Folder that the data files are relative to; the study's if left out.
        settings: Settings of training that this task alone has.
        evaluation: Settings of evaluation that this task alone has.
        items: How many items there are, for a plan without the data: under train, and under the name of each
            evaluation.
        tokens: Mean length of an item in tokens, for estimates; its largest length if left out.
    """

    train: str
    eval: list[str] = field(default_factory=list)
    data_dir: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)
    tokens: float | None = None

    @property
    def evaluations(self) -> dict[str, str]:
        """The tasks to evaluate on, by a short label."""
        return {task_label(name): name for name in self.eval or [self.train]}


@dataclass(frozen=True)
class MergeSpec:
    """A way of merging the adapters that one method trained with one seed, one on each task.

    Args:
        method: As for ``flylora merge``.
        options: Other options of ``flylora merge``, such as density, ridge, texts or rounds.
        evaluation: Settings of evaluation that these merges alone have, e.g. loss_only.
        methods: Labels of the methods whose adapters to merge; all if left out.
    """

    method: MethodName
    options: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    methods: list[str] | None = None


@dataclass(frozen=True)
class LrSearch:
    """A learning rate for each method, chosen by the loss on one task's validation split with one small budget.

    Args:
        rates: The candidates.
        task: Label of the task.
        steps: Optimizer steps of each trial.
        seed: Of the trials.
        limit: Validation items.
        methods: Other candidates for single methods, by label.
        settings: Other settings of training in the trials.
    """

    rates: list[float]
    task: str
    steps: int
    seed: int = 0
    limit: int | None = None
    methods: dict[str, list[float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def candidates(self, method: str) -> list[float]:
        """The rates to try for the method of this label."""
        return self.methods.get(method, self.rates)


@dataclass(frozen=True)
class Override:
    """Settings of training for single cells: those of this model, method and task, each any if left out."""

    train: dict[str, Any]
    model: str | None = None
    method: str | None = None
    task: str | None = None

    def applies(self, model: str, method: str, task: str) -> bool:
        """Whether a cell is meant."""
        asked = zip((self.model, self.method, self.task), (model, method, task), strict=True)
        return all(wanted is None or wanted == given for wanted, given in asked)


@dataclass(frozen=True)
class PaperFigures:
    """Figures of a paper: one model, method and metric.

    Args:
        model: Label of the model.
        method: Label of the method.
        values: In per cent or points, by the label of the evaluation.
        metric: accuracy, pass@k, or points_lost by a merge.
        merge: Label of the merge; a single adapter if left out.
    """

    model: str
    method: str
    values: dict[str, float]
    metric: Metric = "accuracy"
    merge: str | None = None


@dataclass(frozen=True)
class PaperSetup:
    """What must hold for a paper's figure to be comparable; the figure is left out where it does not.

    Args:
        models: The name of the model behind each label.
        train: Settings of training.
        tasks: More of them, by task.
        methods: Options of the adapter, by the label of the method.
    """

    models: dict[str, str] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Paper:
    """Where figures come from, the setup they were measured with, and they themselves."""

    source: str
    setup: PaperSetup = field(default_factory=PaperSetup)
    figures: list[PaperFigures] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Study:
    """The keys of a study file.

    Args:
        name: What the study is called; its run folder is runs/NAME unless told otherwise.
        models, methods, tasks: The grid, each by a label.
        seeds: Each trains every adapter once.
        train: Settings of training, as ``flylora train`` takes them.
        evaluation: Settings of evaluation, as ``flylora eval`` takes them.
        merges: Ways of merging each method's adapters, by a label.
        baseline: Label of the method that the others are compared with, seed by seed.
        lr_search: How learning rates are chosen; methods with a rate of their own are not searched.
        overrides: Settings of training for single cells, later ones first in rank.
        paper: Figures to show beside ours where the setup is the same.
        data_dir: Folder that the tasks' data files are relative to; relative to the study file itself.
        description: A sentence for the results.
    """

    name: str
    models: dict[str, ModelSpec]
    methods: dict[str, MethodSpec]
    tasks: dict[str, TaskSpec]
    seeds: list[int] = field(default_factory=lambda: [0])
    train: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    merges: dict[str, MergeSpec] = field(default_factory=dict)
    baseline: str | None = None
    lr_search: LrSearch | None = None
    overrides: list[Override] = field(default_factory=list)
    paper: Paper | None = None
    data_dir: str | None = None
    description: str = ""

    def train_settings(self, model: str, method: str, task: str) -> dict[str, Any]:
        """The settings of training of one cell, without a searched learning rate.

        The more particular wins: the study's, the method's, the task's, then those of ``overrides``.
        """
        spec = self.methods[method]
        own = {} if spec.lr is None else {"lr": spec.lr}
        layers = [self.train, own, spec.train, self.tasks[task].settings]
        layers += [o.train for o in self.overrides if o.applies(model, method, task)]
        settings: dict[str, Any] = {}
        for layer in layers:
            # The two exclude each other, so the one given last replaces the other.
            for name, other in (("steps", "epochs"), ("epochs", "steps")):
                if layer.get(name) is not None:
                    settings.pop(other, None)
            settings |= layer
        return settings

    def has_own_lr(self, model: str, method: str, task: str) -> bool:
        """Whether something more particular than the study as a whole sets the learning rate of a cell."""
        spec = self.methods[method]
        layers = [spec.train, self.tasks[task].settings]
        layers += [o.train for o in self.overrides if o.applies(model, method, task)]
        return spec.lr is not None or any("lr" in layer for layer in layers)

    def train_config(self, model: str, method: str, task: str, seed: int) -> TrainConfig:
        """The run that trains one adapter, with ``out`` still to be chosen."""
        spec, where = self.methods[method], self.tasks[task]
        seeds = {name: task_seed(task, seed) for name in spec.seed_per_task} | dict.fromkeys(spec.seed_per_run, seed)
        config = typed(
            TrainConfig,
            {
                **self.train_settings(model, method, task),
                "model": self.models[model].name,
                "task": where.train,
                "out": "",
                "method": spec.method,
                "adapter": spec.adapter,
                "data_dir": where.data_dir or self.data_dir,
                "dtype": self.models[model].dtype,
                "device": self.models[model].device,
            },
            f"training {method} on {task}",
        )
        return dataclasses.replace(config, seed=seed, adapter={**config.adapter, **seeds})

    def eval_config(self, model: str, task: str, evaluation: str, merge: str | None = None) -> EvalConfig:
        """The evaluation of the base model on one task, or of a merge, with the adapter's folder still to be chosen."""
        where = self.tasks[task]
        return typed(
            EvalConfig,
            {
                **self.evaluation,
                **where.evaluation,
                **({} if merge is None else self.merges[merge].evaluation),
                "model": self.models[model].name,
                "task": where.evaluations[evaluation],
                "data_dir": where.data_dir or self.data_dir,
                "dtype": self.models[model].dtype,
                "device": self.models[model].device,
            },
            f"evaluation on {task}",
        )

    def trial_eval_config(self, model: str) -> EvalConfig:
        """What a trial of the search for learning rates is judged by: the loss on validation items of every length."""
        assert self.lr_search is not None
        where = self.tasks[self.lr_search.task]
        label = next(iter(where.evaluations))
        return dataclasses.replace(
            self.eval_config(model, self.lr_search.task, label),
            task=where.train,
            split="validation",
            limit=self.lr_search.limit,
            loss_only=True,
            samples=1,
            temperature=0.0,
        )

    def merge_config(self, model: str, merge: str, seed: int) -> MergeConfig:
        """A merge of one adapter a task, with the adapters' folders and ``out`` still to be chosen."""
        spec = self.merges[merge]
        places = {where.data_dir or self.data_dir for where in self.tasks.values()}
        calibrated = spec.method in CALIBRATED_MERGES
        if calibrated and len(places) > 1:
            raise UserError(f"The merge {merge} reads texts of all tasks, so their data_dir must be the same folder.")
        return typed(
            MergeConfig,
            {
                **spec.options,
                "adapters": list(self.tasks),
                "out": "",
                "method": spec.method,
                "calibrate": [where.train for where in self.tasks.values()] if calibrated else [],
                "model": self.models[model].name,
                "data_dir": next(iter(places)) if calibrated else None,
                "dtype": self.models[model].dtype,
                "device": self.models[model].device,
                "seed": seed,
            },
            f"the merge {merge}",
        )


@dataclass(frozen=True)
class StudyOptions:
    """How to run a study. Whatever makes it smaller than its file says makes it another setup than a paper's.

    Args:
        study: The study's YAML file.
        out: Folder for the run; runs/NAME if left out. What is done there already is kept and not done again.
        plan: Print the cells, their tokens and an estimate of the time, and run nothing.
        only: Run only cells whose name matches this pattern (with * and ?), and what they need.
        retry_failed: Run cells again that failed before.
        data_dir: Folder that the tasks' data files are relative to, for all tasks.
        model: Use this model in place of the study's.
        seeds: Use these seeds in place of the study's.
        steps: Train for this many steps, whatever the study says (and search learning rates with no more).
        batch_size: Items per optimizer step.
        micro_batch_size: Items per forward pass while training.
        max_length: Longest item in tokens while training.
        train_limit: Train on this many items of each task.
        eval_limit: Evaluate on this many items of each task (and search learning rates with no more).
        baseline: Compare the methods with this one in place of the study's baseline; what is done stays done.
        allow_code_execution: Run the programs that models write, for tasks that are marked so.
    """

    study: str
    out: str | None = None
    plan: bool = False
    only: str | None = None
    retry_failed: bool = False
    data_dir: str | None = None
    model: str | None = None
    seeds: list[int] | None = None
    steps: int | None = None
    batch_size: int | None = None
    micro_batch_size: int | None = None
    max_length: int | None = None
    train_limit: int | None = None
    eval_limit: int | None = None
    baseline: str | None = None
    allow_code_execution: bool = False


def task_label(name: str) -> str:
    """A short label of a task: the file's name without its ending, or the name without its variant."""
    return Path(name).stem if name.endswith((".yaml", ".yml")) else name.partition(":")[0]


def task_seed(task: str, seed: int) -> int:
    """A number for one task and seed: far from those of all others, and the same whichever tasks there are beside."""
    return int.from_bytes(hashlib.sha256(f"{task}/{seed}".encode()).digest()[:4], "big") >> 1


# --- reading ---------------------------------------------------------------------------------------------------------


def load_study(path: str | Path) -> Study:
    """The study that a YAML file describes, checked.

    A file may begin with ``extends: other.yaml``: keys are then added to that file's, the file's own winning, and a key
    without a value (null) taking that file's away.

    Raises:
        UserError: The file is missing, or not what it should be; the sentence begins with the file.
    """
    path = Path(path)
    try:
        study = typed(Study, _content(path, ()), "the study")
        study = _with_places(study, path.parent)
        _check(study)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(f"{path}: ") else f"{path}: {text}") from error
    return study


def narrowed(study: Study, options: StudyOptions) -> Study:
    """The study at the size, and with the baseline, that the options ask for."""
    changes: dict[str, Any] = {}
    if options.baseline is not None:
        _check_labels("baseline", "methods", [options.baseline], study.methods)
        changes["baseline"] = options.baseline
    if options.model is not None:
        label = re.sub(r"[^\w.+-]", "-", Path(options.model).name).lstrip(".-_") or "model"
        changes["models"] = {label: ModelSpec(options.model)}
    if options.seeds is not None:
        changes["seeds"] = list(options.seeds)
        _check_seeds(options.seeds)
    if options.data_dir is not None:
        changes["data_dir"] = options.data_dir
        changes["tasks"] = {label: dataclasses.replace(t, data_dir=None) for label, t in study.tasks.items()}
    names = ("steps", "batch_size", "micro_batch_size", "max_length", "train_limit")
    train = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.batch_size is not None:
        train.setdefault("micro_batch_size", None)  # the study's need not divide it
    if study.lr_search is not None:
        search = study.lr_search
        changes["lr_search"] = dataclasses.replace(
            search, steps=_least(search.steps, options.steps), limit=_least(search.limit, options.eval_limit)
        )
    if train:
        changes["overrides"] = [*study.overrides, Override(train)]
    evaluation: dict[str, Any] = {} if options.eval_limit is None else {"limit": options.eval_limit}
    if options.allow_code_execution:
        evaluation["allow_code_execution"] = True
    if evaluation:
        tasks = changes.get("tasks", study.tasks)
        changes["evaluation"] = {**study.evaluation, **evaluation}
        changes["tasks"] = {
            label: dataclasses.replace(t, evaluation={**t.evaluation, **evaluation}) for label, t in tasks.items()
        }
        changes["merges"] = {
            label: dataclasses.replace(m, evaluation={**m.evaluation, **evaluation})
            for label, m in study.merges.items()
        }
    return dataclasses.replace(study, **changes)


def _least(value: Any, limit: Any) -> Any:
    return value if limit is None else limit if value is None else min(value, limit)


def typed(cls: type[C], values: Mapping[str, Any], what: str) -> C:
    """An instance of a dataclass from plain values, whose types are checked.

    Raises:
        UserError: A key is unknown or missing, or a value is of another type; ``what`` names the whole.
    """
    names = [key.name for key in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise UserError(f"Unknown key '{key}' in {what}: choose from {', '.join(names)}.")
    checked: C = _typed(cast(Any, cls), json.dumps(values, default=str), what)
    return checked


@cache
def _typed(cls: type[Any], values: str, what: str) -> Any:
    # Studies ask for the same few configs again and again, and checking one takes milliseconds.
    parser = _parser(cast(Any, cls))
    try:
        found = parser.instantiate(parser.parse_object(json.loads(values)))
    except ArgumentError as error:
        text = re.sub(r"<class '(\w+)'>", r"\1", re.sub(r"\s+", " ", str(error))).replace("Parser key", "key")
        raise UserError(f"In {what}: {text.strip().rstrip('.')}: correct the value of that key.") from error
    return cls(**{key.name: found[key.name] for key in dataclasses.fields(cls)})


@cache
def _parser(cls: type[Any]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls)
    return parser


class _Loader(yaml.SafeLoader):
    """YAML in which 3e-4 is a number, as everybody who writes a learning rate means it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def _content(path: Path, within: tuple[Path, ...]) -> dict[str, Any]:
    """The keys of a study file, on top of those of the file it extends."""
    if not path.is_file():
        raise UserError("There is no such study file: give the path of a YAML file.")
    if path.resolve() in within:
        raise UserError(f"{path} extends itself: remove that line.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "it is not text"
        raise UserError(f"The file is not valid YAML{where} ({reason}): correct it there.") from error
    if not isinstance(content, dict):
        raise UserError("A study file must be keys with values, such as 'name: …': see docs/study.md.")
    below = content.pop("extends", None)
    return content if below is None else _merged(_content(path.parent / below, (*within, path.resolve())), content)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = value
    return merged


def _with_places(study: Study, folder: Path) -> Study:
    """The study with the paths it names made relative to the working directory instead of the file."""

    def at(name: str) -> str:
        return str(folder / name) if name.endswith((".yaml", ".yml")) else name

    def under(place: str | None) -> str | None:
        return None if place is None else str(folder / Path(place).expanduser())

    tasks = {
        label: dataclasses.replace(
            task, train=at(task.train), eval=[at(name) for name in task.eval], data_dir=under(task.data_dir)
        )
        for label, task in study.tasks.items()
    }
    return dataclasses.replace(study, tasks=tasks, data_dir=under(study.data_dir))


# --- checking --------------------------------------------------------------------------------------------------------


def _check(study: Study) -> None:
    for what in ("models", "methods", "tasks"):
        if not getattr(study, what):
            raise UserError(f"There are no {what}: name at least one.")
    for what in ("models", "methods", "tasks", "merges"):
        for label in getattr(study, what):
            if not _LABEL.fullmatch(str(label)):
                raise UserError(
                    f"'{label}' cannot be a label in {what}: begin with a letter or digit and use letters, digits and "
                    "the characters . _ + - only."
                )
    if not _LABEL.fullmatch(study.name):
        raise UserError(f"The name '{study.name}' cannot be the name of a folder: use letters, digits, - and _.")
    _check_seeds(study.seeds)
    _check_settings("train", study.train, _NOT_TRAIN)
    _check_settings("evaluation", study.evaluation, _NOT_EVALUATION)
    for label, method in study.methods.items():
        _check_settings(f"the train settings of {label}", method.train, _NOT_TRAIN)
    for label, task in study.tasks.items():
        _check_settings(f"the settings of {label}", task.settings, _NOT_TRAIN)
        _check_settings(f"the evaluation of {label}", task.evaluation, _NOT_EVALUATION)
        if len(task.evaluations) < len(task.eval):
            raise UserError(f"Two evaluations of {label} have the same name: keep one.")
    for label, merge in study.merges.items():
        _check_settings(f"the options of {label}", merge.options, _NOT_MERGE)
        _check_settings(f"the evaluation of {label}", merge.evaluation, _NOT_EVALUATION)
        _check_labels(f"the merge {label}", "methods", merge.methods or [], study.methods)
    if study.merges and len(study.tasks) < 2:
        raise UserError("There is one task, so there is nothing to merge: leave merges out, or add a task.")
    if study.baseline is not None:
        _check_labels("baseline", "methods", [study.baseline], study.methods)
    for override in study.overrides:
        _check_settings("overrides", override.train, _NOT_TRAIN)
        for what, label in (("models", override.model), ("methods", override.method), ("tasks", override.task)):
            _check_labels("overrides", what, [label] if label else [], getattr(study, what))
    _check_search(study)
    if study.paper is not None:
        _check_paper(study, study.paper)
    _check_values(study)


def _check_seeds(seeds: Iterable[int]) -> None:
    seeds = list(seeds)
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"The seeds are {seeds}, but must be different whole numbers from 0 on, at least one.")


def _check_settings(what: str, settings: Mapping[str, Any], placed: frozenset[str]) -> None:
    for key in settings:
        if key in placed:
            raise UserError(f"The study itself decides '{key}', so {what} cannot set it: remove it there.")


def _check_labels(what: str, kind: str, labels: Iterable[str], known: Iterable[str]) -> None:
    for label in labels:
        if label not in known:
            raise UserError(f"{what} names '{label}', which is not among the {kind}: choose from {', '.join(known)}.")


def _check_search(study: Study) -> None:
    search = study.lr_search
    if search is None:
        return
    _check_labels("lr_search", "tasks", [search.task], study.tasks)
    _check_labels("lr_search", "methods", search.methods, study.methods)
    _check_settings("lr_search", search.settings, _NOT_TRAIN)
    for rates in (search.rates, *search.methods.values()):
        if not rates or len(set(rates)) < len(rates) or not all(math.isfinite(rate) and rate > 0 for rate in rates):
            raise UserError(f"lr_search has the rates {rates}, but needs different numbers above 0, at least one.")


def _check_paper(study: Study, paper: Paper) -> None:
    evaluations = {label for task in study.tasks.values() for label in task.evaluations}
    for figures in paper.figures:
        _check_labels("paper", "models", [figures.model], study.models)
        _check_labels("paper", "methods", [figures.method], study.methods)
        _check_labels("paper", "merges", [figures.merge] if figures.merge else [], study.merges)
        _check_labels("paper", "evaluations", figures.values, sorted(evaluations))
        if figures.metric == "points_lost" and figures.merge is None:
            raise UserError("paper has points_lost without a merge, but it is merging that loses them: name the merge.")


def _check_values(study: Study) -> None:
    """Makes every config once, which checks its values."""
    model, method, seed = next(iter(study.models)), next(iter(study.methods)), study.seeds[0]
    for label in study.methods:
        study.train_config(model, label, next(iter(study.tasks)), seed)
    for label, task in study.tasks.items():
        study.train_config(model, method, label, seed)
        for evaluation in task.evaluations:
            study.eval_config(model, label, evaluation)
    for label in study.merges:
        study.merge_config(model, label, seed)
        for name, task in study.tasks.items():
            for evaluation in task.evaluations:
                study.eval_config(model, name, evaluation, label)
    for override in study.overrides:
        study.train_config(
            override.model or model, override.method or method, override.task or next(iter(study.tasks)), seed
        )
