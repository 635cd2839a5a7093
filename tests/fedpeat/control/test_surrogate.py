import math

import numpy as np
import pytest

from fedpeat.control import Curves, next_loss
from fedpeat.core import ConfigError
from tests.fedpeat.control.problems import problem

ALL = np.array([[4, 1, 0]] * 3)


def test_by_hand():
    of = problem(2, steps=(10, 40))
    curves = Curves(start=4, least=2, gap=1, pace=0.5, steps=0.5, rank=1.0, apart=0.2)
    # One device with the small emulator (a quarter kept) at rank 2 of 8, four times the steps.
    share = of.data_share[0]
    floor, goes = 2 + 0.75 + 0.2 * math.log(1 / share), 1 - math.exp(-0.5 * 2 * 0.25)
    found = next_loss(of, curves, 4.0, 0, np.array([[1, 1, 0], [0, 0, 0]]))
    assert found == pytest.approx(4 + goes * (floor - 4))


def test_nobody_changes_nothing():
    assert next_loss(problem(), Curves(), 3.7, 0, np.zeros((3, 3), int)) == 3.7


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ([[4, 1, 0], [0, 0, 0], [0, 0, 0]], ALL),
        ([[4, 0, 0]] * 3, ALL),
        ([[2, 1, 0]] * 3, ALL),
        ([[3, 1, 0]] * 3, ALL),
    ],
    ids=["participation", "steps", "emulator", "rank"],
)
def test_more_is_better(less, more):
    of = problem(steps=(5, 10))
    assert next_loss(of, Curves(), 4.0, 0, np.array(more)) < next_loss(of, Curves(), 4.0, 0, np.array(less)) < 4.0


def test_an_old_emulator_slows_down():
    of, curves = problem(), Curves(ageing=0.2)
    losses = [float(next_loss(of, curves, 4.0, age, ALL)) for age in (0, 1, 5)]
    assert losses == sorted(set(losses))


def test_parameters_are_json():
    curves = Curves(pace=0.7)
    assert Curves.from_json(curves.to_json()) == curves
    for wrong, says in (
        ({"pce": 1}, "did you mean 'pace'"),
        ({"pace": -1}, "pace"),
        ({"start": 0}, "start"),
        ([1], "map"),
    ):
        with pytest.raises(ConfigError, match=says):
            Curves.from_json(wrong)


def test_another_start_moves_all_losses_in_proportion():
    of, curves = problem(), Curves(start=4, least=3, gap=0.5)
    other = curves.starting_at(6.0)
    assert (other.least, other.gap, other.pace) == (4.5, 0.75, curves.pace)
    assert next_loss(of, other, 6.0, 0, ALL) == pytest.approx(1.5 * next_loss(of, curves, 4.0, 0, ALL))
