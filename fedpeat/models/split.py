"""Which blocks are the adapter, and which are the middle."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedpeat.core import ConfigError


@dataclass(frozen=True)
class Split:
    """A model's blocks, divided in two; together they are `0 ... count - 1`, each index once.

    Attributes:
        adapter: Indices of the blocks that a device keeps whole and tunes, ascending; at least one.
        middle: Indices of the others, ascending; may be empty.
    """

    adapter: tuple[int, ...]
    middle: tuple[int, ...]

    @property
    def count(self) -> int:
        """Blocks of the full model."""
        return len(self.adapter) + len(self.middle)

    def __str__(self) -> str:
        """Tell the split as users write it.

        >>> str(make_split(14)), str(make_split(6, blocks=[0, 3])), str(make_split(4, blocks="all"))
        ('split 2+2 of 14', 'split at blocks [0, 3] of 6', 'split all of 4')
        """
        if not self.middle:
            return f"split all of {self.count}"
        first, last = self.middle[0], self.count - 1 - self.middle[-1]
        if first + last == len(self.adapter):
            return f"split {first}+{last} of {self.count}"
        return f"split at blocks {list(self.adapter)} of {self.count}"


def make_split(
    count: int, *, first: int = 2, last: int = 2, blocks: Sequence[int] | Literal["all"] | None = None
) -> Split:
    """Choose the adapter among `count` blocks.

    Args:
        count: Blocks of the full model.
        first: Leading blocks in the adapter.
        last: Trailing blocks in the adapter.
        blocks: Any list of block indices instead of `first` and `last`, or `"all"`.

    Raises:
        ConfigError: If that leaves no adapter, or asks for blocks that are not there.

    >>> make_split(6, first=1, last=2)
    Split(adapter=(0, 4, 5), middle=(1, 2, 3))
    >>> make_split(4, blocks=[3, 0])
    Split(adapter=(0, 3), middle=(1, 2))
    """
    if blocks is None:
        adapter = _ends(count, first, last)
    elif isinstance(blocks, str):
        if blocks != "all":
            raise ConfigError(
                f"cannot split at model.split.blocks={blocks!r}", "it is a list of block indices", "or 'all'"
            )
        adapter = list(range(count))
    else:
        adapter = _listed(count, blocks)
    if not adapter:
        found, remedy = "then no block is the adapter", "set model.split.first or model.split.last to 1 or more"
        raise ConfigError(f"cannot split a model of {count} blocks", found, remedy)
    return Split(tuple(adapter), tuple(index for index in range(count) if index not in set(adapter)))


def _ends(count: int, first: int, last: int) -> list[int]:
    asked = f"cannot split off the first {first} and last {last} blocks"
    if first < 0 or last < 0:
        raise ConfigError(asked, "they are counts", "set model.split.first and model.split.last to 0 or more")
    if first + last > count:
        remedy = f"choose model.split.first + model.split.last <= {count}"
        raise ConfigError(asked, f"the model has {count} blocks", remedy)
    return [*range(first), *range(count - last, count)]


def _listed(count: int, blocks: Sequence[int]) -> list[int]:
    asked = f"cannot split at model.split.blocks={list(blocks)}"
    remedy = f"list each index from 0 to {count - 1} at most once"
    strangers = [b for b in blocks if not isinstance(b, int) or isinstance(b, bool) or not 0 <= b < count]
    if strangers:
        raise ConfigError(asked, f"{strangers[0]!r} is none of the model's {count} blocks", remedy)
    if len(set(blocks)) < len(blocks):
        raise ConfigError(asked, "an index stands there twice", remedy)
    return sorted(blocks)
