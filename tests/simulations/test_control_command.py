import numpy as np
import pytest

from fedpeat.control import CapabilityControl, Objective
from fedpeat.control.world import play
from fedpeat.core import ConfigError
from simulations.control_command import compared, control, interval, split_arguments, table
from tests.fedpeat.control.problems import problem, scene
from tests.fedpeat.control.test_learner import by_chance

SETTINGS = {"client": {"local_steps": 5}, "clients": {"per_round": None}, "seed": 3}


def test_own_keys_are_told_from_the_runs():
    own, rest = split_arguments("evaluate", ["policy=a", "rounds=2", "episodes=7", "devices=cell"])
    assert own == {"policy": "a", "episodes": 7}
    assert rest == ["rounds=2", "devices=cell"]
    with pytest.raises(ConfigError, match="1 or more"):
        split_arguments("train", ["steps=many"])


@pytest.mark.parametrize(("arguments", "says"), [(["trian"], "did you mean 'train'"), (["train"], "policy=FOLDER")])
def test_mistakes_are_told(arguments, says):
    with pytest.raises(ConfigError, match=says):
        control(arguments)


def test_controllers_are_compared_over_the_same_seeds():
    given = scene(problem(2), objective=Objective(time=0.3))
    rows = compared(given, by_chance(given.problem), SETTINGS, 5)
    assert list(rows) == ["sabppo", "greedy", "capability", "random"]
    total, rounds = play(CapabilityControl(given.problem, 2, 5, 0), given, 0)
    assert rows["capability"]["cost"] == (pytest.approx(-total), pytest.approx(0))
    assert rows["capability"]["seconds"][0] == pytest.approx(sum(one["seconds"] for one in rounds))
    assert rows["capability"]["loss"][0] == pytest.approx(rounds[-1]["loss"])
    assert rows["sabppo"]["beside"] == (0, 0)
    assert rows["greedy"]["beside"][0] == pytest.approx(rows["greedy"]["cost"][0] - rows["sabppo"]["cost"][0])
    assert len(table(rows).splitlines()) == 5


def test_an_interval_by_hand():
    mean, half = interval(np.array([1.0, 2.0, 3.0]))
    assert (mean, half) == (2.0, pytest.approx(1.96 / 3**0.5))
