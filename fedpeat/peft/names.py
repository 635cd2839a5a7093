"""Canonical names: which block of the full model a tensor belongs to, whatever the depth of the model at hand."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class View:
    """Where the blocks of a model are, and which blocks of the full model they are.

    Attributes:
        path: Name of the module list that holds the blocks, such as `model.layers`.
        sources: For each block position, its index in the full model.
        adapter_positions: Positions of the adapter blocks.
    """

    path: str
    sources: tuple[int, ...]
    adapter_positions: tuple[int, ...]

    def canonical(self, name: str) -> str:
        """Rename the block position at the start of `name` to the index of that block in the full model.

        >>> view = View("model.layers", sources=(0, 1, 11), adapter_positions=(0, 2))
        >>> view.canonical("model.layers.2.mlp.up_proj.weight")
        'model.layers.11.mlp.up_proj.weight'
        >>> view.canonical("lm_head.weight")
        'lm_head.weight'
        """
        position = self.position(name)
        if position is None:
            return name
        rest = name.removeprefix(f"{self.path}.{position}")
        return f"{self.path}.{self.sources[position]}{rest}"

    def position(self, name: str) -> int | None:
        """Return the position of the block that `name` lies in, or None if it lies in none.

        >>> view = View("transformer.h", sources=(0, 5), adapter_positions=(0, 1))
        >>> view.position("transformer.h.1.attn.c_attn")
        1
        >>> view.position("transformer.wte.weight") is None
        True
        """
        match = re.match(rf"{re.escape(self.path)}\.(\d+)(?:\.|$)", name)
        return int(match.group(1)) if match else None

    def in_adapter(self, name: str) -> bool:
        """Return whether `name` lies in an adapter block."""
        return self.position(name) in self.adapter_positions
