"""The figures of an emulator: which of the full model's blocks it keeps and why, and how it was trained."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from simulations.report.style import WIDE_INCHES, colour, finite, house_style, name_ends, new_axes, scale_for
from simulations.report.wording import number, printable

STRIP_INCHES, BARS_INCHES, GAP_INCHES = 0.46, 1.15, 0.5
HEAD_INCHES, FOOT_INCHES = 0.72, 0.5
LABELLED_BLOCKS = 40
"""Most blocks that are numbered one by one."""
SCORES = ("score", "run")
# What became of a block: fill, edge, opacity and height of its cell.
LOOKS: Mapping[str, tuple[str, str, float, float]] = {
    "adapter": ("plug_in", "plug_in", 1.0, 1.0),
    "kept": ("emulator_tuned", "emulator_tuned", 1.0, 1.0),
    "changed": ("emulator_tuned", "emulator_tuned", 1.0, 0.55),
    "shared": ("emulator_tuned", "emulator_tuned", 0.3, 1.0),
    "dropped": ("none", "faint", 1.0, 1.0),
}
NAMES = {
    "adapter": "of the adapter",
    "kept": "kept",
    "changed": "kept, but changed",
    "shared": "filled by another",
    "dropped": "dropped",
}


def draw_emulators(emulators: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
    """Return the figures of a run's emulators, by file name without its ending.

    Args:
        emulators: What `emulator.json` holds; what cannot be drawn is left out.
    """
    figures: dict[str, Figure | None] = {}
    with house_style():
        for key, emulator in emulators.items():
            end = "" if key == "default" else f"_{key}"
            figures[f"emulator{end}"] = depth(emulator, key=key)
            figures[f"distillation{end}"] = distillation(emulator, key=key)
    return {name: figure for name, figure in figures.items() if figure is not None}


def depth(emulator: Mapping[str, Any], *, key: str = "default") -> Figure | None:
    """Draw the full model's blocks in order, what became of each, and under them the scores that decided."""
    fates = fates_of(emulator)
    if not fates or set(fates) == {"adapter"}:
        return None
    notes = [note for note in emulator.get("notes", ()) if note.get("what") in SCORES and note.get("scores")]
    axes, *below = _rows(len(fates), len(notes), _titled("What stands in for each block", key))
    sources = {block["place"]: block["source"] for block in emulator["blocks"]}
    for place, fate in enumerate(fates):
        fill, edge, opacity, height = LOOKS[fate]
        face = "none" if fill == "none" else (colour(fill), opacity)
        corner, style = (place - 0.43, (1 - height) / 2), "dotted" if fate == "dropped" else "solid"
        axes.add_patch(Rectangle(corner, 0.86, height, facecolor=face, edgecolor=colour(edge), linestyle=style))
        if fate == "shared" and len(fates) <= LABELLED_BLOCKS:
            axes.text(place, 0.5, str(sources[place]), ha="center", va="center", fontsize=8, color=colour("ink"))
    _explain(axes, fates)
    kept = set(sources.values())
    for under, note in zip(below, notes, strict=True):
        _bars(under, note, kept)
    return axes.figure  # type: ignore[return-value]


def fates_of(emulator: Mapping[str, Any]) -> list[str]:
    """Return what became of each of the full model's blocks, in order.

    >>> blocks = [{"source": 1, "place": 1, "changes": []}, {"source": 1, "place": 2, "changes": []}]
    >>> fates_of({"count": 5, "adapter": [0, 4], "blocks": blocks})
    ['adapter', 'kept', 'shared', 'dropped', 'adapter']
    """
    blocks = {block["place"]: block for block in emulator.get("blocks", ())}

    def fate(place: int) -> str:
        if place in emulator.get("adapter", ()):
            return "adapter"
        if place not in blocks:
            return "dropped"
        if blocks[place]["source"] != place:
            return "shared"
        return "changed" if blocks[place].get("changes") else "kept"

    return [fate(place) for place in range(emulator.get("count", 0))]


