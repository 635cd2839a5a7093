import pickle

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from fedpeat.core import UpdateRefused, count_bytes
from fedpeat.wire import read_arrays, to_arrays

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (4, 5), (2, 3, 4)])
def test_tensors_travel_bit_for_bit(dtype, shape):
    tensor = (torch.rand(shape) * 100).to(dtype)
    again = read_arrays(to_arrays({"x": tensor}))["x"]
    assert again.dtype == dtype
    assert again.shape == tensor.shape
    assert torch.equal(again, tensor)


def test_what_was_read_can_be_changed_without_touching_what_was_sent():
    tensor = torch.ones(3)
    record = to_arrays({"x": tensor})
    read_arrays(record)["x"].add_(1)
    assert torch.equal(read_arrays(record)["x"], torch.ones(3))
    assert torch.equal(tensor, torch.ones(3))


def test_framing_is_at_most_300_bytes_a_tensor():
    tensors = {f"model.layers.{i}.self_attn.q_proj.lora_A.weight": torch.zeros(8, 64) for i in range(20)}
    record = to_arrays(tensors)
    sent = sum(len(array.data) + len(name) for name, array in record.items())
    assert count_bytes(tensors) < sent <= count_bytes(tensors) + 300 * len(tensors)


class Bomb:
    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an array",
        pickle.dumps(Bomb()),
        np.lib.format.magic(1, 0) + b"\xff\xff",
    ],
)
def test_hostile_bytes_are_refused(data, capsys):
    record = ArrayRecord({"x": Array(dtype="float32", shape=(3,), stype="numpy.ndarray", data=data)})
    with pytest.raises(UpdateRefused):
        read_arrays(record)
    assert capsys.readouterr().out == ""


def test_an_array_of_objects_is_refused():
    import io

    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
    record = ArrayRecord({"x": Array(dtype="object", shape=(1,), stype="numpy.ndarray", data=buffer.getvalue())})
    with pytest.raises(UpdateRefused):
        read_arrays(record)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 5), (1, 1, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16])
def test_arrays_are_flowers_own_to_the_byte(shape, dtype):
    tensor = torch.ones(shape, dtype=dtype)
    ours, theirs = to_arrays({"w": tensor})["w"], Array(tensor.numpy())
    assert (ours.dtype, tuple(ours.shape), ours.stype) == (theirs.dtype, tuple(theirs.shape), theirs.stype)
    assert ours.data == theirs.data
