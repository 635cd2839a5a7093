"""What an emulator builder takes and gives: blocks, each knowing where it comes from and what was done to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Block:
    """One block of an emulator.

    Attributes:
        source: Its index in the full model.
        module: Its module; a builder that changes weights makes a new one and leaves the full model's alone.
        changes: What was done to it, JSON-like, in order: enough to rebuild its structure; empty for the original.
    """

    source: int
    module: nn.Module
    changes: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Blocks:
    """A row of blocks in the order in which they compute: at first the whole middle, at last the emulator.

    Attributes:
        blocks: The blocks.
        origin: Whose they are, for messages ("GPT2LMHeadModel, split 2+2 of 14").
    """

    blocks: tuple[Block, ...]
    origin: str = ""

    def __len__(self) -> int:
        return len(self.blocks)


@dataclass(frozen=True)
class Builder:
    """A way to make an emulator: a value that maps blocks to blocks and can tell how.

    Attributes:
        name: As in the configs ("uniform").
        settings: Its keywords, JSON-like.
        build: The function itself; pure.
    """

    name: str
    settings: Mapping[str, Any] = field(hash=False)
    build: Callable[[Blocks], Blocks]

    def __call__(self, blocks: Blocks) -> Blocks:
        """Return the emulator's blocks."""
        return self.build(blocks)

    def describe(self) -> dict[str, Any]:
        """Return name and settings, for the manifest."""
        return {"name": self.name, **self.settings}


def chain(*builders: Builder) -> Builder:
    """Apply builders one after another: select, then make smaller, say. Of none, the middle stays as it is.

    >>> row = Blocks(tuple(Block(index, nn.Identity()) for index in range(3)))
    >>> [block.source for block in chain()(row).blocks]
    [0, 1, 2]
    """

    def build(blocks: Blocks) -> Blocks:
        for builder in builders:
            blocks = builder(blocks)
        return blocks

    return Builder("chain", {"builders": [builder.describe() for builder in builders]}, build)
