"""What does this small program print? The answer comes from running it.

What is held out: programs. Every form of program is trained on and tested with other values: the (form, values) pairs
are drawn once, without repetition, and dealt out to the splits, so no test program occurs in training, under whatever
variable names. The score says how well an adapter has learnt what the forms do, not Python at large. Outputs are read
by their first line, and all programs print just one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from itertools import islice

from flylora.lab.tasks.base import Example, Split, Task

VERSION = "1"
SHARES: dict[Split, int] = {"test": 15, "validation": 10, "train": 90}
"""Programs of each form in each split."""

_NAMES = "abcdnstxyz"
_WORDS = "apple bird cat dog fish house milk moon red river star sun tree winter wood cloud lake bread".split()  # noqa: SIM905
_BUILT_INS = {f.__name__: f for f in (len, list, max, min, range, sorted, str, sum)}


def run_program(source: str) -> str:
    """What a program prints, without the last line end.

    Only for the programs made here: it runs them in this process, with a handful of built-in functions and no import.
    """
    printed: list[str] = []
    exec(
        compile(source, "<program>", "exec"),
        {"__builtins__": {**_BUILT_INS, "print": lambda *values: printed.append(" ".join(map(str, values)))}},
    )
    return "\n".join(printed)


def _numbers(rng: random.Random, size: int, top: int = 9) -> list[int]:
    return [rng.randint(1, top) for _ in range(size)]


def _form_update(rng: random.Random) -> str:
    a, b = _numbers(rng, 2, 20)
    return f"NAME = {a}\nNAME += {b}\nprint(NAME)"


def _form_condition(rng: random.Random) -> str:
    a, b = _numbers(rng, 2, 50)
    yes, no = rng.sample(_WORDS, 2)
    return f"NAME = {a}\nprint('{yes}' if NAME > {b} else '{no}')"


def _form_loop(rng: random.Random) -> str:
    start, times = rng.randint(0, 9), rng.randint(2, 5)
    step = rng.randint(1, 4)
    return f"NAME = {start}\nfor _ in range({times}):\n    NAME += {step}\nprint(NAME)"


def _form_format(rng: random.Random) -> str:
    return f"NAME = {rng.randint(2, 99)}\nprint(f'{rng.choice(_WORDS)} {{NAME}}{rng.choice(['', '!', ' times'])}')"


def _form_lookup(rng: random.Random) -> str:
    values = dict(zip(rng.sample(_WORDS, 3), _numbers(rng, 3), strict=True))
    return f"NAME = {values}\nprint(NAME['{rng.choice(list(values))}'])"


def _form_join(rng: random.Random) -> str:
    first, second = rng.sample(_WORDS, 2)
    return f"NAME = '{first}'\nprint(NAME + '{rng.choice('-_ ')}{second}')"


def _form_append(rng: random.Random) -> str:
    values = _numbers(rng, 3)
    return f"NAME = {values}\nNAME.append({rng.randint(1, 9)})\nprint(NAME)"


def _form_index(rng: random.Random) -> str:
    values = _numbers(rng, 4)
    return f"NAME = {values}\nprint(NAME[{rng.randint(-1, 3)}])"


def _form_reduce(rng: random.Random) -> str:
    values = _numbers(rng, 4)
    return f"NAME = {values}\nprint({rng.choice(['len', 'max', 'min', 'sorted'])}(NAME))"


def _form_range(rng: random.Random) -> str:
    start = rng.randint(0, 29)
    return f"NAME = list(range({start}, {start + rng.randint(2, 6)}))\nprint(NAME)"


FORMS: dict[str, Callable[[random.Random], str]] = {
    "update": _form_update,
    "condition": _form_condition,
    "loop": _form_loop,
    "format": _form_format,
    "lookup": _form_lookup,
    "join": _form_join,
    "append": _form_append,
    "index": _form_index,
    "reduce": _form_reduce,
    "range": _form_range,
}
"""Name -> a function that draws the values of a program and writes it, with ``NAME`` for its variable."""


@cache
def _splits() -> dict[Split, list[Example]]:
    rng = random.Random(f"python_output/{VERSION}")
    splits: dict[Split, list[Example]] = {split: [] for split in SHARES}
    for form, write in FORMS.items():
        programs: dict[str, None] = {}
        while len(programs) < sum(SHARES.values()):
            programs[write(rng)] = None
        left = iter(programs)
        for split, share in SHARES.items():
            for program in islice(left, share):
                number = f"{form}-{len(splits[split])}-{split}"
                splits[split].append(_ask(number, form, program.replace("NAME", rng.choice(_NAMES))))
    for examples in splits.values():
        rng.shuffle(examples)
    return splits


def _ask(number: str, form: str, program: str) -> Example:
    printed = run_program(program)
    return Example(
        id=number,
        prompt=f"Program:\n{program}\nOutput:",
        completion=f" {printed}",
        answer=printed,
        group=form,
    )


TASK = Task(
    name="python_output",
    version=VERSION,
    description="What does a small Python program print?",
    load=lambda split: _splits()[split],
    kind="generate",
    extractor="first_line",
    metric="exact_match",
    max_length=80,
    max_new_tokens=28,
    stop=("\n\n", "\nProgram:"),
    sources=("Generated by this task.",),
    licence="Apache-2.0",
)
