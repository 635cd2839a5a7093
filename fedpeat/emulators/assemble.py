"""A model as a device sees it, put together in memory: adapter and emulator, or the full model in the same form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from fedpeat.core import ModelError, Tensors
from fedpeat.emulators.blocks import Blocks
from fedpeat.emulators.changes import rebuild
from fedpeat.models import (
    BlockStack,
    LoadedModel,
    Split,
    build_skeleton,
    canonical_name,
    describe,
    fill,
    find_blocks,
    keep_blocks,
    model_tensors,
    source_of,
    tied_names,
)


@dataclass(frozen=True)
class EmulatedModel:
    """A model whose block positions are known by the full model's indices.

    Attributes:
        model: In eval mode; all parameters frozen.
        path: Where its blocks are (`"model.layers"`).
        sources: For each position, its block's index in the full model; twice the same where a block is shared.
        adapter_positions: Positions of the adapter's blocks.
    """

    model: PreTrainedModel
    path: str
    sources: tuple[int, ...]
    adapter_positions: tuple[int, ...]


@dataclass(frozen=True)
class Position:
    """One place in an emulated model.

    Attributes:
        source: Its block's index in the full model.
        place: The index of the block in whose place it computes.
        role: `adapter` or `emulator`.
        changes: What was done to the block.
    """

    source: int
    place: int
    role: str
    changes: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as in a manifest."""
        plain = {"source": self.source, "role": self.role, "changes": [dict(change) for change in self.changes]}
        return plain if self.place == self.source else {**plain, "place": self.place}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Position":
        """Return the position that `to_json` told."""
        return cls(plain["source"], plain.get("place", plain["source"]), plain["role"], tuple(plain["changes"]))


def positions_of(split: Split, emulator: Blocks) -> tuple[Position, ...]:
    """Return the emulated model's positions: adapter blocks between the emulator's, which keep their own order."""
    adapter = [Position(index, index, "adapter") for index in split.adapter]
    merged: list[Position] = []
    for block in emulator.blocks:
        while adapter and adapter[0].place < block.place:
            merged.append(adapter.pop(0))
        merged.append(Position(block.source, block.place, "emulator", block.changes))
    return (*merged, *adapter)


def emulated_tensors(
    model: PreTrainedModel, split: Split, emulator: Blocks
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], set[str]]:
    """Return what an emulated model consists of, by canonical name: views, not copies.

    Returns:
        Tensors of the adapter's blocks and everything outside the blocks; tensors of the emulator's blocks; and which
        of all these names are not parameters.

    Raises:
        ModelError: If one source stands in the emulator with different modules.
    """
    stack = find_blocks(model)
    modules = {block.source: block.module for block in emulator.blocks}
    for block in emulator.blocks:
        if block.module is not modules[block.source]:
            raise ModelError("cannot put an emulator together", f"block {block.source} stands there in two versions")
    outside: dict[str, torch.Tensor] = {}
    inside: dict[str, torch.Tensor] = {}
    buffers = set()
    for name, tensor, kind in model_tensors(model):
        source = source_of(name, stack)
        if source is None or source in split.adapter:
            outside[name] = tensor.detach()
        elif source in modules and not name.startswith(f"{stack.path}."):
            inside[name] = tensor.detach()  # what lies beside the blocks
        else:
            continue
        if kind != "parameter":
            buffers.add(name)
    for source, module in modules.items():
        for local, tensor, kind in model_tensors(module):
            name = f"{stack.path}.{source}.{local}"
            inside[name] = tensor.detach()
            if kind != "parameter":
                buffers.add(name)
    return outside, inside, buffers


def put_together(
    description: Mapping[str, Any],
    stack: BlockStack,
    positions: Sequence[Position],
    tensors: Tensors,
    *,
    aliases: Mapping[str, str],
    asked: str,
) -> EmulatedModel:
    """Build an emulated model from its description and its tensors, which are not copied.

    Args:
        description: Of the full model, from `describe`.
        stack: Where the full model's blocks are.
        positions: What stands where.
        tensors: By canonical name, stored once each.
        aliases: Canonical name to the name under which its tensor is stored.
        asked: What was to be done, for messages.

    Raises:
        ModelError: If its model class is neither transformers' own nor registered, or the tensors do not fit it.
    """
    model = build_skeleton(description)
    found = find_blocks(model)
    if found != stack:
        raise ModelError(asked, f"its blocks are at {found}, it says {stack}")
    sources = tuple(position.source for position in positions)
    keep_blocks(model, stack, sources)
    for position, block in zip(positions, stack.of(model), strict=True):
        rebuild(block, position.changes)
    chosen, holders = {}, {}
    for name, _, kind in model_tensors(model):
        canonical = name
        for path in stack.paths:
            canonical = canonical_name(canonical, path=path, sources=sources)
        holder = aliases.get(canonical, canonical)
        if holder not in tensors:
            raise ModelError(asked, f"it holds no tensor {holder!r}")
        chosen[name] = tensors[holder]
        if kind == "parameter":
            holders[name] = holder
    fill(model, chosen, tied=_ties(holders))
    adapter = tuple(index for index, position in enumerate(positions) if position.role == "adapter")
    return EmulatedModel(model, stack.path, sources, adapter)


def _ties(holders: Mapping[str, str]) -> dict[str, str]:
    first: dict[str, str] = {}
    return {name: first.setdefault(holder, name) for name, holder in holders.items()}


def stand_in(full: PreTrainedModel, split: Split, emulator: Blocks) -> EmulatedModel:
    """Return the emulated model in memory, as a device would build it from the bundle; it shares the blocks' tensors.

    Raises:
        ModelError: If the blocks do not fit together.
    """
    outside, inside, buffers = emulated_tensors(full, split, emulator)
    tensors = {**outside, **inside}
    aliases = tied_names({name: tensor for name, tensor in tensors.items() if name not in buffers})
    return put_together(
        describe(full),
        find_blocks(full),
        positions_of(split, emulator),
        tensors,
        aliases=aliases,
        asked="cannot put an emulator together",
    )


def full_view(loaded: LoadedModel, split: Split) -> EmulatedModel:
    """Show a full model in the same form: nothing dropped, every block at its own index; shares the model.

    Raises:
        ModelError: If the model has no blocks, or another number of them than the split.
    """
    stack = find_blocks(loaded.model)
    if stack.count != split.count:
        found = f"the model has {stack.count} blocks"
        raise ModelError(f"cannot view the model with a {split}", found, "make the split for this model")
    return EmulatedModel(loaded.model, stack.path, tuple(range(stack.count)), split.adapter)
