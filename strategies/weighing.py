"""From a rule that says who counts to a recipe: it weighs or scales a round's updates, and a reducer averages them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from fedpeat.core import ClientUpdate, ConfigError, nearest
from strategies.folding import fed_ex_lora, flora
from strategies.general import fed_avg
from strategies.recipe import Facts, Recipe
from strategies.reducers import Reducer, Situation, Step, check_weight
from strategies.svd import flex_lora

SERVER = "server"
"""What the server's own update is signed with."""

THEN: dict[str, Callable[..., Recipe]] = {
    "fed_avg": fed_avg,
    "fed_ex_lora": fed_ex_lora,
    "flora": flora,
    "flex_lora": flex_lora,
}
"""The rules that can average what a robust rule lets through."""

Updates = tuple[ClientUpdate, ...]
Prepare = Callable[[Situation, Updates], Sequence[ClientUpdate]]


class _Waiting(NamedTuple):
    situation: Situation
    folded: object
    updates: Updates = ()


def prepared(prepare: Prepare, reducer: Reducer) -> Reducer:
    """Return `reducer`, run on what `prepare` makes of all of a round's updates; on none, the state stays.

    Args:
        prepare: Returns the updates that count, with the weights that count, given the situation and all updates.
        reducer: Any; it never sees the others, so that not even `0 * inf` can come of them.
    """

    def start(situation: Situation) -> _Waiting:
        return _Waiting(situation, reducer.start(situation))

    def add(waiting: _Waiting, update: ClientUpdate) -> _Waiting:
        return waiting._replace(updates=(*waiting.updates, update))

    def finish(waiting: _Waiting) -> Step:
        situation, folded, updates = waiting
        counted = prepare(situation, updates)
        for update in counted:
            folded = reducer.add(folded, update)
        return reducer.finish(folded) if counted else Step({}, memory=situation.state.memory)

    return Reducer(start, add, finish)


def reweighted(weigh: Callable[[Situation, Updates], Sequence[float]], reducer: Reducer) -> Reducer:
    """Return `reducer`, run on a round's updates with the weights that `weigh` gives them; weight 0 leaves one out.

    Args:
        weigh: Returns a weight of 0 or more for each update, given the situation and all updates.
        reducer: Any whose step depends on updates by their weights.
    """

    def prepare(situation: Situation, updates: Updates) -> list[ClientUpdate]:
        weights = weigh(situation, updates)
        check_weight(sum(weights), len(updates))
        return [replace(update, weight=weight) for update, weight in zip(updates, weights, strict=True) if weight > 0]

    return prepared(prepare, reducer)


def own_weight(update: ClientUpdate, weight_by: str) -> float:
    """Return an update's weight: with `equal` it is 1, whatever a client claims; the server's is always its own."""
    return 1.0 if weight_by == "equal" and update.client != SERVER else update.weight


def scaled(update: ClientUpdate, scale: float) -> ClientUpdate:
    """Return the update with its delta multiplied by `scale`, in fp64, then fp32."""
    if scale == 1:
        return update
    return replace(update, delta={name: (delta.double() * scale).float() for name, delta in update.delta.items()})


def robust_recipe(
    name: str,
    wrap: Callable[[Reducer], Reducer],
    facts: Facts,
    then: str = "fed_avg",
    weight_by: str = "equal",
) -> Recipe:
    """Return the recipe of the rule `then` with its reducer wrapped; what it needs of clients and ranks stays.

    Args:
        name: The new recipe's.
        wrap: Makes the reducer, as by `prepared` or `reweighted`.
        facts: The new recipe's; what travels and whether bases change is `then`'s.
        then: One of `THEN`.
        weight_by: The new recipe's.

    Raises:
        ConfigError: If `then` or `weight_by` is unknown.
    """
    if then not in THEN:
        raise ConfigError(f"cannot use strategy.then={then} with strategy={name}", "no such rule", nearest(then, THEN))
    base = THEN[then](weight_by=weight_by)
    known = replace(facts, needs=base.facts.needs, rebases=base.facts.rebases)
    return replace(base, name=name, reduce=wrap(base.reduce), facts=known)
