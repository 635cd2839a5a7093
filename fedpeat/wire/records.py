"""Named tensors to and from Flower's `ArrayRecord`."""

import functools
import io

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from fedpeat.core import Tensors, UpdateRefused

BFLOAT16 = "bfloat16-as-uint16"
"""Serialisation type of a bfloat16 tensor: Flower has no such dtype, so its bits travel as uint16."""

NUMPY = "numpy.ndarray"
"""Serialisation type of a tensor in the bytes of a `.npy` file: Flower's own."""

_MAX_HEADER_BYTES = 10_000


def to_arrays(tensors: Tensors) -> ArrayRecord:
    """Return `tensors` as a Flower record, bits unchanged."""
    return ArrayRecord({name: _to_array(tensor.detach().cpu()) for name, tensor in tensors.items()})


def _to_array(tensor: torch.Tensor) -> Array:
    rounded = tensor.dtype is torch.bfloat16
    values = (tensor.contiguous().view(torch.uint16) if rounded else tensor.contiguous()).numpy()
    dtype, stype = ("bfloat16", BFLOAT16) if rounded else (str(values.dtype), NUMPY)
    data = _header(values.dtype.str, values.shape) + values.tobytes()
    return Array(dtype=dtype, shape=values.shape, stype=stype, data=data)


@functools.lru_cache(maxsize=1024)
def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the header of a `.npy` file; making one takes longer than copying most tensors, and most are alike."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def read_arrays(record: ArrayRecord) -> dict[str, torch.Tensor]:
    """Return the tensors of a Flower record, bits unchanged.

    Raises:
        UpdateRefused: If an array is not a plain numeric one (nothing is ever unpickled).
    """
    return {name: _to_tensor(name, array) for name, array in record.items()}


def _view(data: bytes) -> np.ndarray:
    """Return the array in the bytes of a `.npy` file, without copying it."""
    wide = data[6:7] > b"\x01"
    begin = (12 if wide else 10) + int.from_bytes(data[8 : 12 if wide else 10], "little")
    shape, fortran, dtype = _described(data[:begin])
    values = np.ndarray(shape, dtype, data, begin, order="F" if fortran else "C")
    if values.nbytes != len(data) - begin:
        raise ValueError(f"{values.nbytes} bytes expected, {len(data) - begin} came")
    return values


@functools.lru_cache(maxsize=1024)
def _described(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, order and dtype; parsing a header takes longer than copying most tensors, and most are alike."""
    stream = io.BytesIO(header)
    wide = np.lib.format.read_magic(stream) != (1, 0)
    read = np.lib.format.read_array_header_2_0 if wide else np.lib.format.read_array_header_1_0
    shape, fortran, dtype = read(stream, max_header_size=_MAX_HEADER_BYTES)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return shape, fortran, dtype


def _to_tensor(name: str, array: Array) -> torch.Tensor:
    try:
        # The bytes belong to the message: copy, so that the tensor may outlive and change independently of it.
        tensor = torch.from_numpy(_view(array.data).copy())
    except (ValueError, TypeError, EOFError) as error:
        raise UpdateRefused(
            f"cannot read tensor {name!r} from the wire", str(error), "send it with fedpeat.wire.to_arrays"
        ) from error
    return tensor.view(torch.bfloat16) if array.stype == BFLOAT16 else tensor
