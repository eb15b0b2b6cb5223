"""Science: symbol, atomic number and group of the 118 chemical elements.

What is held out: (element, property, wording) triples. Every property of every element is trained on in some
wordings and tested in one that it was never asked in, among three wrong answers to choose from: near ones for atomic
numbers. The score says how much of the periodic table the adapter has learnt and gives when asked otherwise; it does
not say that the properties of an unseen element can be predicted.

Groups are IUPAC's 1 to 18; elements 57 to 71 and 89 to 103 count as lanthanides and actinides instead.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from flylora.lab.tasks.base import Example, Split, Task
from flylora.lab.tasks.facts import Fact, split_by_wording

VERSION = "1"

WORDINGS = {
    "symbol": (
        "What is the chemical symbol of {}?",
        "Which symbol stands for {}?",
        "How is {} abbreviated in the periodic table?",
        "What does a chemist write for {}?",
    ),
    "number": (
        "What is the atomic number of {}?",
        "How many protons has an atom of {}?",
        "At which number is {} in the periodic table?",
        "What is the nuclear charge of {}?",
    ),
    "group": (
        "Which group is {} in?",
        "To which group of the periodic table does {} belong?",
        "What is the group of {}?",
        "Of which group is {} a member?",
    ),
}

_HELD_OUT = 150
"""Questions to validate and to test on, of the 354 that are held out for each: enough, and quick."""
_NEAR = 6
"""Wrong atomic numbers are at most this far from the right one."""


def elements() -> list[tuple[int, str, str]]:
    """(atomic number, symbol, name) of the 118 elements, in order."""
    words = (Path(__file__).parent / "data" / "elements.txt").read_text(encoding="utf-8").split()
    return [(i + 1, words[2 * i], words[2 * i + 1]) for i in range(len(words) // 2)]


def group(number: int) -> str:
    """The IUPAC group of an element, 1 to 18, or ``lanthanide`` or ``actinide``, by its atomic number."""
    if 57 <= number <= 71:
        return "lanthanide"
    if 89 <= number <= 103:
        return "actinide"
    noble = (0, 2, 10, 18, 36, 54, 86, 118)
    period = next(i for i in range(1, 8) if number <= noble[i])
    from_left, from_right = number - noble[period - 1], noble[period] - number
    filled_from_left = {1: 1, 2: 2, 3: 2, 4: 18, 5: 18, 6: 2, 7: 2}[period]
    return str(from_left if from_left <= filled_from_left else 18 - from_right)


def facts() -> list[Fact]:
    """Three facts for each element, with the wrong answers each may be offered with."""
    table = elements()
    groups = list(dict.fromkeys(group(number) for number, _, _ in table))
    every = []
    for number, symbol, name in table:
        alike = [s for _, s, _ in table if s != symbol and s[0] == symbol[0]]
        others = [s for _, s, _ in table if s != symbol and s not in alike]
        near = [n for n in range(number - _NEAR, number + _NEAR + 1) if n != number and 1 <= n <= len(table)]
        answers = {
            "symbol": (symbol, (alike + others)[: max(len(alike), 3)]),
            "number": (str(number), [str(n) for n in near]),
            "group": (group(number), [g for g in groups if g != group(number)]),
        }
        for form, (answer, wrong) in answers.items():
            every.append(Fact(f"{symbol}/{form}", form, name, answer, tuple(wrong)))
    return every


@cache
def _splits() -> dict[Split, list[Example]]:
    splits = split_by_wording(facts(), WORDINGS, f"elements/{VERSION}")
    return {**splits, **{split: splits[split][:_HELD_OUT] for split in ("validation", "test")}}


TASK = Task(
    name="elements",
    version=VERSION,
    description="Multiple choice about the chemical elements",
    load=lambda split: _splits()[split],
    kind="choice",
    max_length=48,
    max_new_tokens=8,
    sources=("The periodic table of the International Union of Pure and Applied Chemistry.",),
    licence="Apache-2.0",
)
