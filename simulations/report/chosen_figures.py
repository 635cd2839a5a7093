"""Pictures of what a controller chose, and of its objective's terms."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fedpeat.core import RoundReport
from fedpeat.devices.ledger import UNAVAILABLE
from simulations.report.chosen import choices_in
from simulations.report.style import PALETTE, WIDE_INCHES, colour, markers, name_ends, new_axes
from simulations.report.wording import number, printable

ROLES = ("plug_in", "emulator_tuned", "local_only", "whole_model", "personal", "extraction")
"""Colours of emulators, in the order of their names; more than these share."""

DEVICES, WRITTEN = 40, 24
"""Most devices in the picture; most rounds with the number of steps in each field."""

TERMS = {"quality": "plug_in", "time": "emulator_tuned", "bytes": "local_only", "energy": "whole_model"}


def chosen(reports: Sequence[RoundReport], summary: Mapping[str, Any]) -> Figure | None:
    """Draw what each device was given in each round: the emulator as colour, the rank as its strength, steps inside."""
    rounds = [report for report in reports if report.round and report.devices]
    if "control" not in summary or not rounds:
        return None
    visits = Counter(client for report in rounds for client in choices_in(report))
    clients = sorted({client for report in rounds for client in report.devices}, key=lambda one: (-visits[one], one))
    shown = sorted(clients[:DEVICES])
    left = len(clients) - len(shown)
    unit = "colour: emulator and rank; number: local steps; dot: could not be asked; empty: left out"
    figure, axes = new_axes(f"What control={printable(summary['control']['kind'])} chose", unit=unit, wide=True)
    _resize(figure, axes, rows=len(shown))
    pairs = sorted({(one.emulator, one.rank or 0) for report in rounds for one in choices_in(report).values()})
    shades = _shades(pairs)
    for place, client in enumerate(shown):
        for report in rounds:
            _field(axes, report, client, place, shades, written=len(rounds) <= WRITTEN)
    for when in summary["control"]["refreshed"]:
        axes.axvline(when - 0.5, color=colour("ink"), linewidth=1.2, linestyle=(0, (2, 2)))
    axes.set_xlim(rounds[0].round - 0.5, rounds[-1].round + 0.5)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.set_yticks(range(len(shown)), [printable(client, 14) for client in shown])
    handles = [Patch(color=role, alpha=alpha, label=_label(*pair)) for pair, (role, alpha) in shades.items()]
    if summary["control"]["refreshed"]:
        handles.append(Patch(facecolor="none", edgecolor=colour("ink"), linestyle="--", label="re-aligned"))
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.02), handlelength=1, handleheight=1)
    if left:
        axes.text(1.02, 0.0, f"and {left} more devices", transform=axes.transAxes, color=colour("muted"))
    return figure


def _resize(figure: Figure, axes: Axes, *, rows: int) -> None:
    """Give each device a line of its own, and its name room on the left."""
    width, height = WIDE_INCHES[0], 1.2 + 0.27 * max(rows, 3)
    figure.set_size_inches(width, height)
    left, right, bottom, top = 1.25 / width, 1.9 / width, 0.45 / height, 0.68 / height
    axes.set_position((left, bottom, 1 - left - right, 1 - bottom - top))


def _shades(pairs: Sequence[tuple[str, int]]) -> dict[tuple[str, int], tuple[str, float]]:
    """Return colour and strength of each pair of emulator and rank."""
    emulators = list(dict.fromkeys(emulator for emulator, _ in pairs))
    shades = {}
    for emulator, rank in pairs:
        ranks = sorted(own for other, own in pairs if other == emulator)
        strength = 0.9 if len(ranks) == 1 else 0.35 + 0.55 * ranks.index(rank) / (len(ranks) - 1)
        shades[emulator, rank] = (PALETTE[ROLES[emulators.index(emulator) % len(ROLES)]][0], strength)
    return shades


def _field(
    axes: Axes,
    report: RoundReport,
    client: str,
    place: int,
    shades: Mapping[tuple[str, int], tuple[str, float]],
    *,
    written: bool,
) -> None:
    facts = report.devices.get(client)
    if facts is None:
        return
    if facts["status"] == UNAVAILABLE:
        axes.plot([report.round], [place], "o", color=colour("faint"), markersize=2)
        return
    role, strength = shades[facts["emulator"], facts["rank"] or 0]
    axes.barh(place, 0.94, left=report.round - 0.47, height=0.84, color=role, alpha=strength, linewidth=0)
    if written:
        ink = colour("surface") if strength > 0.6 else colour("ink")
        axes.text(report.round, place, str(facts["local_steps"]), ha="center", va="center", fontsize=8, color=ink)


def _label(emulator: str, rank: int) -> str:
    return printable(emulator, 14) + (f", rank {rank}" if rank else "")


def objective_terms(summary: Mapping[str, Any]) -> Figure | None:
    """Draw the objective's terms over rounds; those whose weight is 0 are left out.

    The loss itself is large and nobody can take it away, so of the quality only what is above its best round is drawn.
    """
    rows = summary.get("control", {}).get("objective")
    if not rows:
        return None
    curves = {
        name: [(row["round"], row[name]) for row in rows if row[name] is not None and math.isfinite(row[name])]
        for name in TERMS
    }
    curves = {name: points for name, points in curves.items() if any(value for _, value in points)}
    if not curves:
        return None
    figure, axes = new_axes("The objective's terms", unit="cost of a round; of quality, what is above its best round")
    ends = []
    for name, points in curves.items():
        places, values = zip(*points, strict=True)
        values = [value - min(values) for value in values] if name == "quality" else values
        axes.plot(places, values, color=colour(TERMS[name]), **markers(len(points)))
        ends.append((values[-1], f"{name} {number(values[-1])}", TERMS[name]))
    axes.margins(x=0.02, y=0.08)
    name_ends(axes, ends)
    return figure
