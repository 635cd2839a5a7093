"""The figures of a study: quality against what is kept, against memory, and against the privacy margin."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from simulations.compare.drawing import (
    Box,
    Name,
    free_places,
    list_names,
    place_names,
    scale_places,
    wide_axes,
    write_names,
)
from simulations.compare.figures import FEW, NAMED, ROLES, STROKES, UNITS, front_of, power_of
from simulations.compare.table import precise
from simulations.report.style import colour, house_style, scale_for
from simulations.report.wording import printable
from simulations.study.cells import FULL, WHOLE, title_of
from simulations.study.heat import heat_maps
from simulations.study.results import Setup, Study

LABEL = 40
"""Longest name in a figure."""

LISTED = 34
"""Longest name in a list beside the axes."""

Drawn = dict[str, tuple[Figure, str]]
REFERENCE_DASHES: Mapping[str, Any] = {WHOLE: (0, (6, 2, 1, 2)), FULL: (0, (3, 1.5))}
BEFORE, BEFORE_DASH = "full model before tuning", (0, (1, 2))


def draw(study: Study) -> Drawn:
    """Return all figures that have something to show, with their captions, by file name without its ending.

    Where runs are scored on several texts, each has figures of its own, with a number at the end of their names.
    """
    found: Drawn = {}
    parts = study.parts
    with house_style():
        for number, part in enumerate(parts, 1):
            place = ", ".join((part.setups or part.references)[0].place) if len(parts) > 1 else ""
            drawn = {"quality": quality(part), **heat_maps(part), "memory": memory(part), "margin": margin(part)}
            end = f"_{number}" if place else ""
            for name, made in drawn.items():
                if made is not None:
                    found[f"{name}{end}"] = (made[0], f"{printable(place, 60)}: {made[1]}" if place else made[1])
    return found


def lines_of(study: Study) -> list[tuple[str, list[Setup]]]:
    """Return the setups that differ in `kept` alone, by what they are called without it; the best line first."""
    found: dict[tuple[tuple[str, str], ...], list[Setup]] = {}
    for setup in study.setups:
        if setup.result is not None and setup.mean("kept_share") is not None:
            key = tuple((name, text) for name, text in setup.values.items() if name != "kept")
            found.setdefault(key, []).append(setup)
    return [(title_of(dict(key)), sorted(line, key=_share)) for key, line in found.items()]


def quality(study: Study) -> tuple[Figure, str] | None:
    """Draw the metric against the share of the middle that is kept: plug-in, and thin what a device has."""
    lines = lines_of(study)
    if "kept" not in study.swept or max((len(line) for _, line in lines), default=0) < 2:
        return None
    unit = f"{_better(study)}; thick: the plug-in model, thin: the emulated one, which a device has"
    title = f"{study.metric_words[0].upper()}{study.metric_words[1:]} against what is kept of the middle"
    figure, axes = wide_axes(title, unit=unit)
    free_places(axes, "parameters of the emulator, share of the middle's")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    names: list[Name] = []
    values: list[float] = []
    first = _first_of_each_selection(lines)
    for at, (name, line) in enumerate(lines):
        if at in first:
            number = first.index(at)
            role, dash = ROLES[number % len(ROLES)], STROKES[number // len(ROLES) % len(STROKES)]
            values += _line(axes, line, role, dash, band=study.seeds > 1)
            names.append(Name(0.0, _plug_in(line[-1]), printable(name, LABEL), role, dash))
        else:
            values += map(_plug_in, line)
            axes.plot(*_points_of(line), color=colour("faint"), linewidth=0.8, zorder=1)
    _tick_at(axes, [_share(setup) for _, line in lines for setup in line])
    axes.margins(x=0.04, y=0.08)
    outside = _levels(axes, study, names, values)
    scale_for(axes, values)
    right = axes.get_xlim()[1]
    write_names(axes, [name._replace(place=right) for name in names])
    caption = "Lines are means over seeds, bands reach from the lowest seed to the highest; level lines are references."
    if len(first) < len(lines):
        caption += f" Of each selection, the line with its best setup is in colour; {len(lines) - len(first)} are grey."
    return figure, caption + outside


def _first_of_each_selection(lines: Sequence[tuple[str, Sequence[Setup]]]) -> list[int]:
    """Return which lines are the best of their selection, at most as many as can be told apart."""
    seen: dict[str, int] = {}
    for at, (_, line) in enumerate(lines):
        seen.setdefault(line[0].values["selection"], at)
    return list(seen.values())[:NAMED]


def _line(axes: Axes, line: Sequence[Setup], role: str, dash: Any, *, band: bool) -> list[float]:
    """Draw the plug-in model, its band over the seeds, and thin what a device has; return all values."""
    places, means = _points_of(line)
    axes.plot(places, means, color=colour(role), linestyle=dash, marker="o", markersize=5, zorder=3)
    if band:
        low, high = zip(*(_reach(setup) for setup in line), strict=True)
        axes.fill_between(places, low, high, color=colour(role), alpha=0.13, linewidth=0)
    pairs = [(_share(setup), value) for setup in line if (value := setup.mean("emulated")) is not None]
    if pairs:
        thin = {"linewidth": 0.9, "marker": "o", "markersize": 2.5, "alpha": 0.75}
        axes.plot(*zip(*pairs, strict=True), color=colour(role), **thin)
    return [*means, *(value for _, value in pairs)]


def _tick_at(axes: Axes, places: Sequence[float]) -> None:
    """Mark the shares that there are, if they are few and apart."""
    shown = sorted({round(place, 3) for place in places})
    if len(shown) <= 8 and all(high - low > 0.06 * (shown[-1] - shown[0]) for low, high in pairwise(shown)):
        axes.set_xticks(shown)


def _levels(axes: Axes, study: Study, names: list[Name], values: list[float]) -> str:
    """Draw the references as level lines, and add their values; one that is far from all else is told in words."""
    levels = [(one.label, _plug_in(one), REFERENCE_DASHES[one.role]) for one in study.references[:4] if one.result]
    before = next((setup.mean("full_zero_shot") for setup in study.setups if setup.result), None)
    outside = ""
    if before is not None:
        every = [*values, *(level for _, level, _ in levels)]
        if max(min(every) - before, before - max(every)) > max(every) - min(every):
            outside = f" Outside: the {BEFORE}, {precise(before)}."
        else:
            levels.append((BEFORE, before, BEFORE_DASH))
    for name, level, dash in levels:
        axes.axhline(level, color=colour("muted"), linestyle=dash, linewidth=1.1, zorder=1)
        names.append(Name(0.0, level, printable(name, LABEL), "muted", dash))
        values.append(level)
    return outside


def memory(study: Study) -> tuple[Figure, str] | None:
    """Draw the metric against the memory that a device needs to train; a line joins what nothing beats in both."""
    known = [one for one in (*study.setups, *study.references) if one.result and one.mean("client_memory_bytes")]
    if sum(one in study.setups for one in known) < 2:
        return None
    needs = [one.mean("client_memory_bytes") or 0.0 for one in known]
    power = power_of(max(needs))
    points = [(one, need / 1024**power, _plug_in(one)) for one, need in zip(known, needs, strict=True)]
    places, values = [place for _, place, _ in points], [value for _, _, value in points]
    figure, axes = wide_axes(
        "Quality against a device's memory", unit=f"plug-in {study.metric_words}, {_better(study)}"
    )
    free_places(axes, f"memory to train on a device, {UNITS[power]}")
    joined = front_of(places, values, lower=study.lower_is_better)
    line = {"color": colour("faint"), "linewidth": 1.2, "linestyle": "dashed", "zorder": 0}
    axes.step(*zip(*joined, strict=True), where="post", **line)
    scale_places(axes, places)
    first = [one for one, place, value in points if one in study.references or (place, value) in joined]
    hidden = _points(axes, study, points, first)
    return figure, f"The dashed line joins what nothing beats in both; bars reach over the seeds.{hidden}"


def margin(study: Study) -> tuple[Figure, str] | None:
    """Draw the privacy margin against the metric of the plug-in model."""
    known = [one for one in study.setups if one.result and one.interval("privacy_margin")]
    if len(known) < 2:
        return None
    unit = "emulated minus plug-in loss, nats/token: what a device lacks; higher is more private"
    figure, axes = wide_axes("Privacy margin against quality", unit=unit)
    free_places(axes, f"plug-in {study.metric_words}, {_better(study)}")
    axes.axhline(0, color=colour("muted"), linewidth=1, zorder=1)
    points = [(one, _plug_in(one), one.mean("privacy_margin") or 0.0) for one in known]
    sign = 1 if study.lower_is_better else -1
    joined = front_of([sign * place for _, place, _ in points], [value for _, _, value in points], lower=False)
    first = [one for one, place, value in points if (sign * place, value) in joined]
    hidden = _points(axes, study, points, first, across="plug_in", up="privacy_margin")
    below = "Below the line, plugging in makes the model worse than what a device has; bars reach over the seeds."
    return figure, f"{below}{hidden}"


def _points(
    axes: Axes,
    study: Study,
    points: Sequence[tuple[Setup, float, float]],
    first: Sequence[Setup],
    *,
    across: str | None = None,
    up: str = "plug_in",
) -> str:
    """Draw points in the colours of their selections, with bars over the seeds; return what is said of the nameless.

    Names are written of those in `first`, then of the best others, as long as there is room.
    """
    selections = study.axes.get("selection", ())
    rest = [one for one, _, _ in points if one not in first]
    chosen = [*first, *rest[: max(NAMED - len(first), 0)]]
    names: dict[int, Name] = {}
    marks = []
    for one, place, value in points:
        own, is_named = one.values["selection"], one in chosen
        role = ROLES[selections.index(own) % len(ROLES)] if own in selections else "muted"
        bars = {"yerr": _bars(one, up, value), "xerr": _bars(one, across, place) if across else None}
        look = {"markersize": 7 if is_named else 4.5, "elinewidth": 0.9, "zorder": 3 if is_named else 2}
        axes.errorbar([place], [value], fmt="o", color=colour(role), alpha=1 if is_named else 0.45, **bars, **look)
        marks.append(Box(*(_reach(one, across) if across else (place, place)), *_reach(one, up)))
        names[id(one)] = Name(place, value, printable(one.label, LABEL), role)
    axes.margins(x=0.08, y=0.12)
    if up == "plug_in":
        scale_for(axes, [value for _, _, value in points])
    _name_points(axes, [names[id(one)] for one, _, _ in points if one in chosen], marks)
    hidden = len(points) - len(chosen)
    return f" {hidden} small point{'s have' if hidden > 1 else ' has'} no name." if hidden else ""


def _name_points(axes: Axes, names: Sequence[Name], marks: Sequence[Box]) -> None:
    """Write the names beside their points; of many points numbers, and the names beside the axes."""
    if len(marks) <= FEW:
        place_names(axes, names, marks)
    else:
        place_names(axes, [name._replace(text=str(at)) for at, name in enumerate(names, 1)], marks)
        list_names(
            axes, [name._replace(text=f"{at}  {printable(name.text, LISTED)}") for at, name in enumerate(names, 1)]
        )


def _bars(setup: Setup, name: str, mean: float) -> list[list[float]]:
    low, high = _reach(setup, name)
    return [[max(mean - low, 0.0)], [max(high - mean, 0.0)]]


def _reach(setup: Setup, name: str = "plug_in") -> tuple[float, float]:
    values = setup.measures[name].values()
    return min(values), max(values)


def _points_of(line: Sequence[Setup]) -> tuple[list[float], list[float]]:
    return [_share(setup) for setup in line], [_plug_in(setup) for setup in line]


def _share(setup: Setup) -> float:
    return setup.mean("kept_share") or 0.0


def _plug_in(setup: Setup) -> float:
    return setup.mean("plug_in") or 0.0


def _better(study: Study) -> str:
    return "lower is better" if study.lower_is_better else "higher is better"
