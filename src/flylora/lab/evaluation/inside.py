"""The two programs that run isolated: the generated program, which answers calls, and the judge, which asks.

They are separate processes, each cut off by ``isolate.py``, with two pipes between them on which only plain data
travel, as JSON. The generated program never sees the tests, and what it can do to its own interpreter (patch assert
and builtins, end early, print what it likes) means nothing to the judge, in whose process none of its code runs. The
verdict goes from the judge to flylora on a third pipe, which the program does not have.

``sandbox.py`` passes the text of this file to the interpreter, for the sandbox holds no file of flylora.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

_TOO_LONG = 200  # characters of a reason, so that a verdict fits in one write to a pipe


class ProgramFailed(Exception):
    """The generated program raised an error, ended, or answered with something that is no plain data."""


def encode(value: Any) -> Any:
    """Plain data as JSON that keeps the types apart; subclasses become their plain class.

    An iterator becomes one over what it gives.

    Raises:
        TypeError: The value is of another class.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    for collection in (list, tuple, set, frozenset):
        if isinstance(value, collection):
            return {collection.__name__: [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, Iterator):
        return {"iterator": [encode(item) for item in value]}
    raise TypeError(f"an answer of class {type(value).__name__} is no plain data")


def decode(body: Any) -> Any:
    """The value that ``encode`` gave ``body`` for; ``ProgramFailed`` for anything that it never gives."""
    if body is None or isinstance(body, (bool, int, float, str)):
        return body
    try:
        ((kind, content),) = body.items()
        return _DECODERS[kind](content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ProgramFailed("the answer is no plain data") from error


def _items(content: list[Any]) -> list[Any]:
    return [decode(item) for item in content]


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "complex": lambda content: complex(*content),
    "bytes": bytes.fromhex,
    "list": _items,
    "tuple": lambda content: tuple(_items(content)),
    "set": lambda content: set(_items(content)),
    "frozenset": lambda content: frozenset(_items(content)),
    "dict": lambda content: {decode(key): decode(item) for key, item in content},
    "range": lambda content: range(*content),
    "iterator": lambda content: iter(_items(content)),
}


def answer_calls(task: dict[str, str], calls: TextIO, answers: TextIO) -> None:
    """The generated program's side: runs it, then calls its function as often as it is asked to."""
    namespace: dict[str, Any] = {"__name__": "program"}
    failure = None
    try:
        exec(compile(task["program"], "program", "exec"), namespace)
        function = namespace[task["entry_point"]]
    except BaseException as error:
        failure = _told(error)
    for line in calls:
        try:
            words, named = decode(json.loads(line))
            said = ["error", failure] if failure else ["answer", encode(function(*words, **named))]
        except BaseException as error:
            said = ["error", _told(error)]
        answers.write(json.dumps(said) + "\n")
        answers.flush()


def judge(task: dict[str, str], calls: TextIO, answers: TextIO) -> tuple[bool, str]:
    """The judge's side: runs the tests, whose calls of the function go to the program.

    Returns:
        Whether all of them passed, and if not why: in words that may be the program's, so they decide nothing.
    """

    def candidate(*words: Any, **named: Any) -> Any:
        try:
            calls.write(json.dumps(encode(((*words,), named))) + "\n")
            calls.flush()
            line = answers.readline()
        except OSError:
            line = ""
        if not line.endswith("\n"):
            raise ProgramFailed("the program ended")
        try:
            what, content = json.loads(line)
        except (TypeError, ValueError) as error:
            raise ProgramFailed("the answer is no plain data") from error
        if what != "answer":
            raise ProgramFailed(str(content))
        return decode(content)

    namespace: dict[str, Any] = {"__name__": "tests"}
    random.seed(0)  # some tests draw their cases
    try:
        # Tests may use what the published part of the program defines; its function is the candidate.
        exec(compile(task["given"], "given", "exec"), namespace)
        namespace[task["entry_point"]] = candidate
        exec(compile(task["test"], "test", "exec"), namespace)
        namespace["check"](candidate)
    except BaseException as error:
        return False, _told(error)
    return True, "passed"


def _told(error: BaseException) -> str:
    name = "" if isinstance(error, ProgramFailed) else f"{type(error).__name__}: "
    return f"{name}{str(error)[:_TOO_LONG]}".rstrip(": ")


def main(role: str, reading: int, writing: int, verdict: int | None) -> None:
    """Takes the task from stdin and plays one of the two roles on the given pipes."""
    task = json.loads(sys.stdin.buffer.read())
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    with os.fdopen(reading, encoding="ascii") as source, os.fdopen(writing, "w", encoding="ascii") as sink:
        if role == "program":
            answer_calls(task, source, sink)
        elif verdict is not None:
            os.write(verdict, json.dumps(judge(task, sink, source)).encode())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else None)
