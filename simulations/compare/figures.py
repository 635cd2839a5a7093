"""The figures of a comparison: curves over rounds and bytes, differences to the baseline, quality against traffic."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
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

FEW = 8
"""So many points of a figure all get names."""

ROWS = 60
"""Most rows of the figure of differences."""

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


def drawn(comparison: Comparison) -> list[Variant]:
    """Return the variants that have something to draw, and on the same text as their baseline."""
    return [variant for variant in comparison.variants if variant.finals and variant.ranked]


def named(comparison: Comparison) -> list[tuple[Variant, str, Any]]:
    """Return the variants that get a name, each with its colour's role and its dash, the best ones first."""
    shown = drawn(comparison)
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
    points = {id(v): [run.curve(comparison.metric) for run in v.finished] for v in drawn(comparison)}
    most = max((curve[-1].bytes for several in points.values() for curve in several if curve), default=0)
    if not shown or (over == "bytes" and not most):
        return None
    power = power_of(most)
    scale = 1 / 1024**power

    def place(point: Point) -> float:
        return point.round if over == "rounds" else point.bytes * scale

    better = "lower is better" if comparison.lower_is_better else "higher is better"
    what = "rounds" if over == "rounds" else "traffic"
    figure, axes = wide_axes(f"{comparison.metric_words.capitalize()} on held-out text over {what}", unit=better)
    if over == "bytes":
        free_places(axes, f"tensors moved so far, down and up, {UNITS[power]}")
    lines = {key: mean_line(several, place) for key, several in points.items()}
    lines = {key: line for key, line in lines.items() if line}
    if not lines:
        return None
    for variant in drawn(comparison):
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


def power_of(amount: float) -> int:
    """Return which of UNITS suits an amount of bytes."""
    return min(int(math.log2(amount) // 10), len(UNITS) - 1) if amount >= 1 else 0


def _name(variant: Variant) -> str:
    return printable(variant.label, LABEL - 11) + " (diverged)" if variant.diverged else printable(variant.label, LABEL)


def differences(comparison: Comparison) -> Figure | None:
    """Draw each variant's paired difference to its baseline with its interval, the best one on top."""
    shown = [variant for variant in comparison.variants if variant.difference and variant.difference.half is not None]
    shown = shown[:ROWS]
    if not shown:
        return None
    better = "left of the line is better" if comparison.lower_is_better else "right of the line is better"
    title = f"{comparison.metric_words.capitalize()}, difference to {printable(comparison.baseline_label, LABEL)}"
    figure, axes = wide_axes(title, unit=f"{better}; bars are 95 % intervals", rows=len(shown))
    free_places(axes, f"difference in {comparison.metric_words}, paired over seeds")
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
    shown = [(variant, variant.result) for variant in drawn(comparison) if variant.result is not None]
    traffic = [variant.costs["down"] + variant.costs["up"] for variant, _ in shown]
    if len(shown) < 2 or not max(traffic):
        return None
    power = power_of(max(traffic))
    places = [amount / 1024**power for amount in traffic]
    values = [result.mean for _, result in shown]
    front = front_of(places, values, lower=comparison.lower_is_better)
    unit = f"{comparison.metric_words} at the end, {'lower' if comparison.lower_is_better else 'higher'} is better"
    figure, axes = wide_axes("Quality against traffic", unit=unit)
    free_places(axes, f"tensors moved in a run, down and up, {UNITS[power]}")
    roles = {id(variant): role for variant, role, _ in named(comparison)}
    names: list[Name] = []
    seen: set[str] = set()
    for (variant, result), place, value in zip(shown, places, values, strict=True):
        # Where they are many, the best at each amount of traffic has a name; the baseline always has.
        is_named = len(shown) <= FEW or f"{place:.2g}" not in seen or variant.verdict == "baseline"
        seen.add(f"{place:.2g}")
        role = roles.get(id(variant), "muted") if is_named else "faint"
        error = [result.half or 0.0] if is_named else None
        points = {"color": colour(role), "markersize": 8 if is_named else 5, "elinewidth": 1, "capsize": 2}
        axes.errorbar([place], [value], yerr=error, fmt="o", zorder=3 if is_named else 2, **points)
        names += [Name(place, value, _name(variant), role)] if is_named else []
    line = {"color": colour("faint"), "linewidth": 1.2, "linestyle": "dashed", "zorder": 0}
    axes.step(*zip(*front, strict=True), where="post", **line)
    scale_places(axes, places)
    scale_for(axes, values)
    axes.margins(x=0.08, y=0.12)
    write_names(axes, names)
    return figure


def front_of(places: Sequence[float], values: Sequence[float], *, lower: bool) -> list[tuple[float, float]]:
    """Return the points that no other one beats in both traffic and value, by traffic.

    >>> front_of([1, 2, 3, 2], [30, 25, 26, 27], lower=True)
    [(1, 30), (2, 25)]
    """
    front: list[tuple[float, float]] = []
    for place, value in sorted(zip(places, values, strict=True), key=lambda it: (it[0], it[1] if lower else -it[1])):
        if not front or (value < front[-1][1] if lower else value > front[-1][1]):
            front.append((place, value))
    return front


def caption(name: str, comparison: Comparison, figure: Figure) -> str:
    """Return what stands under a figure."""
    band = "The line is the mean over seeds, the band reaches from the lowest to the highest."
    texts = {
        "rounds": [band],
        "bytes": [band, "Tensor payload of all clients, both ways, without the bundle."],
        "differences": ["An interval that touches the line may be noise between seeds."],
        "pareto": ["The dashed line joins the variants that no other one beats in both; bars are 95 % intervals."],
    }[name]
    if name == "pareto" and sum(variant.result is not None for variant in drawn(comparison)) > FEW:
        texts.append("The best at each amount of traffic has a name.")
    hidden = len(drawn(comparison)) - len(named(comparison))
    if hidden > 0 and name in CURVES:
        texts.append(f"{hidden} more variant{'s are' if hidden > 1 else ' is'} grey.")
    if name in CURVES and _is_cut(figure):
        texts.append("Lines enter from outside: the axis shows the later rounds in full.")
    return " ".join(texts)


def _is_cut(figure: Figure) -> bool:
    """Tell whether a figure's axis leaves out a part of its lines."""
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    lines = [line for line in axes.get_lines() if line.get_transform() is axes.transData]
    return any(not low <= height <= high for line in lines for height in np.asarray(line.get_ydata(), dtype=float))
