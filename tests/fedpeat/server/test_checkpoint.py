import pytest
import torch

from fedpeat.core import GlobalState, RunState, StorageError, digest, write_tensors
from fedpeat.server import read_checkpoint, write_checkpoint

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
    with pytest.raises(StorageError, match="reads format '2'"):
        read_checkpoint(tmp_path / "older.safetensors")
    with pytest.raises(StorageError):
        read_checkpoint(tmp_path / "absent.safetensors")
    path = tmp_path / "state.safetensors"
    write_checkpoint(path, STATE)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(StorageError):
        read_checkpoint(path)
