"""Builders that choose which blocks of the middle stay by where they are, or by chance: they look at no text."""

from collections.abc import Callable, Sequence

from fedpeat.core import ConfigError, seed_for, shorten
from fedpeat.emulators.blocks import Block, Blocks, Builder

_EMPTY = "use emulator=uniform emulator.kept_blocks=0 for an empty middle"


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
    return _by_position("uniform", kept_blocks, uniform_positions)


def first(*, kept_blocks: int) -> Builder:
    """Keep the first `kept_blocks` blocks of the middle.

    Args:
        kept_blocks: From 1 to as many as the middle has.

    Raises:
        ConfigError: If the middle has fewer (when the builder is applied), or the number is below 1.

    Source: a control; what is dropped are the deepest blocks, as A. Gromov et al., 2024, arXiv:2403.17887, section 4.4
    propose without a score.

    Departures: none; the adapter's last blocks stay there, too.

    >>> from torch import nn
    >>> from fedpeat.emulators.blocks import Block
    >>> middle = Blocks(tuple(Block(index, nn.Identity()) for index in range(2, 12)))
    >>> [block.source for block in first(kept_blocks=4)(middle).blocks]
    [2, 3, 4, 5]
    """
    check_kept(kept_blocks)
    return _by_position("first", kept_blocks, lambda _, kept: range(kept))


def last(*, kept_blocks: int) -> Builder:
    """Keep the last `kept_blocks` blocks of the middle.

    Args:
        kept_blocks: From 1 to as many as the middle has.

    Raises:
        ConfigError: If the middle has fewer (when the builder is applied), or the number is below 1.

    Source: a control, the counterpart of `first`.

    >>> from torch import nn
    >>> from fedpeat.emulators.blocks import Block
    >>> middle = Blocks(tuple(Block(index, nn.Identity()) for index in range(2, 12)))
    >>> [block.source for block in last(kept_blocks=4)(middle).blocks]
    [8, 9, 10, 11]
    """
    check_kept(kept_blocks)
    return _by_position("last", kept_blocks, lambda middle, kept: range(middle - kept, middle))


def middle_out(*, kept_blocks: int) -> Builder:
    """Keep the `kept_blocks` blocks that are nearest to the centre of the middle.

    Of m blocks, counted from 0, those with the smallest `|position - (m - 1) / 2|`; of two as near, the earlier.

    Args:
        kept_blocks: From 1 to as many as the middle has.

    Raises:
        ConfigError: If the middle has fewer (when the builder is applied), or the number is below 1.

    Source: the Gaussian-centred choice in the code of K. Zhang et al., CRaSh, 2023, arXiv:2310.15477.

    Departures: the likeliest choice instead of a drawn one.

    >>> from torch import nn
    >>> from fedpeat.emulators.blocks import Block
    >>> middle = Blocks(tuple(Block(index, nn.Identity()) for index in range(2, 12)))
    >>> [block.source for block in middle_out(kept_blocks=3)(middle).blocks]
    [5, 6, 7]
    """
    check_kept(kept_blocks)

    def central(middle: int, kept: int) -> Sequence[int]:
        return sorted(range(middle), key=lambda position: (abs(2 * position - (middle - 1)), position))[:kept]

    return _by_position("middle_out", kept_blocks, central)


def random_blocks(*, kept_blocks: int, seed: int | None = None) -> Builder:
    """Keep `kept_blocks` blocks at random: every choice of that many is as likely.

    Each block has a random number that follows from the seed and its index alone, and the smallest are kept; so with
    one seed, more kept blocks are the fewer ones and others.

    Args:
        kept_blocks: From 1 to as many as the middle has.
        seed: Of the choice; None takes the run's seed.

    Raises:
        ConfigError: If the middle has fewer (when the builder is applied), or the number is below 1.

    Source: a control.
    """
    check_kept(kept_blocks)

    def build(blocks: Blocks) -> Blocks:
        check_enough(blocks, kept_blocks)
        own = blocks.needed_context("random").seed if seed is None else seed
        drawn = {block.place: seed_for(own, "random blocks", block.place) for block in blocks.blocks}
        chosen = sorted(drawn, key=lambda place: drawn[place])[:kept_blocks]
        return blocks.having(blocks_at(blocks, chosen))

    return Builder("random", {"kept_blocks": kept_blocks, "seed": seed}, build)


