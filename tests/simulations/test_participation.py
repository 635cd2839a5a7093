from types import SimpleNamespace

import pytest

from fedpeat.core import ConfigError
from simulations.participation import control_of, participant_of
from strategies.folding import flora
from strategies.general import fed_avg

DATA = SimpleNamespace(clients=[SimpleNamespace(name=name) for name in ("ann", "bob", "eve")])


def test_devices_have_the_ranks_they_are_given(settings):
    control = control_of(settings(control={"rank": {"ann": 2, "bob": 8}}), DATA, flora())
    plan, _ = control.choose(None, control.start())
    assert [device.rank for device in plan.devices] == [2, 8, None]
    assert control_of(settings(), DATA, fed_avg()).rank_of == {}


@pytest.mark.parametrize(
    ("rank", "peft", "told"),
    [
        ({"ann": 9}, {}, "must be LoRA ranks from 1 to peft.rank; peft=lora, peft.rank=8"),
        ({"ann": 0}, {}, "from 1 to peft.rank"),
        ({"ann": 2, "bob": -1}, {}, "from 1 to peft.rank"),
        ({"ann": 2}, {"kind": "lora_sb"}, "peft=lora_sb"),
        ({"ann": 2}, {"kind": "full", "rank": None}, "choose peft=lora"),
        ({"anna": 2}, {}, "did you mean 'ann'"),
    ],
)
def test_ranks_that_cannot_be_are_told(rank, peft, told, settings):
    with pytest.raises(ConfigError) as caught:
        control_of(settings(control={"rank": rank}, peft=peft), DATA, flora())
    assert told in str(caught.value)


def test_not_every_rule_can_mix_ranks(settings):
    with pytest.raises(ConfigError, match="strategy=fed_avg adds tensors of one shape"):
        control_of(settings(control={"rank": {"ann": 2}}), DATA, fed_avg())


def test_the_server_takes_part_only_where_it_is_asked_to(settings):
    for train in ("off", False, None):
        assert participant_of(settings(server={"train": train}), DATA, fed_avg(), None, None) is None
    with pytest.raises(ConfigError, match="choose off, emulator or full"):
        participant_of(settings(server={"train": "emulated"}), DATA, fed_avg(), None, None)
