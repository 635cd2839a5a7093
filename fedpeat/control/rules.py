"""Controllers that look at no objective: `random`, and `capability`, a rule by the devices' memory."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpeat.control.menu import OUT, PAIR, SHARE, STEPS
from fedpeat.control.plans import masked_pairs, round_plan
from fedpeat.control.problem import Observation, Problem
from fedpeat.core import RoundPlan, RoundReport, seed_for


@dataclass(frozen=True)
class RandomControl:
    """Sample clients; give each anything that its device can do.

    Attributes:
        problem: What there is to decide.
        per_round: How many take part in a round, if so many can.
        nominal_steps: The run's own local steps.
        seed: What the draws follow from.
    """

    problem: Problem
    per_round: int
    nominal_steps: int
    seed: int

    def start(self) -> dict[str, Any]:
        """Return the controller's state before round 1."""
        return {"global_step": 0}

    def choose(
        self,
        report: RoundReport | None,  # noqa: ARG002 (what happened does not matter to it)
        state: Mapping[str, Any],
        seen: Observation,
    ) -> tuple[RoundPlan, dict[str, Any]]:
        """Return the plan of the round that is `seen`, and the next state."""
        draw = random.Random(seed_for(self.seed, "random control", seen.round))
        levels, menu = np.zeros((len(self.problem.clients), 3), dtype=int), self.problem.menu
        can = masked_pairs(self.problem, seen)
        for place in sampled(draw, can, self.per_round):
            levels[place, PAIR] = 1 + draw.choice(np.flatnonzero(can[place]).tolist())
            levels[place, STEPS] = draw.randrange(len(menu.steps))
            levels[place, SHARE] = draw.randrange(len(menu.shares))
        refresh = draw.randrange(1 + menu.refresh)
        plan, step = round_plan(self.problem, seen, levels, refresh, state, self.nominal_steps)
        return plan, {"global_step": step}


@dataclass(frozen=True)
class CapabilityControl:
    """Sample clients; give each the pair of emulator and rank that needs most memory of those that fit.

    Steps are the run's own, bands are shared equally, the emulator is never re-aligned.

    Attributes:
        problem: What there is to decide.
        per_round: How many take part in a round, if so many can.
        nominal_steps: The run's own local steps; the level nearest to it is chosen.
        seed: What the samples follow from.
    """

    problem: Problem
    per_round: int
    nominal_steps: int
    seed: int

    def start(self) -> dict[str, Any]:
        """Return the controller's state before round 1."""
        return {"global_step": 0}

    def choose(
        self,
        report: RoundReport | None,  # noqa: ARG002 (what happened does not matter to it)
        state: Mapping[str, Any],
        seen: Observation,
    ) -> tuple[RoundPlan, dict[str, Any]]:
        """Return the plan of the round that is `seen`, and the next state."""
        draw = random.Random(seed_for(self.seed, "sample", seen.round))
        chosen = sampled(draw, masked_pairs(self.problem, seen), self.per_round)
        levels = capable(self.problem, seen, self.nominal_steps)
        levels[[place for place in range(len(levels)) if place not in chosen]] = OUT
        plan, step = round_plan(self.problem, seen, levels, 0, state, self.nominal_steps)
        return plan, {"global_step": step}


def sampled(draw: random.Random, can: np.ndarray, count: int) -> Sequence[int]:
    """Return places of devices drawn without replacement from those that can do anything, `(devices, pairs)`."""
    able = np.flatnonzero(can.any(-1)).tolist()
    return draw.sample(able, min(count, len(able)))


def capable(problem: Problem, seen: Observation, nominal_steps: int) -> np.ndarray:
    """Return levels that give each device the largest pair that fits, `(devices, 3)`; of equals, the first."""
    menu, can = problem.menu, masked_pairs(problem, seen)
    levels = np.zeros((len(problem.clients), 3), dtype=int)
    largest = np.where(can, problem.needs_bytes, -1.0).argmax(-1)
    able = can.any(-1)
    levels[able, PAIR] = 1 + largest[able]
    levels[able, STEPS] = int(np.argmin(np.abs(np.array(menu.steps) - nominal_steps)))
    levels[able, SHARE] = int(np.argmin(np.abs(np.array(menu.shares) - 1.0)))
    return levels
