"""What a controller cannot be asked to be is refused by its settings and files, before a model is loaded."""

import json

import numpy as np
import pytest

from fedpeat.control import Curves, Policy, write_policy
from fedpeat.control.policy import FACTS, NAMES, WEIGHTS
from fedpeat.core import ConfigError, FedPeatError
from simulations.control import check_files
from simulations.control_settings import KINDS, check_control, kind_of
from simulations.deployment.terms import deployed
from simulations.settings import load_settings


@pytest.fixture(scope="module")
def composed():
    """What `load_settings` returns, once for each choice of options; keys are set by hand, dotted."""
    made = {}

    def settings(*options, **keys):
        if options not in made:
            made[options] = json.dumps(load_settings(list(options)))
        plain = json.loads(made[options])
        for key, value in keys.items():
            *above, last = key.split("__")
            node = plain
            for part in above:
                node = node[part]
            assert last in node
            node[last] = value
        return plain

    return settings


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The folder of a policy for nothing in particular."""
    folder = tmp_path_factory.mktemp("policy")
    weights = {name: np.zeros((2, 2) if name.endswith("weight") else 2, dtype=np.float32) for name in NAMES}
    write_policy(folder, Policy(weights, {}, Curves()))
    return folder


def test_a_fixed_plan_asks_for_nothing(composed):
    assert kind_of(composed()) == "fixed"
    check_control(composed())
    check_files(composed())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in {"fixed", "sabppo"}])
def test_the_defaults_of_all_others_go_with_modelled_devices(kind, composed):
    check_control(composed(f"control={kind}", "devices=mixed"))
    with pytest.raises(ConfigError, match="devices=none"):
        check_control(composed(f"control={kind}"))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"control__kind": "randm"}, "no such controller.*'random'"),
        ({"control__menu__steps": [0]}, r"control\.menu\.steps=\[0\].*from 1 on"),
        ({"control__menu__steps": [1.5]}, "whole numbers"),
        ({"control__menu__steps": ["many"]}, "'many' is no number"),
        ({"control__menu__steps": [True]}, "True is no number"),
        ({"control__menu__ranks": [0]}, r"control\.menu\.ranks"),
        ({"control__menu__kept_blocks": [-1]}, "from 0 on"),
        ({"control__objective__time": "much"}, r"control\.objective\.time=much"),
        ({"control__objective__time": -1.0}, "it is a weight, 0 or more"),
        ({"control__objective__time_unit": 0}, "above 0"),
        ({"control__objective__quality_of": "evry"}, "every"),
        ({"control__sampling": "poisson"}, "leave control.sampling out"),
        ({"control__rank": {"ann": 2}}, "decides that itself"),
        ({"clients__per_round": 2}, "decides how many take part"),
        ({"clients__pool": True}, "who takes part"),
        ({"privacy__kind": "client_level"}, "who takes part"),
        ({"round__over_select": 0.5}, "who takes part"),
    ],
)
def test_what_cannot_be_is_refused_in_three_parts(keys, says, composed):
    with pytest.raises(ConfigError, match=says) as caught:
        check_control(composed("control=greedy", "devices=mixed", **keys))
    assert caught.value.asked
    assert caught.value.found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("not json", r"cannot read control\.curves"),
        ("[1]", "no mapping"),
        ('{"pce": 1}', "no such parameter.*pace"),
        ('{"pace": -1}', "pace=-1"),
        ('{"pace": "fast"}', "pace='fast'"),
    ],
)
def test_damaged_curves(text, says, composed, tmp_path):
    path = tmp_path / "curves.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        check_files(composed("control=greedy", "devices=mixed", control__curves=str(path)))


def test_missing_curves(composed, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read control\.curves"):
        check_files(composed("control=greedy", "devices=mixed", control__curves=str(tmp_path / "curves.json")))


SABPPO = ("control=sabppo", "devices=cell")


def test_a_policy_is_named_and_there(composed, policy, tmp_path):
    check_files(composed(*SABPPO, control__policy=str(policy)))
    check_files(composed(*SABPPO))  # one comes with the package
    with pytest.raises(FedPeatError, match=r"policy\.json"):
        check_files(composed(*SABPPO, control__policy=str(tmp_path)))


DAMAGES = ("no facts", "half a file", "other format", "no weights", "lacks a layer")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_policy_is_refused(damage, composed, policy, tmp_path):
    from safetensors.numpy import load_file, save_file

    facts = json.loads((policy / FACTS).read_text())
    weights = load_file(policy / WEIGHTS)
    facts |= {"format": 99} if damage == "other format" else {}
    if damage == "lacks a layer":
        del weights[NAMES[0]]
    (tmp_path / FACTS).write_text("[]" if damage == "no facts" else json.dumps(facts))
    if damage != "no weights":
        save_file(weights, tmp_path / WEIGHTS)
    if damage == "half a file":
        whole = (tmp_path / WEIGHTS).read_bytes()
        (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FedPeatError):
        check_files(composed(*SABPPO, control__policy=str(tmp_path)))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fixed"])
def test_a_deployment_refuses_it(kind, composed, tmp_path):
    with pytest.raises(ConfigError, match=f"cannot deploy control={kind}.*modelled devices"):
        deployed(composed(f"control={kind}"), ["ann", "bob"], folder=tmp_path)
