"""Codecs as plain loops over numbers: slow, obvious, independent of the codecs package. Lists of fp32 in and out."""

import hashlib
import math

import numpy as np

TINY = 2.0**-99
LARGEST = float(np.finfo(np.float32).max)


def settled(values):
    """Round to fp32; numbers near 0 are 0, numbers beyond fp32's range are at its end."""
    with np.errstate(over="ignore"):
        rounded = [float(np.float32(x)) for x in values]
    return [np.float32(0 if abs(x) < TINY else min(max(x, -LARGEST), LARGEST)) for x in rounded]


def bf16_bits(values):
    """The 16 bits of each number: the upper half of its fp32 bits, rounded to nearest, ties to even."""
    out = []
    for value in settled(values):
        bits = int(np.float32(value).view(np.uint32))
        upper, lower = divmod(bits, 1 << 16)
        upper += lower > 0x8000 or (lower == 0x8000 and upper % 2 == 1)
        if upper & 0x7FFF == 0x7F80:  # rounded up to infinity
            upper -= 1
        out.append(upper)
    return out


def fp16_bits(values):
    return [int(np.float16(min(max(float(x), -65504.0), 65504.0)).view(np.uint16)) for x in settled(values)]


def block_codes(values, levels, block_size):
    """Integers in -levels..levels and one scale a block."""
    codes, scales, values = [], [], settled(values)
    for start in range(0, len(values), block_size):
        block = values[start : start + block_size]
        scale = np.float32(max(abs(x) for x in block)) / np.float32(levels)
        scales.append(scale)
        codes += [round(float(x / scale)) if scale else 0 for x in block]
    return codes, scales


def from_block_codes(codes, scales, block_size):
    exact = [code * float(scales[place // block_size]) for place, code in enumerate(codes)]
    return settled(exact)


def nibbles(codes):
    """Two codes a byte, low bits first; 8 stands for 0."""
    padded = [*codes, 0] if len(codes) % 2 else codes
    return [padded[place] + 8 + 16 * (padded[place + 1] + 8) for place in range(0, len(padded), 2)]


def largest(values, share):
    """Indices of the largest magnitudes, rising; of equal ones the first."""
    values = settled(values)
    kept = min(len(values), max(1, round(share * len(values))))
    return sorted(sorted(range(len(values)), key=lambda place: (-abs(float(values[place])), place))[:kept])


def feed_back(values, error, share, block_size=None):
    """One step of top-k with error feedback: indices, decoded delta, next error."""
    total = settled([float(x) + float(e) for x, e in zip(values, error, strict=True)])
    index = largest(total, share)
    chosen = [total[place] for place in index]
    if block_size:
        codes, scales = block_codes(chosen, 127, block_size)
        chosen = from_block_codes(codes, scales, block_size)
    decoded = [np.float32(0)] * len(total)
    for place, value in zip(index, chosen, strict=True):
        decoded[place] = value
    return index, decoded, settled([float(t) - float(d) for t, d in zip(total, decoded, strict=True)])


def rotation(count, seed, name):
    """DRIVE's rotation H S2 H S1 / D as three arrays: the dense H, the signs S1 and S2."""
    size = max(128, 2 ** math.ceil(math.log2(max(count, 1))))
    text = "\x1f".join([str(seed), "drive", name])
    own = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
    raw = hashlib.shake_128(str(own).encode()).digest(2 * size // 8)
    signs = np.array([1.0 if raw[place // 8] >> place % 8 & 1 else -1.0 for place in range(2 * size)])
    hadamard = (-1.0) ** np.bitwise_count(np.arange(size)[:, None] & np.arange(size))
    return hadamard, signs[:size], signs[size:]


def times(matrix, vector):
    return (matrix * vector).sum(axis=1)


def drive(values, seed, name):
    """The rotated vector, sign bits, scale, and what is decoded from them."""
    hadamard, first, second = rotation(len(values), seed, name)
    vector = np.zeros(len(first))
    vector[: len(values)] = settled(values)
    rotated = times(hadamard, second * times(hadamard, first * vector)) / len(vector)
    weight = math.fsum(abs(rotated))
    scale = math.fsum(vector**2) / weight if weight else 0.0
    signs = np.where(rotated >= 0, 1.0, -1.0)
    decoded = scale * first * times(hadamard, second * times(hadamard, signs)) / len(vector)
    return rotated, signs > 0, scale, decoded[: len(values)]
