"""The emulator kept in step with the adapter: what is sent for it, and what it is good for."""

import shutil

import pytest

from fedpeat.core import ConfigError, content_hash, count_bytes
from fedpeat.devices import read_ledger
from fedpeat.server import read_checkpoint
from simulations.keeping import settings_to_resume
from simulations.run import simulate
from strategies.traffic import Changes

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
    assert {row["refresh_bytes"] for row in read_ledger(ran.folder) if row["round"] > 1} == {count_bytes(sent)}


def test_a_device_that_has_them_is_not_sent_them_again(run):
    """Every other round they are new; in between a device goes on with what it keeps on its disk."""
    overrides = (*REALIGNED, "realign.every=2", "rounds=5")
    ran = run(*overrides)
    sent = {number: set() for number in range(1, 6)}
    for row in read_ledger(ran.folder):
        sent[row["round"]].add(row["refresh_bytes"])
    size = count_bytes(changes(ran))
    assert sent == {1: {0}, 2: {0}, 3: {size}, 4: {0}, 5: {size}}
    assert len({line["bytes_down"] - 3 * max(sent[line["round"]]) for line in ran.rounds[1:]}) == 1
    always = run(*overrides, "checkpoints=1", anew=True)
    assert always.digest == ran.digest


def test_what_a_device_trains_on_does_not_depend_on_who_was_sent_what(run, monkeypatch):
    """As if all were sent in every round."""
    ran = run(*REALIGNED, "realign.every=2", "rounds=4")
    monkeypatch.setattr(Changes, "to", lambda self, client: self.tensors)
    again = run(*REALIGNED, "realign.every=2", "rounds=4", anew=True)
    assert again.state == ran.state
    assert again.summary["bytes"]["down"] - ran.summary["bytes"]["down"] == 3 * count_bytes(changes(ran))


def test_a_client_whose_disk_was_emptied_gets_them_a_round_later(run, settings_of, tiny, tmp_path):
    overrides = (*REALIGNED, "realign.every=3")
    simulate(settings_of(tuple(tiny(*overrides, "rounds=4"))), tmp_path)
    shutil.rmtree(tmp_path / "clients" / content_hash("ann"))
    simulate(settings_to_resume(tmp_path, ["rounds=6"]), tmp_path, resume=True)
    rows = {(row["round"], row["client"]): row for row in read_ledger(tmp_path)}
    assert [rows[number, "ann"]["status"] for number in (4, 5, 6)] == ["counted", "error", "counted"]
    assert rows[5, "ann"]["refresh_bytes"] == 0 < rows[6, "ann"]["refresh_bytes"]
    assert rows[6, "bob"]["refresh_bytes"] == 0


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
