"""What is verified before foreign code runs, and what crosses between a program and its judge: plain data only."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("the sandbox is for Linux", allow_module_level=True)

import resource

from flylora.lab.evaluation import inside
from flylora.lab.evaluation.inside import ProgramFailed, answer_calls, decode, encode, judge

PLAIN = [
    None,
    True,
    0,
    -(10**30),
    1.5,
    math.inf,
    "x\n\ud800",
    b"\x00\xff",
    2 - 1j,
    [1, [2.0, "3"]],
    (1, (), [()]),
    {1, 2},
    frozenset({"a"}),
    {1: {"a": (1,)}, (1, 2): None},
    range(1, 9, 2),
]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_data_come_back_as_they_were(value: Any) -> None:
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value
    assert type(back) is type(value)


def test_nan_and_iterators_come_back() -> None:
    assert math.isnan(decode(json.loads(json.dumps(encode(math.nan)))))
    assert list(decode(encode(map(str, [1, 2])))) == ["1", "2"]


class Agreeable(list[int]):
    """Equal to everything."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True


def test_a_subclass_becomes_its_plain_class() -> None:
    assert type(decode(encode(Agreeable([1])))) is list
    assert decode(encode(Agreeable([1]))) != [2]
    assert type(decode(encode(type("Word", (str,), {})("x")))) is str


@pytest.mark.parametrize("value", [object(), print, type, {"a": object()}])
def test_anything_else_is_no_plain_data(value: Any) -> None:
    with pytest.raises(TypeError, match="no plain data"):
        encode(value)


@pytest.mark.parametrize(
    "body",
    [[], [1], {}, {"list": [1], "set": []}, {"eval": "1"}, {"list": 3}, {"set": [{"list": []}]}, {"bytes": "xyz"}],
)
def test_forged_answers_are_failures(body: Any) -> None:
    with pytest.raises(ProgramFailed, match="no plain data"):
        decode(body)


def answered(program: str, *calls: Any) -> list[Any]:
    asked = io.StringIO("".join(json.dumps(encode((words, {}))) + "\n" for words in calls))
    said = io.StringIO()
    answer_calls({"program": program, "entry_point": "f"}, asked, said)
    return [json.loads(line) for line in said.getvalue().splitlines()]


def test_every_call_is_answered_with_a_value_or_an_error() -> None:
    assert answered("def f(x):\n    return 6 // x", (3,), (0,)) == [
        ["answer", 2],
        ["error", "ZeroDivisionError: integer division or modulo by zero"],
    ]
    assert answered("def f(x):\n    return print", (1,))[0][0] == "error"
    assert answered("def g(x):\n    return 1", (1,)) == [["error", "KeyError: 'f'"]]
    assert answered("def f(:", (1,))[0][1].startswith("SyntaxError")
    assert answered("raise SystemExit(0)", (1,)) == [["error", "SystemExit: 0"]]


def judged(test: str, *answers: Any, given: str = "") -> tuple[bool, str]:
    task = {"given": given, "entry_point": "f", "test": test}
    lines = (line if isinstance(line, str) else json.dumps(line) + "\n" for line in answers)
    return judge(task, io.StringIO(), io.StringIO("".join(lines)))


CHECK = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 3\n"


def test_the_judge_passes_what_answers_rightly_every_time() -> None:
    assert judged(CHECK, ["answer", 2], ["answer", 3]) == (True, "passed")
    assert judged(CHECK, ["answer", 2], ["answer", 4]) == (False, "AssertionError")


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([], "the program ended"),
        ([["answer", 2]], "the program ended"),
        (["passed\n"], "the answer is no plain data"),
        (["[\n"], "the answer is no plain data"),
        (["3\n"], "the answer is no plain data"),
        (['["answer", 2'], "the program ended"),
        ([["passed", 2]], "2"),
        ([["error", "NameError: x"]], "NameError: x"),
        ([["error", "passed"]], "passed"),
        ([["answer", {"__class__": "x"}]], "the answer is no plain data"),
    ],
)
def test_whatever_else_the_program_says_fails(answers: list[Any], said: str) -> None:
    assert judged(CHECK, *answers) == (False, said)


def test_tests_may_use_what_is_given_but_its_function_is_the_candidate() -> None:
    given = "def helper(x):\n    return x + 1\n\n\ndef f(x):\n    '''To write.'''\n"
    test = "def check(candidate):\n    assert candidate(1) == helper(1)\n    assert f(2) == helper(2)\n"
    assert judged(test, ["answer", 2], ["answer", 3], given=given)[0]
    assert judged(test, ["answer", 2], ["answer", 2], given=given) == (False, "AssertionError")


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings that a pretended sandbox fulfils; nothing is limited or signalled here."""

    def nobody(number: int, signal: int) -> None:
        assert (number, signal) == (-1, 0)
        raise ProcessLookupError

    home = SimpleNamespace(f_blocks=4, f_frsize=4096, f_files=10)
    monkeypatch.setattr(os, "getresuid", lambda: (9, 9, 9))
    monkeypatch.setattr(os, "getresgid", lambda: (9, 9, 9))
    monkeypatch.setattr(os, "kill", nobody)
    monkeypatch.setattr(os, "listdir", lambda path: ["usr", "sandbox", "inside.py"])
    monkeypatch.setattr(os, "statvfs", lambda path: home)
    monkeypatch.setattr(resource, "getrlimit", lambda number: (7, 7))
    return {**dict.fromkeys(inside.LIMITS, 7), "visible": ["/usr"], "home_bytes": 4 * 4096, "home_files": 10}


def test_what_is_cut_off_is_let_through(settings: dict[str, Any]) -> None:
    inside.verify(settings)


@pytest.mark.parametrize(
    ("name", "instead", "said"),
    [
        ("getresuid", lambda: (9, 9, 0), "still be root"),
        ("getresgid", lambda: (0, 9, 9), "still be root"),
        ("kill", lambda *_: None, "still signal other processes"),
        ("listdir", lambda path: ["usr", "sandbox", "inside.py", "home"], "still see the machine's files"),
        ("statvfs", lambda path: SimpleNamespace(f_blocks=5, f_frsize=4096, f_files=10), "limit of the home"),
        ("statvfs", lambda path: SimpleNamespace(f_blocks=4, f_frsize=4096, f_files=11), "limit of the home"),
    ],
)
def test_what_is_not_cut_off_is_refused(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str, instead: Any, said: str
) -> None:
    monkeypatch.setattr(os, name, instead)
    with pytest.raises(RuntimeError, match=said):
        inside.verify(settings)


@pytest.mark.parametrize("name", inside.LIMITS)
def test_a_limit_that_does_not_hold_is_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(RuntimeError, match=f"the limit of {name} does not hold"):
        inside.verify({**settings, name: 8})


def test_it_needs_nothing_but_the_standard_library() -> None:
    command = [sys.executable, "-I", "-S", "-c", f"import runpy; runpy.run_path({inside.__file__!r})"]
    assert subprocess.run(command, capture_output=True, env={}, check=False).returncode == 0
