"""A codec as a value, and what all codecs share: names of parts, checks of what came, which numbers count as zero."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch

from fedpeat.core import Tensors, UpdateRefused, count_bytes, shorten

TINY = 2.0**-99
"""Entries nearer to 0 than this (about 1.6e-30) count as 0 in every codec but `none`.

Scales and errors made of larger entries are never subnormal, so that flushing subnormals (`torch.set_flush_denormal`,
some processors) cannot change what is sent or decoded.
"""

LARGEST = torch.finfo(torch.float32).max
REMEDY = "both ends must use the same codec, model, split and peft settings"


class Codec(NamedTuple):
    """A way to send a delta.

    A tensor of the delta becomes `<name>`, its main part, and perhaps side parts `<name>|<part>`; a part that all
    tensors share is `|<part>`. All are flat, save with `none`. What is sent is their bytes: see `payload`.

    Attributes:
        name: As in `conf/codec/`.
        description: JSON-like: `name` and the builder's keywords; `from_description` rebuilds the codec.
        start: Returns a client's state before its first delta, given tensors like the delta; empty if it keeps none.
        encode: Returns `(encoded, next state)`, given `(delta, state, seed)`: a delta of finite fp32 tensors, and a
            seed of 63 bits (`seed_for`) that only codecs with random choices use. Arguments are not changed. Raises
            `UpdateRefused` if the state is of other tensors than the delta.
        decode: Returns the delta, finite and fp32, given `(encoded, shapes)`, the shapes by name. Raises
            `UpdateRefused` for names, dtypes, lengths or values that do not fit: `encoded` may come from an attacker.
        stateful: Whether the state must be kept, on the client's disk.
    """

    name: str
    description: Mapping[str, Any]
    start: Callable[[Tensors], dict[str, torch.Tensor]]
    encode: Callable[[Tensors, Tensors, int], tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]
    decode: Callable[[Tensors, Mapping[str, torch.Size]], dict[str, torch.Tensor]]
    stateful: bool


class Coder(NamedTuple):
    """A way to send one tensor, flat; parts go by their names, `""` being the main one.

    Attributes:
        layout: Returns dtype and length of each part, given the number of entries.
        encode: Returns the parts, given settled entries (see `settle`).
        problem: Returns what is wrong with parts that have the right layout and are finite, or `""`.
        decode: Returns the entries, given sound parts and their number.
    """

    layout: Callable[[int], dict[str, tuple[torch.dtype, int]]]
    encode: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    problem: Callable[[Tensors, int], str]
    decode: Callable[[Tensors, int], torch.Tensor]


def payload(encoded: Tensors) -> int:
    """Return what is sent, in bytes: entries times bytes an entry, over all encoded tensors."""
    return count_bytes(encoded)


def settle(tensor: torch.Tensor) -> torch.Tensor:
    """Return a new tensor with entries nearer to 0 than `TINY` as 0, and those beyond fp32's range at its ends.

    >>> settle(torch.tensor([1e-40, -0.0, 1.5, float("inf")])).tolist()
    [0.0, 0.0, 1.5, 3.4028234663852886e+38]
    """
    return torch.where(tensor.abs() < TINY, 0.0, tensor.clamp(-LARGEST, LARGEST))


def stateless(name: str, settings: Mapping[str, Any], coder: Coder) -> Codec:
    """Return the codec that sends each tensor by `coder` and keeps nothing."""
    return Codec(
        name,
        {"name": name, **settings},
        start=lambda _: {},
        encode=lambda delta, _state, _seed: (encode_each(delta, lambda _: coder), {}),
        decode=lambda encoded, shapes: decode_each(encoded, shapes, lambda _: coder, codec=name),
        stateful=False,
    )


def encode_each(delta: Tensors, coder_of: Callable[[str], Coder]) -> dict[str, torch.Tensor]:
    """Return the parts of all tensors, each sent by its own coder."""
    return {
        _label(name, part): value
        for name, tensor in delta.items()
        for part, value in coder_of(name).encode(settle(tensor.detach().reshape(-1))).items()
    }


def decode_each(
    encoded: Tensors, shapes: Mapping[str, torch.Size], coder_of: Callable[[str], Coder], *, codec: str
) -> dict[str, torch.Tensor]:
    """Return the delta; inverse of `encode_each` up to what the coders lose.

    Raises:
        UpdateRefused: If a part is missing, unknown, of another dtype or length, not finite, or not sound.
    """
    coders = {name: coder_of(name) for name in shapes}
    layouts = {name: coders[name].layout(math.prod(shape)) for name, shape in shapes.items()}
    check_names(encoded, {_label(name, part) for name, layout in layouts.items() for part in layout}, codec=codec)
    delta = {}
    for name, shape in shapes.items():
        parts = {part: encoded[_label(name, part)] for part in layouts[name]}
        for part, (dtype, length) in layouts[name].items():
            check_part(parts[part], dtype, length, what=_what(_label(name, part), codec))
        if found := coders[name].problem(parts, math.prod(shape)):
            raise UpdateRefused(f"{_what(name, codec)} must be decodable", found, REMEDY)
        delta[name] = settle(coders[name].decode(parts, math.prod(shape))).reshape(shape)
    return delta


def check_names(encoded: Tensors, expected: Collection[str], *, codec: str) -> None:
    """Check that exactly the expected parts came.

    Raises:
        UpdateRefused: With those missing and unknown.
    """
    missing, unknown = sorted(set(expected) - set(encoded)), sorted(set(encoded) - set(expected))
    if missing or unknown:
        found = [f"missing: {shorten(missing, 3)}"] if missing else []
        found += [f"unknown: {shorten(unknown, 3)}"] if unknown else []
        raise UpdateRefused(
            f"an update sent with codec={codec} must hold {len(expected)} parts", "; ".join(found), REMEDY
        )


def check_part(part: torch.Tensor, dtype: torch.dtype, length: int, *, what: str) -> None:
    """Check dtype and length of a part, and that it is finite.

    Raises:
        UpdateRefused: If one of them is wrong.
    """
    if part.dtype != dtype or part.shape != (length,):
        found = f"it is {tuple(part.shape)} {part.dtype}"
        raise UpdateRefused(f"{what} must be ({length},) {dtype}", found, REMEDY)
    if dtype.is_floating_point and not bool(torch.isfinite(part).all()):
        raise UpdateRefused(f"{what} must be finite", "it has NaN or infinite entries", "lower its learning rate")


def _label(name: str, part: str) -> str:
    return f"{name}|{part}" if part else name


def _what(label: str, codec: str) -> str:
    return f"{label!r} of an update sent with codec={codec}"
