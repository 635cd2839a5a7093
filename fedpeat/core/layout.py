"""What the travelling tensors are to each other: which are a LoRA layer's factors, and of which layer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from fedpeat.core.tree import Tensors

Part = Literal["A", "B", "R", "other"]
"""A travelling tensor's role: a LoRA layer's factor A `(rank, in)` or B `(out, rank)`, a square core R `(rank, rank)`
between two fixed factors, or any other tensor."""

FOLD, EXTRA, EMULATOR = "fold|", "extra|", "emulator|"
"""Prefixes, in messages and checkpoints, of what is folded into base weights, of what a recipe sends beside the
travelling tensors, and of what changes the emulator. No tensor's own name has a bar in it."""


@dataclass(frozen=True)
class LoraPair:
    """One LoRA layer: its weight is `W + scaling * B @ A`, or `W + scaling * B @ R @ A` with a square core.

    Attributes:
        module: Canonical name of the layer, such as `model.layers.11.mlp.up_proj`.
        a: Name of A, `(rank, in)`.
        b: Name of B, `(out, rank)`.
        scaling: The factor before the product.
        shape: Of the product, `(out, in)`.
        r: Name of the core R, `(rank, rank)`; then only R travels, A and B are everybody's from the start.
    """

    module: str
    a: str
    b: str
    scaling: float
    shape: tuple[int, int]
    r: str | None = None


@dataclass(frozen=True)
class Layout:
    """The travelling tensors by role.

    Attributes:
        pairs: The LoRA layers.
        others: Names of the travelling tensors in no LoRA layer.
        rank: Largest rank of the pairs' factors, 0 without pairs.
        unfrozen: Those of the others that are the emulator's own.
    """

    pairs: tuple[LoraPair, ...] = ()
    others: tuple[str, ...] = ()
    rank: int = 0
    unfrozen: tuple[str, ...] = ()

    def part_of(self, name: str) -> Part:
        """Return the role of a travelling tensor."""
        return self._parts.get(name, "other")

    @property
    def _parts(self) -> dict[str, Part]:
        parts: dict[str, Part] = {}
        for pair in self.pairs:
            parts |= {pair.r: "R"} if pair.r else {pair.a: "A", pair.b: "B"}
        return parts

    def names(self, parts: Iterable[str]) -> frozenset[str]:
        """Return the names of the travelling tensors with one of these roles; `unfrozen` is a part of `other`."""
        wanted = set(parts)
        chosen = {name for name, part in self._parts.items() if part in wanted}
        chosen |= set(self.others) if "other" in wanted else set()
        return frozenset(chosen | (set(self.unfrozen) if "unfrozen" in wanted else set()))


def product(pair: LoraPair, tensors: Tensors) -> torch.Tensor:
    """Return `scaling * B @ A`, `(out, in)`, in the factors' dtype."""
    return pair.scaling * (tensors[pair.b] @ tensors[pair.a])


def at_rank(tensors: Tensors, layout: Layout, rank: int | None) -> dict[str, torch.Tensor]:
    """Return `tensors` with the factors cut to their first `rank` rows (A) and columns (B); None leaves them whole.

    >>> pair = LoraPair("m", "m.A", "m.B", 1.0, (3, 4))
    >>> cut = at_rank({"m.A": torch.ones(2, 4), "m.B": torch.ones(3, 2)}, Layout((pair,), (), 2), 1)
    >>> [tuple(tensor.shape) for tensor in cut.values()]
    [(1, 4), (3, 1)]
    """
    if rank is None:
        return dict(tensors)
    cut = dict(tensors)
    for pair in layout.pairs:
        if pair.a in cut:
            cut[pair.a] = cut[pair.a][:rank]
        if pair.b in cut:
            cut[pair.b] = cut[pair.b][:, :rank]
    return cut


def rank_in(update: Tensors, pair: LoraPair) -> int:
    """Return the rank of `pair`'s factors in `update`, whichever of them it holds."""
    return update[pair.a].shape[0] if pair.a in update else update[pair.b].shape[1]


def with_prefix(prefix: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return the tensors under longer names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
