from __future__ import annotations

import pytest

from flylora.lab.tasks.facts import Fact, split_by_wording

FACTS = [Fact(f"k{i}", "a" if i % 2 else "b", f"subject {i}", f"answer {i}") for i in range(40)]
WORDINGS = {"a": ("A1 {}?", "A2 {}?", "A3 {}?", "A4 {}?"), "b": ("B1 {}?", "B2 {}?", "B3 {}?")}


def test_each_fact_and_wording_is_in_exactly_one_split() -> None:
    splits = split_by_wording(FACTS, WORDINGS, "seed")
    found = [example.id for examples in splits.values() for example in examples]
    assert sorted(found) == sorted(f"{fact.key}/{n}" for fact in FACTS for n in range(len(WORDINGS[fact.form])))
    for split in ("validation", "test"):
        assert sorted(example.id.split("/")[0] for example in splits[split]) == sorted(fact.key for fact in FACTS)


def test_which_wording_is_held_out_differs_from_fact_to_fact() -> None:
    held_out = {example.prompt[:8] for example in split_by_wording(FACTS, WORDINGS, "seed")["test"]}
    assert held_out == {f"User: {form}{n}" for form, count in (("A", 4), ("B", 3)) for n in range(1, count + 1)}


def test_the_seed_decides() -> None:
    assert split_by_wording(FACTS, WORDINGS, "seed") == split_by_wording(FACTS, WORDINGS, "seed")
    assert split_by_wording(FACTS, WORDINGS, "seed") != split_by_wording(FACTS, WORDINGS, "other")


@pytest.mark.parametrize("size", [3, 7])
def test_choices_are_distractors_and_the_answer(size: int) -> None:
    wrong = tuple(f"wrong {i}" for i in range(size))
    fact = Fact("k", "a", "subject", "right", wrong)
    for examples in split_by_wording([fact], WORDINGS, "seed").values():
        for example in examples:
            assert example.answer_index is not None
            assert example.choices[example.answer_index] == " right"
            assert {choice.strip() for choice in example.choices} - {"right"} <= set(wrong)
            assert len(set(example.choices)) == 4
