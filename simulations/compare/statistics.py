"""Means with intervals, paired differences, and when a target was reached."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from statistics import fmean, median, stdev
from typing import NamedTuple

LEVEL = 0.95
"""Confidence level of every interval."""


class Interval(NamedTuple):
    """A mean with the half-width of its 95 % interval; None where one value says nothing of the spread."""

    mean: float
    half: float | None
    seeds: int

    @property
    def excludes_zero(self) -> bool | None:
        """Whether the mean differs from 0 by more than its half-width; None where that is unknown."""
        return None if self.half is None else abs(self.mean) > self.half


class Point(NamedTuple):
    """One evaluation of a run: after which round, after how many bytes moved both ways, and the value found."""

    round: int
    bytes: int
    value: float


@cache
def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """Return the `t` with `P(|T| < t) = level` for Student's distribution of `freedom` degrees.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 26.7.3 and 26.7.4, which are exact for a
    whole number of degrees; solved by bisection.

    >>> [round(t_quantile(freedom), 3) for freedom in (1, 2, 4, 30)]
    [12.706, 4.303, 2.776, 2.042]
    """
    low, high = 0.0, 1.0
    while _inside(high, freedom) < level:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in {low, high}:
            break
        low, high = (middle, high) if _inside(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def _inside(t: float, freedom: int) -> float:
    """Return `P(|T| < t)`."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    for step in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (step - 1) / step
        total += term
    if not odd:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0))


def interval(values: Sequence[float]) -> Interval:
    """Return mean and 95 % t-interval of `values` (at least one, all finite).

    >>> interval([1.0, 2.0, 3.0])
    Interval(mean=2.0, half=2.4841377117503285, seeds=3)
    """
    if len(values) == 1:
        return Interval(values[0], None, 1)
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(fmean(values), half, len(values))


def paired(values: Mapping[int, float], base: Mapping[int, float]) -> Interval | None:
    """Return the mean difference `values - base` over the seeds that both have; None where they share none."""
    shared = sorted(values.keys() & base.keys())
    return interval([values[seed] - base[seed] for seed in shared]) if shared else None


def first_reaching(points: Sequence[Point], target: float, *, lower_is_better: bool) -> Point | None:
    """Return the first point that is at least as good as `target`."""
    for point in points:
        if point.value <= target if lower_is_better else point.value >= target:
            return point
    return None


def median_or_never(found: Sequence[float | None]) -> float | None:
    """Return the median where None stands for never; None where the median is never, or nothing was found.

    >>> median_or_never([3, 5, None]), median_or_never([3, None]), median_or_never([4, 5])
    (5, None, 4.5)
    """
    if not found:
        return None
    middle = median([math.inf if value is None else value for value in found])
    return middle if math.isfinite(middle) else None
