"""The largest entries only; what is not sent now is added to the next delta (error feedback)."""

from collections.abc import Mapping
from typing import Any

import torch

from fedpeat.codecs.blocks import block_codes
from fedpeat.codecs.casts import cast_to
from fedpeat.codecs.codec import Codec, Coder, decode_each, encode_each, settle
from fedpeat.core import ConfigError, Tensors, check_like, zeros_like


def top_k(*, share: float = 0.1) -> Codec:
    """Return the codec that sends the largest entries of each tensor, by magnitude, with error feedback.

    Sends C(d + e) and keeps e <- d + e - C(d + e): the delta `d`, the error `e` so far, and C, which keeps `k =
    max(1, round(share * n))` of `n` entries; of equal magnitudes the first. Bytes of a tensor: `8 * k` (fp32 value,
    int32 index).

    Args:
        share: Part of a tensor's entries to send, above 0 and at most 1.

    Source: Stich et al. 2018, arXiv 1809.07599, algorithm 1 (top-k with memory).
    Departures: the error is added to a round's delta, not to single gradients, and each tensor has its own k. A client
        that sits out some rounds sends its old error when it comes back, whole: it is neither aged nor clipped.
    """
    return _with_error_feedback("top_k", {"share": share}, _largest(share, cast_to(torch.float32)))


def top_k_int8(*, share: float = 0.1, block_size: int = 64) -> Codec:
    """Return the codec that sends the largest entries as `int8` sends them; error feedback covers both errors.

    A block is a run of chosen entries, in the order of their indices. Bytes of a tensor of which `k` entries are sent:
    `5 * k + 4 * ceil(k / block_size)`.

    Args:
        share: Part of a tensor's entries to send, above 0 and at most 1.
        block_size: Chosen entries that share a scale.

    Source: as `top_k` and `int8`; error feedback for any such compressor: Karimireddy et al. 2019, arXiv 1901.09847.
    Departures: as theirs.
    """
    settings = {"share": share, "block_size": block_size}
    return _with_error_feedback("top_k_int8", settings, _largest(share, block_codes(8, block_size)))


def _with_error_feedback(name: str, settings: Mapping[str, Any], coder: Coder) -> Codec:
    def encode(delta: Tensors, state: Tensors, _seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        check_like(state, delta, what=f"the error feedback of codec={name}")
        total = {key: settle(tensor.detach() + state[key]) for key, tensor in delta.items()}
        encoded = encode_each(total, lambda _: coder)
        sent = decode(encoded, {key: tensor.shape for key, tensor in total.items()})
        return encoded, {key: settle(tensor - sent[key]) for key, tensor in total.items()}

    def decode(encoded: Tensors, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
        return decode_each(encoded, shapes, lambda _: coder, codec=name)

    return Codec(
        name,
        {"name": name, **settings},
        start=lambda tensors: zeros_like(tensors, torch.float32),
        encode=encode,
        decode=decode,
        stateful=True,
    )


def _largest(share: float, values: Coder) -> Coder:
    """Return the coder that sends indices, rising, and their entries by the coder `values`."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ConfigError(f"codec.share={share!r}", "a share is above 0 and at most 1", "set codec.share, e.g. to 0.1")

    def kept(count: int) -> int:
        return min(count, max(1, round(share * count)))

    def layout(count: int) -> dict[str, tuple[torch.dtype, int]]:
        return {**values.layout(kept(count)), "index": (torch.int32, kept(count))}

    def encode(entries: torch.Tensor) -> dict[str, torch.Tensor]:
        index = _indices_of_largest(entries.abs(), kept(entries.numel()))
        return {**values.encode(entries[index]), "index": index.int()}

    def problem(parts: Tensors, count: int) -> str:
        index = parts["index"]
        if count and (int(index[0]) < 0 or int(index[-1]) >= count or bool((index[1:] <= index[:-1]).any())):
            return f"its indices must rise and lie in 0..{count - 1}"
        return values.problem(parts, kept(count))

    def decode(parts: Tensors, count: int) -> torch.Tensor:
        chosen = values.decode(parts, kept(count))
        return chosen.new_zeros(count).index_put((parts["index"].long(),), chosen)

    return Coder(layout, encode, problem, decode)


def _indices_of_largest(magnitudes: torch.Tensor, kept: int) -> torch.Tensor:
    """Return the indices, rising, of the `kept` largest; of equal ones the first.

    >>> _indices_of_largest(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist()
    [0, 1, 3]
    """
    if not kept:
        return torch.zeros(0, dtype=torch.long)
    # topk alone may choose any of equal entries.
    smallest = magnitudes.topk(kept, sorted=True).values[-1]
    above = (magnitudes > smallest).nonzero().reshape(-1)
    equal = (magnitudes == smallest).nonzero().reshape(-1)[: kept - above.numel()]
    return torch.cat((above, equal)).sort().values
