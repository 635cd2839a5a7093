"""A harmonizer's structure: a low-rank affine residual at the door of a block, in whose stead others were dropped."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fedpeat.core import ModelError

DOORS = ("before", "after")
"""On which side of a block a harmonizer can be, and its name there as a submodule."""


class Harmonizer(nn.Module):
    """`h + up(down(h))` of a hidden state `(rows, tokens, width)`; the bias of `up` is the affine part.

    Args:
        width: Of the hidden state.
        rank: Of the product.
        device: Where it goes.
    """

    def __init__(self, width: int, rank: int, *, device: torch.device | str) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False, device=device)
        self.up = nn.Linear(rank, width, device=device)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the hidden state behind the dropped blocks, `(rows, tokens, width)`."""
        return hidden + self.up(self.down(hidden))


def harmonize(block: nn.Module, change: Mapping[str, Any]) -> None:
    """Give a block the harmonizers that a change says, in place, on the meta device: without values.

    Args:
        block: A transformer block that takes the hidden state first, or as `hidden_states`, and returns it first.
        change: `before` and `after`: their ranks, or None for none there; `width`: of the hidden state.

    Raises:
        ValueError: If a rank or the width is below 1, or the block has a part of that name already.
    """
    for door in DOORS:
        rank = change[door]
        if rank is None:
            continue
        if rank < 1 or change["width"] < 1:
            raise ValueError(f"a harmonizer of rank {rank} and width {change['width']}")
        if hasattr(block, door):
            raise ValueError(f"the block has something called {door!r} already")
        # On the meta device: torch would otherwise draw random weights, and change the global random state.
        block.add_module(door, Harmonizer(change["width"], rank, device="meta"))
    # Functions of this module that look the harmonizer up in their owner: so a deep copy uses its own.
    if change["before"] is not None:
        block.register_forward_pre_hook(_enter, with_kwargs=True)
    if change["after"] is not None:
        block.register_forward_hook(_leave)


def _enter(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    hidden = block.before(hidden_input(args, kwargs))
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def _leave(block: Any, _args: tuple[Any, ...], output: Any) -> Any:
    hidden = block.after(hidden_output(output))
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def hidden_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return the hidden state, `(rows, tokens, width)`, that a block was called with.

    Raises:
        ModelError: If there is none where transformers' blocks have it.

    >>> hidden_input((), {"hidden_states": torch.ones(1, 2, 3)}).shape
    torch.Size([1, 2, 3])
    """
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, torch.Tensor):
        found = f"it was called with {len(args)} arguments and the keywords {sorted(kwargs)}"
        raise ModelError(
            "cannot find a block's hidden state", found, "take it first, or call it hidden_states in the model's class"
        )
    return hidden


def hidden_output(output: Any) -> torch.Tensor:
    """Return the hidden state, `(rows, tokens, width)`, in what a block returned.

    Raises:
        ModelError: If there is none.
    """
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, torch.Tensor):
        raise ModelError(
            "cannot find a block's hidden state", f"it returned a {type(hidden).__name__}", "return the tensor first"
        )
    return hidden
