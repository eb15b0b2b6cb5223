"""What crosses between a program and its judge: plain data, and nothing that could be anything else."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest

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
