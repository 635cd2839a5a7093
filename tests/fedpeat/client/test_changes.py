"""A re-aligned emulator's changes: sent once, then kept."""

import pytest
import torch

from fedpeat.client.changes import SPARE, changes_for
from fedpeat.client.store import Store
from fedpeat.core import StorageError, UpdateRefused, digest


def made(number):
    tensors = {"model.layers.1.mlp.up_proj.realign_A": torch.full((2, 3), float(number))}
    return digest(tensors), tensors


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path, "ann")


def test_none_is_the_bundles_own(store):
    assert changes_for(store, "", {}, server_round=1, rounds=1) == {}
    assert not store.folder.exists()


def test_what_was_sent_is_there_again(store, tmp_path):
    version, tensors = made(1)
    assert changes_for(store, version, tensors, server_round=1, rounds=1) is tensors
    again = changes_for(Store(tmp_path, "ann", 7), version, {}, server_round=1, rounds=1)
    assert digest(again) == version
    with pytest.raises(StorageError, match="were not sent"):
        changes_for(Store(tmp_path, "bob"), version, {}, server_round=1, rounds=1)


def test_damaged_they_are_not_used(store):
    version, tensors = made(1)
    changes_for(store, version, tensors, server_round=1, rounds=1)
    other, changed = made(2)
    changes_for(store, other, changed, server_round=1, rounds=1)
    folder = store.folder / "emulator"
    (folder / f"000001.{version}.safetensors").write_bytes((folder / f"000001.{other}.safetensors").read_bytes())
    with pytest.raises(StorageError):
        changes_for(store, version, {}, server_round=1, rounds=1)


@pytest.mark.parametrize("version", ["../../secret", made(2)[0], ""])
def test_another_version_than_was_told_is_refused(version, store):
    with pytest.raises(UpdateRefused, match="named by their hash"):
        changes_for(store, version, made(1)[1], server_round=1, rounds=1)
    assert not store.folder.exists()


def test_as_many_are_kept_as_a_resumed_run_may_ask_for(store):
    for number in range(9):
        changes_for(store, *made(number), server_round=number + 1, rounds=2)
    kept = {path.stem.partition(".")[2] for path in (store.folder / "emulator").iterdir()}
    assert kept == {made(number)[0] for number in range(9 - 2 - SPARE, 9)}
    for number in range(9 - 2 - SPARE, 9):
        assert digest(changes_for(store, made(number)[0], {}, server_round=10, rounds=2)) == made(number)[0]


def test_without_a_folder_they_come_with_each_message():
    version, tensors = made(1)
    assert changes_for(Store(None, "server"), version, tensors, server_round=1, rounds=0) is tensors


def test_a_path_is_no_version(store):
    with pytest.raises(UpdateRefused, match="named by their hash"):
        changes_for(store, "../../secret", {}, server_round=1, rounds=1)
