"""How the figures of a comparison are laid out: axes over anything, names beside lines and points."""

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from simulations.report.style import WIDE_INCHES, colour, new_axes, spread

ROOM_INCHES = 2.6
"""Space on the right for names."""

GAP_INCHES = 0.215
"""Least distance of two names."""


DISTANCES = (8, 16, 26, 38, 52, 70, 95)
"""Points between a point and its name, the nearest first."""

AROUND = (
    (1, 0),
    (1, 1),
    (1, -1),
    (-1, 0),
    (-1, 1),
    (-1, -1),
    (0, 1),
    (0, -1),
    (0.5, 1),
    (0.5, -1),
    (-0.5, 1),
    (-0.5, -1),
)
"""Where a name may stand around its point, the best first: right, upper right, and so on."""


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


class Box(NamedTuple):
    """A rectangle: from left to right, from bottom to top."""

    left: float
    right: float
    bottom: float
    top: float

    def meets(self, other: "Box", gap: float = 0.0) -> bool:
        """Tell whether two rectangles are less than `gap` apart."""
        across = self.left < other.right + gap and other.left < self.right + gap
        return across and self.bottom < other.top + gap and other.bottom < self.top + gap


def place_names(axes: Axes, names: Sequence[Name], marks: Sequence[Box]) -> int:
    """Write each name near its point, where it hides neither another name nor a mark; return how many have no place.

    Args:
        axes: Where all points are drawn already.
        names: The most important first.
        marks: The points with their bars, in data units.
    """
    axes.set_xlim(axes.get_xlim())  # final from here on
    axes.set_ylim(axes.get_ylim())
    figure = axes.get_figure(root=True)
    if figure is None:
        return len(names)
    point = figure.dpi / 72
    edges = [axes.transData.transform([(mark.left, mark.bottom), (mark.right, mark.top)]).ravel() for mark in marks]
    taken = [Box(x0 - 5 * point, x1 + 5 * point, y0 - 5 * point, y1 + 5 * point) for x0, y0, x1, y1 in edges]
    inner = axes.get_window_extent()
    page = Box(inner.x0, figure.bbox.x1 - 4 * point, inner.y0 + 2 * point, inner.y1 + 8 * point)
    left_out = 0
    for name in names:
        text = axes.annotate(name.text, (name.place, name.value), color=colour(name.role), fontsize=9, zorder=2.6)
        size = text.get_window_extent()
        x, y = axes.transData.transform((name.place, name.value))
        found = _free_place((x, y), (size.width, size.height), point, taken, page)
        text.remove()
        if found is None:
            left_out += 1
            continue
        taken.append(found[0])
        _write_beside(axes, name, _centre(found[0], (x, y), point), with_line=found[1])
    return left_out


def _write_beside(axes: Axes, name: Name, offset: tuple[float, float], *, with_line: bool) -> None:
    role = colour(name.role)
    axes.annotate(
        name.text,
        (name.place, name.value),
        offset,
        textcoords="offset points",
        ha="center",
        va="center",
        color=role,
        fontsize=9,
        zorder=2.6,
        bbox={"facecolor": colour("surface"), "edgecolor": "none", "pad": 0.5, "alpha": 0.85},
        arrowprops={"arrowstyle": "-", "color": role, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4}
        if with_line
        else None,
    )


def _centre(box: Box, anchor: tuple[float, float], point: float) -> tuple[float, float]:
    """Return how far a rectangle's centre is from its point, in points."""
    return ((box.left + box.right) / 2 - anchor[0]) / point, ((box.bottom + box.top) / 2 - anchor[1]) / point


def _free_place(
    anchor: tuple[float, float], size: tuple[float, float], point: float, taken: Sequence[Box], page: Box
) -> tuple[Box, bool] | None:
    """Return a free rectangle of this size near a point, all in pixels, and whether it is so far that a line helps."""
    width, height = size
    for distance, (across, up) in product(DISTANCES, AROUND):
        x = anchor[0] + across * (distance * point + width / 2)
        y = anchor[1] + up * (distance * point + height / 2)
        box = Box(x - width / 2, x + width / 2, y - height / 2, y + height / 2)
        within = page.left <= box.left and box.right <= page.right and page.bottom <= box.bottom and box.top <= page.top
        if within and not any(box.meets(other, 1.5 * point) for other in taken):
            return box, distance > DISTANCES[0]
    return None


def list_names(axes: Axes, names: Sequence[Name]) -> None:
    """Write names one under the other, beside the axes."""
    figure = axes.get_figure(root=True)
    gap = GAP_INCHES / ((figure.get_figheight() if figure else 1.0) * axes.get_position().height)
    for at, name in enumerate(names):
        place = {"transform": axes.transAxes, "va": "center", "fontsize": 8}
        axes.text(1.03, 0.97 - at * gap, name.text, color=colour(name.role), **place)


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
