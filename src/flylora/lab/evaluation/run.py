"""One evaluation: items in, scores and losses out, as a record."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flylora.adapted import OTHER_WEIGHTS, adapted, base_of, changes_logits, trained_on_other_weights
from flylora.errors import UserError
from flylora.lab.data import encode
from flylora.lab.evaluation.code import judge, pass_rates
from flylora.lab.evaluation.config import EvalConfig
from flylora.lab.evaluation.generation import Sampling, generate, sample_seed
from flylora.lab.evaluation.likelihood import token_log_likelihoods
from flylora.lab.evaluation.record import EvalRecord
from flylora.lab.evaluation.sandbox import check_isolation
from flylora.lab.tasks import Example, Task, load_task
from flylora.lab.tasks.base import CodeExample
from flylora.models import LoadedModel, load_model
from flylora.records import Provenance, now, progress, provenance, write_record
from flylora.texts import Encoded, encode_prompt, end_token_id, fit_prompt

logger = logging.getLogger(__name__)

NO_OP = (
    "The adapter is a no-op: the logits of a probe batch are the same with it and without it, so these figures are "
    "the base model's."
)
_PROBE_ITEMS = 4


@dataclass(frozen=True)
class _Setting:
    """What every part of an evaluation needs."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    config: EvalConfig
    chat_template: bool
    context: int


@dataclass
class _Scored:
    """What became of one item."""

    example: Example
    details: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)  # by the way of reading or comparing answers
    score: float | None = None  # by the way that was asked for
    log_likelihoods: list[float] | None = None

    def as_item(self) -> dict[str, Any]:
        likelihoods = self.log_likelihoods
        return {
            "id": self.example.id,
            **({"group": self.example.group} if self.example.group else {}),
            **self.details,
            "answer": self.example.answer,
            "score": self.score,
            **({"scores": self.scores} if len(self.scores) > 1 else {}),
            "loss": -sum(likelihoods) / len(likelihoods) if likelihoods else None,
            "loss_tokens": len(likelihoods or ()),
        }


def run(config: EvalConfig, loaded: LoadedModel | None = None) -> EvalRecord:
    """Evaluates a model, with or without an adapter, on one split of a task.

    Multiple choice is answered by log-likelihood, other tasks by greedy generation and the task's extractor, or by
    programs that are run against tests. The loss on the gold completion is always measured, and nothing else with
    ``config.loss_only``.

    Args:
        config: Settings.
        loaded: The model that ``config.model`` names, to save loading it; given back without an adapter.

    Returns:
        The record, which is also in ``config.out`` if that is given.

    Raises:
        UserError: Settings, data, model or adapter are not what they should be, or the result cannot be written.
    """
    out = None if config.out is None else Path(config.out)
    if out is not None:
        check_out(out, config.overwrite)
    if config.task is None:
        raise UserError("No task is given: name one, or call flylora.lab.evaluation.evaluate_with_harness.")
    task = load_task(config.task, config.data_dir)
    _check_kind(task, config)
    examples = task.examples(config.split, config.limit)
    loaded = loaded or load_model(config.model, config.dtype, config.device)
    origin = provenance(
        seeds={"seed": config.seed},
        data_sha256={config.split: task.data_hash(config.split)},
        model_sha256=loaded.sha256,
    )
    if config.adapter is None:
        record = _evaluate(config, task, examples, loaded, loaded.model, origin, None)
    else:
        with adapted(loaded, Path(config.adapter)) as (model, fingerprint):
            record = _evaluate(config, task, examples, loaded, model, origin, fingerprint)
    if out is not None:
        write_record(record, out)
    return record


def _check_kind(task: Task, config: EvalConfig) -> None:
    if task.kind == "code":
        if config.loss_only:
            return  # which runs no program
        if not config.allow_code_execution:
            raise UserError(
                f"The task '{task.name}' runs programs that the model writes: add --allow-code-execution to allow that "
                "(docs/domains.md says what protects the machine)."
            )
        check_isolation()
    elif config.samples > 1 or config.temperature > 0:
        raise UserError(
            f"samples and temperature are for tasks whose answers are programs, and '{task.name}' is none: leave them "
            "out."
        )


def check_out(out: Path, overwrite: bool) -> None:
    """Raises a ``UserError`` where a result cannot go, or may not."""
    if out.is_dir():
        raise UserError(
            f"{out} is a folder, but the result is one JSON file: give a file name such as {out}/eval.json."
        )
    if out.exists() and not overwrite:
        raise UserError(f"The file {out} exists already: choose another name, or add --overwrite to replace it.")


