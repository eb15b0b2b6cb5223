"""Prompts are pinned: a change of one must be a new one, or results would not be comparable."""

from __future__ import annotations

import pytest

from flylora.lab.tasks import load_task, published_task_names
from flylora.lab.tasks.prompts import PROMPTS

PINNED = [
    ("question-v1", ("1 + 1?",), {}, "Question: 1 + 1?\nAnswer:"),
    ("lettered-v1", ("Which?", ["x", "y"]), {}, "Question: Which?\nA. x\nB. y\nAnswer:"),
    (
        "lettered-v1",
        ("Which?", ["x", "y", "z"]),
        {"context": "Here.", "subject": "law"},
        "Subject: law\nContext: Here.\nQuestion: Which?\nA. x\nB. y\nC. z\nAnswer:",
    ),
    ("instruction-v1", ("Sort.",), {}, "### Instruction:\nSort.\n\n### Response:\n"),
    ("instruction-v1", ("Sort.", "2 1"), {}, "### Instruction:\nSort.\n\n### Input:\n2 1\n\n### Response:\n"),
    (
        "numbered-instruction-v1",
        ("Which?", ["x", "y"], "Here."),
        {},
        "### Instruction:\nAnswer the question with the number of the right option.\n\n"
        "### Input:\nHere.\nWhich?\n0: x\n1: y\n\n### Response:\n",
    ),
    (
        "function-instruction-v1",
        ("\ndef f():\n",),
        {},
        "### Instruction:\nComplete the Python function below and write it out in full.\n\n"
        "### Input:\ndef f():\n\n### Response:\n",
    ),
    ("code-v1", ("import re\ndef f():\n",), {}, "import re\ndef f():"),
]


@pytest.mark.parametrize(("name", "words", "options", "expected"), PINNED)
def test_prompts(name: str, words: tuple[object, ...], options: dict[str, str], expected: str) -> None:
    assert PROMPTS[name](*words, **options) == expected


def test_every_prompt_is_pinned() -> None:
    assert {name for name, *_ in PINNED} == set(PROMPTS)


def test_every_published_task_names_its_prompt() -> None:
    assert all(load_task(name).prompt in PROMPTS for name in published_task_names())
