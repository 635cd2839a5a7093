"""Gaussian noise whose every bit comes from the operating system, or, to be repeated, from a seed."""

import os
from collections.abc import Callable

import numpy as np
import torch

from fedpeat.core import seed_for

Bits = Callable[[int], np.ndarray]
"""Returns so many random numbers of 64 bits, `(count,)`, uint64."""

_AT_ONCE = 1 << 18


def secret(count: int) -> np.ndarray:
    """Return bits of the operating system's generator for secrets."""
    return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)


def repeatable(seed: int) -> Bits:
    """Return bits that follow from a seed: whoever knows it knows them.

    >>> bool((repeatable(1)(3) == repeatable(1)(3)).all())
    True
    """
    # Not torch's generator on the CPU: it uses 32 bits of a seed, few enough to try them all.
    return np.random.Philox(key=seed).random_raw


def bits_of(seed: int | None, *parts: object) -> Bits:
    """Return the bits for one use of a seed, named by `parts`; without a seed, secret ones."""
    return secret if seed is None else repeatable(seed_for(seed, "privacy", *parts))


def normal(bits: Bits, shape: tuple[int, ...]) -> torch.Tensor:
    """Return standard normal numbers, fp64, made of `bits`.

    They lie within 8.6 standard deviations: what lies beyond has a probability of 1e-17.

    Source: Box and Muller 1958, "A note on the generation of random normal deviates".
    """
    count = int(np.prod(shape, dtype=np.int64))
    parts = [_pairs(bits, min(_AT_ONCE, count - first)) for first in range(0, count, _AT_ONCE)]
    return torch.from_numpy(np.concatenate(parts) if parts else np.empty(0)).reshape(shape)


def _pairs(bits: Bits, count: int) -> np.ndarray:
    half = (count + 1) // 2
    # 53 bits each, the first in (0, 1], as the logarithm of 0 is none.
    radius = np.sqrt(-2 * np.log(((bits(half) >> np.uint64(11)) + np.uint64(1)) * 2.0**-53))
    angle = 2 * np.pi * ((bits(half) >> np.uint64(11)) * 2.0**-53)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
