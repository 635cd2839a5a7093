"""One round's updates to the next global state."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from fedpeat.core import (
    ClientUpdate,
    EngineError,
    GlobalState,
    Tensors,
    add,
    all_finite,
    count_bytes,
    norm,
    with_prefix,
    without_prefix,
)
from strategies.exactness import mean_change
from strategies.recipe import Recipe
from strategies.reducers import Situation

REDUCER, SERVER = "reducer|", "server|"
"""Prefixes in a global state's memory: the reducer's own and the server step's."""


@dataclass(frozen=True)
class Aggregation:
    """The outcome of a round.

    Attributes:
        state: The next global state.
        clients: Metrics of each participant that counted, by name.
        update_norm: Euclidean norm of the step taken by the travelling tensors.
        error: How far the step on LoRA is from the weighted mean of the clients' products, relative to its size; None
            if it was not measured, or means nothing for the rule.
        metrics: What else the rule tells of the round, by name.
    """

    state: GlobalState
    clients: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    update_norm: float = 0.0
    error: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


def start(recipe: Recipe, tensors: Tensors) -> GlobalState:
    """Return the global state before round 1."""
    return GlobalState(tensors, {}, with_prefix(SERVER, recipe.server.start(tensors)))


def seen_by_recipe(situation: Situation) -> Situation:
    """Return the situation as a reducer sees it: with its own memory only."""
    own = without_prefix(REDUCER, situation.state.memory)
    return replace(situation, state=replace(situation.state, memory=own))


def aggregate(
    recipe: Recipe,
    situation: Situation,
    updates: Iterable[ClientUpdate],
    *,
    min_replies: int = 1,
    exactness: bool = False,
) -> Aggregation:
    """Fold `updates`, in the order given and one at a time, into the next global state.

    Args:
        recipe: The rule.
        situation: The round's.
        updates: One a participant.
        min_replies: Fewest that make a round; 0 where nobody may have been asked: without any, the state stays, unless
            the recipe makes a step `always`.
        exactness: Whether to measure the step against the mean of the clients' products.

    Raises:
        EngineError: If fewer than `min_replies` updates came, or the next state would not be finite.
    """
    state = situation.state
    folded = recipe.reduce.start(seen_by_recipe(situation))
    clients: dict[str, Mapping[str, float]] = {}
    measured = mean_change(situation, recipe.facts.exact) if exactness else None
    for update in updates:
        if measured is not None:
            measured.add(update)
        folded = recipe.reduce.add(folded, update)
        sent = update.payload_bytes
        if sent is None:
            sent = count_bytes(update.delta) + count_bytes(update.extras)
        clients[update.client] = {
            **update.metrics,
            "weight": update.weight,
            "delta_norm": norm(update.delta),
            "bytes_up": float(sent),
        }
    if len(clients) < min_replies:
        raise EngineError(
            f"a round needs round.min_replies={min_replies} usable updates",
            f"{len(clients)} came",
            "mend the clients that failed, or lower round.min_replies",
        )
    if not clients and not recipe.always:
        return Aggregation(state)
    step = recipe.reduce.finish(folded)
    taken, server = recipe.server.update(step.tensors, without_prefix(SERVER, state.memory))
    after = GlobalState(
        {**state.tensors, **add({name: state.tensors[name] for name in taken}, taken)},
        _folded(state.folds, step.folds),
        {**with_prefix(REDUCER, step.memory), **with_prefix(SERVER, server)},
    )
    if not all(all_finite(part) for part in (after.tensors, after.folds, after.memory)):
        raise EngineError(
            f"the global state of round {situation.round} must be finite",
            f"strategy={recipe.name} made entries that are NaN or infinite",
            "lower client.learning_rate or the strategy's server rate, or choose a robust strategy",
        )
    error = measured.error(after) if measured is not None and clients else None
    return Aggregation(after, clients, norm(taken), error, step.metrics)


def _folded(folds: Tensors, more: Tensors) -> Tensors:
    return {
        **folds,
        **{name: folds[name] + change if name in folds else change for name, change in more.items()},
    }
