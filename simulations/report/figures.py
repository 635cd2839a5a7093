"""The figures of a run: functions from reports to a `Figure`, or None where there is nothing to show."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from statistics import fmean, quantiles
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedpeat.core import RoundReport
from simulations.report.chosen_figures import chosen, objective_terms
from simulations.report.simulated import simulated_time
from simulations.report.style import DASHES, colour, finite, house_style, markers, name_ends, new_axes, scale_for
from simulations.report.wording import number, printable, size

NAMES = {
    "plug_in": "plug-in",
    "personal": "personal",
    "emulator_tuned": "emulated, tuned",
    "full_zero_shot": "full, zero-shot",
    "emulator_zero_shot": "emulator, zero-shot",
    "local_only": "clients alone",
    "whole_model": "whole model tuned",
    "extraction": "curious client",
}
NAMED_CLIENTS = 8


def draw(reports: Sequence[RoundReport], summary: Mapping[str, Any]) -> dict[str, Figure]:
    """Return all figures that have something to show, by file name without its ending."""
    with house_style():
        figures = {
            "learning_curves": learning_curves(reports, summary),
            "right_answers": right_answers(reports, summary),
            "chosen": chosen(reports, summary),
            "simulated_time": simulated_time(reports),
            "objective_terms": objective_terms(summary),
            "privacy_margin": privacy_margin(reports),
            "client_loss": client_loss(reports),
            "bytes": bytes_moved(reports, summary),
            "seconds": seconds_spent(reports),
        }
    return {name: figure for name, figure in figures.items() if figure is not None}


def learning_curves(reports: Sequence[RoundReport], summary: Mapping[str, Any]) -> Figure | None:
    """Draw perplexity over rounds: plug-in and emulated models as curves, zero-shots and baselines as levels."""
    return _curves(reports, summary, "perplexity", title="Perplexity on held-out text", unit="lower is better")


def right_answers(reports: Sequence[RoundReport], summary: Mapping[str, Any]) -> Figure | None:
    """Draw the share of right answers over rounds, likewise, where the data has choices."""
    title = "Right answers to held-out documents"
    return _curves(reports, summary, "choice_accuracy", title=title, unit="share, 0 to 1; higher is better")


def _curves(
    reports: Sequence[RoundReport], summary: Mapping[str, Any], metric: str, *, title: str, unit: str
) -> Figure | None:
    curves = {name: _points(reports, name, metric) for name in _tuned_models(reports)}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    levels = {name: summary["metrics"][name].get(metric) for name in ("full_zero_shot", "emulator_zero_shot")}
    levels["local_only"] = summary["baselines"].get("local_only", {}).get("mean", {}).get(metric)
    for name in ("whole_model", "extraction"):
        levels[name] = summary["baselines"].get(name, {}).get(metric)
    levels = {name: level for name, level in levels.items() if level is not None and finite([(0, level)])}
    figure, axes = new_axes(title, unit=unit, wide=True)
    ends = [(level, f"{NAMES[name]} {number(level)}", name) for name, level in levels.items()]
    for name, level in levels.items():
        axes.axhline(level, color=colour(name), linestyle=DASHES[name], linewidth=1.2)
    for name, points in curves.items():
        model, _, key = name.partition("/")
        rounds, values = zip(*points, strict=True)
        width = 1.2 if key else 2.2
        axes.plot(rounds, values, color=colour(model), linestyle=DASHES[model], linewidth=width, **markers(len(points)))
        label = f"emulated ({printable(key, 8)})" if key else NAMES[model]
        ends.append((values[-1], f"{label} {number(values[-1])}", model))
    if metric == "perplexity":
        scale_for(axes, [value for points in curves.values() for _, value in points] + list(levels.values()))
    axes.margins(x=0.02, y=0.08)
    name_ends(axes, ends)
    return figure


def _tuned_models(reports: Sequence[RoundReport]) -> list[str]:
    found = {name for report in reports for name in report.evaluations}
    return sorted(name for name in found if name.partition("/")[0] in ("plug_in", "emulator_tuned", "personal"))


def _points(reports: Sequence[RoundReport], model: str, metric: str) -> list[tuple[int, float]]:
    found = [(each.round, getattr(each.evaluations[model], metric)) for each in reports if model in each.evaluations]
    return finite([(place, value) for place, value in found if value is not None])


def privacy_margin(reports: Sequence[RoundReport]) -> Figure | None:
    """Draw how much better the plug-in is than what a device holds, in nats a token, over rounds."""
    points = finite(
        [
            (report.round, report.evaluations["emulator_tuned"].loss - report.evaluations["plug_in"].loss)
            for report in reports
            if "emulator_tuned" in report.evaluations and "plug_in" in report.evaluations
        ]
    )
    if not points:
        return None
    figure, axes = new_axes("Privacy margin", unit="emulated-and-tuned minus plug-in loss, nats per token")
    rounds, values = zip(*points, strict=True)
    axes.axhline(0, color=colour("muted"), linewidth=1)
    axes.fill_between(rounds, values, 0, color=colour("plug_in"), alpha=0.12, linewidth=0)
    axes.plot(rounds, values, color=colour("plug_in"), **markers(len(points)))
    axes.margins(x=0.02, y=0.12)
    name_ends(axes, [(0, "emulated = plug-in", "muted"), (values[-1], f"margin {number(values[-1])}", "plug_in")])
    return figure


def client_loss(reports: Sequence[RoundReport]) -> Figure | None:
    """Draw each client's training loss over its visits and the mean of each round.

    Few clients are lines with names; many are dots, with a band around the middle 80 % of a round.
    """
    visits: dict[str, list[tuple[int, float]]] = {}
    for report in reports:
        for name, metrics in report.clients.items():
            visits.setdefault(name, []).extend(finite([(report.round, metrics.get("train_loss", math.nan))]))
    visits = {name: points for name, points in visits.items() if points}
    if not visits:
        return None
    by_round: dict[int, list[float]] = {}
    for place, value in (point for points in visits.values() for point in points):
        by_round.setdefault(place, []).append(value)
    rounds = sorted(by_round)
    means = [fmean(by_round[place]) for place in rounds]
    figure, axes = new_axes(
        "Training loss of the clients", unit="nats per token, each on its own data; lower is better"
    )
    ends = [(means[-1], f"mean {number(means[-1])}", "plug_in")]
    if len(visits) <= NAMED_CLIENTS:
        for name, points in visits.items():
            axes.plot(*zip(*points, strict=True), color=colour("faint"), linewidth=1, marker="o", markersize=2)
            ends.append((points[-1][1], printable(name, 18), "muted"))
    else:
        _cloud(axes, by_round)
    axes.plot(rounds, means, color=colour("plug_in"), linewidth=2.2, **markers(len(rounds)))
    axes.margins(x=0.02, y=0.08)
    name_ends(axes, ends)
    return figure


def _cloud(axes: Axes, by_round: Mapping[int, Sequence[float]]) -> None:
    """Draw each visit as a dot, and a band from the first to the ninth tenth of each round's losses."""
    dots = [(place, value) for place, values in by_round.items() for value in values]
    axes.plot(*zip(*dots[:2000], strict=True), "o", color=colour("faint"), markersize=2, markeredgewidth=0)
    rounds = sorted(by_round)
    # One value has no quantiles: doubled, it is its own band.
    bands = [quantiles([*by_round[place], fmean(by_round[place])], n=10, method="inclusive") for place in rounds]
    low, high = [band[0] for band in bands], [band[-1] for band in bands]
    axes.fill_between(rounds, low, high, color=colour("plug_in"), alpha=0.15, linewidth=0)


