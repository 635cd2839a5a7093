import pytest

from fedpeat.core import ConfigError
from simulations.ladder import MIB, assigned, named_emulators, rungs

UNIFORM = {"_target_": "fedpeat.emulators.uniform", "kept_blocks": 4}
CHAIN = {"_target_": "fedpeat.emulators.chain", "stages": {"select": UNIFORM, "store": {"_target_": "x.int8"}}}
NEEDS = {"default": 40 * MIB, "small": 10 * MIB, "tiny": 5 * MIB}


def settings(node=UNIFORM, **control):
    empty = {"kept_blocks": {}, "emulators": {}, "emulator": {}, "memory_mib": {}}
    return {"emulator": node, "control": {**empty, **control}}


def test_one_emulator_is_a_ladder_of_one_rung():
    assert rungs(settings()) == {"default": UNIFORM}


def test_rungs_differ_by_the_keys_that_are_named():
    found = rungs(settings(kept_blocks={"ann": 2, "bob": 2}, emulators={"small": {"kept_blocks": 1}}))
    assert found == {
        "default": UNIFORM,
        "kept_2": {**UNIFORM, "kept_blocks": 2},
        "small": {**UNIFORM, "kept_blocks": 1},
    }


def test_a_rung_of_a_chain_changes_the_stage_that_keeps_blocks():
    found = rungs(settings(CHAIN, emulators={"small": {"kept_blocks": 1}}))["small"]
    assert found["stages"]["select"]["kept_blocks"] == 1
    assert found["stages"]["store"] == {"_target_": "x.int8"}
    assert CHAIN["stages"]["select"]["kept_blocks"] == 4


def test_a_rung_can_be_another_builder():
    other = {"_target_": "fedpeat.emulators.first", "kept_blocks": 1}
    assert rungs(settings(emulators={"other": other}))["other"] == other


@pytest.mark.parametrize(
    ("control", "told"),
    [
        ({"emulators": {"default": {}}}, "that name is taken"),
        ({"emulators": {"small": {"kept_block": 1}}}, "did you mean 'kept_blocks'"),
    ],
)
def test_a_mistaken_ladder_is_refused(control, told):
    with pytest.raises(ConfigError, match=told):
        rungs(settings(**control))


def test_a_number_of_kept_blocks_needs_an_emulator_that_has_one():
    with pytest.raises(ConfigError, match="keeps no number of blocks"):
        rungs(settings({"_target_": "fedpeat.emulators.int8"}, kept_blocks={"ann": 1}))


def test_a_device_gets_the_largest_that_fits():
    memory = {"ann": 100, "bob": 39.9, "eve": 5}
    assert assigned(settings(memory_mib=memory), ["ann", "bob", "eve", "ian"], NEEDS) == {
        "ann": "default",
        "bob": "small",
        "eve": "tiny",
    }


def test_devices_that_are_named_keep_what_they_are_given():
    chosen = settings(kept_blocks={"ann": 2}, emulator={"bob": "small"})
    assert named_emulators(chosen) == {"ann": "kept_2", "bob": "small"}
    assert assigned(chosen, ["ann", "bob"], {**NEEDS, "kept_2": 1}) == {"ann": "kept_2", "bob": "small"}


@pytest.mark.parametrize(
    ("control", "told"),
    [
        ({"memory_mib": {"eve": 4}}, r"client 'eve' has 4 MiB .* 'tiny', needs 5.0 MiB"),
        ({"memory_mib": {"eva": 40}}, "did you mean 'eve'"),
        ({"emulator": {"eve": "smal"}}, "did you mean 'small'"),
    ],
)
def test_what_does_not_fit_is_told(control, told):
    with pytest.raises(ConfigError, match=told):
        assigned(settings(**control), ["eve"], NEEDS)
