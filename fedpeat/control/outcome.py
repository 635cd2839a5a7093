"""What a round would bring: its price, and the loss after it."""

from typing import NamedTuple

import numpy as np

from fedpeat.control.menu import OUT
from fedpeat.control.objective import Objective, Price, cost, price
from fedpeat.control.problem import Observation, Problem
from fedpeat.control.surrogate import Curves, next_loss


class Situation(NamedTuple):
    """Where a run stands before a round.

    Attributes:
        loss: Of the plug-in model, nats a token, `(...)`.
        age: Rounds since the emulator was re-aligned, `(...)`.
    """

    loss: np.ndarray | float
    age: np.ndarray | int


def foretold(
    problem: Problem,
    curves: Curves,
    seen: Observation,
    choice: tuple[np.ndarray, np.ndarray],
    now: Situation,
    leaves: np.ndarray | None = None,
) -> tuple[Price, np.ndarray]:
    """Return what a round takes, and the loss after it, `(...)`; only those whose work counts move it.

    Args:
        problem: The run.
        curves: The response.
        seen: Of the round.
        choice: Levels of each device's branches, `(..., devices, 3)`, and whether the emulator is re-aligned, `(...)`.
        now: Before the round.
        leaves: After which share of its own time each device is gone, as for `price`.
    """
    levels, refresh = choice
    took = price(problem, seen, levels, refresh, leaves)
    counted = np.where(took.counts[..., None], levels, OUT)
    return took, next_loss(problem, curves, now.loss, np.where(np.asarray(refresh) > 0, 0, now.age), counted)


def worth(
    problem: Problem,
    objective: Objective,
    curves: Curves,
    seen: Observation,
    choice: tuple[np.ndarray, np.ndarray],
    now: Situation,
) -> np.ndarray:
    """Return what a round costs if nobody leaves it, `(...)`; arguments as of `foretold`."""
    took, after = foretold(problem, curves, seen, choice, now)
    return cost(objective, took, now.loss, after)
