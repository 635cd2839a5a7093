"""The figures of a comparison: curves over rounds and bytes, differences to the baseline, quality against traffic."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulations.compare.drawing import Name, free_places, scale_places, wide_axes, write_names
from simulations.compare.statistics import Point
from simulations.compare.variants import Comparison, Variant
from simulations.report.style import colour, house_style, markers, scale_for
from simulations.report.wording import printable

ROLES = ("plug_in", "emulator_tuned", "local_only", "whole_model", "emulator_zero_shot", "full_zero_shot")
STROKES = ("solid", (0, (6, 1.5)), (0, (1, 1.5)))
NAMED = 12
"""Variants with a colour and a name: the best ones and the baseline; more cannot be told apart."""

LABEL = 30
"""Longest name in a figure."""

CURVES = ("rounds", "bytes")
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
WORST = 2.0
"""Where training diverged, the axis ends at this multiple of the largest value before training."""

AWAY = {"better": "local_only", "worse": "emulator_tuned"}


class Line(NamedTuple):
    """A variant's mean over seeds at one place, with the lowest and highest seed."""

    place: float
    mean: float
    low: float
    high: float


def draw(comparison: Comparison) -> dict[str, Figure]:
    """Return all figures that have something to show, by file name without its ending."""
    with house_style():
        figures = {
            "rounds": curves(comparison, over="rounds"),
            "bytes": curves(comparison, over="bytes"),
            "differences": differences(comparison),
            "pareto": pareto(comparison),
        }
    return {name: figure for name, figure in figures.items() if figure is not None}


