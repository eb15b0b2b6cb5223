"""How an answer is read out of generated text and compared with the gold one: pure functions in two tables."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal

# A sign counts only where it cannot be a minus between two numbers; a comma only as a thousands separator.
_NUMBER = r"(?:(?<![\w)])[-+−])?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
_ANY_NUMBER = re.compile(_NUMBER)
_STRICT_NUMBER = re.compile(rf"####\s*({_NUMBER})")
_NAMED_LETTER = re.compile(r"\banswer\b(?:\s+is)?\s*:?\s*[(*\[]*([A-Z])\b(?!['’])", re.IGNORECASE)
_LEADING_LETTER = re.compile(r"\s*[(*\[]*([A-Z])(?:[).:\]*]|\s*$|\s*\n)")
_BRACKETED_LETTER = re.compile(r"\(([A-Z])\)")
_LONE_DIGIT = re.compile(r"(?<![\w.,−-])\d(?![\w%]|[.,]\d)")
_FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:\n?```|\Z)", re.DOTALL)


def text(output: str) -> str | None:
    """The whole output without surrounding white space; ``None`` if nothing is left."""
    return output.strip() or None


def first_line(output: str) -> str | None:
    """The first line that is not blank, without surrounding white space."""
    return next((line.strip() for line in output.splitlines() if line.strip()), None)


def first_word(output: str) -> str | None:
    """The first word, without punctuation around it."""
    words = (word.strip(".,;:!?\"'`*()[]{}") for word in output.split())
    return next((word for word in words if word), None)


def last_number(output: str) -> str | None:
    """The last number, without currency sign and thousands separators: the flexible reading."""
    numbers = _ANY_NUMBER.findall(output)
    return _plain(numbers[-1]) if numbers else None


def strict_number(output: str) -> str | None:
    """The number after the first ``####`` that one follows, as GSM8K writes its answers: the strict reading."""
    match = _STRICT_NUMBER.search(output)
    return _plain(match.group(1)) if match else None


def choice_letter(output: str) -> str | None:
    """The capital letter of a multiple-choice answer: the one named after "answer", the first on a line of its own or
    before a bracket, full stop or colon at the beginning, or the first in brackets."""
    for pattern in (_NAMED_LETTER, _LEADING_LETTER, _BRACKETED_LETTER):
        match = pattern.match(output) if pattern is _LEADING_LETTER else pattern.search(output)
        if match and match.group(1).isupper():
            return match.group(1)
    return None


def option_number(output: str) -> str | None:
    """The first digit that stands alone, as a multiple-choice answer counted from 0; no part of a larger number."""
    match = _LONE_DIGIT.search(output)
    return match.group() if match else None


def program(output: str) -> str | None:
    """Program text: the first fenced block if there is one, else everything, with its indentation."""
    fenced = _FENCED.search(output)
    written = (fenced.group(1) if fenced else output).rstrip()
    return written or None


def python_output(output: str) -> str | None:
    """What a program printed: the first fenced block if there is one, else everything; line ends stripped."""
    fenced = _FENCED.search(output)
    lines = [line.rstrip() for line in (fenced.group(1) if fenced else output).strip("\n").splitlines()]
    return "\n".join(lines).strip() or None


def last_match(pattern: str, output: str) -> str | None:
    """The last match of a regular expression, its first group if it has one; ``None`` without a match."""
    matches = list(re.finditer(pattern, output))
    return matches[-1].group(1 if matches[-1].re.groups else 0) if matches else None


def exact_match(answer: str | None, gold: str) -> float:
    """1.0 where the extracted answer is the gold one, character for character, else 0.0."""
    return float(answer == gold)


def normalised_match(answer: str | None, gold: str) -> float:
    """``exact_match`` regardless of case, accents, punctuation, spacing and a leading article."""
    return float(answer is not None and bool(_normal(gold)) and _normal(answer) == _normal(gold))


def contains(answer: str | None, gold: str) -> float:
    """1.0 where the normalised gold answer occurs as whole words in the normalised answer, else 0.0."""
    return float(answer is not None and bool(_normal(gold)) and f" {_normal(gold)} " in f" {_normal(answer)} ")


def numeric_match(answer: str | None, gold: str) -> float:
    """1.0 where both are numbers of the same value (18, 18.0 and 1,800.00 / 1800 agree), else 0.0."""
    values = [_value(text) for text in (answer, gold)]
    return float(values[0] is not None and values[0] == values[1])


def _plain(number: str) -> str:
    return number.replace(",", "").replace("$", "").replace("−", "-").removeprefix("+")


def _value(written: str | None) -> Decimal | None:
    match = _ANY_NUMBER.fullmatch(written.strip()) if written is not None else None
    return Decimal(_plain(match.group())) if match else None


def _normal(written: str) -> str:
    bare = "".join(c for c in unicodedata.normalize("NFKD", written.casefold()) if not unicodedata.combining(c))
    words = re.sub(r"[^\w\s]", " ", re.sub(r"['’.]", "", bare)).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "text": text,
    "first_line": first_line,
    "first_word": first_word,
    "last_number": last_number,
    "strict_number": strict_number,
    "choice_letter": choice_letter,
    "option_number": option_number,
    "program": program,
    "python_output": python_output,
}
"""Generated text -> the answer in it, or ``None`` without one."""

METRICS: dict[str, Callable[[str | None, str], float]] = {
    "exact_match": exact_match,
    "normalised_match": normalised_match,
    "contains": contains,
    "numeric_match": numeric_match,
}
"""(extracted answer, gold answer) -> 0 to 1."""
