"""The table of a comparison in words: the same for a terminal, a page, Markdown and LaTeX."""

import math
from collections.abc import Callable, Sequence
from statistics import median_high
from typing import Any, NamedTuple

from simulations.compare.statistics import Interval
from simulations.compare.variants import Comparison, Variant
from simulations.report.wording import NOTHING, duration, number, printable, size

MINUS = "\u2212"


class Column(NamedTuple):
    """A column: its heading, and the words of a row, such as a variant; `left` for text."""

    heading: str
    words: Callable[[Any], str]
    left: bool = False


class Told(NamedTuple):
    """What all outputs tell in the same words.

    Attributes:
        stem: The name of the files, without their endings.
        sentences: What came out, the most important first.
        columns: Of the table.
        rows: What the columns take: each with a `verdict` and a `result`, which is None where it has none.
    """

    stem: str
    sentences: Sequence[str]
    columns: Sequence[Column]
    rows: Sequence[Any]


def columns(comparison: Comparison) -> list[Column]:
    """Return the columns that have something to tell."""
    found = [Column(printable(key), _value_of(key), left=True) for key in comparison.keys]
    if not found:
        found.append(Column("runs", lambda variant: variant.label, left=True))
    results = [variant.result for variant in comparison.variants if variant.result]
    places = common_places(results)
    found.append(Column(comparison.metric_words, lambda variant: result_words(variant, places)))
    if comparison.baseline and len(comparison.variants) > 1:
        changes = common_places([variant.difference for variant in comparison.variants if variant.difference])
        heading = f"vs. {printable(comparison.baseline_label, 60)}"
        found.append(Column(heading, lambda variant: difference_words(variant, changes)))
        found.append(Column("beyond noise", verdict_words, left=True))
    targets = {variant.target for variant in comparison.variants if variant.target is not None}
    if targets:
        goal = f"{precise(next(iter(targets)))}" if len(targets) == 1 else "target"
        if len(targets) > 1:
            found.append(Column("target", lambda variant: precise(variant.target)))
        found.append(Column(f"rounds to {goal}", rounds_words))
        found.append(Column(f"bytes to {goal}", bytes_words))
    found += [
        Column("down", lambda variant: size(variant.costs["down"])),
        Column("up", lambda variant: size(variant.costs["up"])),
        Column("time", lambda variant: duration(variant.costs["seconds"])),
        Column("memory", lambda variant: size(variant.costs["peak_rss_mib"] * 2**20)),
    ]
    every = comparison.variants
    if any(variant.costs["peak_gpu_mib"] > 0 for variant in every):
        found.append(Column("GPU memory", lambda variant: size(variant.costs["peak_gpu_mib"] * 2**20)))
    if any(not math.isnan(variant.costs["aggregation_error"]) for variant in every):
        found.append(Column("aggregation error", lambda variant: error_words(variant.costs["aggregation_error"])))
    if any(variant.costs["clients_failed"] > 0 for variant in every):
        found.append(Column("failed visits", failed_visits_words))
    if any(not len(variant.finals) == len(variant.placed) == comparison.seeds for variant in every):
        found.append(Column("seeds", seeds_words))
    return found


def _value_of(key: str) -> Callable[[Variant], str]:
    return lambda variant: printable(variant.values[key])


def result_words(variant: Variant, places: int | None = None) -> str:
    """Return mean and half-width, or why there is none."""
    if variant.result is not None:
        suffix = " (personal)" if variant.model == "personal" else ""
        return with_error(variant.result, places=places) + suffix
    if variant.diverged:
        several = f" in {variant.diverged} of {len(variant.finals)}" if len(variant.finals) > 1 else ""
        return f"diverged{several}"
    statuses = {placed.run.status for placed in variant.placed}
    if "failed" in statuses:
        return "failed"
    if "interrupted" in statuses:
        return "interrupted"
    return "not run" if "missing" in statuses else "not evaluated"


def difference_words(variant: Variant, places: int | None = None) -> str:
    """Return the paired difference to the baseline."""
    if variant.verdict == "baseline":
        return "baseline"
    return NOTHING if variant.difference is None else with_error(variant.difference, signed=True, places=places)