def named(comparison: Comparison) -> list[tuple[Variant, str, Any]]:
    """Return the variants that get a name, each with its colour's role and its dash, the best ones first."""
    shown = [variant for variant in comparison.variants if variant.finals]
    first = [variant for variant in shown if variant.verdict == "baseline"][:1]
    rest = [variant for variant in shown if variant not in first]
    chosen = {id(variant) for variant in [*first, *rest[: NAMED - len(first)]]}
    kept = [variant for variant in shown if id(variant) in chosen]
    return [(variant, ROLES[at % len(ROLES)], STROKES[at // len(ROLES)]) for at, variant in enumerate(kept)]


def mean_line(curves: Sequence[Sequence[Point]], place: Callable[[Point], float]) -> list[Line]:
    """Return a variant's line: where each seed was evaluated after a round, the mean of the finite values."""
    by_round: dict[int, list[Point]] = {}
    for point in (point for curve in curves for point in curve):
        if math.isfinite(point.value):
            by_round.setdefault(point.round, []).append(point)
    return [
        Line(fmean(map(place, points)), fmean(values), min(values), max(values))
        for _, points in sorted(by_round.items())
        if (values := [point.value for point in points])
    ]


def curves(comparison: Comparison, *, over: str) -> Figure | None:
    """Draw the metric over `rounds` or over `bytes` moved both ways: a line for the mean, a band over the seeds."""
    shown = named(comparison)
    points = {id(v): [run.curve(comparison.metric) for run in v.finished] for v in comparison.variants}
    most = max((curve[-1].bytes for several in points.values() for curve in several if curve), default=0)
    if not shown or (over == "bytes" and not most):
        return None
    power = _power(most)
    scale = 1 / 1024**power

    def place(point: Point) -> float:
        return point.round if over == "rounds" else point.bytes * scale

    better = "lower is better" if comparison.lower_is_better else "higher is better"
    what = "rounds" if over == "rounds" else "traffic"
    figure, axes = wide_axes(f"{comparison.metric.capitalize()} on held-out text over {what}", unit=better)
    if over == "bytes":
        free_places(axes, f"tensors moved so far, down and up, {UNITS[power]}")
    lines = {key: mean_line(several, place) for key, several in points.items()}
    lines = {key: line for key, line in lines.items() if line}
    if not lines:
        return None
    for variant in comparison.variants:
        if id(variant) not in {id(one) for one, _, _ in shown} and id(variant) in lines:
            axes.plot(*_means(lines[id(variant)]), color=colour("faint"), linewidth=0.8)
    ends = []
    for variant, role, dash in shown:
        line = lines.get(id(variant))
        if line:
            _line(axes, line, role, dash, band=len(variant.finished) > 1)
            ends.append((line[-1].mean, _name(variant), role, dash))
    _look_at_the_end(axes, comparison, list(lines.values()))
    low, high = axes.get_ylim()
    write_names(axes, [Name(axes.get_xlim()[1], min(max(height, low), high), *rest) for height, *rest in ends])
    return figure


def _line(axes: Axes, line: Sequence[Line], role: str, dash: Any, *, band: bool) -> None:
    places, means = _means(line)
    axes.plot(places, means, color=colour(role), linestyle=dash, **markers(len(line)))
    if band:
        low, high = [each.low for each in line], [each.high for each in line]
        axes.fill_between(places, low, high, color=colour(role), alpha=0.13, linewidth=0)


def _means(line: Sequence[Line]) -> tuple[list[float], list[float]]:
    return [each.place for each in line], [each.mean for each in line]


def _look_at_the_end(axes: Axes, comparison: Comparison, lines: Sequence[Sequence[Line]]) -> None:
    """Choose the vertical axis: neither first rounds nor a run that diverges may flatten what there is to compare."""
    first = max(line[0].mean for line in lines)
    limit = WORST * first if comparison.lower_is_better else math.inf
    every = [each for line in lines for each in line if each.mean <= limit]
    late = [each for line in lines for each in line[len(line) // 4 :] if each.mean <= limit] or every
    low, high = min(each.low for each in late), max(min(each.high, limit) for each in late)
    scale_for(axes, [max(each.mean, low) for each in every])
    axes.margins(x=0.02)
    span = max(each.mean for each in every) - min(each.mean for each in every)
    if span > 1.5 * (high - low) > 0 or any(each.mean > limit for line in lines for each in line):
        pad = 0.08 * (high - low) or 0.05 * abs(high)
        axes.set_ylim(low - pad, high + pad)
    else:
        axes.margins(y=0.08)


def _power(amount: float) -> int:
    return min(int(math.log2(amount) // 10), len(UNITS) - 1) if amount >= 1 else 0


def _name(variant: Variant) -> str:
    return printable(variant.label, LABEL - 11) + " (diverged)" if variant.diverged else printable(variant.label, LABEL)


def differences(comparison: Comparison) -> Figure | None:
    """Draw each variant's paired difference to its baseline with its interval, the best one on top."""
    shown = [variant for variant in comparison.variants if variant.difference and variant.difference.half is not None]
    shown = shown[:NAMED]
    if not shown:
        return None
    better = "left of the line is better" if comparison.lower_is_better else "right of the line is better"
    title = f"{comparison.metric.capitalize()}, difference to {printable(comparison.baseline_label, LABEL)}"
    figure, axes = wide_axes(title, unit=f"{better}; bars are 95 % intervals")
    free_places(axes, f"difference in {comparison.metric}, paired over seeds")
    ends = []
    for height, variant in enumerate(reversed(shown)):
        mean, half, _ = variant.difference or (0.0, 0.0, 0)
        role = AWAY.get(variant.verdict, "muted")
        bar = {"capsize": 3, "elinewidth": 1.8, "markersize": 6}
        axes.errorbar([mean], [height], xerr=[half or 0.0], fmt="o", color=colour(role), **bar)
        ends.append((height, _name(variant), role))
    axes.axvline(0, color=colour("muted"), linewidth=1)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.margins(x=0.06)
    write_names(axes, [Name(axes.get_xlim()[1], height, name, role) for height, name, role in ends])
    return figure


def pareto(comparison: Comparison) -> Figure | None:
    """Draw the metric at the end against the bytes moved; a line joins those that nothing beats in both."""
    shown = [(variant, role) for variant, role, _ in named(comparison) if variant.result is not None]
    traffic = [variant.costs["down"] + variant.costs["up"] for variant, _ in shown]
    if len(shown) < 2 or not max(traffic):
        return None
    power = _power(max(traffic))
    places = [amount / 1024**power for amount in traffic]
    results = [variant.result.mean for variant, _ in shown if variant.result]
    unit = f"{comparison.metric} at the end, {'lower' if comparison.lower_is_better else 'higher'} is better"
    figure, axes = wide_axes("Quality against traffic", unit=unit)
    free_places(axes, f"tensors moved in a run, down and up, {UNITS[power]}")
    for (variant, role), place, value in zip(shown, places, results, strict=True):
        half = (variant.result.half if variant.result else None) or 0.0
        axes.errorbar([place], [value], yerr=[half], fmt="o", color=colour(role), markersize=8, elinewidth=1, capsize=2)
    front = _front(places, results, lower=comparison.lower_is_better)
    axes.step(
        *zip(*front, strict=True), where="post", color=colour("faint"), linewidth=1.2, linestyle="dashed", zorder=0
    )
    scale_places(axes, places)
    scale_for(axes, results)
    axes.margins(x=0.08, y=0.12)
    write_names(
        axes, [Name(p, v, _name(each), role) for (each, role), p, v in zip(shown, places, results, strict=True)]
    )
    return figure


def _front(places: Sequence[float], values: Sequence[float], *, lower: bool) -> list[tuple[float, float]]:
    """Return the points that no other one beats in both traffic and value, by traffic.

    >>> _front([1, 2, 3, 2], [30, 25, 26, 27], lower=True)
    [(1, 30), (2, 25)]
    """
    front: list[tuple[float, float]] = []
    for place, value in sorted(zip(places, values, strict=True), key=lambda it: (it[0], it[1] if lower else -it[1])):
        if not front or (value < front[-1][1] if lower else value > front[-1][1]):
            front.append((place, value))
    return front


def caption(name: str, comparison: Comparison) -> str:
    """Return what stands under a figure."""
    band = "The line is the mean over seeds, the band reaches from the lowest to the highest."
    texts = {
        "rounds": band,
        "bytes": f"{band} Tensor payload of all clients, both ways, without the bundle.",
        "differences": "An interval that touches the line may be noise between seeds.",
        "pareto": "The dashed line joins the variants that no other one beats in both.",
    }
    hidden = sum(bool(variant.finals) for variant in comparison.variants) - len(named(comparison))
    more = f" {hidden} more variants are grey." if hidden > 0 and name in CURVES else ""
    more = " The axis shows the later rounds in full; lines may enter from outside." + more if name in CURVES else more
    return texts[name] + more
