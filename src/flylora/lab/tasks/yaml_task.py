"""Tasks of the user's own, described by a YAML file (see docs/add_a_task.md)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from flylora.errors import UserError
from flylora.lab.tasks.base import REGEX, SPLITS, Example, Kind, Split, Task
from flylora.lab.tasks.published import hold_out
from flylora.lab.tasks.scoring import EXTRACTORS, METRICS
from flylora.lab.tasks.tables import DataSource, Table, read_table
from flylora.lab.tasks.templates import Template

logger = logging.getLogger(__name__)

LOSS = "loss"
AnswerIs = Literal["text", "index", "letter"]
FileKind = Literal["choice", "generate", "loss"]


@dataclass(frozen=True, kw_only=True)
class TaskFile:
    """The keys of a task file. Templates are text with columns in braces, such as ``{question}``.

    Attributes:
        data: Where the rows are.
        prompt: Template of what comes before the answer.
        completion: Template of what is learnt; with choices it may use ``{choice}``, which is what it is by default.
        choices: For multiple choice: templates of the candidate answers, or the name of a column that lists them.
        choices_pattern: Or a regular expression whose matches in the prompt are the candidates.
        kind: ``choice``, ``generate`` or ``loss``; by default what the keys choices and metric say.
        answer: Template of the gold answer; by default the completion.
        answer_is: With choices: whether the answer is the ``text`` of one, its ``index`` from 0, or its ``letter``.
        answer_extractor: Reads the gold answer out of that template's text.
        extractor: Reads the answer out of generated text.
        also_extractors: Further readings to report.
        pattern: The regular expression of the extractor ``regex``.
        metric: Compares the two; ``loss`` measures the loss on the completion and nothing else.
        name, version, licence, sources: What the task is called and where its data come from.
        id, group: Templates of an item's id and of what results are broken down by.
        drop_empty: Whether rows without a completion are left out, with a warning, instead of being an error.
        stop, max_length, max_new_tokens, chat_template, truncate_prompt: As in ``Task``.
    """

    data: DataSource
    prompt: str
    completion: str | None = None
    choices: str | list[str] | None = None
    choices_pattern: str | None = None
    kind: FileKind | None = None
    answer: str | None = None
    answer_is: AnswerIs = "text"
    answer_extractor: str = "text"
    extractor: str = "text"
    also_extractors: list[str] = field(default_factory=list)
    pattern: str | None = None
    metric: str | None = None
    name: str | None = None
    version: str | int | float = "1"
    licence: str = ""
    sources: list[str] = field(default_factory=list)
    id: str | None = None
    group: str = ""
    drop_empty: bool = False
    stop: list[str] = field(default_factory=list)
    max_length: int = 512
    max_new_tokens: int = 256
    chat_template: bool = False
    truncate_prompt: bool = False

    @property
    def has_choices(self) -> bool:
        """Whether candidate answers are given, in either way."""
        return self.choices is not None or self.choices_pattern is not None

    @property
    def evaluated_as(self) -> Kind:
        """``kind``, or what the other keys say."""
        if self.kind is not None:
            return self.kind
        if self.metric == LOSS:
            return "loss"
        return "choice" if self.has_choices else "generate"


def load_yaml_task(path: Path, data_dir: Path | None = None) -> Task:
    """The task a YAML file describes, with all its data read and checked.

    Args:
        path: The YAML file.
        data_dir: The folder its data files are relative to; its own folder by default.

    Raises:
        UserError: The file or its data are missing, or not what they should be; the sentence begins with the file.
    """
    if not path.is_file():
        raise UserError(f"There is no task file {path}: give the path of a YAML file or the name of a built-in task.")
    try:
        spec = _parse(path)
        _check(spec)
        splits = _read(spec, path.parent if data_dir is None else data_dir)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return Task(
        name=spec.name or path.stem,
        version=str(spec.version),
        load=partial(_split, splits),
        kind=spec.evaluated_as,
        extractor=spec.extractor,
        also_extractors=tuple(spec.also_extractors),
        metric=spec.metric or (LOSS if spec.evaluated_as == "loss" else "exact_match"),
        pattern=spec.pattern,
        max_length=spec.max_length,
        max_new_tokens=spec.max_new_tokens,
        stop=tuple(spec.stop),
        sources=tuple(spec.sources),
        licence=spec.licence,
        chat_template=spec.chat_template,
        truncate_prompt=spec.truncate_prompt,
    )


def _parse(path: Path) -> TaskFile:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "it is not text"
        raise UserError(f"The file is not valid YAML{where} ({reason}): correct it there.") from error
    _check_keys(content, TaskFile, "the task")
    _check_keys(content.get("data", {}), DataSource, "data")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TaskFile)
    try:
        values = parser.instantiate(parser.parse_object(content))
    except ArgumentError as error:
        raise UserError(f"{_one_line(str(error))}: correct the value of that key.") from error
    return TaskFile(**{key.name: values[key.name] for key in fields(TaskFile)})


def _check_keys(content: Any, described_by: type, what: str) -> None:
    names = [key.name for key in fields(described_by)]
    if not isinstance(content, Mapping):
        raise UserError(f"The description of {what} must be keys with values, such as '{names[0]}: …'.")
    for key in content:
        if key not in names:
            raise UserError(f"Unknown key '{key}' in {what}: choose from {', '.join(names)}.")


def _one_line(message: str) -> str:
    message = re.sub(r"<class '(\w+)'>", r"\1", message).replace("typing.", "").replace("Parser key", "Key")
    return re.sub(r"\s+", " ", message).rstrip(". ")


def _check(spec: TaskFile) -> None:
    extractors = [*EXTRACTORS, REGEX]
    for key, name in [("extractor", spec.extractor), *(("also_extractors", n) for n in spec.also_extractors)]:
        if name not in extractors:
            raise UserError(f"Unknown {key} '{name}': choose one of {', '.join(extractors)}.")
    if spec.answer_extractor not in EXTRACTORS:
        raise UserError(f"Unknown answer_extractor '{spec.answer_extractor}': choose one of {', '.join(EXTRACTORS)}.")
    if spec.metric not in (None, LOSS, *METRICS):
        raise UserError(f"Unknown metric '{spec.metric}': choose one of {', '.join([*METRICS, LOSS])}.")
    if (REGEX in (spec.extractor, *spec.also_extractors)) != (spec.pattern is not None):
        raise UserError(f"The extractor {REGEX} and the key pattern belong together: give both or neither.")
    for key, pattern in (("pattern", spec.pattern), ("choices_pattern", spec.choices_pattern)):
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise UserError(f"The {key} is not a regular expression ({error}): correct it.") from error
    if spec.choices is not None and spec.choices_pattern is not None:
        raise UserError("Both choices and choices_pattern are given: leave one of them out.")
    _check_kind(spec)
    for key, least in (("max_length", 2), ("max_new_tokens", 1)):
        if getattr(spec, key) < least:
            raise UserError(f"{key} must be at least {least}, not {getattr(spec, key)}: raise it.")
    _check_splits(spec.data)


def _check_kind(spec: TaskFile) -> None:
    kind = spec.evaluated_as
    if (kind == "choice") != spec.has_choices and kind != "loss":
        raise UserError(
            f"The kind {kind} and the choices do not fit: give choices to choose from, and to nothing else."
        )
    if spec.has_choices and spec.answer is None:
        raise UserError("The key answer is missing: say which of the choices is right.")
    if not spec.has_choices and spec.completion is None:
        raise UserError("The key completion is missing: give the template of what is to be learnt.")
    fitting = {"choice": (None,), "loss": (None, LOSS)}.get(kind, (None, *METRICS))
    if spec.metric not in fitting:
        raise UserError(f"The metric {spec.metric} does not fit the kind {kind}: leave one of them out.")


def _check_splits(data: DataSource) -> None:
    held_out = {"validation": data.validation_fraction, "test": data.test_fraction}
    if all(getattr(data, split) is None for split in SPLITS):
        raise UserError("No data are named: give data.train, data.validation or data.test.")
    for split, fraction in held_out.items():
        if not 0 <= fraction < 1:
            raise UserError(f"data.{split}_fraction must be from 0 to below 1, not {fraction}: it is a share of train.")
        if fraction and getattr(data, split) is not None:
            raise UserError(f"Both data.{split} and data.{split}_fraction are given: leave one of them out.")
    if any(held_out.values()) and data.train is None:
        raise UserError("A fraction of train is to be held out, but data.train is missing: name the file.")
    if sum(held_out.values()) >= 1:
        raise UserError("The fractions to be held out leave nothing to train on: their sum must be below 1.")


def _read(spec: TaskFile, folder: Path) -> dict[Split, list[Example]]:
    named = {split: getattr(spec.data, split) for split in SPLITS}
    splits = {
        split: _examples(spec, split, read_table(spec.data, name, folder))
        for split, name in named.items()
        if name is not None
    }
    seen: set[str] = set()
    for example in (example for examples in splits.values() for example in examples):
        if example.id in seen:
            raise UserError(f"The id '{example.id}' occurs twice: ids must be unique over all splits.")
        seen.add(example.id)
    if spec.data.validation_fraction or spec.data.test_fraction:
        data = spec.data
        splits |= hold_out(splits["train"], data.validation_fraction, data.test_fraction, data.seed)
    return splits


def _split(splits: Mapping[Split, list[Example]], split: Split) -> list[Example]:
    if split not in splits:
        raise UserError(
            f"The task file names no {split} data: add data.{split}"
            + (f" or data.{split}_fraction." if split != "train" else ".")
        )
    return splits[split]


def _examples(spec: TaskFile, split: Split, table: Table) -> list[Example]:
    columns = table.columns
    written = [*columns, "choice"] if spec.has_choices else columns
    completion = _template("completion", spec.completion or " {choice}", written)
    write = _Writer(
        spec=spec,
        prompt=_template("prompt", spec.prompt, columns),
        completion=completion,
        answer=None if spec.answer is None else _template("answer", spec.answer, columns),
        split=split,
        id=None if spec.id is None else _template("id", spec.id, columns),
        group=_template("group", spec.group, columns),
        choices=_choice_templates(spec.choices, columns),
    )
    found = [write.example(row, number) for number, row in enumerate(table.rows)]
    examples = [example for example in found if example is not None]
    if len(examples) < len(found):
        logger.warning(
            "%d of %d %s rows have no completion and are left out.", len(found) - len(examples), len(found), split
        )
    return examples


def _template(key: str, text: str, columns: Iterable[str]) -> Template:
    template = Template.parse(key, text)
    template.check(columns)
    return template


def _choice_templates(choices: str | list[str] | None, columns: list[str]) -> str | list[Template]:
    if isinstance(choices, str) and choices not in columns:
        raise UserError(
            f"There is no column '{choices}' to take the choices from: the columns are {', '.join(columns)}."
        )
    return choices if isinstance(choices, str) else [_template("choices", text, columns) for text in choices or ()]


@dataclass(frozen=True, kw_only=True)
class _Writer:
    """Turns rows into examples; ``choices`` is a column's name or templates."""

    spec: TaskFile
    prompt: Template
    completion: Template
    answer: Template | None
    split: Split
    id: Template | None
    group: Template
    choices: str | list[Template]

    def example(self, row: Mapping[str, Any], number: int) -> Example | None:
        try:
            return self._example(row, f"{self.split}-{number}" if self.id is None else self.id.render(row))
        except UserError as error:
            raise UserError(f"In row {number + 1}: {error}") from error

    def _example(self, row: Mapping[str, Any], name: str) -> Example | None:
        prompt = self.prompt.render(row)
        options = self._options(row, prompt)
        answer = None if self.answer is None else self.answer.render(row).strip()
        index = _chosen(options, answer or "", self.spec.answer_is) if options is not None else None
        completions = [self.completion.render({**row, "choice": option}) for option in options or ()]
        completion = completions[index] if index is not None else self.completion.render(row)
        if not completion.strip() and self.spec.drop_empty:
            return None
        if not completion.strip():
            raise UserError("the completion is empty: fill its columns, or set drop_empty to leave such rows out.")
        return Example(
            id=name,
            prompt=prompt,
            completion=completion,
            answer=(options[index] if options and index is not None else self._gold(answer, completion)),
            choices=tuple(completions),
            answer_index=index,
            group=self.group.render(row),
        )

    def _gold(self, answer: str | None, completion: str) -> str:
        if self.spec.evaluated_as == "loss":
            return completion.strip() if answer is None else answer
        gold = EXTRACTORS[self.spec.answer_extractor](completion if answer is None else answer)
        if gold is None:
            raise UserError(f"{self.spec.answer_extractor} finds no gold answer: check answer and answer_extractor.")
        return gold

    def _options(self, row: Mapping[str, Any], prompt: str) -> list[str] | None:
        if self.spec.choices_pattern is not None:
            found = [match.group(match.re.groups and 1) for match in re.finditer(self.spec.choices_pattern, prompt)]
        elif isinstance(self.choices, str):
            if not isinstance(row[self.choices], list):
                raise UserError(f"the column '{self.choices}' does not hold a list of choices: choose one that does.")
            found = [str(option) for option in row[self.choices]]
        elif self.choices:
            found = [template.render(row) for template in self.choices]
        else:
            return None
        if len(found) < 2:
            raise UserError(f"there must be at least two choices, not {found}: correct them.")
        return found


def _chosen(options: list[str], answer: str, answer_is: AnswerIs) -> int:
    names: dict[AnswerIs, list[str]] = {
        "text": [option.strip() for option in options],
        "index": [str(number) for number in range(len(options))],
        "letter": [chr(ord("A") + number) for number in range(len(options))],
    }
    if answer not in names[answer_is]:
        raise UserError(
            f"the answer '{answer}' is not among the choices {', '.join(names[answer_is])}: correct it, or set "
            f"answer_is to one of {', '.join(get_args(AnswerIs))}."
        )
    return names[answer_is].index(answer)