def distillation(emulator: Mapping[str, Any], *, key: str = "default") -> Figure | None:
    """Draw the loss of an emulator's own training, over its steps."""
    notes = [note for note in emulator.get("notes", ()) if note.get("what") == "distillation"]
    points = [finite([(int(step), _float(value)) for step, value in note.get("loss", ())]) for note in notes]
    points = [curve for curve in points if curve]
    if not points:
        return None
    unit = "loss on public text; lower is better"
    if {"held_out_before", "held_out_after"} <= notes[-1].keys():
        before, after = (number(notes[-1][name]) for name in ("held_out_before", "held_out_after"))
        unit = f"loss on public text; on rows held out, {before} before and {after} after"
    figure, axes = new_axes(_titled("Training of the emulator", key), unit=unit)
    axes.set_xlabel("step")
    ends = []
    for curve in points:
        steps, values = zip(*curve, strict=True)
        axes.plot(steps, values, color=colour("emulator_tuned"))
        ends.append((values[-1], f"loss {number(values[-1])}", "emulator_tuned"))
    scale_for(axes, [value for curve in points for _, value in curve])
    axes.margins(x=0.02, y=0.08)
    name_ends(axes, ends)
    return figure


def _titled(title: str, key: str) -> str:
    return title if key == "default" else f"{title} ({printable(key, 20)})"


def _rows(count: int, below: int, title: str) -> list[Axes]:
    """Return axes over depth, one under the other: a strip, and `below` for bars."""
    width = WIDE_INCHES[0]
    height = HEAD_INCHES + STRIP_INCHES + FOOT_INCHES + below * (GAP_INCHES + BARS_INCHES)
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    left, right = 0.52 / width, 2.1 / width
    made, top = [], height - HEAD_INCHES
    for number_of in range(1 + below):
        tall = BARS_INCHES if number_of else STRIP_INCHES
        axes = figure.add_axes((left, (top - tall) / height, 1 - left - right, tall / height))
        axes.set_xlim(-0.6, count - 0.4)
        if count <= LABELLED_BLOCKS:
            axes.set_xticks(range(count))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(axis="x", length=0, labelbottom=number_of == below)
        made.append(axes)
        top -= tall + GAP_INCHES
    made[0].set_title(title)
    subtitle = "blocks of the full model, from the input (left) to the output"
    made[0].annotate(
        subtitle, (0, 1), (0, 9), xycoords="axes fraction", textcoords="offset points", color=colour("muted")
    )
    made[0].set_ylim(-0.04, 1.04)
    made[0].set_yticks([])
    made[0].spines["bottom"].set_visible(False)
    made[-1].set_xlabel("block")
    return made


def _explain(axes: Axes, fates: Sequence[str]) -> None:
    handles = []
    for fate in (name for name in LOOKS if name in fates):
        fill, edge, opacity, _ = LOOKS[fate]
        style = "dotted" if fate == "dropped" else "solid"
        face = "none" if fill == "none" else (colour(fill), opacity)
        label = f"{fates.count(fate)} {NAMES[fate]}"
        handles.append(Patch(facecolor=face, edgecolor=colour(edge), linestyle=style, label=label))
    place = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
    axes.legend(handles=handles, handlelength=1, handleheight=1, labelspacing=0.35, **place)


def _bars(axes: Axes, note: Mapping[str, Any], kept: set[int]) -> None:
    """Draw a score for each block: of those that stayed in colour."""
    pairs = finite([(int(place), _float(value)) for place, value in note["scores"].items()])
    run = note["what"] == "run"
    stays = set(note.get("kept", kept))
    if run and pairs:  # a score stands at the first block of a run, and one run went
        went = min(pairs, key=lambda pair: (pair[1], pair[0]))[0]
        stays = {place for place, _ in pairs} - {went}
    for place, value in pairs:
        role, edge = ("emulator_tuned", "emulator_tuned") if place in stays else ("none", "muted")
        face = "none" if role == "none" else colour(role)
        axes.bar(place, value, width=0.62, color=face, edgecolor=colour(edge), linewidth=1)
    axes.axhline(0, color=colour("faint"), linewidth=0.8)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    higher = "higher" if note.get("higher_stays", True) else "lower"
    what = f"of each block; the {higher} stay"
    if run:
        what = f"of the {note.get('length', '')} blocks from each on; the run of least went"
    told = [
        printable(note.get("builder", "score"), 24),
        printable(note.get("unit", ""), 24) if note.get("unit") else "",
    ]
    text = f"{', '.join(part for part in told if part)} {what}"
    axes.annotate(text, (0, 1), (0, 7), xycoords="axes fraction", textcoords="offset points", color=colour("muted"))


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)
