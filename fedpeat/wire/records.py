"""Named tensors to and from Flower's `ArrayRecord`."""

import io

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from fedpeat.core import Tensors, UpdateRefused

BFLOAT16 = "bfloat16-as-uint16"
"""Serialisation type of a bfloat16 tensor: Flower has no such dtype, so its bits travel as uint16."""

_MAX_HEADER_BYTES = 10_000


def to_arrays(tensors: Tensors) -> ArrayRecord:
    """Return `tensors` as a Flower record, bits unchanged."""
    return ArrayRecord({name: _to_array(tensor.detach().cpu()) for name, tensor in tensors.items()})


def _to_array(tensor: torch.Tensor) -> Array:
    if tensor.dtype is not torch.bfloat16:
        return Array(tensor.contiguous().numpy())
    plain = Array(tensor.contiguous().view(torch.uint16).numpy())
    return Array(dtype="bfloat16", shape=plain.shape, stype=BFLOAT16, data=plain.data)


def read_arrays(record: ArrayRecord) -> dict[str, torch.Tensor]:
    """Return the tensors of a Flower record, bits unchanged.

    Raises:
        UpdateRefused: If an array is not a plain numeric one (nothing is ever unpickled).
    """
    return {name: _to_tensor(name, array) for name, array in record.items()}


def _to_tensor(name: str, array: Array) -> torch.Tensor:
    try:
        values = np.lib.format.read_array(io.BytesIO(array.data), allow_pickle=False, max_header_size=_MAX_HEADER_BYTES)
        # The bytes belong to the message: copy, so that the tensor may outlive and change independently of it.
        tensor = torch.from_numpy(np.array(values))
    except (ValueError, TypeError, EOFError) as error:
        raise UpdateRefused(
            f"cannot read tensor {name!r} from the wire", str(error), "send it with fedpeat.wire.to_arrays"
        ) from error
    return tensor.view(torch.bfloat16) if array.stype == BFLOAT16 else tensor
