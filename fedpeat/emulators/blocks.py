"""What an emulator builder takes and gives: blocks, each knowing where it comes from and what was done to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fedpeat.core import ConfigError, ModelError, Tensors, digest
from fedpeat.emulators.changes import check_known
from fedpeat.models import LoadedModel, Split, check_plain, describe, find_blocks, model_tensors


@dataclass(frozen=True)
class Block:
    """One block of an emulator.

    Attributes:
        source: Its index in the full model.
        module: Its module; a builder that changes weights makes a new one and leaves the full model's alone. One module
            at several places is stored and sent once.
        changes: What was done to it, JSON-like, in order: enough to rebuild its structure (see
            `fedpeat.emulators.changes`); empty for the original.
        place: The index of the full model's block in whose place it computes; its own unless it is shared.
    """

    source: int
    module: nn.Module
    changes: tuple[Mapping[str, Any], ...] = ()
    place: int = -1

    def __post_init__(self) -> None:
        """Take its own place if none is given."""
        if self.place < 0:
            object.__setattr__(self, "place", self.source)

    @property
    def shared(self) -> bool:
        """Whether it computes in another block's place."""
        return self.place != self.source


@dataclass(frozen=True)
class BuildContext:
    """What a server has at hand when it builds an emulator.

    Attributes:
        model: The full model; builders only read it.
        split: Which of its blocks are the adapter.
        rows: Public text as keywords for the model (`input_ids`, `labels`, perhaps `attention_mask`), each
            `(rows, tokens)`; None where the server has none.
        seed: The run's seed.
        cache: Where scores and distilled emulators are kept; None keeps nothing.
        batch_size: Rows of a forward pass.
        tell: Told what is being done, and how far it is (0 to 1; None where that is not known).
    """

    model: PreTrainedModel
    split: Split
    rows: Tensors | None = None
    seed: int = 0
    cache: Path | None = None
    batch_size: int = 8
    tell: Callable[[str, float | None], None] = lambda _text, _share: None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the full model's tensors."""
        return digest({name: tensor for name, tensor, _ in model_tensors(self.model)})


@dataclass(frozen=True)
class Blocks:
    """A row of blocks in the order in which they compute: at first the whole middle, at last the emulator.

    Attributes:
        blocks: The blocks.
        origin: Whose they are, for messages ("GPT2LMHeadModel, split 2+2 of 14").
        context: What builders may use besides the blocks.
        description: The builder that made them, as its `describe` says; empty for the whole middle.
        notes: What builders found out, JSON-like, for reports and plots; it stays with the server.
    """

    blocks: tuple[Block, ...]
    origin: str = ""
    context: BuildContext | None = field(default=None, repr=False)
    description: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[Mapping[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.blocks)

    def having(self, blocks: tuple[Block, ...], *notes: Mapping[str, Any]) -> "Blocks":
        """Return the same row with other blocks, and notes added."""
        return replace(self, blocks=blocks, notes=(*self.notes, *notes))

    def changed(self, change: Callable[[Block], Block]) -> "Blocks":
        """Return the row with `change` applied to each block; one that is shared is changed once."""
        done: dict[int, Block] = {}
        for block in self.blocks:
            if id(block.module) not in done:
                done[id(block.module)] = change(block)
        return self.having(
            tuple(replace(done[id(block.module)], source=block.source, place=block.place) for block in self.blocks)
        )

    def needed_context(self, builder: str) -> BuildContext:
        """Return the context.

        Raises:
            ConfigError: If there is none.
        """
        if self.context is None:
            raise ConfigError(
                f"cannot use emulator={builder} here", "no full model came with the blocks", "call make_emulator"
            )
        return self.context

    def needed_rows(self, builder: str) -> Tensors:
        """Return the public text, `(rows, tokens)` each.

        Raises:
            ConfigError: If there is none.
        """
        context = self.needed_context(builder)
        if context.rows is None or not len(context.rows["input_ids"]):
            raise ConfigError(
                f"emulator={builder} needs public text on the server",
                "the server has none",
                "set data.public_share or data.server_share, e.g. 0.05, or data.server_path",
            )
        return context.rows


@dataclass(frozen=True)
class Builder:
    """A way to make an emulator: a value that maps blocks to blocks and can tell how.

    Attributes:
        name: As in the configs ("uniform").
        settings: Its keywords, JSON-like.
        build: The function itself; equal blocks, context and settings give equal blocks.
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


def chain(*, stages: Mapping[str, Builder]) -> Builder:
    """Apply builders one after another, in the order of `stages`: select, then make smaller, say.

    Args:
        stages: Builders by any names; of none, the middle stays as it is.

    >>> row = Blocks(tuple(Block(index, nn.Identity()) for index in range(3)))
    >>> [block.source for block in chain(stages={})(row).blocks]
    [0, 1, 2]
    """

    def build(blocks: Blocks) -> Blocks:
        for builder in stages.values():
            blocks = builder(blocks)
        return blocks

    return Builder("chain", {"stages": {name: builder.describe() for name, builder in stages.items()}}, build)


def make_emulator(
    loaded: LoadedModel, *, split: Split, builder: Builder, context: BuildContext | None = None
) -> Blocks:
    """Return the emulator that `builder` makes of a full model's middle.

    Args:
        loaded: The full model; only read. It may be on any device.
        split: Which blocks are the adapter.
        builder: How the middle becomes the emulator.
        context: What the builder may use; without one, the model and the split alone.

    Raises:
        ConfigError: If the builder cannot be applied (more kept blocks than the middle has, no public text).
        ModelError: If the model has no blocks, has layers attached, or could not be rebuilt from a description.
    """
    stack = find_blocks(loaded.model)
    if stack.count != split.count:
        found = f"{type(loaded.model).__name__} has {stack.count} blocks"
        raise ModelError(f"cannot build an emulator with a {split}", found, "make the split for this model")
    check_plain(loaded.model, describe(loaded.model), what="build an emulator")
    middle = tuple(Block(index, stack.of(loaded.model)[index]) for index in split.middle)
    origin = f"{type(loaded.model).__name__}, {split}"
    emulator = builder(Blocks(middle, origin, context or BuildContext(loaded.model, split)))
    strangers = [block for block in emulator.blocks if not {block.source, block.place} <= set(split.middle)]
    if strangers:
        found = f"{builder.name} gave block {strangers[0].source}, not of the middle"
        raise ModelError("cannot build an emulator", found)
    for block in emulator.blocks:
        check_known(block.changes)
    return replace(emulator, description=builder.describe())
