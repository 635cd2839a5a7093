"""What all compressing builders share: new copies of blocks, the changes noted, and what came of it."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from fedpeat.core import ConfigError, ModelError
from fedpeat.emulators.blocks import Block, Blocks
from fedpeat.emulators.changes import rebuild
from fedpeat.emulators.compression.layers import Linear, matrix_of
from fedpeat.emulators.compression.stored import StoredLinear
from fedpeat.models import linear_layers


class Encoded(NamedTuple):
    """A linear layer's new form: its structure's settings, JSON-like, and the tensors to put into it, by name."""

    settings: Mapping[str, Any]
    values: Mapping[str, torch.Tensor]


Encode = Callable[[Block], Mapping[str, Encoded]]
"""A block's new layers by path; those not named stay as they are."""
Layers = Callable[[nn.Module], Mapping[str, Linear]]
"""The layers of a block's module that there are to change, by path."""


@dataclass
class _Tally:
    """What a row was and became, counted block by block."""

    parameters_before: int = 0
    parameters_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    lost: float = 0.0
    whole: float = 0.0

    def count(self, old: nn.Module, new: nn.Module, changed: Iterable[str]) -> None:
        self.parameters_before += _parameters(old)
        self.parameters_after += _parameters(new)
        self.bytes_before += sum(parameter.nbytes for parameter in old.parameters())
        self.bytes_after += sum(parameter.nbytes for parameter in new.parameters())
        for path in changed:
            was, now = matrix_of(old.get_submodule(path)), matrix_of(new.get_submodule(path))
            self.whole += _square(was)
            # In another shape, rows or columns are gone and the others are as they were.
            same = was.shape == now.shape
            self.lost += _square(was.float() - now.float()) if same else max(0.0, _square(was) - _square(now))

    def note(self, builder: str) -> dict[str, Any]:
        counts = {key: value for key, value in asdict(self).items() if key not in {"lost", "whole"}}
        error = (self.lost / self.whole) ** 0.5 if self.whole else 0.0
        return {"builder": builder, "what": "compression", **counts, "error": error}


def _parameters(module: nn.Module) -> int:
    """Return how many numbers a module computes with, however many bits each takes."""
    total = 0
    for part in module.modules():
        if isinstance(part, StoredLinear):
            total += part.kept_weights + sum(bias.numel() for name, bias in part.named_parameters() if name == "bias")
        else:
            total += sum(parameter.numel() for parameter in part.parameters(recurse=False))
    return total


def _square(matrix: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2


def compress(blocks: Blocks, *, builder: str, kind: str, encode: Encode, layers: Layers = linear_layers) -> Blocks:
    """Give the linear layers of every block another form, in copies of the blocks.

    Args:
        blocks: The row; one block at several places is changed once.
        builder: The builder's name, for messages and notes.
        kind: The kind of change, one of `REBUILDS`.
        encode: A block's new layers, by path.
        layers: A block's module to the layers that there are to change, by path.

    Raises:
        ConfigError: If there are none in any block.
        ModelError: If a weight is not finite.
    """
    modules = {id(block.module): block.module for block in blocks.blocks}
    if not any(layers(module) for module in modules.values()):
        names = sorted({type(module).__name__ for module in modules.values()})
        found = f"there are no such linear layers in a {names[0]}" if names else "the row of blocks is empty"
        raise ConfigError(
            f"emulator={builder} has nothing to compress", found, "keep some middle blocks, or leave this stage out"
        )
    tally, told = _Tally(), 0

    @torch.no_grad()
    def change(block: Block) -> Block:
        nonlocal told
        if blocks.context is not None:
            blocks.context.tell(f"{builder}: block {block.source}", told / len(modules))
        told += 1
        _check_finite(block, layers(block.module))
        encoded = encode(block)
        new = _changed(block, kind, encoded)
        tally.count(block.module, new.module, encoded)
        return new

    result = blocks.changed(change)
    return result.having(result.blocks, tally.note(builder))


def _check_finite(block: Block, layers: Mapping[str, Linear]) -> None:
    for path, layer in layers.items():
        if not bool(torch.isfinite(layer.weight).all()):
            raise ModelError(
                f"cannot compress {path!r} of block {block.source}",
                "its weights are not all finite",
                "load a sound checkpoint",
            )


def _changed(block: Block, kind: str, encoded: Mapping[str, Encoded]) -> Block:
    if not encoded:
        return block
    # Weights that are about to be replaced need no copy.
    spared = [block.module.get_submodule(path).weight for path in encoded]
    module = copy.deepcopy(block.module, {id(weight): weight for weight in spared})
    change = {"kind": kind, "modules": {path: dict(one.settings) for path, one in encoded.items()}}
    rebuild(module, [change])
    for path, one in encoded.items():
        for name, value in one.values.items():
            _put(module.get_submodule(path), name, value)
    return replace(block, module=module.requires_grad_(False), changes=(*block.changes, change))


def _put(layer: nn.Module, name: str, value: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = layer.get_submodule(parent)
    expected = owner.get_parameter(leaf)
    if expected.shape != value.shape:
        raise ModelError(f"cannot put {name!r} in place", f"{tuple(value.shape)} is not {tuple(expected.shape)}")
    values = value.detach().to(expected.dtype).contiguous()
    owner.register_parameter(leaf, nn.Parameter(values, requires_grad=False))


def each_layer(encode: Callable[[Linear], Encoded | None], layers: Layers = linear_layers) -> Encode:
    """Return the `Encode` that takes one layer after another; None leaves a layer as it is."""

    def encode_block(block: Block) -> dict[str, Encoded]:
        new = {path: encode(layer) for path, layer in layers(block.module).items()}
        return {path: one for path, one in new.items() if one is not None}

    return encode_block


def check_share(share: float, *, builder: str, whole: bool = True) -> None:
    """Check a share: above 0 and at most 1, or below 1 unless `whole`.

    Raises:
        ConfigError: If it is no such number.
    """
    number = isinstance(share, int | float) and not isinstance(share, bool)
    if not number or not (0 < share < 1 or (whole and share == 1)):
        raise ConfigError(
            f"emulator={builder} with share={share!r}",
            f"a share is a number above 0 and {'at most' if whole else 'below'} 1",
            "set emulator.share, e.g. to 0.5",
        )


def check_count(value: int, *, builder: str, key: str) -> None:
    """Check a count: an integer of at least 1.

    Raises:
        ConfigError: If it is none.
    """
    if type(value) is not int or value < 1:
        asked = f"emulator={builder} with {key}={value!r}"
        raise ConfigError(asked, "it is a count of 1 or more", f"set emulator.{key} >= 1")