def listed(*, blocks: Sequence[int]) -> Builder:
    """Keep the blocks that are listed, in the order in which they compute.

    Args:
        blocks: Indices in the full model, each once; in any order.

    Raises:
        ConfigError: If the list is empty, or an index stands there twice, is the adapter's, or is not the middle's
            (the latter two when the builder is applied).

    Source: a control, and a way to repeat any other choice.

    >>> from torch import nn
    >>> from fedpeat.emulators.blocks import Block
    >>> middle = Blocks(tuple(Block(index, nn.Identity()) for index in range(2, 12)))
    >>> [block.source for block in listed(blocks=[9, 2, 5])(middle).blocks]
    [2, 5, 9]
    """
    wanted = list(blocks)
    asked = f"cannot keep the middle blocks {wanted}"
    if not wanted:
        raise ConfigError(asked, "the list is empty", _EMPTY)
    strangers = [index for index in wanted if not isinstance(index, int) or isinstance(index, bool)]
    if strangers:
        raise ConfigError(asked, f"{strangers[0]!r} is no index", "list indices of blocks, e.g. [2, 5, 8]")
    if len(set(wanted)) < len(wanted):
        raise ConfigError(asked, "an index stands there twice", "list each block at most once")

    def build(row: Blocks) -> Blocks:
        _check_listed(row, wanted, asked)
        return row.having(blocks_at(row, wanted))

    return Builder("listed", {"blocks": sorted(wanted)}, build)


def uniform_positions(middle: int, kept: int) -> tuple[int, ...]:
    """Return which of `middle` positions uniform selection keeps.

    >>> uniform_positions(10, 4), uniform_positions(10, 1), uniform_positions(3, 3), uniform_positions(5, 0)
    ((0, 3, 6, 9), (4,), (0, 1, 2), ())
    """
    if kept == 1:
        return ((middle - 1) // 2,)
    return tuple(round(index * (middle - 1) / (kept - 1)) for index in range(kept))


def check_kept(kept: int) -> None:
    """Check that at least one block is to be kept.

    Raises:
        ConfigError: If not.
    """
    if kept < 1:
        raise ConfigError(f"cannot keep {kept} middle blocks", "this builder keeps one or more", _EMPTY)


def check_enough(blocks: Blocks, kept: int) -> None:
    """Check that `kept` blocks can be kept.

    Raises:
        ConfigError: If there are fewer.
    """
    count = len(blocks)
    if kept > count:
        origin = f" ({blocks.origin})" if blocks.origin else ""
        remedy = f"set emulator.kept_blocks <= {count}" if count else _EMPTY
        found = f"there are {count}{origin}"
        raise ConfigError(f"cannot keep {kept} middle blocks", found, f"{remedy}, or shrink model.split")


def blocks_at(blocks: Blocks, places: Sequence[int]) -> tuple[Block, ...]:
    """Return the row's blocks at `places` (indices in the full model), in the row's order."""
    wanted = set(places)
    return tuple(block for block in blocks.blocks if block.place in wanted)


def between_adapters(places: Sequence[int], adapter: Sequence[int]) -> list[list[int]]:
    """Divide ascending `places` where a block of the adapter stands in between.

    >>> between_adapters([1, 2, 4, 6], adapter=[0, 3, 7])
    [[1, 2], [4, 6]]
    """
    runs: list[list[int]] = []
    for place in places:
        if not runs or any(runs[-1][-1] < index < place for index in adapter):
            runs.append([])
        runs[-1].append(place)
    return runs


def _by_position(name: str, kept: int, choose: Callable[[int, int], Sequence[int]]) -> Builder:
    def build(blocks: Blocks) -> Blocks:
        check_enough(blocks, kept)
        chosen = sorted(choose(len(blocks), kept))
        return blocks.having(tuple(blocks.blocks[position] for position in chosen))

    return Builder(name, {"kept_blocks": kept}, build)


def _check_listed(row: Blocks, wanted: Sequence[int], asked: str) -> None:
    there = [block.place for block in row.blocks]
    strangers = sorted(set(wanted) - set(there))
    if not strangers:
        return
    adapter = row.context.split.adapter if row.context else ()
    origin = f" of {row.origin}" if row.origin else ""
    own = f"block {strangers[0]} is the adapter's{origin}"
    found = own if strangers[0] in adapter else f"there is no block {strangers[0]} in the middle{origin}"
    raise ConfigError(asked, found, f"choose from: {shorten(there, 40)}")
