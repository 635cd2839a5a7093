import hashlib
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from fedpeat.bundles.tensor_file import sha256_of, write_tensor_file
from fedpeat.core import ModelError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 9), max_size=3), st.sampled_from(DTYPES)),
        max_size=8,
    )
)
def test_safetensors_reads_what_is_written(tmp_path_factory, entries):
    tensors = {f"t{number}": torch.randn(shape).mul(100).to(dtype) for number, (shape, dtype) in enumerate(entries)}
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    written = write_tensor_file(path, tensors)
    again = load_file(path)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)
    assert written.size == path.stat().st_size
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == sha256_of(path)
    assert written.payload_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_order_and_layout_in_memory_do_not_matter(tmp_path):
    wide = torch.arange(12.0).reshape(3, 4)
    one = write_tensor_file(tmp_path / "a", {"x": wide.t(), "y": torch.ones(2)})
    two = write_tensor_file(tmp_path / "b", {"y": torch.ones(2), "x": wide.t().contiguous()})
    assert one == two


def test_tensors_of_whole_lines_start_at_lines(tmp_path):
    odd = {f"odd{size}": torch.ones(size) for size in (1, 3, 7)}
    even = {f"even{size}": torch.ones(size) for size in (16, 160, 32)}
    write_tensor_file(tmp_path / "a", {**odd, **even})
    assert (8 + struct.unpack("<Q", (tmp_path / "a").read_bytes()[:8])[0]) % 64 == 0
    mapped = load_file(tmp_path / "a")
    assert all(mapped[name].data_ptr() % 64 == 0 for name in even)


def test_files_tell_that_they_are_torchs(tmp_path):
    write_tensor_file(tmp_path / "a", {"x": torch.ones(1)})
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_dtype_without_a_place(tmp_path):
    with pytest.raises(ModelError, match="complex64"):
        write_tensor_file(tmp_path / "a", {"x": torch.ones(1, dtype=torch.complex64)})
