"""Means and intervals against numbers worked out by hand or printed in tables."""

from __future__ import annotations

import math

import pytest

from flylora.lab.study.estimates import estimate, t_cdf, t_quantile

# Two-sided 95 % and one-sided 95 % points of Student's t, as printed in statistical tables.
TABLE = {1: (12.706, 6.314), 2: (4.303, 2.920), 3: (3.182, 2.353), 4: (2.776, 2.132), 9: (2.262, 1.833)}
TABLE |= {10: (2.228, 1.812), 30: (2.042, 1.697), 120: (1.980, 1.658)}


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_the_tables(freedom: int) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(TABLE[freedom][0], abs=5e-4)
    assert t_quantile(0.95, freedom) == pytest.approx(TABLE[freedom][1], abs=5e-4)


def test_distribution_function() -> None:
    assert t_cdf(0.0, 3) == 0.5
    assert t_cdf(1.0, 1) == pytest.approx(0.75)  # the Cauchy distribution's quartile
    assert t_cdf(1.0, 2) == pytest.approx(0.5 + 1 / (2 * math.sqrt(3)))  # its closed form
    assert t_cdf(-1.3, 5) == pytest.approx(1 - t_cdf(1.3, 5))


def test_mean_deviation_and_interval() -> None:
    found = estimate([1.0, 2.0, 6.0])
    assert found is not None
    assert (found.mean, found.n) == (3.0, 3)
    assert found.deviation == pytest.approx(math.sqrt((4 + 1 + 9) / 2))  # sample, not population
    assert found.interval is not None
    half = 4.3027 * math.sqrt(7) / math.sqrt(3)
    assert found.interval == pytest.approx((3 - half, 3 + half), abs=1e-3)


def test_one_value_has_no_spread_and_none_has_no_mean() -> None:
    alone = estimate([2.0])
    assert alone is not None
    assert (alone.mean, alone.deviation, alone.interval, alone.n) == (2.0, None, None, 1)
    assert estimate([]) is None
