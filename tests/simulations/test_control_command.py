import pytest

from fedpeat.control.learner import Seen
from fedpeat.core import ConfigError
from simulations.control_command import HELP, OWN, control, split_arguments, words_of


def test_own_keys_are_told_from_the_runs():
    own, rest = split_arguments("evaluate", ["policy=a", "rounds=2", "episodes=7", "devices=cell"])
    assert own == {"policy": "a", "episodes": 7, "folder": None}
    assert rest == ["rounds=2", "devices=cell"]
    for mapping in (
        "control.menu.steps=[1]",
        "devices.named={ann: phone}",
        "devices.profiles.phone.flops=1",
        "+seed=3",
    ):
        assert split_arguments("train", [mapping])[1] == [mapping]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "did you mean 'train'"),
        (["train"], "policy=FOLDER"),
        (["train", "policy=p", "steps=many"], "1 or more"),
        (["train", "policy=p", "step=3"], "did you mean 'steps'"),
        (["evaluate", "episode=3"], "did you mean 'episodes'"),
        (["evaluate", "devises=cell"], "did you mean 'devices'"),
        (["evaluate", "policy"], "it has no value"),
    ],
)
def test_mistakes_are_told(arguments, says):
    with pytest.raises(ConfigError, match=says):
        control(arguments)


def test_help_names_all_keys(capsys):
    assert control(["train", "--help"]) == 0
    assert capsys.readouterr().out == HELP
    assert all(f"{key}=" in HELP for keys in OWN.values() for key in keys)


def test_training_is_told_in_words():
    assert words_of(Seen(5, 12.3456, entropy=1.5)) == "cost of a run 12.35, entropy 1.50 nats"
