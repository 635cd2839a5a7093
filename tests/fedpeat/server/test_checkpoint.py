import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from fedpeat.core import GlobalState, RunState, StorageError, digest, write_tensors
from fedpeat.server import Checkpoints, read_checkpoint, write_checkpoint

STATE = RunState(
    round=3,
    shared=GlobalState(
        tensors={"h.0.mlp.lora_A.weight": torch.randn(2, 3), "h.0.mlp.lora_B.weight": torch.randn(4, 2)},
        folds={"h.0.mlp": torch.randn(4, 3)},
        memory={"server|0/momentum/h.0.mlp.lora_A.weight": torch.randn(2, 3), "reducer|count": torch.tensor(3)},
    ),
    control_state={"global_step": 30},
    global_step=30,
    seed=7,
)


def test_a_state_is_read_back_whole(tmp_path):
    path = tmp_path / "deep" / "state.safetensors"
    write_checkpoint(path, STATE)
    again = read_checkpoint(path)
    for part in ("tensors", "folds", "memory"):
        assert digest(getattr(again.shared, part)) == digest(getattr(STATE.shared, part))
    assert (again.round, again.control_state, again.global_step, again.seed) == (3, {"global_step": 30}, 30, 7)


def test_parts_of_one_name_do_not_mix(tmp_path):
    """A tensor, its fold and its momentum may be named alike, and as the parts are."""
    shared = GlobalState(*({"folds/w": torch.full((2,), value), "w": torch.zeros(1)} for value in (1.0, 2.0, 3.0)))
    write_checkpoint(tmp_path / "state", RunState(1, shared, {}, 0, 0))
    again = read_checkpoint(tmp_path / "state").shared
    assert [float(part["folds/w"][0]) for part in (again.tensors, again.folds, again.memory)] == [1.0, 2.0, 3.0]
    assert [set(part) for part in (again.tensors, again.folds, again.memory)] == [{"folds/w", "w"}] * 3


def test_nothing_folded_and_remembered_is_nothing(tmp_path):
    write_checkpoint(tmp_path / "state", RunState(0, GlobalState({"w": torch.ones(1)}), {}, 0, 0))
    again = read_checkpoint(tmp_path / "state")
    assert (again.shared.folds, again.shared.memory) == ({}, {})


def test_other_files_are_refused(tmp_path):
    write_tensors(tmp_path / "other.safetensors", {"w": torch.zeros(1)})
    with pytest.raises(StorageError, match="format"):
        read_checkpoint(tmp_path / "other.safetensors")
    write_tensors(tmp_path / "older.safetensors", {"w": torch.zeros(1)}, {"format": "1", "state": "{}"})
    with pytest.raises(StorageError, match="reads format '4'"):
        read_checkpoint(tmp_path / "older.safetensors")
    with pytest.raises(StorageError):
        read_checkpoint(tmp_path / "absent.safetensors")
    path = tmp_path / "state.safetensors"
    write_checkpoint(path, STATE)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(StorageError):
        read_checkpoint(path)


def test_the_newest_stay_in_order_of_rounds(tmp_path):
    kept = Checkpoints(tmp_path / "checkpoint", keep=2)
    assert kept.newest() is None
    assert kept.files() == []
    for number in (8, 9, 10, 1_000_000):
        kept.write(replace(STATE, round=number, counted={"ann": (2, 3)}, resumed=(3, 5)))
    assert [path.name for path in kept.files()] == ["round-000010.safetensors", "round-1000000.safetensors"]
    assert kept.newest().round == 1_000_000
    assert kept.newest().resumed == (3, 5)
    assert kept.newest().counted == {"ann": (2, 3)}


@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_a_damaged_one_is_passed_over_and_said_so(damage, tmp_path):
    kept, told = Checkpoints(tmp_path, keep=2), []
    kept.write(replace(STATE, round=1))
    kept.write(replace(STATE, round=2))
    newest = kept.files()[-1]
    if damage == "cut":
        newest.write_bytes(newest.read_bytes()[:-7])
    else:
        blob = newest.read_bytes()
        newest.write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    assert kept.newest(told.append).round == 1
    assert len(told) == 1
    assert "round-000002" in told[0]
    kept.files()[0].write_bytes(b"")
    with pytest.raises(StorageError, match="round-000001"):
        kept.newest()


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path, keep=1)
    kept.write(replace(STATE, round=1))

    def full(*_args, **_keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(StorageError, match="the disk is full"):
        kept.write(replace(STATE, round=2))
    assert [path.name for path in tmp_path.iterdir()] == ["round-000001.safetensors"]
    assert kept.newest().round == 1


WRITER = """
import sys, torch
from fedpeat.core import GlobalState, RunState
from fedpeat.server import Checkpoints

kept = Checkpoints(sys.argv[1], keep=2)
for number in range(1, 10**6):
    kept.write(RunState(number, GlobalState({"w": torch.full((200_000,), float(number))}), {}, number, 0))
    print(number, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.003, 0.011, 0.02])
def test_a_kill_while_writing_leaves_a_whole_checkpoint(delay, tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while int(process.stdout.readline()) < 5:
            pass
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        said = [int(line) for line in process.stdout.read().split()] or [5]
    state = Checkpoints(tmp_path, keep=2).newest(pytest.fail)
    assert state.round >= said[-1]
    assert set(state.shared.tensors["w"].tolist()) == {float(state.round)}
