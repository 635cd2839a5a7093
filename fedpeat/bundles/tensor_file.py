"""Safetensors files written as they go: one tensor in memory at a time, hashed on the way, laid out for mapping."""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fedpeat.core import ModelError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 64


@dataclass(frozen=True)
class WrittenFile:
    """A file that was written: its size in bytes, its SHA-256, and the bytes of tensors in it."""

    size: int
    sha256: str
    payload_bytes: int


def write_tensor_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> WrittenFile:
    """Write `tensors` as safetensors; the same tensors always give the same bytes.

    Tensors start at multiples of 64 bytes wherever their sizes allow it, as in torch's own memory: they are used where
    they are mapped, and math libraries promise the same bits only at the same alignment.

    Raises:
        OSError: If the file cannot be written.
        ModelError: If a tensor's dtype has no place in the format.
    """
    # Whole multiples of 64 bytes first, then by falling size: what is odd only ever displaces what is odd.
    names = sorted(tensors, key=lambda name: (tensors[name].nbytes % _ALIGNMENT != 0, -tensors[name].nbytes, name))
    header, end = {}, 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            remedy = "load the model in float32, bfloat16 or float16"
            raise ModelError(f"cannot write {name!r} as safetensors", f"its dtype is {tensor.dtype}", remedy)
        place = [end, end + tensor.nbytes]
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        end += tensor.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in (struct.pack("<Q", len(text)), text):
            file.write(chunk)
            digest.update(chunk)
        for name in names:
            raw = _bytes_of(tensors[name])
            file.write(raw)
            digest.update(raw)
    return WrittenFile(8 + len(text) + end, digest.hexdigest(), end)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, as hex.

    Raises:
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
