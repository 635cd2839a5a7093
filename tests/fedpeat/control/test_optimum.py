import itertools

import numpy as np
import pytest

from fedpeat.control import GreedyControl, Objective, RandomControl
from fedpeat.control.optimum import optimum
from fedpeat.control.world import World, play
from fedpeat.core import ConfigError
from tests.fedpeat.control.problems import CELL, PAIRS, problem, scene

OBJECTIVES = (Objective(time=0.3), Objective(time=0.3, bytes=0.01, quality_of="change"))


def totals(given, sequences):
    """Sums of rewards of sequences of levels, `(sequences, rounds, devices, 3)`, and refreshes."""
    world = World(given)
    world.start([0] * len(sequences))
    levels, flags = (np.array(part) for part in zip(*(zip(*one, strict=True) for one in sequences), strict=True))
    return sum(world.step(levels[:, place], flags[:, place]).reward for place in range(given.problem.rounds))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["every", "change"])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_best_of_all_sequences(objective, seed):
    given = scene(problem(2, pairs=PAIRS[1:3], steps=(5,), refresh=True, memory=[3, 2], seed=seed), objective=objective)
    own = [[[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 0, 0], [1, 0, 0], [2, 0, 0]]]
    rounds = [(levels, flag) for levels in itertools.product(*own) for flag in (0, 1)]
    best = totals(given, list(itertools.product(rounds, repeat=3))).max()
    found, sequence = optimum(given)
    assert found == pytest.approx(best)
    assert totals(given, [sequence])[0] == pytest.approx(best)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["every", "change"])
def test_nobody_does_better(objective):
    given = scene(problem(3, pairs=PAIRS[:2], steps=(5,), refresh=True), objective=objective)
    best, _ = optimum(given)
    of = given.problem
    assert play(GreedyControl(of, objective, given.curves, 5), given, 0)[0] <= best + 1e-9
    assert all(play(RandomControl(of, 2, 5, seed), given, 0)[0] < best for seed in range(10))


def test_chance_has_no_part_in_it():
    with pytest.raises(ConfigError, match="chance"):
        optimum(scene(problem(2, radio=CELL)))
    with pytest.raises(ConfigError, match="chance"):
        optimum(scene(problem(2), dropout=0.1))
    with pytest.raises(ConfigError, match="choices a round"):
        optimum(scene(problem(8)))
