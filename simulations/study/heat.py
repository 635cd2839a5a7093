"""Heat maps of a study: one axis against another, a panel for each depth."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from simulations.compare.table import common_places, with_error
from simulations.report.style import WIDE_INCHES, colour
from simulations.report.wording import NOTHING, printable
from simulations.study.results import Setup, Study

ACROSS = ("unfreeze", "compression", "distillation")
HEIGHT, NARROW, BROAD, GAP, HEAD, FOOT = 0.46, 0.95, 1.5, 0.3, 0.95, 0.15
LEFT, RIGHT, UNDER = 1.65, 0.25, 0.75
PANELS = 4
"""Most depths that have a panel: of more, the deepest."""

SHADES = 0.06, 0.5
"""Opacity of the worst and of the best cell: ink can be read on both, on a light page and on a dark one."""


def heat_maps(study: Study) -> dict[str, tuple[Figure, str]]:
    """Return a figure for each two axes that are swept, `kept` apart: rows are selections where these are swept."""
    rows = next((name for name in ("selection", *ACROSS) if name in study.swept), None)
    columns = [name for name in ACROSS if name in study.swept and name != rows]
    drawn = {f"heat_{name}": heat_map(study, str(rows), name) for name in columns}
    return {name: made for name, made in drawn.items() if made is not None}


def heat_map(study: Study, down: str, across: str) -> tuple[Figure, str] | None:
    """Draw the plug-in model's metric for each value of two axes: of what else is swept, the best."""
    known = [setup for setup in study.setups if setup.result is not None]
    if not known:
        return None
    depths: Sequence[str | None] = study.axes["kept"][-PANELS:] if "kept" in study.swept else [None]
    rows, columns = study.axes[down], study.axes[across]
    figure, panels, abreast = _panels(len(depths), len(rows), len(columns))
    title = f"{study.metric_words[0].upper()}{study.metric_words[1:]} by {down} and {across}"
    better = "lower is better" if study.lower_is_better else "higher is better"
    figure.text(
        0.12 / figure.get_figwidth(), 1 - 0.12 / figure.get_figheight(), title, va="top", fontsize=11, weight="bold"
    )
    head = {"va": "top", "fontsize": 9, "color": colour("muted")}
    figure.text(0.12 / figure.get_figwidth(), 1 - 0.34 / figure.get_figheight(), f"plug-in model, {better}", **head)
    means = [setup.mean("plug_in") or 0.0 for setup in known]
    places = common_places([setup.result for setup in known if setup.result])
    for at, (axes, depth) in enumerate(zip(panels, depths, strict=True)):
        inside = [setup for setup in known if depth is None or setup.values["kept"] == depth]
        _grid(axes, rows if at % abreast == 0 else [""] * len(rows), columns)
        for row, name in enumerate(rows):
            for column, text in enumerate(columns):
                here = [one for one in inside if one.values[down] == name and one.values[across] == text]
                _cell(axes, (column, row), here[0] if here else None, means, places, lower=study.lower_is_better)
        if depth is not None:
            axes.annotate(f"kept {depth}", (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points")
    rest = [name for name in study.swept if name not in {down, across, "kept"}]
    others = {name for setup in known for name, _ in setup.others}
    best = f" Each cell is the best over {' and '.join([*rest, *sorted(others)])}." if rest or others else ""
    deepest = f" The {PANELS} last depths." if "kept" in study.swept and len(study.axes["kept"]) > PANELS else ""
    noise = ", with the half-width of a 95 % interval below" if study.seeds > 1 else ""
    return figure, f"Means over seeds{noise}; the darker, the better; bold: the best.{best}{deepest}"


def _panels(count: int, rows: int, columns: int) -> tuple[Figure, list[Axes], int]:
    """Return a figure with so many panels of rows times columns cells, and how many of them stand side by side."""
    room, tall = WIDE_INCHES[0] - LEFT - RIGHT, rows * HEIGHT
    abreast = min(count, max(1, int((room + GAP) / (columns * NARROW + GAP))))
    inside = columns * min(max((room - (abreast - 1) * GAP) / (abreast * columns), NARROW), BROAD)
    lines = -(-count // abreast)
    width = max(LEFT + abreast * (inside + GAP) - GAP + RIGHT, WIDE_INCHES[0])
    height = HEAD + lines * (tall + UNDER) - 0.3 + FOOT
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    made = []
    for at in range(count):
        left, below = LEFT + at % abreast * (inside + GAP), HEAD + at // abreast * (tall + UNDER) + tall
        made.append(figure.add_axes((left / width, 1 - below / height, inside / width, tall / height)))
    return figure, made, abreast


def _grid(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.set_xticks(range(len(columns)), [_folded(text) for text in columns])
    axes.set_yticks(range(len(rows)), [printable(text, 22) if text else "" for text in rows])
    axes.tick_params(length=0, labelsize=9, left=False)
    axes.spines["bottom"].set_visible(False)


def _folded(text: str) -> str:
    r"""Return a column's name in two lines, if it is long and joined.

    >>> _folded("attention+mlp"), _folded("low_rank (share 0.5)"), _folded("none")
    ('attention\n+mlp', 'low_rank\n(share 0.5)', 'none')
    """
    shown = printable(text, 32)
    mark = next((mark for mark in (" (", "+") if mark in shown and len(shown) > 11), None)
    one, _, other = shown.partition(mark) if mark else (shown, "", "")
    return f"{one}\n{mark.strip()}{other}" if mark else one


def _cell(
    axes: Axes,
    at: tuple[int, int],
    setup: Setup | None,
    means: Sequence[float],
    places: int | None,
    *,
    lower: bool,
) -> None:
    column, row = at
    corner: tuple[float, float] = (column - 0.5, row - 0.5)
    edge = {"edgecolor": colour("surface"), "linewidth": 2}
    centred: dict[str, Any] = {"ha": "center", "va": "center"}
    if setup is None or setup.result is None:
        axes.add_patch(Rectangle(corner, 1, 1, facecolor="none", **edge))
        axes.text(column, row, NOTHING, color=colour("faint"), **centred)
        return
    mean, low, high = setup.result.mean, min(means), max(means)
    goodness = 1.0 if high == low else (high - mean if lower else mean - low) / (high - low)
    shade = SHADES[0] + goodness * (SHADES[1] - SHADES[0])
    axes.add_patch(Rectangle(corner, 1, 1, facecolor=(colour("plug_in"), shade), **edge))
    weight = "bold" if mean == (low if lower else high) else "normal"
    value, _, half = with_error(setup.result, places=places).partition(" ± ")
    axes.text(column, row - (0.14 if half else 0.0), value, fontsize=9.5, weight=weight, **centred)
    if half:
        axes.text(column, row + 0.24, f"± {half}", fontsize=7, color=colour("muted"), **centred)
