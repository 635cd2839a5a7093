"""The emulator kept in step with the adapter: what is sent for it, and what it is good for."""

import pytest

from fedpeat.core import ConfigError, count_bytes
from fedpeat.server import read_checkpoint

REALIGNED = ("rounds=3", "data.server_share=0.3", "realign.every=1", "realign.steps=4", "client.learning_rate=0.01")


def changes(ran):
    return read_checkpoint(max((ran.folder / "checkpoint").iterdir())).emulator


def test_only_low_rank_changes_of_the_emulator_are_sent(run):
    ran, without = run(*REALIGNED), run(*REALIGNED, "realign.every=null")
    sent = changes(ran)
    assert not changes(without)
    assert {name.split(".")[2] for name in sent} == {"1", "4"}, "kept blocks, by the full model's index"
    assert any(float(tensor.abs().max()) > 0 for name, tensor in sent.items() if name.endswith("realign_B"))
    down = [line["bytes_down"] for line in ran.rounds]
    plain = [line["bytes_down"] for line in without.rounds]
    # Before round 1 the emulator is what the bundle says; then each of three clients gets the changes.
    assert [here - there for here, there in zip(down, plain, strict=True)] == [0, 0, *2 * [3 * count_bytes(sent)]]
    assert ran.summary["bytes"]["up"] == without.summary["bytes"]["up"]


def test_devices_train_against_what_was_sent(run):
    ran, without = run(*REALIGNED), run(*REALIGNED, "realign.every=null")
    for client in ("ann", "bob", "eve"):
        assert ran.of(client, "train_loss_first", 1) == without.of(client, "train_loss_first", 1)
        assert ran.of(client, "train_loss_first", 2) != without.of(client, "train_loss_first", 2)
    later = run(*REALIGNED, "realign.every=2")
    assert later.of("ann", "train_loss_first", 2) == without.of("ann", "train_loss_first", 2)
    assert later.of("ann", "train_loss_first", 3) != without.of("ann", "train_loss_first", 3)


def test_the_full_model_stays_what_it_is(run):
    ran, without = run(*REALIGNED), run(*REALIGNED, "realign.every=null")
    first = [line["evaluations"]["plug_in"]["loss"] for line in ran.rounds[:2]]
    assert first == [line["evaluations"]["plug_in"]["loss"] for line in without.rounds[:2]]
    assert run(*REALIGNED, anew=True).digest == ran.digest


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["realign.every=0"], "number of rounds"),
        (["emulator.kept_blocks=4"], "nothing of the middle was left out"),
        (["control.kept_blocks={ann: 1}"], "there are several"),
        (["client.unfreeze=[norm]"], "client.unfreeze trains the emulator too"),
        (["data.server_share=0"], "no public text"),
    ],
)
def test_what_cannot_be_had_is_refused(overrides, told, run):
    with pytest.raises(ConfigError, match=told):
        run(*REALIGNED, *overrides)
