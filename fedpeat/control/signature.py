"""What a policy is made for: kept beside its weights, and held against a run before it decides there."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from fedpeat.control.problem import Problem

RATIO = 1.01
"""Numbers that are measured may differ by 1 %."""

COLUMNS = ("FLOP/s", "memory, bytes", "W receiving", "W computing", "W sending", "W radiated")
LINKS = {1: ("mean gain",), 2: ("bit/s down", "bit/s up")}


def signature_of(problem: Problem) -> dict[str, Any]:
    """Return what a policy depends on, JSON-like: devices in an order of their own, the ladder, and what it needs.

    Names, shares of the data, the number of rounds and what the refresh takes are no part of it.
    """
    menu = problem.menu
    return {
        "devices": devices_of(problem).tolist(),
        "links": "radio" if problem.radio else "fixed",
        "radio": asdict(problem.radio) if problem.radio else None,
        "deadline_seconds": problem.deadline_seconds,
        "pairs": [list(pair) for pair in menu.pairs],
        "steps": list(menu.steps),
        "shares": list(menu.shares),
        "refresh": menu.refresh,
        "step_flops": problem.step_flops.tolist(),
        "needs_bytes": problem.needs_bytes.tolist(),
        "kept": problem.kept.tolist(),
        "bundle_bytes": problem.bundle_bytes.tolist(),
    }


def devices_of(problem: Problem) -> np.ndarray:
    """Return what each device has, and its links where they are known, sorted: the order of devices does not matter."""
    own = np.column_stack([problem.flops, problem.memory_bytes, problem.watt])
    own = own if problem.links is None else np.column_stack([own, problem.links])
    return own[np.lexsort(own.T[::-1])]


def difference(trained: Mapping[str, Any], problem: Problem) -> str | None:
    """Return the first thing in which a run differs from what a policy was trained for, in words; None for nothing."""
    here = signature_of(problem)
    was, now = trained.get("devices", []), here["devices"]
    if len(was) != len(now):
        return f"it was trained for {len(was)} devices; here are {len(now)}"
    for key, what in (("links", "links"), ("radio", "a cell of"), ("deadline_seconds", "deadline_seconds")):
        if trained.get(key) != here[key]:
            return f"it was trained with {what} {trained.get(key)}; here: {here[key]}"
    for key in ("pairs", "steps", "shares", "refresh"):
        if trained.get(key) != here[key]:
            return f"it was trained with control.menu's {key} {trained.get(key)}; here: {here[key]}"
    for key in ("step_flops", "needs_bytes", "kept", "bundle_bytes"):
        if not _close(trained.get(key, []), here[key]):
            return f"{key} of its ladder were {trained.get(key)}; here: {here[key]}"
    return _other_device(was, now)


def _other_device(was: Sequence[Sequence[float]], now: Sequence[Sequence[float]]) -> str | None:
    names = (*COLUMNS, *LINKS.get(len(now[0]) - len(COLUMNS), ())) if now else ()
    for place, (old, new) in enumerate(zip(was, now, strict=True), start=1):
        if len(old) != len(new):
            return "the links of its devices were known; here they are not, or the other way round"
        for name, one, other in zip(names, old, new, strict=True):
            if not _close([one], [other]):
                return f"{name} of device {place} (in ascending order) was {one:.4g}; here it is {other:.4g}"
    return None


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    if len(one) != len(other):
        return False
    first, second = np.array(one, dtype=float), np.array(other, dtype=float)
    return bool(np.all(np.maximum(first, second) <= RATIO * np.minimum(first, second)))
