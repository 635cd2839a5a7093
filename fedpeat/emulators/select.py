"""Builders that choose which blocks of the middle stay."""

from fedpeat.core import ConfigError
from fedpeat.emulators.blocks import Blocks, Builder


def uniform(*, kept_blocks: int) -> Builder:
    """Keep `kept_blocks` blocks, spread evenly over the middle; its first and last are among them.

    Of m blocks, block `round(i * (m - 1) / (k - 1))` is kept for i = 0 ... k - 1 (halves to even); for k = 1, block
    `(m - 1) // 2`; for k = 0, none: the adapter's blocks then stand alone.

    Args:
        kept_blocks: k, from 0 to m.

    Raises:
        ConfigError: If the middle has fewer (when the builder is applied), or the number is negative.

    Source: G. Xiao, J. Lin, S. Han, Offsite-Tuning: Transfer Learning without Full Model, 2023, arXiv:2302.04870,
    section 3 (layer drop).

    Departures: k = 1, a division by zero in the authors' code, and k = 0 are defined.

    >>> from torch import nn
    >>> from fedpeat.emulators.blocks import Block
    >>> middle = Blocks(tuple(Block(index, nn.Identity()) for index in range(2, 12)))
    >>> [block.source for block in uniform(kept_blocks=4)(middle).blocks]
    [2, 5, 8, 11]
    """
    if kept_blocks < 0:
        raise ConfigError(f"cannot keep {kept_blocks} middle blocks", "it is a count", "set emulator.kept_blocks >= 0")

    def build(blocks: Blocks) -> Blocks:
        check_enough(blocks, kept_blocks)
        chosen = uniform_positions(len(blocks), kept_blocks)
        return Blocks(tuple(blocks.blocks[position] for position in chosen), blocks.origin)

    return Builder("uniform", {"kept_blocks": kept_blocks}, build)


def uniform_positions(middle: int, kept: int) -> tuple[int, ...]:
    """Return which of `middle` positions uniform selection keeps.

    >>> uniform_positions(10, 4), uniform_positions(10, 1), uniform_positions(3, 3), uniform_positions(5, 0)
    ((0, 3, 6, 9), (4,), (0, 1, 2), ())
    """
    if kept == 1:
        return ((middle - 1) // 2,)
    return tuple(round(index * (middle - 1) / (kept - 1)) for index in range(kept))


def check_enough(blocks: Blocks, kept: int) -> None:
    """Check that `kept` blocks can be kept.

    Raises:
        ConfigError: If there are fewer.
    """
    if kept > len(blocks):
        origin = f" ({blocks.origin})" if blocks.origin else ""
        raise ConfigError(
            f"cannot keep {kept} of {len(blocks)} middle blocks{origin}",
            remedy=f"set emulator.kept_blocks <= {len(blocks)} or shrink model.split",
        )
