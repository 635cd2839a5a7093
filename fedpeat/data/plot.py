"""A picture of who holds how much of what."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeat.core import read_json
from fedpeat.data.rows import TABLE_FILE, FederatedData, client_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMED = 40
"""Up to this many clients, each has a line of its own with its name; more are columns, by rank."""
_PARTS = (("rows", "train", "#2b5c8a"), ("validation_rows", "validation", "#8fb8de"), ("test_rows", "test", "#e8a33d"))
_INK, _PALE = "#30343b", "#d9dde3"


def plot_clients(data: FederatedData, path: str | Path) -> Path:
    """Draw rows of each client, largest first, and what kinds of documents they hold, as a PNG.

    Args:
        data: The population.
        path: The file to write.

    Returns:
        That path.

    Raises:
        StorageError: If the table of the data is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    table = sorted(client_table(data), key=lambda row: (-row["rows"], row["client"]))
    labels = list(table[0]["histogram"]) if table else []
    field = read_json(data.folder / TABLE_FILE)["field"]
    figure = Figure(layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    draw = _draw_lines if len(table) <= _NAMED else _draw_columns
    draw(figure, table, labels, field)
    figure.suptitle(_title(data), fontsize=11, color=_INK, x=0.01, ha="left")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _title(data: FederatedData) -> str:
    tokens = sum(client.tokens for client in data.clients)
    return f"{len(data.clients):,} clients, {_short(tokens)} training tokens, rows of {data.block_size}"


def _short(number: float) -> str:
    """Write a count in three figures.

    >>> _short(1234567), _short(12345), _short(123)
    ('1.23M', '12.3k', '123')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _shares(table: list[dict[str, Any]], labels: list[str]) -> np.ndarray:
    """Return each client's documents by label as shares of its own, `(clients, labels)`."""
    counts = np.array([[row["histogram"][label] for label in labels] for row in table], dtype=float)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def _draw_lines(figure: Figure, table: list[dict[str, Any]], labels: list[str], field: str | None) -> None:
    """One line a client: its name, its bar, its tokens, and its kinds of documents beside them."""
    height = 1.5 + 0.28 * max(len(table), 3) + (0.7 if labels else 0)
    figure.set_size_inches(6.5 + (1.5 + 0.26 * len(labels) if labels else 0), height)
    ratios = [4, 1 + 0.26 * len(labels)] if labels else [1]
    axes = figure.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
    place = np.arange(len(table))
    _bars(axes[0], table, place, lines=True)
    axes[0].set_yticks(place, [_cut(row["client"]) for row in table], fontsize=8)
    axes[0].set_ylim(max(len(table), 1) - 0.5, -0.5)
    longest = max((row["rows"] + row["validation_rows"] + row["test_rows"] for row in table), default=1)
    for line, row in enumerate(table):
        total = row["rows"] + row["validation_rows"] + row["test_rows"]
        said = f"{_short(row['tokens'])} tokens"
        axes[0].text(total + 0.015 * longest, line, said, va="center", fontsize=7, color=_INK)
    axes[0].set_xlim(0, longest * 1.2 or 1)
    if labels:
        _heat(figure, axes[1], _shares(table, labels), field)
        axes[1].set_yticks([])
        axes[1].set_xticks(np.arange(len(labels)), [_cut(label) for label in labels], rotation=90, fontsize=7)


def _draw_columns(figure: Figure, table: list[dict[str, Any]], labels: list[str], field: str | None) -> None:
    """One column a client, by rank, and its kinds of documents below it."""
    figure.set_size_inches(10, 3.4 + (0.9 + 0.2 * len(labels) if labels else 0))
    ratios = [2.4, 0.5 + 0.2 * len(labels)] if labels else [1]
    axes = figure.subplots(len(ratios), 1, squeeze=False, height_ratios=ratios, sharex=True)[:, 0]
    _bars(axes[0], table, np.arange(len(table)), lines=False)
    axes[0].set_xlim(-0.5, len(table) - 0.5)
    rows = [row["rows"] for row in table]
    median = float(np.median(rows))
    axes[0].axhline(median, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
    said = f"median: {median:g} training rows"
    axes[0].text(len(table) - 1, median, said, ha="right", va="bottom", fontsize=8, color=_INK)
    named = "   ".join(f"{_cut(row['client'])} ({row['rows']:,})" for row in table[:2])
    axes[0].set_title(f"largest: {named}", fontsize=8, color=_INK, loc="left")
    axes[-1].set_xlabel("clients, largest first", fontsize=8)
    if labels:
        _heat(figure, axes[1], _shares(table, labels).T, field)
        axes[1].set_yticks(np.arange(len(labels)), [_cut(label) for label in labels], fontsize=7)


def _bars(axes: Axes, table: list[dict[str, Any]], place: np.ndarray, *, lines: bool) -> None:
    """Draw rows for training, validation and test, one on top of the other."""
    before = np.zeros(len(table))
    for key, label, colour in _PARTS:
        rows = np.array([row[key] for row in table], dtype=float)
        if not rows.any() and key != "rows":
            continue
        if lines:
            axes.barh(place, rows, left=before, height=0.72, color=colour, label=label)
        else:
            # One outline, not a bar each: with 10,000 clients that is a second instead of half a minute.
            edges = np.arange(len(table) + 1) - 0.5
            axes.stairs(before + rows, edges, baseline=before, fill=True, color=colour, label=label)
        before += rows
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.grid(axis="x" if lines else "y", color=_PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    (axes.set_xlabel if lines else axes.set_ylabel)("rows", fontsize=8)
    axes.legend(fontsize=8, frameon=False, loc="lower right" if lines else "upper right")


def _heat(figure: Figure, axes: Axes, shares: np.ndarray, field: str | None) -> None:
    image = axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(f"documents by {field}", fontsize=8, color=_INK, loc="left")
    axes.tick_params(length=0, labelsize=8, colors=_INK)
    axes.spines[:].set_color(_PALE)
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.04)
    bar.set_label("share of a client's documents", fontsize=7)
    bar.ax.tick_params(labelsize=7)


def _cut(name: str, width: int = 34) -> str:
    """Shorten a name in its middle: both ends tell natural clients apart, the last part most.

    >>> _cut("The Tragedy of Antony and Cleopatra/CLEOPATRA", width=20)
    'The T…atra/CLEOPATRA'
    """
    if len(name) <= width:
        return name
    head = width // 4
    return f"{name[:head]}…{name[head + 1 - width :]}"
