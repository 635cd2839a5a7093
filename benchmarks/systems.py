"""Systems of federated tuning and what they spend to the same quality: targets, ratios, and a picture."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.samples import Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Runs = Mapping[str, Mapping[int, Sequence["Point"]]]
"""What each system had spent, by seed."""


class System(NamedTuple):
    """One way to tune the same model on the same devices' text.

    Attributes:
        label: What it is called.
        overrides: What it differs by.
        rate: Its learning rate.
        role: Of its colour, in the reports' palette.
    """

    label: str
    overrides: tuple[str, ...]
    rate: float
    role: str


FED_FT = "fed_ft"
SYSTEMS: Mapping[str, System] = {
    FED_FT: System("Fed-FT", ("experiment=fed_ft",), 1e-3, "full_zero_shot"),
    "fed_peft": System("Fed-PEFT", ("experiment=fed_peft",), 1e-2, "emulator_zero_shot"),
    "fixed": System("FedPEAT, fixed", (), 1e-2, "plug_in"),
    "capability": System("FedPEAT, capability", ("control=capability",), 1e-2, "local_only"),
    "greedy": System("FedPEAT, greedy", ("control=greedy",), 1e-2, "emulator_tuned"),
    "sabppo": System("FedPEAT, SABPPO", ("control=sabppo",), 1e-2, "whole_model"),
}
SHARES = (0.5, 0.8, 0.95)
"""Targets, as shares of the way from the loss before tuning to the best loss of the system that comes least far."""

ANYWHERE = 1e-3
"""Nats a token; a system that gets no further, since it hardly takes part, sets no target."""

PAPER = {"times as fast": 4.6, "times less traffic": 4.9}
"""FedPEAT over Fed-FT as Chua et al. 2023 (arXiv:2310.17491) claim it, second-hand, on another model and fleet."""

PANELS = (
    ("seconds", 60, "simulated time, minutes", "Perplexity over simulated time"),
    ("bytes", 1e6, "traffic so far, MB", "Perplexity over traffic"),
)
COLUMNS = (
    "target",
    "system",
    "perplexity",
    "reached",
    "rounds",
    "simulated s",
    "MB",
    "J",
    "times as fast",
    "of seeds",
    "times less traffic",
    "of seeds ",
)


class Point(NamedTuple):
    """A run after a round: all that was spent so far, and how good the plug-in model is.

    Attributes:
        round: Counted from 1; 0 before training.
        seconds: Simulated time, s.
        bytes: Tensors both ways and bundles, bytes.
        joules: Of all devices, J.
        loss: Nats a token.
    """

    round: int
    seconds: float
    bytes: float
    joules: float
    loss: float


def targets(points: Iterable[Sequence[Point]], shares: Sequence[float] = SHARES) -> list[float]:
    """Return the losses to reach: shares of the way of the system that comes least far, of those that come anywhere.

    >>> quick = [Point(0, 0, 0, 0, 4.0), Point(1, 1, 1, 1, 2.0)]
    >>> slow = [Point(0, 0, 0, 0, 4.0), Point(1, 1, 1, 1, 3.0)]
    >>> idle = [Point(0, 0, 0, 0, 4.0), Point(1, 0, 0, 0, 4.0)]
    >>> targets([quick, slow, idle], [0.5, 1.0])
    [3.5, 3.0]
    """
    runs = list(points)
    first = runs[0][0].loss
    bests = [_least(own) for own in runs if _least(own) < first - ANYWHERE]
    least = max(bests, default=first)
    return [first - share * (first - least) for share in shares]


def reached(points: Sequence[Point], loss: float) -> Point | None:
    """Return the first point at which a loss is reached, if there is one: nothing is interpolated between rounds.

    >>> way = [Point(0, 0, 0, 0, 4.0), Point(1, 9, 1, 1, 3.0)]
    >>> reached(way, 3.5) == way[1], reached(way, 2.5)
    (True, None)
    """
    return next((point for point in points if point.loss <= loss + 1e-12), None)


def section(runs: Runs, rates: Mapping[str, float]) -> Section:
    """Return the table: medians over the seeds that reach a target, ratios to Fed-FT seed by seed."""
    seeds = sorted(next(iter(runs.values())))
    losses = {seed: targets([of[seed] for of in runs.values()]) for seed in seeds}
    rows = []
    for place, share in enumerate(SHARES):
        for name, of in runs.items():
            own = {seed: losses[seed][place] for seed in seeds}
            found = {seed: point for seed in seeds if (point := reached(of[seed], own[seed])) is not None}
            row: dict[str, Any] = {"target": f"{share:.0%}", "system": SYSTEMS[name].label}
            row |= {"perplexity": _perplexity(list(own.values())), "reached": f"{len(found)} of {len(seeds)}"}
            rows.append(row | (_spent(list(found.values())) | _beside(runs, found, own) if found else {}))
    facts = {
        "paper, second-hand, FedPEAT over Fed-FT": PAPER,
        "learning rates": {SYSTEMS[name].label: rate for name, rate in rates.items()},
        "perplexity before, and best of each": {
            "before": _perplexity([next(iter(runs.values()))[seed][0].loss for seed in seeds]),
            **{SYSTEMS[name].label: _perplexity([_least(of[seed]) for seed in seeds]) for name, of in runs.items()},
        },
        "seeds": len(seeds),
    }
    return Section(
        "To the same plug-in perplexity, a share of the way of the slowest, on one fleet", COLUMNS, rows, facts=facts
    )


def _spent(points: Sequence[Point]) -> dict[str, float]:
    units = {"rounds": ("round", 1), "simulated s": ("seconds", 1), "MB": ("bytes", 1e6), "J": ("joules", 1)}
    return {
        column: statistics.median(getattr(point, key) for point in points) / unit
        for column, (key, unit) in units.items()
    }


def _beside(runs: Runs, found: Mapping[int, Point], losses: Mapping[int, float]) -> dict[str, Any]:
    """Return the ratios to Fed-FT: medians, and the least and largest of the seeds that both reach."""
    base = {seed: reached(runs[FED_FT][seed], losses[seed]) for seed in found} if FED_FT in runs else {}
    beside = {}
    for key, column, spread in (
        ("seconds", "times as fast", "of seeds"),
        ("bytes", "times less traffic", "of seeds "),
    ):
        ratios = [getattr(full, key) / getattr(found[seed], key) for seed, full in base.items() if full is not None]
        if ratios:
            beside |= {column: statistics.median(ratios), spread: [min(ratios), max(ratios)]}
    return beside


def _least(points: Sequence[Point]) -> float:
    return min(point.loss for point in points)


def _perplexity(losses: Sequence[float]) -> float:
    return math.exp(statistics.median(losses))


def draw(runs: Runs) -> "Figure":
    """Draw perplexity over simulated time and over traffic: a line a seed, named at its end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    from simulations.report.style import DASHES, colour

    figure = Figure(figsize=(9.8, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (key, unit, label, title) in zip(panels, PANELS, strict=True):
        for name, of in runs.items():
            system = SYSTEMS[name]
            look = {"color": colour(system.role), "linestyle": DASHES[system.role], "linewidth": 1.3}
            for number, points in enumerate(of.values()):
                spent = [getattr(point, key) / unit for point in points[1:]]
                values = [math.exp(point.loss) for point in points[1:]]
                axes.plot(spent, values, marker="o", markersize=2, label=None if number else system.label, **look)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(visible=True, axis="x")
        axes.set_xlabel(label)
        axes.set_title(title, pad=10)
    panels[0].set_ylabel("plug-in perplexity, after each round")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    return figure
