"""The best fixed plan in hindsight: one that every device of a class follows in all rounds, chosen by the very runs."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedpeat.control.menu import OUT, PAIR
from fedpeat.control.problem import Problem
from fedpeat.control.world import Scene, World
from fedpeat.core import seed_for

EXHAUSTIVE_BELOW = 3_000_000
"""Rounds to be played, over all plans and seeds, below which all plans are."""

RHYTHMS = (0, 1, 2, 3, 4, 6)
"""Every how many rounds a fixed plan re-aligns the emulator; 0 for never."""

AT_ONCE = 4096
SWEEPS = 10


class FixedPlan(NamedTuple):
    """What all rounds of a run do.

    Attributes:
        levels: Of each class of devices, `(classes, 3)`.
        rhythm: Every how many rounds the emulator is re-aligned; 0 for never.
    """

    levels: np.ndarray
    rhythm: int


class Hindsight(NamedTuple):
    """The best fixed plan found.

    Attributes:
        plan: The plan.
        cost: Its mean cost over the seeds.
        exhaustive: Whether all plans were played; else one class after the other was changed, from several beginnings.
        played: How many plans were.
    """

    plan: FixedPlan
    cost: float
    exhaustive: bool
    played: int


def classes_of(problem: Problem) -> np.ndarray:
    """Return the class of each device, `(devices,)`: devices of one profile have the same speed, memory and power."""
    own = np.column_stack([problem.flops, problem.memory_bytes, problem.watt])
    return np.unique(own, axis=0, return_inverse=True)[1].reshape(-1)


def best_fixed(scene: Scene, seeds: Sequence[int], *, restarts: int = 6, seed: int = 0) -> Hindsight:
    """Return the fixed plan that costs least in the runs of these seeds, on the mean.

    Args:
        scene: What is played.
        seeds: Of the runs' chances.
        restarts: Beginnings of coordinate ascent, where there are too many plans to play them all: nobody, everybody at
            most, and drawn ones.
        seed: What is drawn follows from it.
    """
    problem = scene.problem
    classes = classes_of(problem)
    options = [_options(problem, classes == which) for which in range(classes.max() + 1)]
    rhythms = RHYTHMS if problem.menu.refresh else (0,)
    every = math.prod(map(len, options)) * len(rhythms)
    if every * len(seeds) * problem.rounds < EXHAUSTIVE_BELOW:
        plans = [FixedPlan(np.array(levels), rhythm) for *levels, rhythm in itertools.product(*options, rhythms)]
        costs = mean_costs(scene, plans, seeds)
        least = int(np.argmin(costs))
        return Hindsight(plans[least], float(costs[least]), True, every)
    draw = np.random.default_rng(seed_for(seed, "hindsight"))
    starts = [[own[0] for own in options], [own[-1] for own in options]]
    starts += [[own[draw.integers(len(own))] for own in options] for _ in range(max(restarts - 2, 0))]
    found, played = [], 0
    for start in starts[: max(restarts, 1)]:
        plan, cost, tried = _ascend(scene, seeds, options, rhythms, FixedPlan(np.array(start), 0))
        found.append((cost, plan))
        played += tried
    cost, plan = min(found, key=lambda one: one[0])
    return Hindsight(plan, cost, False, played)


def _options(problem: Problem, members: np.ndarray) -> np.ndarray:
    """Return all that a class can do in every round, `(options, 3)`, the largest pair last."""
    fits = problem.fits[members].any(0)
    order = sorted(np.flatnonzero(fits).tolist(), key=lambda pair: problem.needs_bytes[pair])
    return problem.menu.options([1 + pair for pair in order])


def _ascend(
    scene: Scene, seeds: Sequence[int], options: list[np.ndarray], rhythms: Sequence[int], plan: FixedPlan
) -> tuple[FixedPlan, float, int]:
    now, tried = float(mean_costs(scene, [plan], seeds)[0]), 1
    for _ in range(SWEEPS):
        before = now
        for which in range(len(options) + (len(rhythms) > 1)):
            if which == len(options):
                plans = [FixedPlan(plan.levels, rhythm) for rhythm in rhythms]
            else:
                plans = [FixedPlan(_with(plan.levels, which, own), plan.rhythm) for own in options[which]]
            costs = mean_costs(scene, plans, seeds)
            tried += len(plans)
            if costs.min() < now:
                plan, now = plans[int(costs.argmin())], float(costs.min())
        if now == before:
            break
    return plan, now, tried


def _with(levels: np.ndarray, which: int, own: np.ndarray) -> np.ndarray:
    changed = levels.copy()
    changed[which] = own
    return changed


def mean_costs(scene: Scene, plans: Sequence[FixedPlan], seeds: Sequence[int]) -> np.ndarray:
    """Return what runs come to under fixed plans, the mean over the seeds, `(plans,)`."""
    several, found = max(AT_ONCE // len(seeds), 1), []
    classes = classes_of(scene.problem)
    for first in range(0, len(plans), several):
        some = plans[first : first + several]
        world = World(scene)
        world.start([seed for _ in some for seed in seeds])
        levels = np.repeat(np.stack([plan.levels for plan in some])[:, classes], len(seeds), axis=0)
        rhythm = np.repeat([plan.rhythm for plan in some], len(seeds))
        total = np.zeros(len(rhythm))
        for number in range(1, scene.problem.rounds + 1):
            total -= world.step(levels, realigns(rhythm, number)).reward
        found.append(total.reshape(len(some), -1).mean(-1))
    return np.concatenate(found)


def realigns(rhythm: np.ndarray, number: int) -> np.ndarray:
    """Return whether a fixed plan re-aligns the emulator before a round: every so many, not before the first.

    >>> [int(realigns(np.array(2), number)) for number in (1, 2, 3, 4, 5)]
    [0, 0, 1, 0, 1]
    """
    return ((rhythm > 0) & (number > 1) & ((number - 1) % np.maximum(rhythm, 1) == 0)).astype(int)


def in_words(problem: Problem, plan: FixedPlan) -> list[str]:
    """Return what a fixed plan gives each class, a line each, then the rhythm where it re-aligns."""
    menu, classes = problem.menu, classes_of(problem)
    lines = []
    for which, (pair, steps, share) in enumerate(plan.levels):
        members = classes == which
        first = int(np.flatnonzero(members)[0])
        who = f"{members.sum()} of {problem.flops[first]:.3g} FLOP/s"
        if pair == OUT:
            lines.append(f"{who}: out")
            continue
        emulator, rank = menu.pairs[pair - 1]
        at = "" if rank is None else f" at rank {rank}"
        weight = "" if len(menu.shares) == 1 else f", band weight {menu.shares[share]:g}"
        lines.append(f"{who}: {emulator}{at}, {menu.steps[steps]} steps{weight}")
    return [*lines, f"re-aligned every {plan.rhythm} rounds"] if plan.rhythm else lines


def levels_for(problem: Problem, plan: FixedPlan) -> np.ndarray:
    """Return the levels of all devices under a fixed plan, `(devices, 3)`; what does not fit one stays out."""
    levels = plan.levels[classes_of(problem)].copy()
    pair = np.maximum(levels[:, PAIR] - 1, 0)
    levels[~problem.fits[np.arange(len(levels)), pair]] = OUT
    return levels
