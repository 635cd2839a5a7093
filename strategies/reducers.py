"""Many deltas to one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fedpeat.core import ClientUpdate, EngineError


class Reducer(NamedTuple):
    """How updates are folded into one delta, in the order given, one at a time.

    Attributes:
        start: Returns an empty accumulator.
        add: Returns the accumulator with one more update; it may reuse the accumulator's memory, never the update's.
        finish: Returns the delta, fp32.
    """

    start: Callable[[], Any]
    add: Callable[[Any, ClientUpdate], Any]
    finish: Callable[[Any], dict[str, torch.Tensor]]


def weighted_mean() -> Reducer:
    """Return the mean of the deltas, weighted by the updates' weights.

    Sums are kept in fp64, where the product of an fp32 delta and a whole weight is exact: one client alone gets its own
    delta back to the bit. Memory does not grow with the number of clients.

    >>> update = ClientUpdate("a", 1, {"w": torch.tensor([0.1])}, weight=3)
    >>> mean = weighted_mean()
    >>> mean.finish(mean.add(mean.start(), update))
    {'w': tensor([0.1000])}
    """
    return Reducer(start=_start, add=_add, finish=_finish)


def _start() -> dict[str, Any]:
    return {"weight": 0.0, "replies": 0, "sums": {}}


def _add(sums: dict[str, Any], update: ClientUpdate) -> dict[str, Any]:
    totals = sums["sums"]
    for name, tensor in update.delta.items():
        if name in totals:
            totals[name].add_(tensor.double(), alpha=update.weight)
        else:
            totals[name] = tensor.double() * update.weight
    return {"weight": sums["weight"] + update.weight, "replies": sums["replies"] + 1, "sums": totals}


def _finish(sums: dict[str, Any]) -> dict[str, torch.Tensor]:
    if sums["weight"] <= 0:
        raise EngineError(
            "cannot average updates whose weights sum to 0",
            f"{sums['replies']} replies",
            "give the clients data to train on, or set strategy.weight_by=equal",
        )
    return {name: (total / sums["weight"]).float() for name, total in sums["sums"].items()}
