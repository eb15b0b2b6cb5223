"""lm-evaluation-harness under our roof, with a module of its interface in its place."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from conftest import make_model
from flylora.errors import UserError
from flylora.lab.evaluation import EvalConfig, evaluate_with_harness
from flylora.lab.evaluation.harness import HarnessRecord
from flylora.lab.evaluation.subject import NO_OP
from flylora.lab.show import show_evaluation
from flylora.lab.training.methods import attach, method_config
from flylora.models import LoadedModel, load_model
from flylora.records import read_record
from flylora_cli import main


class Wrapped:
    """Stands for the harness's model class; like it, gives the tokenizer it gets a padding token."""

    def __init__(self, *, pretrained: Any, tokenizer: Any, batch_size: int) -> None:
        self.model, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size
        tokenizer.pad_token = tokenizer.eos_token


class Tasks:
    all_tasks = ("arc_easy", "hellaswag", "mmlu")


class Harness:
    """Stands for the module; its results are those of the version named, with figures of the model lent to it."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.error: Exception | None = None

    def simple_evaluate(self, *, model: Wrapped, tasks: list[str], **settings: Any) -> dict[str, Any]:
        if self.error:
            raise self.error
        self.calls.append({"model": model.model, "tasks": tasks, "batch_size": model.batch_size, **settings})
        with torch.no_grad():
            figure = float(model.model(input_ids=torch.tensor([[5, 6, 7]])).logits.abs().mean())
        torch.rand(1)  # a task may draw
        return {
            "results": {
                name: {
                    "name": name,
                    "alias": name,
                    "sample_len": 3,
                    "acc,none": figure,
                    "acc_stderr,none": 0.25,
                    "word_perplexity,none": 12,
                    "word_perplexity_stderr,none": "N/A",
                    "exact_match,strict-match": 0.0,
                }
                for name in tasks
            },
            "versions": dict.fromkeys(tasks, 1.0),
            "n-shot": dict.fromkeys(tasks, 0),
            "n-samples": {name: {"original": 9, "effective": 3} for name in tasks},
        }


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Harness:
    made = Harness()
    modules: dict[str, dict[str, Any]] = {
        "lm_eval": {"__version__": "0.4.99", "simple_evaluate": made.simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": Wrapped},
        "lm_eval.tasks": {"TaskManager": Tasks},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return made


@pytest.fixture
def loaded(tiny_model_dir: Path) -> LoadedModel:
    return load_model(str(tiny_model_dir), "float32")


@pytest.fixture
def config(tiny_model_dir: Path) -> Callable[..., EvalConfig]:
    def make(**changes: Any) -> EvalConfig:
        settings = {"model": str(tiny_model_dir), "lm_eval": "hellaswag,arc_easy", "dtype": "float32"}
        return EvalConfig(**{**settings, **changes})

    return make


def make_adapter(folder: Path, trained: bool = True) -> str:
    model = attach(make_model(), method_config("flylora", {"r": 4, "k": 2}), seed=0)
    for name, parameter in model.named_parameters():
        if trained and "flylora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return str(folder)


def test_the_harness_gets_the_model_the_tasks_and_the_settings(
    harness: Harness, config: Callable[..., EvalConfig], loaded: LoadedModel, tmp_path: Path
) -> None:
    out = tmp_path / "r.json"
    record = evaluate_with_harness(config(limit=5, batch_size=3, seed=7, out=str(out)), loaded)
    (call,) = harness.calls
    assert call["model"] is loaded.model
    assert call["tasks"] == ["hellaswag", "arc_easy"]
    assert (call["limit"], call["batch_size"], call["fewshot_random_seed"]) == (5, 3, 7)
    assert call["apply_chat_template"] is False
    assert record.harness == "0.4.99"
    assert list(record.results) == ["hellaswag", "arc_easy"]
    assert record.results["arc_easy"].keys() == {
        "acc,none",
        "acc_stderr,none",
        "word_perplexity,none",
        "exact_match,strict-match",
    }
    assert record.task_versions == {"hellaswag": "1.0", "arc_easy": "1.0"}
    assert record.few_shot == {"hellaswag": 0, "arc_easy": 0}
    assert record.items_scored == {"hellaswag": 3, "arc_easy": 3}
    assert (record.adapter_active, record.adapter_fingerprint) == (None, None)
    assert read_record(out, HarnessRecord) == record


def test_the_adapter_is_on_the_model_and_comes_off(
    harness: Harness, config: Callable[..., EvalConfig], loaded: LoadedModel, tmp_path: Path
) -> None:
    base = evaluate_with_harness(config(), loaded)
    adapted = evaluate_with_harness(config(adapter=make_adapter(tmp_path / "a")), loaded)
    assert isinstance(harness.calls[1]["model"], PeftModel)
    assert isinstance(loaded.model, PreTrainedModel)
    assert adapted.adapter_active is True
    assert adapted.adapter_fingerprint
    assert adapted.results["arc_easy"]["acc,none"] != base.results["arc_easy"]["acc,none"]
    assert evaluate_with_harness(config(), loaded).results == base.results


def test_an_adapter_that_does_nothing_is_called_so(
    harness: Harness, config: Callable[..., EvalConfig], loaded: LoadedModel, tmp_path: Path
) -> None:
    record = evaluate_with_harness(config(adapter=make_adapter(tmp_path / "a", trained=False)), loaded)
    assert record.adapter_active is False
    assert record.notes == [NO_OP]


def test_global_generators_and_the_tokenizer_are_left_alone(
    harness: Harness, config: Callable[..., EvalConfig], loaded: LoadedModel
) -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # noqa: NPY002  the global one is meant
    pad = loaded.tokenizer.pad_token
    evaluate_with_harness(config(), loaded)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])  # noqa: NPY002
    assert all(harness.calls[0][f"{name}random_seed"] is None for name in ("", "numpy_", "torch_"))
    assert loaded.tokenizer.pad_token == pad


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lm_eval": "hellaswag,arc"}, r"lm-evaluation-harness 0\.4\.99 has no task 'arc'"),
        ({"lm_eval": " , "}, "lm_eval names no task"),
        ({"adapter": "/no/such/adapter"}, "There is no adapter folder"),
        ({"model": "/no/such/model"}, "There is no model"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    harness: Harness, config: Callable[..., EvalConfig], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        evaluate_with_harness(config(out=str(tmp_path / "r.json"), **changes))
    assert list(tmp_path.iterdir()) == []


def test_what_the_harness_cannot_do_is_said_in_its_words(
    harness: Harness, config: Callable[..., EvalConfig], loaded: LoadedModel
) -> None:
    harness.error = ConnectionError("Couldn't reach the data.\nsecond line")
    with pytest.raises(UserError, match=r"could not run hellaswag, arc_easy \(Couldn't reach the data\)"):
        evaluate_with_harness(config(), loaded)


def test_a_missing_harness_is_named_with_its_extra(
    config: Callable[..., EvalConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'flylora\[lm-eval\]'"):
        evaluate_with_harness(config())


def test_the_command_line_reaches_it(
    harness: Harness, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "--model", str(tiny_model_dir), "--lm-eval", "hellaswag,arc_easy", "--dtype", "float32"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    for word in ("hellaswag", "arc_easy", "± 0.2500", "12.0000", "exact_match (strict-match)", "0.0000"):
        assert word in shown
    assert "stderr" not in shown


def test_notes_and_the_place_of_the_result_are_shown(
    harness: Harness,
    config: Callable[..., EvalConfig],
    loaded: LoadedModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter, out = make_adapter(tmp_path / "a", trained=False), str(tmp_path / "r[1].json")
    show_evaluation(evaluate_with_harness(config(adapter=adapter, out=out), loaded))
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Note: {NO_OP}" in shown
    assert "r[1].json" in "".join(shown.split())  # lines are broken where the terminal ends
