"""Fewer bits an entry, and nothing else: 32 (as it is), 16."""

from collections.abc import Mapping

import torch

from fedpeat.codecs.codec import Codec, Coder, stateless
from fedpeat.core import Tensors, UpdateRefused, all_finite, check_like


def none() -> Codec:
    """Return the codec that sends tensors as they are: fp32, 4 bytes an entry."""
    return Codec(
        "none",
        {"name": "none"},
        start=lambda _: {},
        encode=lambda delta, _state, _seed: (dict(delta), {}),
        decode=_accept,
        stateful=False,
    )


def _accept(encoded: Tensors, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    like = {name: torch.empty(shape, dtype=torch.float32, device="meta") for name, shape in shapes.items()}
    check_like(encoded, like, what="an update sent with codec=none")
    if not all_finite(encoded):
        found = "it has NaN or infinite entries"
        raise UpdateRefused("an update sent with codec=none must be finite", found, "lower its learning rate")
    return dict(encoded)


def bf16() -> Codec:
    """Return the codec that sends bfloat16: 2 bytes an entry, error at most 1/256 of the entry.

    Rounds to nearest, ties to even; entries beyond the largest finite bfloat16 (3.39e38) become that number.
    """
    return stateless("bf16", {}, cast_to(torch.bfloat16))


def fp16() -> Codec:
    """Return the codec that sends IEEE half precision: 2 bytes an entry.

    Rounds to nearest, ties to even; entries beyond +-65504 become +-65504. The error is at most 1/2048 of the entry, or
    3e-8 if that is more: entries below about 6e-5 lose relative precision, those below 3e-8 become 0. Where learning
    rates are small, `bf16` is the safer choice.
    """
    return stateless("fp16", {}, cast_to(torch.float16))


def cast_to(dtype: torch.dtype) -> Coder:
    """Return the coder that casts to a floating dtype, clamped to its finite range.

    >>> cast_to(torch.float16).encode(torch.tensor([1.0, -1e9]))[""].tolist()
    [1.0, -65504.0]
    """
    largest = torch.finfo(dtype).max
    return Coder(
        layout=lambda count: {"": (dtype, count)},
        encode=lambda entries: {"": entries.clamp(-largest, largest).to(dtype)},
        problem=lambda _parts, _count: "",
        decode=lambda parts, _count: parts[""].float(),
    )