def bytes_moved(reports: Sequence[RoundReport], summary: Mapping[str, Any]) -> Figure | None:
    """Draw the payload sent and received so far, over rounds."""
    total = max(summary["bytes"]["down"], summary["bytes"]["up"])
    if not total:
        return None
    power = min(int(math.log2(total) // 10), 4)
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    rounds = [report.round for report in reports]
    figure, axes = new_axes("Tensors moved so far, all clients together", unit=unit)
    ends = []
    for role, name, width, steps in (
        ("plug_in", "down", 3.2, [report.bytes_down for report in reports]),
        ("emulator_tuned", "up", 1.6, [report.bytes_up for report in reports]),
    ):
        so_far = [count / 1024**power for count in accumulate(steps)]
        axes.plot(rounds, so_far, color=colour(role), linestyle=DASHES[role], linewidth=width, **markers(len(rounds)))
        ends.append((so_far[-1], f"{name} {size(sum(steps))}", role))
    axes.margins(x=0.02)
    axes.set_ylim(bottom=0)
    name_ends(axes, ends)
    if summary["bytes"]["bundle"]:
        note = f"and once a device:\nthe bundle, {size(summary['bytes']['bundle'])}"
        axes.text(1.04, 0.02, note, transform=axes.transAxes, color=colour("muted"), va="bottom")
    return figure


def seconds_spent(reports: Sequence[RoundReport]) -> Figure | None:
    """Draw where the time of each round went."""
    parts = {"train": "plug_in", "evaluate": "emulator_tuned", "wire": "local_only", "overhead": "faint"}
    spent = {part: [_positive(report.seconds.get(part, 0.0)) for report in reports] for part in parts}
    total = sum(sum(values) for values in spent.values())
    if total <= 0:
        return None
    figure, axes = new_axes("Time of each round", unit="seconds")
    rounds = [report.round for report in reports]
    base = [0.0] * len(rounds)
    for part, role in parts.items():
        share = sum(spent[part]) / total
        label = f"{part} {100 * share:.0f} %" if share >= 0.01 or share == 0 else f"{part} < 1 %"
        axes.bar(rounds, spent[part], bottom=base, width=0.7, color=colour(role), label=label)
        base = [low + more for low, more in zip(base, spent[part], strict=True)]
    axes.set_xlim(rounds[0] - 0.6, max(rounds[-1], rounds[0] + 3) + 0.6)  # one round is no poster
    handles, labels = axes.get_legend_handles_labels()
    place = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
    axes.legend(handles[::-1], labels[::-1], handlelength=1, handleheight=1, **place)
    return figure


def _positive(value: float) -> float:
    return value if math.isfinite(value) and value > 0 else 0.0
