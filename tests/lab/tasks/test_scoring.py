"""Extractors and metrics, as tables of outputs that have fooled others."""

from __future__ import annotations

import pytest

from flylora.lab.tasks.scoring import EXTRACTORS, METRICS, last_match

EXTRACTED = [
    ("text", "  Paris \n", "Paris"),
    ("text", "two\nlines", "two\nlines"),
    ("text", " \n\t", None),
    ("first_line", "\n\n  Paris. \nParis is", "Paris."),
    ("first_line", "", None),
    ("first_line", "\r\nfirst\r\nsecond", "first"),
    ("first_word", " Paris, of course", "Paris"),
    ("first_word", "**Paris**", "Paris"),
    ("first_word", "... well", "well"),
    ("first_word", "?!", None),
    ("last_number", "12 + 7 = 19", "19"),
    ("last_number", "The answer is 1,234.", "1234"),
    ("last_number", "It costs $1,234.50!", "1234.50"),
    ("last_number", "It costs -$5", "-5"),
    ("last_number", "1, 2, 3", "3"),
    ("last_number", "1,2,3", "3"),
    ("last_number", "12,34", "34"),
    ("last_number", "16-3", "3"),
    ("last_number", "16 - 3", "3"),
    ("last_number", "x = -3", "-3"),
    ("last_number", "x = −3", "-3"),
    ("last_number", "about .5", ".5"),
    ("last_number", "version 1.2.3", "3"),
    ("last_number", "50%", "50"),
    ("last_number", "USD20", "20"),
    ("last_number", "(4)-3", "3"),
    ("last_number", "<<16-3=13>>13 eggs", "13"),
    ("last_number", "+7", "7"),
    ("last_number", "no number", None),
    ("last_number", "1,234,567", "1234567"),
    ("last_number", "1,2345", "2345"),
    ("strict_number", "so 3 + 4 = 7\n#### 7", "7"),
    ("strict_number", "####7", "7"),
    ("strict_number", "#### $1,000.00 in all", "1000.00"),
    ("strict_number", "#### -4", "-4"),
    ("strict_number", "#### 7\nQuestion: more\n#### 8", "7"),
    ("strict_number", "The answer is 7", None),
    ("strict_number", "### 7", None),
    ("strict_number", "#### seven", None),
    ("strict_number", "#### none\n#### 5", "5"),
    ("choice_letter", "B", "B"),
    ("choice_letter", " (C) because", "C"),
    ("choice_letter", "D. Paris", "D"),
    ("choice_letter", "The answer is B.", "B"),
    ("choice_letter", "Answer: (A)", "A"),
    ("choice_letter", "The answer is **C**", "C"),
    ("choice_letter", "A cat sat on the mat", None),
    ("choice_letter", "I think so", None),
    ("choice_letter", "I think it is (D)", "D"),
    ("choice_letter", "The answer is a cat", None),
    ("choice_letter", "B\nand then A", "B"),
    ("choice_letter", "", None),
    ("choice_letter", "A", "A"),
    ("choice_letter", "the answer is (b)", None),
    ("option_number", "0", "0"),
    ("option_number", " 2\n", "2"),
    ("option_number", "The answer is 3.", "3"),
    ("option_number", "**1**", "1"),
    ("option_number", "answer:2", "2"),
    ("option_number", "1) because of 3", "1"),
    ("option_number", "0: ice", "0"),
    ("option_number", "1, 2", "1"),
    ("option_number", "12", None),
    ("option_number", "In 1984, option 2", "2"),
    ("option_number", "3.5 or 1", "1"),
    ("option_number", "-1", None),
    ("option_number", "50% say x2", None),
    ("option_number", "5% say 0", "0"),
    ("option_number", "1,000 times 2", "2"),
    ("option_number", "none", None),
    ("option_number", "", None),
    ("program", "    return 1\n", "    return 1"),
    ("program", "Here:\n```python\ndef f():\n    return 1\n```\nDone.", "def f():\n    return 1"),
    ("program", "```\nx = 1\n```\n```\nx = 2\n```", "x = 1"),
    ("program", "```python\nx = 1", "x = 1"),
    ("program", " \n", None),
    ("python_output", " 8\n", "8"),
    ("python_output", "```\n[1, 2]\n```", "[1, 2]"),
    ("python_output", "It prints:\n```python\n1  \n2\n```\nas said", "1\n2"),
    ("python_output", "```\n5", "5"),
    ("python_output", "\n", None),
]


@pytest.mark.parametrize(("extractor", "output", "answer"), EXTRACTED)
def test_extractors(extractor: str, output: str, answer: str | None) -> None:
    assert EXTRACTORS[extractor](output) == answer


def test_every_extractor_is_in_the_table() -> None:
    assert {name for name, _, _ in EXTRACTED} == set(EXTRACTORS)


MATCHED = [
    ("exact_match", "Paris", "Paris", 1.0),
    ("exact_match", "paris", "Paris", 0.0),
    ("exact_match", None, "None", 0.0),
    ("normalised_match", "  the PARIS. ", "Paris", 1.0),
    ("normalised_match", "Washington DC", "Washington, D.C.", 1.0),
    ("normalised_match", "Sao Tome", "São Tomé", 1.0),
    ("normalised_match", "Paris is", "Paris", 0.0),
    ("normalised_match", "", "...", 0.0),
    ("normalised_match", None, "x", 0.0),
    ("normalised_match", "a", "a", 1.0),
    ("normalised_match", "[1, 2]", "[12]", 0.0),
    ("contains", "The capital is N'Djamena.", "N'Djamena", 1.0),
    ("contains", "NDjamena", "N'Djamena", 1.0),
    ("contains", "Port-au-Prince it is", "Port-au-Prince", 1.0),
    ("contains", "Parisian", "Paris", 0.0),
    ("contains", "Rome or Paris", "Paris", 1.0),
    ("contains", "anything", "", 0.0),
    ("contains", None, "Paris", 0.0),
    ("numeric_match", "18", "18.0", 1.0),
    ("numeric_match", "1800", "1,800.00", 1.0),
    ("numeric_match", ".5", "0.50", 1.0),
    ("numeric_match", "-3", "3", 0.0),
    ("numeric_match", "18 apples", "18", 0.0),
    ("numeric_match", None, "18", 0.0),
    ("numeric_match", "nan", "nan", 0.0),
    ("numeric_match", "0", "0", 1.0),
    ("numeric_match", "9007199254740993", "9007199254740992", 0.0),
]


@pytest.mark.parametrize(("metric", "answer", "gold", "score"), MATCHED)
def test_metrics(metric: str, answer: str | None, gold: str, score: float) -> None:
    assert METRICS[metric](answer, gold) == score


def test_every_metric_is_in_the_table() -> None:
    assert {name for name, *_ in MATCHED} == set(METRICS)


@pytest.mark.parametrize(
    ("pattern", "output", "answer"),
    [(r"\d+", "1 and 22", "22"), (r"is (\w+)", "it is so, is it", "it"), (r"(a)?b", "ab b", None), ("x", "y", None)],
)
def test_last_match_takes_the_first_group_of_the_last_match(pattern: str, output: str, answer: str | None) -> None:
    assert last_match(pattern, output) == answer
