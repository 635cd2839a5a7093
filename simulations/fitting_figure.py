"""The figure of a fit: losses measured against losses foretold."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from simulations.compare.drawing import free_places
from simulations.fitting import FIT, HELD_OUT
from simulations.report.style import colour, house_style, name_ends, new_axes, write_png

LOOK = {FIT: ("full_zero_shot", "o", 3.5), HELD_OUT: ("emulator_tuned", "D", 5.5)}
"""Colour, marker and its size of each part: not told apart by colour alone."""


def write_figure(path: Path, ends: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Write a figure of final losses.

    Args:
        path: A PNG.
        ends: Foretold and measured loss of each run, nats a token, by part: `fit` and `held-out`.

    Raises:
        StorageError: If it cannot be written.
    """
    with house_style():
        title = "What response curves foretell, against what was measured"
        figure, axes = new_axes(
            title, unit="measured plug-in loss after the last round, nats/token; on the line: as foretold"
        )
        free_places(axes, "foretold, nats/token")
        every = [value for pairs in ends.values() for pair in pairs for value in pair]
        limits = (min(every), max(every))
        axes.plot(limits, limits, color=colour("muted"), linewidth=1, zorder=1)
        names = []
        for part, pairs in ends.items():
            if not pairs:
                continue
            role, marker, size = LOOK[part]
            across, up = zip(*pairs, strict=True)
            axes.plot(across, up, linestyle="none", marker=marker, markersize=size, color=colour(role))
            names.append((max(pairs)[1], f"{part}, {len(pairs)} runs", role))
        name_ends(axes, names)
    write_png(figure, path)
