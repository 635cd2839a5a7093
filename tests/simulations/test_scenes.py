"""Which control and devices are played where nobody chooses any."""

from simulations.scenes import _unless_chosen


def test_without_a_choice_there_are_defaults():
    assert _unless_chosen(["rounds=3"]) == ["control=sabppo", "devices=mixed"]
    assert _unless_chosen(["devices=cell", "experiment=smoke"]) == ["control=sabppo"]


def test_an_experiment_chooses():
    assert _unless_chosen(["experiment=adaptive", "control.objective.time=2"]) == []
