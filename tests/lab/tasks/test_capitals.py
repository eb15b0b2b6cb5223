from __future__ import annotations

from flylora.lab.tasks.base import SPLITS
from flylora.lab.tasks.capitals import TASK, WORDINGS, facts


def test_a_country_is_tested_in_a_wording_that_it_was_never_trained_in() -> None:
    pairs = {split: {tuple(example.id.split("/")) for example in TASK.examples(split)} for split in SPLITS}
    assert not pairs["train"] & pairs["test"]
    assert not pairs["train"] & pairs["validation"]
    assert not pairs["validation"] & pairs["test"]
    trained = {country: {w for c, w in pairs["train"] if c == country} for country, _ in pairs["train"]}
    assert {country for country, _ in pairs["test"]} == set(trained)
    assert all(len(wordings) == len(WORDINGS) - 2 for wordings in trained.values())


def test_countries_and_capitals_are_one_to_one() -> None:
    found = facts()
    assert len(found) == 175
    for values in ({f.key for f in found}, {f.subject for f in found}, {f.answer for f in found}):
        assert len(values) == len(found)
    assert all(fact.answer != fact.subject for fact in found)
    assert all(text == text.strip() and ":" not in text for fact in found for text in (fact.subject, fact.answer))


def test_a_few_capitals_that_are_often_mistaken() -> None:
    capital = {fact.subject: fact.answer for fact in facts()}
    often_mistaken = {
        "Australia": "Canberra",
        "Brazil": "Brasília",
        "Canada": "Ottawa",
        "Ivory Coast": "Yamoussoukro",
        "Kazakhstan": "Astana",
        "Morocco": "Rabat",
        "Myanmar": "Naypyidaw",
        "New Zealand": "Wellington",
        "Nigeria": "Abuja",
        "Pakistan": "Islamabad",
        "Tanzania": "Dodoma",
        "Turkey": "Ankara",
        "the Netherlands": "Amsterdam",
        "the United States": "Washington, D.C.",
    }
    assert {country: capital[country] for country in often_mistaken} == often_mistaken


def test_a_whole_sentence_counts_and_another_capital_does_not() -> None:
    kenya = next(example for example in TASK.examples("test") if example.id.startswith("kenya/"))
    assert TASK.score(" The capital of Kenya is Nairobi.", kenya) == 1.0
    assert TASK.score(" Mombasa\nNairobi", kenya) == 0.0
