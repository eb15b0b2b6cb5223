"""How an answer is found in generated text and compared with the gold one: pure functions in two tables."""

from __future__ import annotations

import re
from collections.abc import Callable

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def text(output: str) -> str | None:
    """The whole output without surrounding white space; ``None`` if nothing is left."""
    return output.strip() or None


def last_number(output: str) -> str | None:
    """The last number of the output, without thousands separators."""
    found = _NUMBER.findall(output)
    return found[-1].replace(",", "") if found else None


def last_match(pattern: str, output: str) -> str | None:
    """The last match of a regular expression, its first group if it has one; ``None`` without a match."""
    found = None
    for found in re.finditer(pattern, output):
        pass
    return None if found is None else found.group(1 if found.re.groups else 0)


def exact_match(answer: str | None, gold: str) -> float:
    """1.0 where the extracted answer is the gold one, character for character, else 0.0."""
    return float(answer == gold)


EXTRACTORS: dict[str, Callable[[str], str | None]] = {"text": text, "last_number": last_number}
METRICS: dict[str, Callable[[str | None, str], float]] = {"exact_match": exact_match}
