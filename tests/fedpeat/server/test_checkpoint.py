import pytest
import torch

from fedpeat.core import RunState, StorageError, write_tensors
from fedpeat.server import read_checkpoint, write_checkpoint

STATE = RunState(
    round=3,
    tensors={"w": torch.randn(3)},
    server_step_state={"0/momentum/w": torch.randn(3)},
    control_state={"global_step": 30},
    global_step=30,
    seed=7,
)


def test_a_state_is_read_back_whole(tmp_path):
    path = tmp_path / "deep" / "state.safetensors"
    write_checkpoint(path, STATE)
    again = read_checkpoint(path)
    assert torch.equal(again.tensors["w"], STATE.tensors["w"])
    assert torch.equal(again.server_step_state["0/momentum/w"], STATE.server_step_state["0/momentum/w"])
    assert (again.round, again.control_state, again.global_step, again.seed) == (3, {"global_step": 30}, 30, 7)


def test_other_files_are_refused(tmp_path):
    write_tensors(tmp_path / "other.safetensors", {"w": torch.zeros(1)})
    with pytest.raises(StorageError, match="format"):
        read_checkpoint(tmp_path / "other.safetensors")
    with pytest.raises(StorageError):
        read_checkpoint(tmp_path / "absent.safetensors")
    path = tmp_path / "state.safetensors"
    write_checkpoint(path, STATE)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(StorageError):
        read_checkpoint(path)
