"""What a recipe has travel in a round, both ways, and whether what came is that."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedpeat.codecs import Codec
from fedpeat.core import (
    EXTRA,
    FOLD,
    ClientUpdate,
    Layout,
    Tensors,
    UpdateRefused,
    all_finite,
    at_rank,
    check_like,
    count_bytes,
    with_prefix,
)
from strategies.recipe import Recipe
from strategies.reducers import Situation


@dataclass(frozen=True)
class Changes:
    """What was changed of the emulator since its bundle: sent to a device once, which keeps it.

    Attributes:
        tensors: By name; empty for an emulator as it is in the bundle.
        version: Their hash; empty for none.
        held_by: Clients that have this version.
    """

    tensors: Tensors = field(default_factory=dict)
    version: str = ""
    held_by: frozenset[str] = frozenset()

    def to(self, client: str) -> Tensors:
        """Return what has to be sent to a client."""
        return {} if client in self.held_by else self.tensors

    def bytes_to(self, client: str) -> int:
        """Return how much that is, bytes."""
        return count_bytes(self.to(client))


def tensors_down(recipe: Recipe, situation: Situation, half: Mapping[str, Any], rank: int | None) -> Tensors:
    """Return all tensors of the message to a device of this rank, by name (None: the run's own).

    Args:
        recipe: The rule.
        situation: As the recipe sees it.
        half: The client half of the round.
        rank: The device's.
    """
    state, layout = situation.state, situation.layout
    kept = layout.names([*half.get("fixed", ()), *half.get("personal", ())])
    travelling = {name: tensor for name, tensor in state.tensors.items() if name not in kept}
    return {
        **at_rank(travelling, layout, rank),
        **with_prefix(FOLD, state.folds),
        **with_prefix(EXTRA, recipe.sends(situation)),
    }


def tensors_up(state: Tensors, layout: Layout, half: Mapping[str, Any], rank: int | None) -> Tensors:
    """Return tensors shaped like the delta that a device of this rank is to send, by name."""
    sent = layout.names(half["train_only"]) if "train_only" in half else frozenset(state)
    sent -= layout.names(half.get("personal", ()))
    return at_rank({name: tensor for name, tensor in state.items() if name in sent}, layout, rank)


def encoded_bytes(codec: Codec, like: Tensors) -> int:
    """Return the size of a delta of these shapes once it is encoded, bytes: it does not depend on its values."""
    nothing = {name: torch.zeros(tensor.shape) for name, tensor in like.items()}
    return count_bytes(codec.encode(nothing, codec.start(nothing), 0)[0])


def checked(
    update: ClientUpdate,
    *,
    client: str,
    server_round: int,
    like: Tensors,
    half: Mapping[str, Any],
    codec: Codec,
    bundle: str = "",
) -> ClientUpdate:
    """Return `update` decoded, if it is what its client was to send.

    Args:
        update: As it came.
        client: Whose it must be.
        server_round: The round it must belong to.
        like: What its delta must look like.
        half: The client half of the round.
        codec: What its delta must be encoded by.
        bundle: Version of the bundle that it must be made with.

    Raises:
        UpdateRefused: If it is another client's, round's or bundle's, does not fit, or is not finite.
    """
    what = f"the update of {client!r} in round {server_round}"
    if update.round != server_round:
        raise UpdateRefused(f"{what} must belong to it", f"it is of round {update.round}", "one reply a message")
    if update.client != client:
        raise UpdateRefused(f"{what} must be its own", f"it is signed {update.client!r}", "one name per client")
    if update.bundle != bundle:
        found = f"it says {update.bundle[:64]!r}"
        raise UpdateRefused(f"{what} must be made with bundle {bundle!r}", found, "start the run again")
    if dict(update.encoding) != dict(codec.description):
        raise UpdateRefused(
            f"{what} must be encoded by {dict(codec.description)}", f"it says {dict(update.encoding)}", "use one codec"
        )
    delta = codec.decode(update.delta, {name: tensor.shape for name, tensor in like.items()})
    check_like(delta, like, what=what)
    check_like(update.extras, like if half.get("control_variates") else {}, what=f"{what}: its extras")
    if not all_finite(delta) or not all_finite(update.extras):
        raise UpdateRefused(f"{what} must be finite", "it has NaN or infinite entries", "lower its learning rate")
    return replace(update, delta=delta, encoding={})