def verdict_words(variant: Variant) -> str:
    """Say whether the difference is larger than noise between seeds."""
    known = {"baseline": "", "better": "yes, better", "worse": "yes, worse", "within noise": "no"}
    if variant.verdict in known:
        return known[variant.verdict]
    if variant.difference is None:
        return NOTHING if variant.ranked else "other text"
    return f"unknown ({variant.difference.seeds} seed)"


def rounds_words(variant: Variant) -> str:
    """Return the median rounds to the target."""
    if not variant.reached:
        return NOTHING
    there = sum(point is not None for point in variant.reached)
    words = "not reached" if variant.rounds_to_target is None else f"{variant.rounds_to_target:g}"
    return words if there in {0, len(variant.reached)} else f"{words} ({there} of {len(variant.reached)})"


def bytes_words(variant: Variant) -> str:
    """Return the median bytes to the target."""
    return size(variant.bytes_to_target)


def seeds_words(variant: Variant) -> str:
    """Return how many seeds finished, of how many."""
    done, planned = len(variant.finals), len(variant.placed)
    return str(done) if done == planned else f"{done} of {planned}"


def failed_visits_words(variant: Variant) -> str:
    """Return how many visits of clients did not count, mean over seeds."""
    count = variant.costs["clients_failed"]
    return NOTHING if math.isnan(count) else f"{round(count, 2):g}"


def failed_words(label: str, seeds: Sequence[int]) -> str:
    """Return which runs failed.

    >>> failed_words("flora", [0, 2])
    'flora, seeds 0 and 2'
    """
    many = "seeds" if len(seeds) > 1 else "seed"
    listed = " and ".join([", ".join(map(str, seeds[:-1])), str(seeds[-1])] if len(seeds) > 1 else map(str, seeds))
    return f"{printable(label, 80)}, {many} {listed}"


def error_words(value: float) -> str:
    """Return an aggregation error, which may be as small as rounding.

    >>> error_words(0.0), error_words(3.2e-9), error_words(0.0123), error_words(math.nan)
    ('0', '3.2e-09', '0.0123', '—')
    """
    return number(value) if math.isnan(value) or value == 0 or abs(value) >= 1e-4 else f"{value:.1e}"


def precise(value: float | None) -> str:
    """Return a number with four significant digits at least, since differences between variants may be small.

    >>> [precise(value) for value in (25.6887, 3.24605, 0.381, 12345.6, None)]
    ['25.69', '3.246', '0.3810', '12,346', '—']
    """
    if value is None or not math.isfinite(value):
        return number(value)
    return _fixed(value, _digits(value) + 3)


def common_places(found: Sequence[Interval]) -> int | None:
    """Return how many places after the point suit a column of intervals; None where there is none."""
    every = [_places(each) for each in found]
    return median_high(every) if every else None


def _places(found: Interval) -> int:
    """Return the place of the half-width's second significant digit, or of the mean's fourth."""
    known = found.half is not None and found.half > 0
    return max(1 + _digits(found.half or 0.0), 0) if known else _digits(found.mean) + 3


def with_error(found: Interval, *, signed: bool = False, places: int | None = None) -> str:
    """Return `mean ± half-width`, both with so many `places`, or to the half-width's second significant digit.

    >>> with_error(Interval(25.6887, 0.1234, 3)), with_error(Interval(0.5, 0.0123, 3), signed=True)
    ('25.69 ± 0.12', '+0.500 ± 0.012')
    >>> with_error(Interval(25.6887, None, 1)), with_error(Interval(0.2, None, 1), signed=True)
    ('25.69', '+0.2000')
    """
    places = _places(found) if places is None else places
    sign = ("+" if found.mean >= 0 else MINUS) if signed else ("" if found.mean >= 0 else MINUS)
    words = sign + _fixed(abs(found.mean), places)
    return words if found.half is None else f"{words} ± {_fixed(found.half, places)}"


def _digits(value: float) -> int:
    """Return how many places after the point the first significant digit stands (0 for 1 to 9, negative above)."""
    return 0 if value == 0 else -math.floor(math.log10(abs(float(f"{value:.2g}"))))


def _fixed(value: float, places: int) -> str:
    if abs(value) >= 1e9 or places > 9:
        return f"{value:.2e}"
    return f"{value:,.{max(places, 0)}f}"
