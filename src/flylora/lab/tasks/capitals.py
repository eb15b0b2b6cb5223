"""General knowledge: the capital of a country.

What is held out: (country, wording) pairs. Every country is trained on in some wordings and tested in one that it
was never seen with, so the score says how many capitals the adapter has learnt well enough to give them when asked
otherwise. It does not say that the adapter knows capitals of unseen countries: nothing could infer those. The marking
is lenient towards a model that answers in a whole sentence: the capital has to occur in the first line.

Countries with a disputed capital, with several or with none by law, and those named like their capital are left out.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from flylora.lab.tasks.base import Example, Split, Task
from flylora.lab.tasks.facts import Fact, split_by_wording
from flylora.options import parse_yaml

VERSION = "1"

WORDINGS = (
    "What is the capital of {}?",
    "Which city is the capital of {}?",
    "Name the capital city of {}.",
    "Which capital belongs to {}?",
    "What do you call the capital of {}?",
    "The capital of {} is which city?",
)


@cache
def _capitals() -> dict[str, dict[str, str]]:
    """Continent -> country -> capital."""
    return parse_yaml((Path(__file__).parent / "data" / "capitals.yaml").read_text(encoding="utf-8"))


def facts() -> list[Fact]:
    """One fact for each country; its form is the continent."""
    return [
        Fact(key=country.removeprefix("the ").lower().replace(" ", "-"), form=continent, subject=country, answer=city)
        for continent, capitals in _capitals().items()
        for country, city in capitals.items()
    ]


@cache
def _splits() -> dict[Split, list[Example]]:
    return split_by_wording(facts(), dict.fromkeys(_capitals(), WORDINGS), f"capitals/{VERSION}")


TASK = Task(
    name="capitals",
    version=VERSION,
    description="Capitals of countries, asked in other words than in training",
    load=lambda split: _splits()[split],
    kind="generate",
    extractor="first_line",
    metric="contains",
    max_length=48,
    max_new_tokens=16,
    stop=("\nUser:",),
    sources=("Compiled for this project from common knowledge.",),
    licence="Apache-2.0",
)
