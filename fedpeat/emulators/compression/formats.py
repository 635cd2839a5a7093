"""The forms that a weight is kept in: 8-bit and 4-bit integers with a scale a block, and a mask with what it keeps."""

from collections.abc import Mapping
from typing import Any

import torch

from fedpeat.core import Tensors
from fedpeat.emulators.compression.stored import Format, Layout, Shape

_LEVELS = 127


def whole(settings: Mapping[str, Any], key: str, most: int) -> int:
    """Return a setting that must be an integer from 1 to `most`.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is out of range.
    """
    value = settings[key]
    if type(value) is not int:
        raise TypeError(f"{key}={value!r} is no integer")
    if not 1 <= value <= most:
        raise ValueError(f"{key}={value} is not in 1 ... {most}")
    return value


def _block_count(shape: Shape, settings: Mapping[str, Any]) -> int:
    return -(-shape[1] // whole(settings, "block_size", shape[1]))


def _blocks_of(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """Return `(out, blocks, size)`, each row's last block filled up with zeros."""
    rest = -matrix.shape[1] % size
    return (torch.nn.functional.pad(matrix, (0, rest)) if rest else matrix).reshape(len(matrix), -1, size)


def _scaled(codes: torch.Tensor, scale: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    # A code has 8 bits or fewer and a scale 8: their product, exact in fp32, is rounded once in bf16 as well. In fp16 a
    # scale could overflow.
    work = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    products = _blocks_of(codes.to(work), size) * scale.to(work)[:, :, None]
    return products.flatten(1)[:, : codes.shape[1]].to(dtype)


def _rounded_up(scale: torch.Tensor) -> torch.Tensor:
    """Return positive scales in bf16, none smaller than it was: no code then leaves its range."""
    short = scale.to(torch.bfloat16)
    return torch.where(short.float() < scale, torch.nextafter(short, torch.full_like(short, torch.inf)), short)


def _codes(blocks: torch.Tensor, scale: torch.Tensor, least: int, most: int) -> torch.Tensor:
    steps = scale.float()
    codes = (blocks / torch.where(steps == 0, 1.0, steps)[:, :, None]).round().clamp(least, most)
    return codes.to(torch.int8).flatten(1)


def _all_weights(shape: Shape, _settings: Mapping[str, Any]) -> int:
    return shape[0] * shape[1]


def _int8_layout(shape: Shape, settings: Mapping[str, Any]) -> Layout:
    return {"codes": (torch.int8, shape), "scale": (torch.bfloat16, (shape[0], _block_count(shape, settings)))}


def _int8_encode(matrix: torch.Tensor, settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    blocks = _blocks_of(matrix.float(), settings["block_size"])
    scale = _rounded_up(blocks.abs().amax(dim=2) / _LEVELS)
    return {"codes": _codes(blocks, scale, -_LEVELS, _LEVELS)[:, : matrix.shape[1]], "scale": scale}


def _int8_decode(stored: Tensors, _shape: Shape, settings: Mapping[str, Any], dtype: torch.dtype) -> torch.Tensor:
    return _scaled(stored["codes"], stored["scale"], settings["block_size"], dtype)


def _int4_layout(shape: Shape, settings: Mapping[str, Any]) -> Layout:
    out, width = shape
    return {
        "codes": (torch.uint8, (out, -(-width // 2))),
        "scale": (torch.bfloat16, (out, _block_count(shape, settings))),
    }


def _int4_encode(matrix: torch.Tensor, settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    width = matrix.shape[1]
    blocks = _blocks_of(matrix.float(), settings["block_size"])
    above, below = blocks.amax(dim=2).clamp_min(0), -blocks.amin(dim=2).clamp_max(0)
    # Of the codes -8 ... 7, the side that reaches further gets the longer half: a negative scale turns them round.
    size = torch.maximum(torch.maximum(above, below) / 8, torch.minimum(above, below) / 7)
    scale = _rounded_up(size) * torch.where(above > below, -1, 1).to(torch.bfloat16)
    codes = _codes(blocks, scale, -8, 7)[:, :width] + 8
    pairs = torch.nn.functional.pad(codes, (0, width % 2)).to(torch.uint8).reshape(len(matrix), -1, 2)
    return {"codes": pairs[:, :, 0] | (pairs[:, :, 1] << 4), "scale": scale}


def _int4_decode(stored: Tensors, shape: Shape, settings: Mapping[str, Any], dtype: torch.dtype) -> torch.Tensor:
    packed = stored["codes"]
    codes = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)[:, : shape[1]].to(torch.int8) - 8
    return _scaled(codes, stored["scale"], settings["block_size"], dtype)


def _sparse_layout(shape: Shape, settings: Mapping[str, Any]) -> Layout:
    count = shape[0] * shape[1]
    return {"kept": (None, (whole(settings, "kept", count),)), "mask": (torch.uint8, (-(-count // 8),))}


def _sparse_encode(matrix: torch.Tensor, settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    kept = matrix.reshape(-1) != 0
    spare = settings["kept"] - int(kept.sum())  # zeros that were there before and are not among the smallest
    kept[torch.nonzero(~kept).reshape(-1)[:spare]] = True
    bits = torch.nn.functional.pad(kept, (0, -kept.numel() % 8)).reshape(-1, 8).to(torch.uint8)
    places = torch.arange(8, dtype=torch.uint8, device=matrix.device)
    return {"kept": matrix.reshape(-1)[kept], "mask": (bits << places).sum(dim=1, dtype=torch.uint8)}


def _sparse_decode(stored: Tensors, shape: Shape, _settings: Mapping[str, Any], dtype: torch.dtype) -> torch.Tensor:
    mask = stored["mask"]
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    kept = ((mask[:, None] >> places) & 1).reshape(-1)[: shape[0] * shape[1]].bool()
    dense = torch.zeros(kept.shape, dtype=dtype, device=mask.device)
    return dense.masked_scatter_(kept, stored["kept"].to(dtype)).reshape(shape)


def _kept_weights(_shape: Shape, settings: Mapping[str, Any]) -> int:
    return settings["kept"]


INT8 = Format(_int8_layout, _int8_encode, _int8_decode, _all_weights)
INT4 = Format(_int4_layout, _int4_encode, _int4_decode, _all_weights)
SPARSE = Format(_sparse_layout, _sparse_encode, _sparse_decode, _kept_weights)
