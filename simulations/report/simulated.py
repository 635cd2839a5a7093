"""Simulated time: what the devices of a run would have taken, and when which quality was reached."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from fedpeat.core import RoundReport
from fedpeat.devices import CLOCK, milestones, totals
from simulations.report.wording import count, duration, number, percent, size


def simulated(reports: Sequence[RoundReport]) -> dict[str, Any]:
    """Return what the summary says of devices, under `devices`; nothing for a run without a model of them."""
    if not any(CLOCK in report.metrics for report in reports):
        return {}
    return {"devices": {**totals(reports), "milestones": [one._asdict() for one in milestones(reports)]}}


def energy(joules: float | None) -> str:
    """Return an energy.

    >>> [energy(joules) for joules in (12.0, 4321.0, 7.2e6, None)]
    ['12.0 J', '4.32 kJ', '2.00 kWh', '—']
    """
    if joules is None or joules < 1000:
        return number(joules) + (" J" if joules is not None else "")
    return f"{number(joules / 1000)} kJ" if joules < 3.6e5 else f"{number(joules / 3.6e6)} kWh"


def simulated_table(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the page says of simulated time: facts and a row a milestone; None without a model of devices."""
    found = summary.get("devices")
    if not found:
        return None
    statuses = ", ".join(f"{name} {count(many)}" for name, many in found["status"].items())
    facts = [
        ("simulated time", duration(found["seconds"]), f"measured: {duration(summary['seconds']['total'])}"),
        ("energy", energy(found["joules"]), "of all devices and rounds"),
        ("bundles fetched", size(found["bundle_bytes"]), "modelled"),
    ]
    rows = [
        (
            percent(one["share"]),
            number(one["perplexity"]),
            str(one["round"]),
            duration(one["simulated_seconds"]),
            duration(one["seconds"]),
        )
        for one in found["milestones"]
    ]
    return {"facts": facts, "rows": rows, "statuses": statuses}


def simulated_time(reports: Sequence[RoundReport]) -> Figure | None:
    """Draw the plug-in model's perplexity over the virtual clock."""
    from simulations.report.style import colour, markers, name_ends, new_axes, scale_for

    points = [
        (report.metrics.get(CLOCK, 0.0), report.evaluations["plug_in"].perplexity)
        for report in reports
        if "plug_in" in report.evaluations
    ]
    points = [point for point in points if all(map(math.isfinite, point))]
    if not points or not any(CLOCK in report.metrics for report in reports):
        return None
    longest = max(seconds for seconds, _ in points)
    unit, length = next(
        (pair for pair in (("days", 86400), ("hours", 3600), ("minutes", 60)) if longest > 3 * pair[1]), ("seconds", 1)
    )
    figure, axes = new_axes("Plug-in perplexity over simulated time", unit="lower is better")
    times, values = [seconds / length for seconds, _ in points], [value for _, value in points]
    axes.plot(times, values, color=colour("plug_in"), **markers(len(points)))
    axes.set_xlabel(f"simulated time, {unit}")
    scale_for(axes, values)
    axes.margins(x=0.02, y=0.08)
    name_ends(axes, [(values[-1], f"plug-in {number(values[-1])}", "plug_in")])
    return figure