def _evaluate(
    config: EvalConfig,
    task: Task,
    examples: Sequence[Example],
    loaded: LoadedModel,
    model: PreTrainedModel | PeftModel,
    origin: Provenance,
    fingerprint: str | None,
) -> EvalRecord:
    started = time.monotonic()
    setting = _Setting(
        model=model,
        tokenizer=loaded.tokenizer,
        task=task,
        config=config,
        chat_template=task.chat_template if config.chat_template is None else config.chat_template,
        context=int(getattr(loaded.model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 30),
    )
    # An adapter that routes at random draws from torch's global generator.
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        active, notes = about_adapter(model, config, loaded, _probe(setting, examples))
        scored = [_Scored(example) for example in examples]
        kind = "loss" if config.loss_only else task.kind
        if kind == "choice":
            _answer_choices(setting, scored)
        else:
            if kind == "generate":
                _answer_by_generation(setting, scored)
            elif kind == "code":
                _answer_by_programs(setting, scored)
            _measure_loss(setting, scored)
    return _summary(config, task, loaded, origin, fingerprint, active, notes, scored, time.monotonic() - started)


def about_adapter(
    model: PreTrainedModel | PeftModel, config: EvalConfig, loaded: LoadedModel, probe: torch.Tensor
) -> tuple[bool | None, list[str]]:
    """Whether an adapter changes the logits of a probe batch, and what a reader must know of it, also as warnings.

    ``None`` and nothing for the base model alone.
    """
    if not isinstance(model, PeftModel):
        return None, []
    active = changes_logits(model, probe)
    notes = [] if active else [NO_OP]
    notes += [OTHER_WEIGHTS] if trained_on_other_weights(Path(str(config.adapter)), loaded) else []
    for note in notes:
        logger.warning(note)
    return active, notes


def _probe(setting: _Setting, examples: Sequence[Example]) -> torch.Tensor:
    """A few prompts, cut to the shortest, so that no padding is needed."""
    prompts = [encode_prompt(e.prompt, setting.tokenizer, setting.chat_template) for e in examples[:_PROBE_ITEMS]]
    length = max(1, min(min(map(len, prompts)), setting.context))
    rows = [prompt[-length:] or [0] for prompt in prompts]
    return torch.tensor(rows, device=base_of(setting.model).device)


def _answer_choices(setting: _Setting, scored: list[_Scored]) -> None:
    """Scores every candidate completion; the gold one, with its end of sequence, also gives the loss."""
    rows: list[Encoded] = []
    owners: list[tuple[_Scored, int]] = []
    for item in scored:
        encoded = [_encoded(setting, dataclasses.replace(item.example, completion=c)) for c in item.example.choices]
        whole = [row for row in encoded if row is not None]
        if len(whole) == len(encoded):
            rows += whole
            owners += [(item, index) for index in range(len(whole))]
    found: dict[str, list[list[float]]] = defaultdict(list)
    with progress("answers", len(rows)) as advance:
        likelihoods = token_log_likelihoods(setting.model, rows, setting.config.batch_size, advance)
    for (item, _), likelihood in zip(owners, likelihoods, strict=True):
        found[item.example.id].append(likelihood)
    for item in scored:
        if item.example.id in found:
            _pick(setting.config, item, found[item.example.id])


def _pick(config: EvalConfig, item: _Scored, likelihoods: list[list[float]]) -> None:
    example = item.example
    # The end of sequence is left out: a base model that never ends its answers would be compared by that alone.
    sums = [sum(likelihood[:-1]) for likelihood in likelihoods]
    per_byte = [total / len(c.encode()) for total, c in zip(sums, example.choices, strict=True)]
    picks = {"sum": _argmax(sums), "per_byte": _argmax(per_byte)}
    gold = example.answer_index
    item.details = {"choice_log_likelihoods": sums, "picked": picks[config.choice_score], "answer_index": gold}
    item.scores = {way: float(pick == gold) for way, pick in picks.items()}
    item.score = item.scores[config.choice_score]
    if gold is not None:
        item.log_likelihoods = likelihoods[gold]


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _answer_by_generation(setting: _Setting, scored: list[_Scored]) -> None:
    task = setting.task
    readings = (task.extractor, *task.also_extractors)
    for item, (text,) in _generated(setting, scored):
        item.details = {"output": text, "extracted": task.extract(text)}
        item.scores = {name: task.score(text, item.example, name) for name in readings}
        item.score = item.scores[task.extractor]


def _answer_by_programs(setting: _Setting, scored: list[_Scored]) -> None:
    """Draws programs for every item and runs each against the item's tests, in the sandbox."""
    outputs = _generated(setting, scored)
    with progress("programs", len(outputs) * setting.config.samples) as advance:
        for item, texts in outputs:
            assert isinstance(item.example, CodeExample)
            samples = []
            for text in texts:
                verdict = judge(item.example, setting.task.extract(text))
                samples.append({"output": text, "passed": verdict.passed, "reason": verdict.reason})
                advance(1)
            passed = sum(bool(sample["passed"]) for sample in samples)
            item.details = {"samples": samples, "passed": passed}
            item.scores = pass_rates(len(samples), passed)
            item.score = item.scores["pass@1"]


def _generated(setting: _Setting, scored: list[_Scored]) -> list[tuple[_Scored, list[str]]]:
    """The items that fit in the context, each with as many outputs as samples are asked for."""
    task, config, chat = setting.task, setting.config, setting.chat_template
    max_new_tokens = config.max_new_tokens or task.max_new_tokens
    room = setting.context - max_new_tokens
    prompts, owners = [], []
    for item in scored:
        prompt: list[int] | None = encode_prompt(item.example.prompt, setting.tokenizer, chat)
        if prompt is not None and len(prompt) > room:
            prompt = fit_prompt(item.example.prompt, setting.tokenizer, room, chat) if task.truncate_prompt else None
        if prompt is not None:
            prompts += [prompt] * config.samples
            owners.append(item)
    seeds = [sample_seed(config.seed, item.example.id, n) for item in owners for n in range(config.samples)]
    ends = {end_token_id(setting.tokenizer, chat), end_token_id(setting.tokenizer, False)}
    with progress("generation", len(prompts)) as advance:
        texts = generate(
            setting.model,
            setting.tokenizer,
            prompts,
            batch_size=config.batch_size,
            max_new_tokens=max_new_tokens,
            end_ids=sorted(ends),
            stop=task.stop,
            sampling=Sampling(config.temperature, seeds) if config.temperature else None,
            advance=advance,
        )
    return [(item, texts[i * config.samples : (i + 1) * config.samples]) for i, item in enumerate(owners)]


def _measure_loss(setting: _Setting, scored: list[_Scored]) -> None:
    pairs = [(item, _encoded(setting, item.example)) for item in scored]
    fitting = [(item, row) for item, row in pairs if row is not None]
    with progress("loss", len(fitting)) as advance:
        likelihoods = token_log_likelihoods(
            setting.model, [row for _, row in fitting], setting.config.batch_size, advance
        )
    for (item, _), likelihood in zip(fitting, likelihoods, strict=True):
        item.log_likelihoods = likelihood


def _encoded(setting: _Setting, example: Example) -> Encoded | None:
    truncate = setting.task.truncate_prompt
    return encode(example, setting.tokenizer, setting.context, setting.chat_template, truncate)


def _summary(
    config: EvalConfig,
    task: Task,
    loaded: LoadedModel,
    origin: Provenance,
    fingerprint: str | None,
    active: bool | None,
    notes: list[str],
    scored: list[_Scored],
    seconds: float,
) -> EvalRecord:
    has_accuracy = task.kind != "loss" and not config.loss_only
    too_long = [s.example.id for s in scored if (s.score is None if has_accuracy else s.log_likelihoods is None)]
    if too_long:
        notes = [*notes, f"{len(too_long)} items do not fit in the model's context and count as wrong."]
    scores = [s.score or 0.0 for s in scored]
    accuracy = sum(scores) / len(scores) if has_accuracy else None
    likelihoods = [value for s in scored for value in s.log_likelihoods or ()]
    by_group = defaultdict(list)
    for s, score in zip(scored, scores, strict=True):
        by_group[s.example.group].append(score)
    return EvalRecord(
        status="complete",
        provenance=dataclasses.replace(origin, finished=now()),
        config=dataclasses.asdict(config),
        task={key: str(getattr(task, key)) for key in ("name", "version", "kind", "prompt", "extractor", "metric")},
        split=config.split,
        dtype=loaded.dtype,
        adapter_fingerprint=fingerprint,
        adapter_active=active,
        items_scored=len(scored),
        accuracy=accuracy,
        accuracy_stderr=None if accuracy is None else standard_error(scores),
        accuracies={
            way: sum(s.scores.get(way, 0.0) for s in scored) / len(scored)
            for way in sorted({way for s in scored for way in s.scores})
        },
        loss=-math.fsum(likelihoods) / len(likelihoods) if likelihoods else None,
        loss_tokens=len(likelihoods),
        groups={
            name: {"accuracy": sum(values) / len(values), "items": len(values)}
            for name, values in sorted(by_group.items())
            if has_accuracy and set(by_group) != {""}
        },
        notes=notes,
        too_long=too_long,
        seconds=round(seconds, 1),
        items=[s.as_item() for s in scored],
    )


def standard_error(scores: Sequence[float]) -> float:
    """sqrt(sum of (s - mean)^2) / n: of the mean of n independent scores; sqrt(p (1 - p) / n) where each is 0 or 1."""
    mean = math.fsum(scores) / len(scores)
    return math.sqrt(math.fsum((score - mean) ** 2 for score in scores)) / len(scores)
