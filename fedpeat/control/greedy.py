"""`greedy`: what is best for the coming round alone, by the response curves."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpeat.control.objective import Objective
from fedpeat.control.outcome import Situation, foretold, worth
from fedpeat.control.plans import loss_in, masked_pairs, round_plan
from fedpeat.control.problem import Observation, Problem
from fedpeat.control.rules import capable
from fedpeat.control.surrogate import Curves
from fedpeat.core import RoundPlan, RoundReport

EXACT_BELOW = 100_000
"""Joint choices of a round below which all are compared."""

CHUNK = 8192
SWEEPS = 20


@dataclass(frozen=True)
class GreedyControl:
    """Choose what costs least in the coming round, and look no further.

    Below `EXACT_BELOW` joint choices it compares them all; else it changes one device after the other to what is best
    for the round with the others as they are, until nothing changes, from nobody and from all at their largest.

    Attributes:
        problem: What there is to decide.
        objective: What counts.
        curves: How good the model would be.
        nominal_steps: The run's own local steps.
    """

    problem: Problem
    objective: Objective
    curves: Curves
    nominal_steps: int

    def start(self) -> dict[str, Any]:
        """Return the controller's state before round 1."""
        return {"global_step": 0, "loss": self.curves.start, "age": 0}

    def choose(
        self, report: RoundReport | None, state: Mapping[str, Any], seen: Observation
    ) -> tuple[RoundPlan, dict[str, Any]]:
        """Return the plan of the round that is `seen`, and the next state.

        Args:
            report: Of the round before; its plug-in loss is taken where it has one, else what the curves foretold.
            state: Of this controller.
            seen: Of the coming round.
        """
        measured, age = loss_in(report), int(state["age"])
        loss = float(state["loss"]) if measured is None or not math.isfinite(measured) else measured
        levels, refresh = best(self.problem, self.objective, self.curves, seen, (loss, age), self.nominal_steps)
        plan, step = round_plan(self.problem, seen, levels, refresh, state, self.nominal_steps)
        _, after = foretold(self.problem, self.curves, seen, (levels, np.array(refresh)), Situation(loss, age))
        return plan, {"global_step": step, "loss": float(after), "age": 1 if refresh else age + 1}


def best(
    problem: Problem,
    objective: Objective,
    curves: Curves,
    seen: Observation,
    situation: tuple[float, int],
    nominal_steps: int,
) -> tuple[np.ndarray, int]:
    """Return the levels, `(devices, 3)`, and the refresh that cost least in a round; of equals, the first.

    Args:
        problem: The run.
        objective: What counts.
        curves: The response.
        seen: Of the round.
        situation: Loss before it, nats a token, and rounds since the emulator was re-aligned.
        nominal_steps: The run's own local steps.
    """

    def costs(levels: np.ndarray, refresh: np.ndarray) -> np.ndarray:
        return worth(problem, objective, curves, seen, (levels, refresh), Situation(*situation))

    options = [problem.menu.options((1 + np.flatnonzero(can)).tolist()) for can in masked_pairs(problem, seen)]
    joint = math.prod(map(len, options)) * (1 + problem.menu.refresh)
    if joint < EXACT_BELOW:
        return _least((costs(*choices), *choices) for choices in all_choices(options, problem.menu.refresh))
    nobody = np.zeros((len(options), 3), dtype=int)
    largest = capable(problem, seen, nominal_steps)
    starts = [(first, flag) for first in (nobody, largest) for flag in range(1 + problem.menu.refresh)]
    ends = [(_ascend(costs, options, first, flag), flag) for first, flag in starts]
    return _least((costs(levels[None], np.array([flag])), levels[None], np.array([flag])) for levels, flag in ends)


def all_choices(options: list[np.ndarray], refresh: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield all joint choices in chunks: levels, `(choices, devices, 3)`, and refreshes, `(choices,)`."""
    counts = (1 + int(refresh), *map(len, options))
    for first in range(0, math.prod(counts), CHUNK):
        flags, *picked = np.unravel_index(np.arange(first, min(first + CHUNK, math.prod(counts))), counts)
        levels = [own[which] for own, which in zip(options, picked, strict=True)]
        yield np.stack(levels, axis=1) if levels else np.zeros((len(flags), 0, 3), dtype=int), flags


def _least(priced: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, int]:
    places = ((int(np.argmin(costs)), costs, levels, flags) for costs, levels, flags in priced)
    found = ((float(costs[place]), levels[place], int(flags[place])) for place, costs, levels, flags in places)
    _, levels, refresh = min(found, key=lambda one: one[0])
    return levels, refresh


def _ascend(
    worth: Callable[[np.ndarray, np.ndarray], np.ndarray], options: list[np.ndarray], first: np.ndarray, refresh: int
) -> np.ndarray:
    levels, now = first.copy(), float(worth(first[None], np.array([refresh]))[0])
    for _ in range(SWEEPS):
        before = now
        for place, own in enumerate(options):
            tried = np.repeat(levels[None], len(own), axis=0)
            tried[:, place] = own
            costs = worth(tried, np.full(len(own), refresh))
            least = int(np.argmin(costs))
            if costs[least] < now:
                levels, now = tried[least], float(costs[least])
        if now == before:
            break
    return levels
