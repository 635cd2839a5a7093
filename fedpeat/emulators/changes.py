"""What can have been done to a block, and how its structure is made so again, from the manifest alone.

A change is JSON-like: `{"kind": ..., "modules": {path: settings}}`. Its function gives a block the structure that the
change says, in place, without values: those come from the bundle.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fedpeat.core import ModelError, nearest
from fedpeat.emulators.harmonizer import harmonize

Change = Mapping[str, Any]
Rebuild = Callable[[nn.Module, Change], None]


def _nothing(_block: nn.Module, _change: Change) -> None:
    """Other values in the same structure."""


REBUILDS: dict[str, Rebuild] = {"pruned": _nothing, "distilled": _nothing, "harmonizers": harmonize}
"""By kind; a room that adds a kind adds its function here."""


def rebuild(block: nn.Module, changes: Sequence[Change]) -> None:
    """Give `block`, fresh from its class, the structure that `changes` say, in place.

    Raises:
        ModelError: If a change is unknown or does not fit the block.
    """
    check_known(changes)
    for change in changes:
        kind = change["kind"]
        try:
            REBUILDS[kind](block, change)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            found = f"{type(error).__name__}: {error}"
            raise ModelError(
                f"cannot rebuild a block with the change {kind!r}", found, "fetch the bundle again, or write it anew"
            ) from error


def check_known(changes: Sequence[Change]) -> None:
    """Check that blocks with these changes can be rebuilt.

    Raises:
        ModelError: If a kind of change is unknown.
    """
    for change in changes:
        kind = change.get("kind")
        if kind not in REBUILDS:
            raise ModelError(
                f"cannot rebuild a block with the change {kind!r}", "no such kind", nearest(str(kind), REBUILDS)
            )


def replace_module(block: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path` in `block`, in place.

    Raises:
        AttributeError: If there is nothing at `path`.
    """
    block.get_submodule(path)
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, module)
