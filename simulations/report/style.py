"""The one house style of all figures: colours, type, and how a figure is drawn and written down.

Colours follow Okabe and Ito's set, which stays apart under the usual colour-vision deficiencies; no two series are told
apart by colour alone, each has its own dash and its name at its end. In a page, colours are CSS variables
(`--plug_in`, ...), so one drawing serves light and dark.
"""

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fedpeat.core import StorageError

# Role: (on light, on dark). The light ones differ from each other: they are found again by value in an SVG.
PALETTE = {
    "ink": ("#1f2329", "#e6e8eb"),
    "muted": ("#646b75", "#9aa2ad"),
    "grid": ("#e4e7eb", "#343a43"),
    "surface": ("#fffffe", "#1b1f25"),
    "faint": ("#b9c0c9", "#59616c"),
    "plug_in": ("#0072b2", "#5ab4ec"),
    "emulator_tuned": ("#d55e00", "#f28a3d"),
    "full_zero_shot": ("#4a4f57", "#c3c8cf"),
    "emulator_zero_shot": ("#a67c00", "#d9b23c"),
    "local_only": ("#00855f", "#3cc79a"),
    "whole_model": ("#a8528a", "#e093c4"),
    "personal": ("#5b5fc7", "#a3a6f0"),
    "extraction": ("#b3263e", "#f07f91"),
}
DASHES = {
    "plug_in": "solid",
    "emulator_tuned": (0, (6, 1.5)),
    "full_zero_shot": (0, (4, 3)),
    "emulator_zero_shot": (0, (1, 2)),
    "local_only": (0, (6, 2, 1, 2)),
    "whole_model": (0, (6, 2, 1, 2, 1, 2)),
    "personal": (0, (3, 1.5)),
    "extraction": (0, (2, 1.5)),
}
SIZE_INCHES = (5.9, 3.2)
WIDE_INCHES = (9.8, 4.2)
PNG_DPI = 200


def colour(role: str) -> str:
    """Return the colour of a role, as drawn on a light page."""
    return PALETTE[role][0]


_SETTINGS: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": colour("faint"),
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": colour("muted"),
    "axes.labelsize": 9,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": colour("ink"),
    "axes.titlelocation": "left",
    "axes.titlepad": 24,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.facecolor": colour("surface"),
    "font.family": "sans-serif",
    "font.size": 9,
    "grid.color": colour("grid"),
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.labelcolor": colour("ink"),
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "text.color": colour("ink"),
    "text.parse_math": False,  # a client may be called "$\frac"
    "xtick.color": colour("muted"),
    "xtick.major.size": 3,
    "ytick.color": colour("muted"),
    "ytick.left": False,
}


@contextmanager
def house_style() -> Iterator[None]:
    """Draw and write figures in here; nothing global stays changed."""
    with mpl.rc_context(_SETTINGS), warnings.catch_warnings():
        # A PNG shows a box for a letter that the font lacks; that is no reason to fail.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def new_axes(title: str, *, unit: str, wide: bool = False) -> tuple[Figure, Axes]:
    """Return a figure over rounds, its `unit` under the title, with room on the right for names at lines' ends."""
    width, height = WIDE_INCHES if wide else SIZE_INCHES
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    left, right, bottom, top = 0.52 / width, 1.9 / width, 0.45 / height, 0.68 / height
    axes = figure.add_axes((left, bottom, 1 - left - right, 1 - bottom - top))
    axes.set_title(title)
    axes.annotate(unit, (0, 1), (0, 9), xycoords="axes fraction", textcoords="offset points", color=colour("muted"))
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    return figure, axes


def _tick(value: float, _: int | None = None) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{round(value, 9):g}"


def scale_for(axes: Axes, values: Sequence[float]) -> None:
    """Use a logarithmic axis where the positive `values` span much: the best ones must stay apart."""
    if min(values) > 0 and max(values) / min(values) > 3:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="y", which="minor", length=0)


def markers(points: int) -> dict[str, Any]:
    """Return the marker of a curve: dots, or none where there are so many `points` that they'd touch."""
    return {"marker": "o", "markersize": 4 if points <= 40 else 0}


def name_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], *, gap: float = 0.075) -> None:
    """Write names to the right of the axes, each at the height of its line's end, moved apart where they'd overlap.

    Args:
        axes: Where the lines are; all of them are drawn.
        ends: Height in data units, name, and role (for the colour) of each line.
        gap: Least distance of two names, as a share of the axes' height.
    """
    axes.set_ylim(axes.get_ylim())  # final from here on
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = sorted((float(to_axes.transform((0, height))[1]), name, role) for height, name, role in ends)
    places = spread([height for height, _, _ in wanted], gap=gap)
    for (height, name, role), place in zip(wanted, places, strict=True):
        axes.plot(
            [1.005, 1.02, 1.03],
            [height, place, place],
            color=colour(role),
            linewidth=0.8,
            clip_on=False,
            transform=axes.transAxes,
            scalex=False,
            scaley=False,
        )
        axes.text(1.04, place, name, transform=axes.transAxes, color=colour(role), va="center", fontsize=9)


def spread(wanted: Sequence[float], *, gap: float) -> list[float]:
    """Return places at least `gap` apart, close to those `wanted` (ascending): overlapping ones move as a block.

    >>> [round(place, 3) for place in spread([0.1, 0.5, 0.52], gap=0.1)]
    [0.1, 0.46, 0.56]
    """
    blocks: list[tuple[float, int]] = []  # (centre, members)
    for place in wanted:
        centre, members = place, 1
        while blocks and centre - blocks[-1][0] < gap * (members + blocks[-1][1]) / 2:
            last, more = blocks.pop()
            centre = (centre * members + last * more) / (members + more)
            members += more
        blocks.append((centre, members))
    return [centre + gap * (index - (members - 1) / 2) for centre, members in blocks for index in range(members)]


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure for light paper, at twice the usual resolution.

    Raises:
        StorageError: If the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with house_style():
            figure.savefig(path, format="png", dpi=PNG_DPI, metadata={"Software": None})
    except OSError as error:
        raise StorageError(f"cannot write {path}", str(error), "free some space or choose another folder") from error


def to_svg(figure: Figure, *, name: str) -> str:
    """Return a figure as an `<svg>` element for a page: colours are CSS variables, the type is the page's."""
    buffer = io.StringIO()
    with house_style(), mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for role, (light, _) in PALETTE.items():
        text = text.replace(light, f"var(--{role})")
    text = re.sub(r"; font-family: [^;\"]*", "", text)  # the page's own
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)  # the same in every figure; nothing refers to them
    text = re.sub(r"\s*\n\s*", " ", text)
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)


def finite(pairs: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the pairs whose value can be drawn."""
    return [(place, value) for place, value in pairs if math.isfinite(value)]
