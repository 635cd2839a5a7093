"""How the figures of a comparison are laid out: axes over anything, names beside lines and points."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from simulations.report.style import WIDE_INCHES, colour, new_axes, spread

ROOM_INCHES = 2.6
"""Space on the right for names."""

GAP_INCHES = 0.215
"""Least distance of two names."""


class Name(NamedTuple):
    """A name beside a point: its place and value, the role of its colour, and the dash of its line, if it has one."""

    place: float
    value: float
    text: str
    role: str
    dash: Any = None


def wide_axes(title: str, *, unit: str, rows: int = 0) -> tuple[Figure, Axes]:
    """Return a wide figure with room for the names of variants, which are longer than those of models.

    Args:
        title: Its title.
        unit: What stands under the title.
        rows: Rows that it must have the height for; 0 for the usual height.
    """
    figure, axes = new_axes(title, unit=unit, wide=True)
    box = axes.get_position()
    width, usual = WIDE_INCHES
    inside = max(usual * box.height, rows * 1.2 * GAP_INCHES)
    below, above = usual * box.y0, usual * (1 - box.y1)
    height = below + inside + above
    figure.set_size_inches(width, height)
    axes.set_position((box.x0, below / height, 1 - box.x0 - ROOM_INCHES / width, inside / height))
    return figure, axes


def free_places(axes: Axes, label: str) -> None:
    """Let the horizontal axis hold any number, not rounds."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value, 9):g}"))


def scale_places(axes: Axes, places: Sequence[float]) -> None:
    """Use a logarithmic horizontal axis where `places` span much; give equal ones room on both sides."""
    if min(places) > 0 and max(places) / min(places) > 8:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    elif min(places) == max(places):
        axes.set_xlim(0, 2 * places[0])


def write_names(axes: Axes, names: Sequence[Name]) -> None:
    """Write names to the right of their points, moved apart where they'd overlap, each with a thin line to its point.

    A name with a dash has a sample of its line before it.
    """
    axes.set_xlim(axes.get_xlim())  # final from here on
    axes.set_ylim(axes.get_ylim())
    to_axes = axes.transData + axes.transAxes.inverted()
    found = []
    for order, name in enumerate(names):
        across, height = to_axes.transform((name.place, name.value))
        found.append((float(height), order, float(across)))
    found.sort()
    figure = axes.get_figure(root=True)
    gap = GAP_INCHES / ((figure.get_figheight() if figure else 1.0) * axes.get_position().height)
    free: dict[str, Any] = {"clip_on": False, "transform": axes.transAxes, "scalex": False, "scaley": False}
    for (height, order, across), level in zip(found, inside([one[0] for one in found], gap), strict=True):
        _, _, text, role, dash = names[order]
        start = across + 0.024
        axes.plot(
            [across + 0.005, across + 0.018, start], [height, level, level], color=colour(role), linewidth=0.8, **free
        )
        if dash is not None:
            axes.plot([start, start + 0.045], [level, level], color=colour(role), linestyle=dash, linewidth=1.8, **free)
            start += 0.05
        axes.text(start + 0.006, level, text, transform=axes.transAxes, color=colour(role), va="center", fontsize=9)


def inside(heights: Sequence[float], gap: float) -> list[float]:
    """Return heights (shares of the axes') at least `gap` apart; too many of them grow over the top.

    >>> [round(place, 3) for place in inside([0.0, 0.01, 0.5], 0.1)]
    [0.0, 0.1, 0.5]
    """
    places = spread(heights, gap=gap)
    top = 1.0
    for at in reversed(range(len(places))):
        places[at] = min(places[at], top)
        top = places[at] - gap
    least = 0.0
    for at, place in enumerate(places):
        places[at] = max(place, least)
        least = places[at] + gap
    return places
