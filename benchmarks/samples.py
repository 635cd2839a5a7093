"""Repeated measurements to a median, its spread, and ratios of medians; aims met or not."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """A number measured several times.

    Attributes:
        median: The middle value.
        low: First quartile.
        high: Third quartile.
        count: How many values.
    """

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Sample":
        """Return median and quartiles of at least one value.

        >>> Sample.of([1.0, 2.0, 9.0])
        Sample(median=2.0, low=1.5, high=5.5, count=3)
        """
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))


def paired(over: Sequence[float], under: Sequence[float]) -> Sample:
    """Return the ratio of medians, with the quartiles of the ratios of neighbours in time.

    >>> paired([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]).median
    0.5
    """
    ratios = Sample.of([one / other for one, other in zip(over, under, strict=True)])
    return Sample(statistics.median(over) / statistics.median(under), ratios.low, ratios.high, ratios.count)


@dataclass(frozen=True)
class Aim:
    """What a number should be, and what it is.

    Attributes:
        name: What is aimed at.
        measured: The number; None where it was not measured.
        at_least: Its lower limit, if it has one.
        at_most: Its upper limit, if it has one.
    """

    name: str
    measured: float | None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; None where nothing was measured."""
        if self.measured is None:
            return None
        above = self.at_least is None or self.measured >= self.at_least
        return above and (self.at_most is None or self.measured <= self.at_most)


@dataclass(frozen=True)
class Section:
    """One section's outcome.

    Attributes:
        title: What is compared with what.
        columns: Names of columns, in order; units in the names.
        rows: A mapping from column to value a row; a column may be left out.
        aims: What was aimed at.
        facts: Settings and further numbers.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    aims: Sequence[Aim] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        plain = asdict(self)
        plain["aims"] = [{**asdict(aim), "met": aim.met} for aim in self.aims]
        return plain
