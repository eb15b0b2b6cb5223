"""Tasks of lm-evaluation-harness, run by it, on the base model with or without an adapter.

Prompts, few-shot examples, metrics and data are the harness's own; this module lends it the model and keeps what it
found. Programs that a model writes are not run this way: our own humaneval does that in a sandbox.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from flylora.adapted import adapted, base_of
from flylora.errors import UserError
from flylora.lab.evaluation.config import EvalConfig
from flylora.lab.evaluation.run import about_adapter, check_out
from flylora.models import LoadedModel, first_line, load_model
from flylora.records import Provenance, Record, now, provenance, write_record

_PROBE = "Question: What is the answer?\nAnswer:"


@dataclass(frozen=True, kw_only=True)
class HarnessRecord(Record):
    """What lm-evaluation-harness measured.

    Attributes:
        dtype: Of the base model's weights.
        adapter_fingerprint: sha256 over the adapter's tensors; ``None`` for the base model alone.
        adapter_active: Whether the adapter changes the logits of a probe; ``None`` for the base model alone.
        harness: Version of lm-evaluation-harness.
        results: For each task its metrics by the harness's names: the metric, a comma and the filter, such as
            ``acc,none``, and ``acc_stderr,none`` for the standard error.
        task_versions: For each task its version.
        few_shot: For each task the number of examples shown before each question.
        items_scored: For each task the number of items.
        notes: Sentences a reader of the figures must know.
        seconds: Time spent, without loading.
    """

    kind: ClassVar[str] = "lm_eval"

    dtype: str
    adapter_fingerprint: str | None
    adapter_active: bool | None
    harness: str
    results: dict[str, dict[str, float]]
    task_versions: dict[str, str] = field(default_factory=dict)
    few_shot: dict[str, int] = field(default_factory=dict)
    items_scored: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def evaluate_with_harness(config: EvalConfig, loaded: LoadedModel | None = None) -> HarnessRecord:
    """Runs the tasks that ``config.lm_eval`` names.

    Of the other settings, model, adapter, out, limit (the harness takes the first items), batch_size, chat_template,
    dtype, device, seed and overwrite count.

    Args:
        config: Settings.
        loaded: The model that ``config.model`` names, to save loading it; given back without an adapter.

    Returns:
        The record, which is also in ``config.out`` if that is given.

    Raises:
        UserError: The harness is not installed or does not know a task, or settings, model or adapter are not what
            they should be.
    """
    names = [name.strip() for name in (config.lm_eval or "").split(",") if name.strip()]
    if not names:
        raise UserError("lm_eval names no task: give names of lm-evaluation-harness, separated by commas.")
    if config.out is not None:
        check_out(Path(config.out), config.overwrite)
    harness = _Harness(names)
    loaded = loaded or load_model(config.model, config.dtype, config.device)
    origin = provenance(seeds={"seed": config.seed}, data_sha256={}, model_sha256=loaded.sha256)
    if config.adapter is None:
        record = _run(config, harness, loaded, loaded.model, origin, None)
    else:
        with adapted(loaded, Path(config.adapter)) as (model, fingerprint):
            record = _run(config, harness, loaded, model, origin, fingerprint)
    if config.out is not None:
        write_record(record, Path(config.out))
    return record


class _Harness:
    """The library, imported only when it is asked for, and the tasks it is to run."""

    def __init__(self, names: list[str]) -> None:
        try:
            import lm_eval
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(
                f"lm-evaluation-harness cannot be imported ({first_line(error)}): install it with pip install "
                "'flylora[lm-eval]'."
            ) from error
        self.version = str(lm_eval.__version__)
        self.names = names
        self._evaluate = lm_eval.simple_evaluate
        self._wrap = HFLM
        self._tasks = TaskManager()
        unknown = [name for name in names if name not in set(self._tasks.all_tasks)]
        if unknown:
            raise UserError(
                f"lm-evaluation-harness {self.version} has no task '{unknown[0]}': lm-eval ls tasks lists what it has."
            )

    def run(self, config: EvalConfig, loaded: LoadedModel, model: PreTrainedModel | PeftModel) -> Mapping[str, Any]:
        """The harness's own results; ``UserError`` with its reason where it cannot run a task."""
        # It gives the tokenizer a padding token.
        tokenizer = copy.deepcopy(loaded.tokenizer)
        try:
            found = self._evaluate(
                model=self._wrap(pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size),
                tasks=self.names,
                task_manager=self._tasks,
                limit=config.limit,
                apply_chat_template=bool(config.chat_template),
                log_samples=False,
                # None keeps it from seeding the global generators.
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
                fewshot_random_seed=config.seed,
            )
        except Exception as error:  # data sets, metrics and the harness raise errors of their own
            raise UserError(
                f"lm-evaluation-harness could not run {', '.join(self.names)} ({first_line(error)}): see its "
                "documentation on the task."
            ) from error
        assert found is not None  # so only in further processes of a distributed run
        return found


def _run(
    config: EvalConfig,
    harness: _Harness,
    loaded: LoadedModel,
    model: PreTrainedModel | PeftModel,
    origin: Provenance,
    fingerprint: str | None,
) -> HarnessRecord:
    started = time.monotonic()
    probe = torch.tensor([loaded.tokenizer(_PROBE)["input_ids"]], device=base_of(model).device)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        active, notes = about_adapter(model, config, loaded, probe)
        found = harness.run(config, loaded, model)
    results = {task: _numbers(measured) for task, measured in found["results"].items()}
    return HarnessRecord(
        status="complete",
        provenance=dataclasses.replace(origin, finished=now()),
        config=dataclasses.asdict(config),
        dtype=loaded.dtype,
        adapter_fingerprint=fingerprint,
        adapter_active=active,
        harness=harness.version,
        results=results,
        task_versions={task: str(version) for task, version in found.get("versions", {}).items()},
        few_shot={task: int(count) for task, count in found.get("n-shot", {}).items() if count is not None},
        items_scored={task: int(count["effective"]) for task, count in found.get("n-samples", {}).items()},
        notes=notes,
        seconds=round(time.monotonic() - started, 1),
    )


def _numbers(measured: Mapping[str, Any]) -> dict[str, float]:
    """The metrics among what is said of a task; it also has a name, and N/A for an error that is not known."""
    return {
        name: float(value)
        for name, value in measured.items()
        if "," in name and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
