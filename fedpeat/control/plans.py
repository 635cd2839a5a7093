"""From levels to a plan, and what a controller keeps from round to round."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedpeat.control.menu import OUT, PAIR, SHARE, STEPS
from fedpeat.control.problem import Observation, Problem
from fedpeat.core import DevicePlan, RoundPlan, RoundReport


def device_plans(problem: Problem, levels: np.ndarray) -> tuple[DevicePlan, ...]:
    """Return the plans of those that take part, ordered by name, from the levels of all, `(devices, 3)`."""
    menu, made = problem.menu, []
    for client, chosen in zip(problem.clients, levels, strict=True):
        if chosen[PAIR] == OUT:
            continue
        pair = menu.pairs[chosen[PAIR] - 1]
        made.append(
            DevicePlan(
                client=client,
                local_steps=menu.steps[chosen[STEPS]],
                emulator=pair.emulator,
                rank=pair.rank,
                band=menu.shares[chosen[SHARE]],
            )
        )
    return tuple(sorted(made, key=lambda plan: plan.client))


def round_plan(
    problem: Problem,
    seen: Observation,
    levels: np.ndarray,
    refresh: int,
    state: Mapping[str, Any],
    nominal_steps: int,
) -> tuple[RoundPlan, int]:
    """Return the plan of a round, and the federation's global step after it.

    The global step, which schedules and the order of data follow, moves by the run's own local steps, whatever single
    devices do.
    """
    start = int(state["global_step"])
    plan = RoundPlan(
        round=seen.round,
        start_step=start,
        total_steps=problem.rounds * nominal_steps,
        devices=device_plans(problem, levels),
        refresh=bool(refresh) if problem.menu.refresh else None,
    )
    return plan, start + nominal_steps


def loss_in(report: RoundReport | None) -> float | None:
    """Return the plug-in model's loss in a report, nats a token; None where it was not evaluated."""
    evaluation = report.evaluations.get("plug_in") if report else None
    return None if evaluation is None else evaluation.loss


def masked_pairs(problem: Problem, seen: Observation) -> np.ndarray:
    """Return which pairs each device can be given in a round, `(devices, pairs)`."""
    return problem.fits & seen.available[:, None]


def levels_of(problem: Problem, plan: RoundPlan) -> tuple[np.ndarray, int]:
    """Return the levels that a plan was made of, `(devices, 3)`, and whether it re-aligns the emulator."""
    menu, places = problem.menu, {client: place for place, client in enumerate(problem.clients)}
    levels = np.zeros((len(problem.clients), 3), dtype=int)
    for device in plan.devices:
        pair = 1 + [tuple(pair) for pair in menu.pairs].index((device.emulator, device.rank))
        levels[places[device.client]] = pair, menu.steps.index(device.local_steps), menu.shares.index(device.band)
    return levels, int(bool(plan.refresh))
