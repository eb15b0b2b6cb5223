"""Questions about facts, asked in several ways: which wording of which fact is held out."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flylora.lab.tasks.base import Example, Split

N_CHOICES = 4


@dataclass(frozen=True)
class Fact:
    """One fact: ``subject`` fills the wordings of ``form``, and ``answer`` is what they ask for.

    ``distractors`` are the wrong answers a choice may offer; none makes the question an open one.
    """

    key: str
    form: str
    subject: str
    answer: str
    distractors: tuple[str, ...] = ()


def split_by_wording(
    facts: Sequence[Fact], wordings: Mapping[str, Sequence[str]], seed: str
) -> dict[Split, list[Example]]:
    """Every fact in every wording of its form, each (fact, wording) pair in exactly one split.

    One wording of each fact, drawn at random, is for testing, another for validation, and the rest for
    training; which ones differs from fact to fact. Within a split the order is random.

    Args:
        facts: The facts, with distinct keys.
        wordings: For each form at least three questions, with ``{}`` where the subject goes.
        seed: Fixes every draw.
    """
    rng = random.Random(seed)
    splits: dict[Split, list[Example]] = {"train": [], "validation": [], "test": []}
    for fact in facts:
        numbers = list(range(len(wordings[fact.form])))
        rng.shuffle(numbers)
        for place, number in enumerate(numbers):
            split: Split = ("test", "validation")[place] if place < 2 else "train"
            splits[split].append(_ask(fact, number, wordings[fact.form][number], rng))
    for examples in splits.values():
        rng.shuffle(examples)
    return splits


def _ask(fact: Fact, number: int, wording: str, rng: random.Random) -> Example:
    options = [*rng.sample(fact.distractors, N_CHOICES - 1), fact.answer] if fact.distractors else []
    rng.shuffle(options)
    return Example(
        id=f"{fact.key}/{number}",
        prompt=f"User: {wording.format(fact.subject)}\nAssistant:",
        completion=f" {fact.answer}",
        answer=fact.answer,
        choices=tuple(f" {option}" for option in options),
        answer_index=options.index(fact.answer) if options else None,
        group=fact.form,
    )
