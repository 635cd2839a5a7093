import itertools
from dataclasses import replace

import numpy as np
import pytest

from fedpeat.control import Objective, hindsight
from fedpeat.control.hindsight import FixedPlan, best_fixed, classes_of, in_words, levels_for, mean_costs, realigns
from fedpeat.control.world import World
from tests.fedpeat.control.problems import CELL, PAIRS, problem, scene


def twins(**more):
    """Four devices of two classes."""
    of = problem(4, **more)
    alike = {name: getattr(of, name)[[0, 1, 0, 1]] for name in ("flops", "memory_bytes", "watt")}
    return replace(of, **alike)


def total(given, levels, refreshes, seed):
    world, found = World(given), 0.0
    world.start([seed])
    for refresh in refreshes:
        found -= float(world.step(levels[None], np.array([refresh])).reward[0])
    return found


def test_devices_of_one_profile_are_a_class():
    assert len(set(classes_of(problem(4)).tolist())) == 4
    kinds = classes_of(twins()).tolist()
    assert kinds[0] == kinds[2] != kinds[1] == kinds[3]


@pytest.mark.parametrize("radio", [None, CELL])
def test_it_is_the_best_of_all_plans(radio):
    of = twins(pairs=PAIRS[:2], steps=(5,), radio=radio, refresh=True, memory=[1, 2, 0, 0])
    given = scene(of, objective=Objective(time=0.2), availability=0.8, rounds=4)
    found = best_fixed(given, [3, 4, 5])
    assert found.exhaustive
    kinds, own = classes_of(given.problem), [[0, 0, 0], [1, 0, 0], [2, 0, 0]]
    costs = []
    for plan in itertools.product(own, repeat=2):
        levels = np.array(plan)[kinds]
        for rhythm in (0, 1, 2, 3, 4, 6):
            refreshes = [int(realigns(np.array(rhythm), number)) for number in range(1, 5)]
            costs.append(np.mean([total(given, levels, refreshes, seed) for seed in (3, 4, 5)]))
    assert found.cost == pytest.approx(min(costs))
    assert mean_costs(given, [found.plan], [3, 4, 5])[0] == pytest.approx(found.cost)


def test_one_class_after_the_other_comes_as_far(monkeypatch):
    given = scene(twins(pairs=PAIRS, steps=(5, 10), radio=CELL), objective=Objective(time=0.2))
    whole = best_fixed(given, [1, 2])
    monkeypatch.setattr(hindsight, "EXHAUSTIVE_BELOW", 1)
    found = best_fixed(given, [1, 2])
    assert (whole.exhaustive, found.exhaustive) == (True, False)
    assert found.cost == pytest.approx(whole.cost)
    assert found.played < 300


def test_what_does_not_fit_one_of_a_class_stays_out():
    of = problem(2, memory=[4, 1])
    plan = FixedPlan(np.array([[4, 1, 0], [4, 0, 0]]), 2)
    fits = levels_for(of, plan)[:, 0] > 0
    assert fits.tolist() == [True, False]
    lines = in_words(of, plan)
    assert any("large at rank 8, 10 steps" in line for line in lines)
    assert lines[-1] == "re-aligned every 2 rounds"
    assert in_words(of, FixedPlan(np.zeros((2, 3), dtype=int), 0))[0].endswith(": out")
