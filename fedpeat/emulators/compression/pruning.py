"""Zeros in place of the smallest weights."""

from functools import partial

import torch

from fedpeat.core import ConfigError, nearest
from fedpeat.emulators.blocks import Blocks, Builder
from fedpeat.emulators.compression.formats import SPARSE
from fedpeat.emulators.compression.layers import Linear, as_weight, matrix_of
from fedpeat.emulators.compression.shrink import Encoded, check_share, compress, each_layer

_FORMS = ("dense", "sparse")


def magnitude_pruning(*, share: float = 0.5, stored: str = "sparse") -> Builder:
    """Put zeros in place of the smallest weights of each linear layer.

    Of a matrix of n weights, the `floor(share * n)` of least magnitude become 0; among equal ones, the first in the
    order of rows of `(out, in)`. Biases stay.

    Args:
        share: Weights that become 0, above 0 and below 1.
        stored: `sparse`: the others and one bit a weight are in the bundle, on the disk and in memory, with w bytes a
            weight `(n - floor(share * n)) * w + ceil(n / 8)` bytes; the matrix exists only while a product with it is
            computed. `dense`: the matrix with its zeros, as many bytes as before and as fast, for comparisons.

    Raises:
        ConfigError: If an argument is unknown or out of range, or (when it is applied) there are no linear layers, or
            stored sparse they would be no smaller.

    Source: S. Han et al., Learning both weights and connections for efficient neural networks, 2015, arXiv:1506.02626.

    Departures: The same share of each matrix, at once and without training in between.
    """
    check_share(share, builder="pruned", whole=False)
    if stored not in _FORMS:
        raise ConfigError(f"emulator=pruned with stored={stored!r}", "no such form", nearest(str(stored), _FORMS))

    encode = partial(_encode, share=share, sparse=stored == "sparse")
    kind = "sparse" if stored == "sparse" else "pruned"

    def build(blocks: Blocks) -> Blocks:
        return compress(blocks, builder="pruned", kind=kind, encode=each_layer(encode))

    return Builder("pruned", {"share": share, "stored": stored}, build)


def without_smallest(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """Return a copy whose `count` entries of least magnitude are 0; of equal ones, the first.

    >>> without_smallest(torch.tensor([[3.0, -1.0], [1.0, 2.0]]), 1)
    tensor([[3., 0.],
            [1., 2.]])
    """
    entries = matrix.flatten().clone()
    if count:
        sizes = entries.abs()
        largest = sizes.float().kthvalue(count).values
        smaller = sizes < largest
        equal = torch.nonzero(sizes == largest).flatten()
        entries[smaller] = 0
        entries[equal[: count - int(smaller.sum())]] = 0
    return entries.reshape(matrix.shape)


def _encode(layer: Linear, *, share: float, sparse: bool) -> Encoded:
    matrix = matrix_of(layer)
    count = int(share * matrix.numel())
    settings = {"kept": matrix.numel() - count}
    rest = without_smallest(matrix, count)
    if not sparse:
        return Encoded(settings, {"weight": as_weight(layer, rest)})
    values = SPARSE.encode(rest, settings)
    if sum(value.nbytes for value in values.values()) >= matrix.nbytes:
        raise ConfigError(
            f"emulator=pruned with share={share} and stored=sparse",
            "to say where the zeros are takes as many bytes as they save",
            "raise emulator.share, e.g. to 0.5, or set emulator.stored=dense",
        )
    return Encoded(settings, values)
