"""Many updates to one step: what a reducer is, and the weighted sum that most are made of."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from fedpeat.core import ClientUpdate, EngineError, GlobalState, Layout, Tensors


@dataclass(frozen=True)
class Situation:
    """What a recipe may look at in a round.

    Attributes:
        round: Counted from 1.
        state: What the federation has learnt so far; `state.memory` is the recipe's reducer's own.
        layout: The travelling tensors by role.
        population: How many clients the federation has, the server not among them.
        seed: The run's seed.
    """

    round: int
    state: GlobalState
    layout: Layout = field(default_factory=Layout)
    population: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """A change of the global state.

    Attributes:
        tensors: Added to the travelling tensors of these names; the others stay.
        folds: Added to what is folded into base weights, `(out, in)`, by the LoRA layer's canonical name.
        memory: The reducer's whole memory from here on.
        metrics: What else is to be reported of the round, by name.
    """

    tensors: Tensors
    folds: Tensors = field(default_factory=dict)
    memory: Tensors = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class Reducer(NamedTuple):
    """How updates become one step: folded in the order given, one at a time.

    Attributes:
        start: Returns an accumulator, given the round's situation.
        add: Returns the accumulator with one more update; it may reuse the accumulator's memory, never the update's.
        finish: Returns the step, fp32. Raises EngineError where what came does not make one.
    """

    start: Callable[[Situation], Any]
    add: Callable[[Any, ClientUpdate], Any]
    finish: Callable[[Any], Step]


_PIECE = 65536
"""Entries that `WeightedSum` adds at once: half a megabyte of fp64."""


class WeightedSum:
    """A running weighted sum of named tensors, in fp64, and its mean.

    The product of an fp32 number and a whole weight is exact in fp64: one client alone gets its own delta back to the
    bit. Memory does not grow with the number of updates. A name that only some updates hold is divided by the weight of
    all, as if the others had sent zeros.

    >>> total = WeightedSum()
    >>> total.add({"w": torch.tensor([0.1])}, 3)
    >>> total.mean()
    {'w': tensor([0.1000])}
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self.count = 0
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, tensors: Tensors, weight: float) -> None:
        """Add `weight` times the tensors."""
        self.weight += weight
        self.count += 1
        for name, tensor in tensors.items():
            if name not in self.sums:
                self.sums[name] = (tensor.double() * weight).contiguous()
            elif tensor.numel() <= _PIECE:
                self.sums[name].add_(tensor, alpha=weight)
            else:
                # torch copies what it adds to fp64: a piece at a time stays in the cache, and needs no large memory.
                pieces = tensor.reshape(-1).split(_PIECE)
                for into, piece in zip(self.sums[name].view(-1).split(_PIECE), pieces, strict=True):
                    into.add_(piece, alpha=weight)

    def mean(self) -> dict[str, torch.Tensor]:
        """Return the sums over the total weight, fp32.

        Raises:
            EngineError: If the weights sum to 0.
        """
        check_weight(self.weight, self.count)
        return {name: (total / self.weight).float() for name, total in self.sums.items()}


def check_weight(weight: float, replies: int) -> None:
    """Check that weights sum to more than 0.

    Raises:
        EngineError: If they do not.
    """
    if not weight > 0:
        raise EngineError(
            "cannot average updates whose weights sum to 0",
            f"{replies} replies",
            "give the clients data to train on, or set strategy.weight_by=equal",
        )


def weighted_mean() -> Reducer:
    """Return the mean of the deltas, weighted by the updates' weights."""

    def add(total: WeightedSum, update: ClientUpdate) -> WeightedSum:
        total.add(update.delta, update.weight)
        return total

    return Reducer(start=lambda _: WeightedSum(), add=add, finish=lambda total: Step(total.mean()))


@dataclass(frozen=True)
class Gathered:
    """All updates of a round, for rules that must see them side by side.

    Attributes:
        situation: The round's.
        updates: In the order of the plan; the server's own, if any, last.
    """

    situation: Situation
    updates: tuple[ClientUpdate, ...] = ()


def gathering(finish: Callable[[Situation, tuple[ClientUpdate, ...]], Step]) -> Reducer:
    """Return a reducer that keeps all updates (memory grows with the round's clients) and then calls `finish`."""
    return Reducer(
        start=Gathered,
        add=lambda gathered, update: Gathered(gathered.situation, (*gathered.updates, update)),
        finish=lambda gathered: finish(gathered.situation, gathered.updates),
    )


def shares(updates: Iterable[ClientUpdate]) -> list[float]:
    """Return the updates' weights over their sum.

    Raises:
        EngineError: If they sum to 0.
    """
    weights = [update.weight for update in updates]
    check_weight(sum(weights), len(weights))
    return [weight / sum(weights) for weight in weights]


def local_tensors(state: GlobalState, update: ClientUpdate, names: Mapping[str, Any] | None = None) -> Tensors:
    """Return the tensors that a client ended with, fp32: global plus delta, cut to the client's rank.

    Args:
        state: What it started from.
        update: What it sent; names it did not send are as they were.
        names: The names wanted; by default those of the update.
    """
    local: dict[str, torch.Tensor] = {}
    for name in update.delta if names is None else names:
        start = state.tensors[name]
        delta = update.delta.get(name)
        local[name] = start if delta is None else start[tuple(slice(size) for size in delta.shape)] + delta
    return local
