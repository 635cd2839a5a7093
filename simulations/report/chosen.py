"""What a controller chose: for which device and when, and what each round cost by its objective."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedpeat.control import Objective
from fedpeat.control.objective import Price, bytes_term, energy_term, quality_term, time_term
from fedpeat.core import RoundReport
from fedpeat.devices import CLOCK
from fedpeat.devices.ledger import UNAVAILABLE


class Choice(NamedTuple):
    """What a device was given in a round.

    Attributes:
        emulator: Its key.
        rank: PEFT rank; None for the run's own.
        steps: Local steps.
    """

    emulator: str
    rank: int | None
    steps: int


def control_facts(reports: Sequence[RoundReport], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the summary says of the controller, under `control`; nothing of a fixed plan.

    Returns:
        `kind`; `choices`: how many visits had which emulator, rank and steps; `left_out`: visits of devices that could
        be asked and were not; `refreshed`: rounds before which the emulator was re-aligned; and, with an objective,
        `objective`: the terms of each round, of which `quality` is None where nothing was evaluated.
    """
    control = settings.get("control") or {}
    if control.get("kind", "fixed") == "fixed":
        return {}
    rounds = [report for report in reports if report.round]
    chosen = [choices_in(report) for report in rounds]
    counts = Counter(choice for own in chosen for choice in own.values())
    everybody = {client for report in rounds for client in report.devices}
    away = sum(facts["status"] == UNAVAILABLE for report in rounds for facts in report.devices.values())
    facts: dict[str, Any] = {
        "kind": control["kind"],
        "choices": [{**choice._asdict(), "visits": many} for choice, many in counts.most_common()],
        "left_out": len(everybody) * len(rounds) - away - sum(counts.values()),
        "refreshed": refreshed(rounds),
    }
    if control.get("objective"):
        facts["objective"] = terms(reports, Objective(**control["objective"]))
    return {"control": facts}


def choices_in(report: RoundReport) -> dict[str, Choice]:
    """Return what each device was given in a round, by name."""
    return {
        client: Choice(facts["emulator"], facts["rank"], facts["local_steps"])
        for client, facts in report.devices.items()
        if facts["status"] != UNAVAILABLE
    }


def refreshed(rounds: Sequence[RoundReport]) -> list[int]:
    """Return the rounds in which devices first got a version of the emulator's changes."""
    known: set[str] = set()
    found = []
    for report in rounds:
        new = {facts["changes"] for facts in report.devices.values() if facts.get("changes")} - known
        known |= new
        found += [report.round] if new else []
    return found


def terms(reports: Sequence[RoundReport], objective: Objective) -> list[dict[str, float | int | None]]:
    """Return the objective's terms of each round, as they came out: the ledger's time, bytes and energy."""
    rows: list[dict[str, float | int | None]] = []
    clock, before = 0.0, _loss(reports[0]) if reports else None
    for report in reports:
        if not report.round:
            continue
        after, now = _loss(report), report.metrics.get(CLOCK, clock)
        moved = report.bytes_down + report.bytes_up
        moved += sum(facts.get("bundle_bytes") or 0 for facts in report.devices.values())
        joules = sum(facts.get("joules") or 0.0 for facts in report.devices.values())
        none = np.zeros(0)
        price = Price(np.array(now - clock), np.array(float(moved)), np.array(joules), none, none, none)
        row: dict[str, float | int | None] = {"round": report.round, "quality": None}
        if after is not None and before is not None:
            row["quality"] = float(quality_term(objective, before, after))
        for name, term in (("time", time_term), ("bytes", bytes_term), ("energy", energy_term)):
            row[name] = float(term(objective, price))
        rows.append(row)
        clock, before = now, before if after is None else after
    return rows


def _loss(report: RoundReport) -> float | None:
    found = report.evaluations.get("plug_in")
    return None if found is None or not math.isfinite(found.loss) else found.loss
