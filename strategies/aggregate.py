"""One round's updates to the next global state."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from fedpeat.core import ClientUpdate, EngineError, Tensors, add, count_bytes, norm
from strategies.recipes import Recipe


@dataclass(frozen=True)
class Aggregation:
    """The outcome of a round.

    Attributes:
        tensors: The next global travelling state.
        server_step_state: The next state of the recipe's server steps.
        clients: Metrics of each participant that counted, by name.
        update_norm: Euclidean norm of the step taken.
    """

    tensors: Tensors
    server_step_state: Tensors
    clients: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    update_norm: float = 0.0


def aggregate(
    recipe: Recipe,
    tensors: Tensors,
    server_step_state: Tensors,
    updates: Iterable[ClientUpdate],
    *,
    min_replies: int = 1,
) -> Aggregation:
    """Fold `updates`, in the order given and one at a time, into the next global state.

    Raises:
        EngineError: If fewer than `min_replies` updates came.
    """
    folded = recipe.reduce.start()
    clients: dict[str, Mapping[str, float]] = {}
    for update in updates:
        folded = recipe.reduce.add(folded, update)
        clients[update.client] = {
            **update.metrics,
            "weight": update.weight,
            "delta_norm": norm(update.delta),
            "bytes_up": float(count_bytes(update.delta)),
        }
    if len(clients) < max(min_replies, 1):
        raise EngineError(
            f"a round needs round.min_replies={max(min_replies, 1)} usable updates",
            f"{len(clients)} came",
            "mend the clients that failed, or lower round.min_replies",
        )
    step, state = recipe.server.update(recipe.reduce.finish(folded), server_step_state)
    return Aggregation(add(tensors, step), state, clients, norm(step))


def start(recipe: Recipe, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return the server steps' state before round 1."""
    return recipe.server.start(tensors)
