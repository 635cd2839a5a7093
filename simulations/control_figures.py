"""The pictures of `fedpeat control`: the learning curve, controllers side by side, and what the policy chose."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedpeat.control.hindsight import classes_of
from fedpeat.control.learner import Seen
from fedpeat.control.menu import OUT, PAIR, SHARE, STEPS
from fedpeat.control.problem import Problem
from simulations.contest import Contest, Entry, spread
from simulations.report.style import WIDE_INCHES, colour, house_style, new_axes
from simulations.report.wording import number, printable

PANELS = (
    ("objective", "objective"),
    ("seconds", "simulated time, s"),
    ("bytes", "traffic, MB"),
    ("joules", "energy, J"),
    ("loss", "loss at the end"),
)
EMULATORS = ("plug_in", "emulator_tuned", "local_only", "whole_model", "emulator_zero_shot", "personal")
DEVICES = 40
"""Most devices of the picture of choices: the first."""


def learning(curve: Sequence[Seen]) -> Figure:
    """Draw the cost of the federations for choosing over the rounds played, and the best so far."""
    with house_style():
        figure, axes = new_axes("Learning", unit="cost of a run, in runs that are not trained in; lower is better")
        steps, costs = [one.steps for one in curve], [one.cost for one in curve]
        axes.plot(steps, costs, color=colour("muted"), linewidth=1)
        axes.plot(steps, np.minimum.accumulate(costs), color=colour("plug_in"))
        axes.set_xlabel("rounds played")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        # The first policies may be so bad that nothing else could be told apart.
        low, high = min(costs), float(np.quantile(costs, 0.95))
        room = 0.08 * max(high - low, 1e-9)
        axes.set_ylim(low - room, high + room)
        for place, (text, role) in enumerate((("as it was then", "muted"), ("best so far, kept", "plug_in"))):
            axes.text(1.04, 0.9 - 0.09 * place, text, transform=axes.transAxes, color=colour(role))
    return figure


def controllers(found: Contest) -> Figure:
    """Draw what runs come to under each controller: means with 95 % intervals, a panel a measure."""
    with house_style():
        rows = len(found.entries)
        width, height = WIDE_INCHES[0], 1.35 + 0.34 * rows
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        left, gap, right = 0.95, 0.22, 0.15
        each = (width - left - right - gap * (len(PANELS) - 1)) / len(PANELS)
        figure.text(0.12 / width, 1 - 0.12 / height, "Controllers", va="top", fontsize=11, weight="bold")
        told = f"means over {len(found.seeds)} runs with 95 % intervals; lower is better"
        figure.text(0.12 / width, 1 - 0.36 / height, told, va="top", color=colour("muted"))
        for place, (measure, title) in enumerate(PANELS):
            box = ((left + place * (each + gap)) / width, 0.45 / height, each / width, (height - 1.3) / height)
            _panel(figure.add_axes(box), found.entries, measure, title, named=place == 0)
    return figure


def _panel(axes: Axes, entries: Sequence[Entry], measure: str, title: str, *, named: bool) -> None:
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.annotate(title, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points")
    for place, entry in enumerate(entries):
        role = "plug_in" if place == 0 else "full_zero_shot"
        found = spread(entry.of(measure) / (1e6 if measure == "bytes" else 1.0))
        axes.errorbar(
            found.mean,
            place,
            xerr=[[found.mean - found.low], [found.high - found.mean]],
            fmt="o" if place == 0 else "s",
            markersize=5,
            color=colour(role),
            capsize=2.5,
            linewidth=1.4,
        )
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.set_yticks(range(len(entries)), [entry.name for entry in entries] if named else [""] * len(entries))
    axes.tick_params(axis="y", length=0, labelcolor=colour("ink"))
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.margins(x=0.12)


def _tick(value: float) -> str:
    return number(value) if abs(value) < 1000 else f"{value:,.0f}"


def choices(problem: Problem, levels: np.ndarray, refreshes: np.ndarray, *, title: str) -> Figure:
    """Draw what each device was given in each round of a run.

    Args:
        problem: What was decided.
        levels: Of all branches, `(rounds, devices, 3)`.
        refreshes: Whether the emulator was re-aligned before each round, `(rounds,)`.
        title: Of the figure.
    """
    kinds, speeds = classes_of(problem).tolist(), problem.flops.tolist()
    order = sorted(range(len(speeds)), key=lambda at: (speeds[at], kinds[at], problem.clients[at]))[:DEVICES]
    rounds = len(levels)
    with house_style():
        left, below, above = 1.75, 0.75, 0.95
        width = max(WIDE_INCHES[0], left + 0.2 + 0.55 * rounds)
        height = above + 0.3 * len(order) + below
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        axes = figure.add_axes(
            (left / width, below / height, (width - left - 0.15) / width, (height - above - below) / height)
        )
        figure.text(0.12 / width, 1 - 0.12 / height, title, va="top", fontsize=11, weight="bold")
        told = _legend_words(problem)
        figure.text(0.12 / width, 1 - 0.36 / height, told, va="top", color=colour("muted"))
        axes.grid(visible=False)
        axes.set_xlim(0.5, rounds + 0.5)
        axes.set_ylim(len(order) - 0.5, -0.5)
        for row, device in enumerate(order):
            for number_, chosen in enumerate(levels[:, device], start=1):
                _cell(axes, problem, (number_, row), chosen)
        for number_ in np.flatnonzero(refreshes) + 1:
            axes.plot([number_ - 0.5] * 2, [-0.5, len(order) - 0.5], color=colour("extraction"), linewidth=2.5)
        names = [f"{printable(problem.clients[at], 13)}  {_short(speeds[at])}" for at in order]
        axes.set_yticks(range(len(order)), names)
        axes.set_xticks(range(1, rounds + 1))
        axes.set_xlabel("round")
        axes.tick_params(length=0, labelsize=8.5)
        axes.spines["bottom"].set_visible(False)
        axes.legend(
            handles=_handles(problem, refreshes),
            loc="upper right",
            bbox_to_anchor=(1.0, -0.36 / (height - above - below)),
            ncols=8,
            fontsize=8.5,
            handlelength=1.2,
            borderaxespad=0,
        )
    return figure


def _legend_words(problem: Problem) -> str:
    parts = ["rank"] if any(pair.rank for pair in problem.menu.pairs) else []
    parts += ["steps"] if len(problem.menu.steps) > 1 else []
    words = ", ".join(parts) or "taking part"
    shares = "; small: weight in sharing the bands out" if len(problem.menu.shares) > 1 else ""
    return f"in a cell: {words}{shares}; empty: it stays out; beside a name: its FLOP/s"


def _short(flops: float) -> str:
    exponent = int(np.floor(np.log10(flops)))
    return f"{flops / 10**exponent:.2g}e{exponent}"


def _handles(problem: Problem, refreshes: np.ndarray) -> list[Any]:
    found: list[Any] = [
        Patch(facecolor=(colour(EMULATORS[place % len(EMULATORS)]), 0.35), label=_emulator(problem, place))
        for place in range(len(problem.menu.emulators))
    ]
    if refreshes.any():
        found.append(Patch(facecolor=colour("extraction"), label="re-aligned before the round"))
    return found


def _emulator(problem: Problem, place: int) -> str:
    return f"{problem.menu.emulators[place]}: {problem.kept[place]:.0%} of the middle"


def _cell(axes: Axes, problem: Problem, at: tuple[int, int], chosen: np.ndarray) -> None:
    (column, row), menu = at, problem.menu
    corner: tuple[float, float] = (column - 0.5, row - 0.5)
    edge = {"edgecolor": colour("surface"), "linewidth": 1.5}
    if chosen[PAIR] == OUT:
        axes.add_patch(Rectangle(corner, 1, 1, facecolor=(colour("grid"), 0.35), **edge))
        return
    place = chosen[PAIR] - 1
    pair = menu.pairs[place]
    role = EMULATORS[int(problem.emulator_of[place]) % len(EMULATORS)]
    axes.add_patch(Rectangle(corner, 1, 1, facecolor=(colour(role), 0.35), **edge))
    words = [str(pair.rank)] if pair.rank else []
    words += [str(menu.steps[chosen[STEPS]])] if len(menu.steps) > 1 else []
    lift = 0.0 if len(menu.shares) == 1 else 0.12
    axes.text(column, row - lift, ", ".join(words), ha="center", va="center", fontsize=8)
    if lift:
        weight = f"{menu.shares[chosen[SHARE]]:g}"
        axes.text(column, row + 0.3, weight, ha="center", va="center", fontsize=5.5, color=colour("muted"))
