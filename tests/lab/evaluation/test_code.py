"""pass@k against every possible draw, and how a program is put together."""

from __future__ import annotations

import math
from itertools import combinations

import pytest

from flylora.errors import UserError
from flylora.lab.evaluation.code import assemble, pass_at_k, pass_rates
from flylora.lab.tasks.base import CodeExample


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_sample(n: int) -> None:
    for c in range(n + 1):
        for k in range(1, n + 1):
            draws = list(combinations([i < c for i in range(n)], k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_is_exact_for_many_samples() -> None:
    for n, c, k in ((200, 1, 1), (200, 13, 10), (1000, 3, 100), (10_000, 5, 5)):
        exact = 1 - math.comb(n - c, k) / math.comb(n, k)
        assert pass_at_k(n, c, k) == pytest.approx(exact, rel=1e-9)
    assert pass_at_k(10**6, 1, 1) == pytest.approx(1e-6, rel=1e-6)


def test_none_right_and_all_right_are_exact() -> None:
    assert pass_at_k(10, 0, 10) == 0.0
    assert pass_at_k(10, 10, 1) == 1.0
    assert pass_at_k(10, 1, 10) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(5, 6, 1), (5, -1, 1), (5, 1, 6), (5, 1, 0), (0, 0, 1)])
def test_numbers_that_make_no_sense_are_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(UserError, match=f"There is no pass@{k}"):
        pass_at_k(n, c, k)


def test_only_what_there_are_samples_for_is_reported() -> None:
    assert pass_rates(1, 1) == {"pass@1": 1.0}
    assert pass_rates(5, 1) == {"pass@1": pytest.approx(0.2), "pass@5": 1.0}
    assert list(pass_rates(20, 3)) == ["pass@1", "pass@5", "pass@10"]


@pytest.mark.parametrize(
    ("written", "program"),
    [
        ("    return 1", "def one():\n    '''1'''\n    return 1\n"),
        ("def one():\n    return 1", "def one():\n    '''1'''\n\n\ndef one():\n    return 1\n"),
        (
            "import math\n\ndef  one ():\n    pass",
            "def one():\n    '''1'''\n\n\nimport math\n\ndef  one ():\n    pass\n",
        ),
        ("    return once()\ndef once(): pass", "def one():\n    '''1'''\n    return once()\ndef once(): pass\n"),
        (None, "def one():\n    '''1'''\n"),
    ],
)
def test_what_is_written_goes_on_from_what_is_given_or_replaces_it(written: str | None, program: str) -> None:
    example = CodeExample("id", "p", "c", "a", given="def one():\n    '''1'''\n", entry_point="one", test="")
    assert assemble(example, written) == program
