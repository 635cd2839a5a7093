"""Weights in few bits: 8-bit and 4-bit integers."""

from fedpeat.emulators.blocks import Blocks, Builder
from fedpeat.emulators.compression.formats import INT4, INT8
from fedpeat.emulators.compression.layers import Linear, matrix_of, shape_of
from fedpeat.emulators.compression.shrink import Encoded, check_count, compress, each_layer
from fedpeat.emulators.compression.stored import Format


def int8(*, block_size: int | None = 64) -> Builder:
    """Keep the weights of linear layers as integers from -127 to 127, with one scale for some of a row.

    Every `block_size` neighbours in a row of the matrix `(out, in)` share `scale = max|w| / 127`, rounded up to bf16;
    `code = round(w / scale)`, to nearest, ties to even. A weight is off by at most `scale / 2` (and the rounding of
    the dtype it is computed with). Bytes: `out * in + 2 * out * ceil(in / block_size)`. Norms, biases and embeddings
    stay as they are. The integers are in the bundle, on the disk and in memory; the matrix exists only while a product
    with it is computed, which makes a step slower.

    Args:
        block_size: Weights that share a scale; None for a whole row.

    Raises:
        ConfigError: If `block_size` is no count, or (when it is applied) there are no linear layers.

    Source: T. Dettmers et al., 8-bit optimizers via block-wise quantization, 2021, arXiv:2110.02861.

    Departures: Evenly spaced levels; blocks do not cross rows; scales in bf16.
    """
    return _stored("int8", INT8, block_size)


def int4(*, block_size: int | None = 32) -> Builder:
    """Keep the weights of linear layers as integers from -8 to 7, two in a byte, with one scale for some of a row.

    As `int8`, with `|scale| = max(a / 8, b / 7)` of the largest positive and negative magnitudes, a being the larger
    and b the smaller: the scale's sign gives the larger side the longer half. A weight is off by at most `|scale| / 2`,
    and a zero stays one. Bytes: `out * ceil(in / 2) + 2 * out * ceil(in / block_size)`.

    Args:
        block_size: Weights that share a scale; None for a whole row.

    Raises:
        ConfigError: If `block_size` is no count, or (when it is applied) there are no linear layers.

    Source: T. Dettmers, L. Zettlemoyer, The case for 4-bit precision, 2022, arXiv:2212.09720 (blocks).

    Departures: Evenly spaced levels with a signed scale. A zero point a block, at equal bytes, was no better.
    """
    return _stored("int4", INT4, block_size)


def _stored(name: str, layer_format: Format, block_size: int | None) -> Builder:
    if block_size is not None:
        check_count(block_size, builder=name, key="block_size")

    def encode(layer: Linear) -> Encoded:
        inputs = shape_of(layer)[1]
        settings = {"block_size": min(block_size or inputs, inputs)}
        return Encoded(settings, layer_format.encode(matrix_of(layer), settings))

    def build(blocks: Blocks) -> Blocks:
        return compress(blocks, builder=name, kind=name, encode=each_layer(encode))

    return Builder(name, {"block_size": block_size}, build)
