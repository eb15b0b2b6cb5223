"""Means, spreads and intervals over a few seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: Of the values.
        deviation: Sample standard deviation (n - 1); ``None`` for one value.
        n: How many values.
    """

    mean: float
    deviation: float | None
    n: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval of the mean by Student's t; ``None`` for one value, which has none."""
        if self.deviation is None:
            return None
        half = t_quantile((1 + LEVEL) / 2, self.n - 1) * self.deviation / math.sqrt(self.n)
        return self.mean - half, self.mean + half


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and sample standard deviation; ``None`` for no value."""
    n = len(values)
    if not n:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, 1)
    return Estimate(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)), n)


def t_cdf(t: float, freedom: int) -> float:
    """P(T <= t) for Student's t with a whole number of degrees of freedom, by its finite series.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    theta = math.atan2(t, math.sqrt(freedom))
    cos2, total, term = math.cos(theta) ** 2, 0.0, 1.0
    if freedom % 2:
        term = math.cos(theta)
        for step in range(1, (freedom - 1) // 2 + 1):
            total += term
            term *= cos2 * 2 * step / (2 * step + 1)
        inside = 2 / math.pi * (theta + math.sin(theta) * total)
    else:
        for step in range(1, freedom // 2 + 1):
            total += term
            term *= cos2 * (2 * step - 1) / (2 * step)
        inside = math.sin(theta) * total
    return 0.5 + inside / 2


def t_quantile(p: float, freedom: int) -> float:
    """The t with P(T <= t) = p, for p in [0.5, 1), by bisection."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < p else (low, middle)
    return (low + high) / 2
