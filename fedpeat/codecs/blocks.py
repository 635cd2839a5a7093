"""Small integers with one scale a block: 8 or 4 bits an entry."""

import torch

from fedpeat.codecs.codec import Codec, Coder, stateless
from fedpeat.core import ConfigError, Tensors


def int8(*, block_size: int = 64) -> Codec:
    """Return the codec that sends integers from -127 to 127, and one fp32 scale a block of entries.

    In each block of consecutive entries, `scale = max|x| / 127` and `code = round(x / scale)`, to nearest, ties to
    even: nothing is random. The error of an entry is at most half its block's scale. Bytes of a tensor of `n` entries:
    `n + 4 * ceil(n / block_size)`.

    Args:
        block_size: Entries that share a scale.

    Source: Dettmers et al. 2022, arXiv 2110.02861 (block-wise quantisation).
    Departures: evenly spaced levels, as there is no optimiser state with its long tails here; blocks of 64, not 2048.
    """
    return stateless("int8", {"block_size": block_size}, block_codes(8, block_size))


def int4(*, block_size: int = 64) -> Codec:
    """Return the codec that sends integers from -7 to 7, two in a byte, and one fp32 scale a block of entries.

    As `int8`, with `scale = max|x| / 7`. Bytes of a tensor of `n` entries: `ceil(n / 2) + 4 * ceil(n / block_size)`.

    Args:
        block_size: Entries that share a scale.

    Source: Dettmers et al. 2022, arXiv 2110.02861 (block-wise quantisation).
    Departures: evenly spaced levels, symmetric about 0; the sixteenth is not used.
    """
    return stateless("int4", {"block_size": block_size}, block_codes(4, block_size))


def block_codes(bits: int, block_size: int) -> Coder:
    """Return the coder to integers of 8 or 4 bits.

    Raises:
        ConfigError: If `block_size` is not an integer of at least 1.
    """
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ConfigError(
            f"codec.block_size={block_size!r}", "a block holds 1 entry or more", "set codec.block_size, e.g. to 64"
        )
    levels, pack, unpack = (127, _as_is, _as_is) if bits == 8 else (7, _pack, _unpack)
    dtype = torch.int8 if bits == 8 else torch.uint8

    def layout(count: int) -> dict[str, tuple[torch.dtype, int]]:
        return {"": (dtype, -(-count * bits // 8)), "scale": (torch.float32, -(-count // block_size))}

    def encode(entries: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = _rows(entries, block_size)
        scale = rows.abs().amax(dim=1) / levels
        codes = (rows / torch.where(scale > 0, scale, 1.0)[:, None]).round().to(torch.int8)
        return {"": pack(codes.reshape(-1)[: entries.numel()]), "scale": scale}

    def problem(parts: Tensors, count: int) -> str:
        codes = unpack(parts[""])[:count]
        if bool((codes < -levels).any()):
            return f"a code is not in -{levels}..{levels}"
        return "a scale is negative" if bool((parts["scale"] < 0).any()) else ""

    def decode(parts: Tensors, count: int) -> torch.Tensor:
        codes = _rows(unpack(parts[""])[:count], block_size)
        return (codes * parts["scale"][:, None]).reshape(-1)[:count]

    return Coder(layout, encode, problem, decode)


def _rows(entries: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return one block a row, the last one filled up with zeros."""
    count = entries.numel()
    # A block is never longer than the tensor: a block_size from the wire must not decide how much memory is used.
    size = max(min(block_size, count), 1)
    return torch.nn.functional.pad(entries, (0, -count % size)).reshape(-1, size)


def _as_is(codes: torch.Tensor) -> torch.Tensor:
    return codes


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Return two codes a byte, each shifted by 8 to be positive, the first in the low bits."""
    shifted = torch.nn.functional.pad(codes + 8, (0, codes.numel() % 2), value=8).to(torch.uint8)
    low, high = shifted.reshape(-1, 2).unbind(dim=1)
    return low | (high << 4)


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=1).reshape(-1).to(torch.int8) - 8
