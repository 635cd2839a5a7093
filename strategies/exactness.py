"""The weighted mean of the clients' products: what exact rules take, and what the others are measured by."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from fedpeat.core import ClientUpdate, GlobalState, LoraPair, Tensors, rank_in
from strategies.reducers import Reducer, Situation, Step, WeightedSum, check_weight

_ROUNDING = 1e-12
"""A change of a product by less than this, relative to it, is none: products are fp64."""


def local_factors(state: GlobalState, update: ClientUpdate, pair: LoraPair) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors `(B, A)` that a client ended with, fp64: `(out, rank)` and `(rank, in)` at its own rank.

    A factor that it did not send is the global one, cut to the rank of the one that it sent.
    """
    a, b = state.tensors[pair.a].double(), state.tensors[pair.b].double()
    if pair.a in update.delta or pair.b in update.delta:
        rank = rank_in(update.delta, pair)
        a, b = a[:rank], b[:, :rank]
    if pair.a in update.delta:
        a = a + update.delta[pair.a].double()
    if pair.b in update.delta:
        b = b + update.delta[pair.b].double()
    return b, a


def with_rest(
    state: GlobalState, b: torch.Tensor, a: torch.Tensor, pair: LoraPair
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a client's factors, and behind them the columns and rows of the global ones that it was not given.

    What a small rank has no room for so counts as a client's own, unchanged: it is not averaged with zeros.

    Args:
        state: What the client started from.
        b: Its factor, `(out, r)`.
        a: Its factor, `(r, in)`.
        pair: The layer.
    """
    rank = a.shape[0]
    return torch.cat([b, state.tensors[pair.b][:, rank:].to(b)], dim=1), torch.cat(
        [a, state.tensors[pair.a][rank:].to(a)]
    )


def plain_product(pair: LoraPair, tensors: Tensors) -> torch.Tensor:
    """Return `B @ A`, `(out, in)`, fp64, without the scaling."""
    return tensors[pair.b].double() @ tensors[pair.a].double()


class MeanProduct:
    """The running weighted mean of the clients' products `B_k A_k`, without the scaling, fp64.

    Each LoRA layer takes a dense `(out, in)`, however many clients there are.

    Args:
        state: What the clients started from.
        pairs: The layers; ones with a square core are left out, as their factors do not travel.
    """

    def __init__(self, state: GlobalState, pairs: Iterable[LoraPair]) -> None:
        self.state = state
        self.pairs = tuple(pair for pair in pairs if pair.r is None)
        self.weight = 0.0
        self.count = 0
        self.sums = {pair.module: torch.zeros(pair.shape, dtype=torch.float64) for pair in self.pairs}

    def add(self, update: ClientUpdate) -> None:
        """Add one client's products."""
        self.weight += update.weight
        self.count += 1
        for pair in self.pairs:
            b, a = local_factors(self.state, update, pair)
            self.sums[pair.module].addmm_(b, a, alpha=update.weight)

    def mean(self) -> dict[str, torch.Tensor]:
        """Return `sum_k p_k B_k A_k`, `(out, in)`, fp64, by layer.

        Raises:
            EngineError: If the weights sum to 0.
        """
        check_weight(self.weight, self.count)
        return {module: total / self.weight for module, total in self.sums.items()}


@dataclass
class _Totals:
    situation: Situation
    products: MeanProduct
    means: WeightedSum = field(default_factory=WeightedSum)


def with_products(finish: Callable[[Situation, Tensors, Tensors], Step], averaged: Sequence[str]) -> Reducer:
    """Return a reducer that calls `finish(situation, products, means)` at the end.

    Args:
        finish: Makes the step of the mean products (`MeanProduct.mean`) and the mean deltas, fp32.
        averaged: The parts (`A`, `B`, `other`) whose mean deltas are wanted.
    """

    def start(situation: Situation) -> _Totals:
        return _Totals(situation, MeanProduct(situation.state, situation.layout.pairs))

    def add(totals: _Totals, update: ClientUpdate) -> _Totals:
        names = totals.situation.layout.names(averaged)
        totals.products.add(update)
        totals.means.add({name: delta for name, delta in update.delta.items() if name in names}, update.weight)
        return totals

    return Reducer(start, add, lambda totals: finish(totals.situation, totals.products.mean(), totals.means.mean()))


class MeanChange:
    """The running weighted mean of what clients changed in the LoRA layers, and how far a step is from it."""

    def __init__(self, before: GlobalState, pairs: Sequence[LoraPair]) -> None:
        self._before = before
        self._pairs = tuple(pairs)
        self._products = MeanProduct(before, pairs)
        self._cores = WeightedSum()

    def add(self, update: ClientUpdate) -> None:
        """Add one client's changes."""
        cores = {pair.r: update.delta[pair.r] for pair in self._pairs if pair.r and pair.r in update.delta}
        self._products.add(update)
        self._cores.add(cores, update.weight)

    def error(self, after: GlobalState) -> float | None:
        """Return `|applied - mean| / |mean|` over all layers together; None where clients changed nothing on average.

        What was applied counts factors and folds: `s B'A' - s BA + fold' - fold`. Of layers with a square core only the
        cores are compared, as the fixed factors around them never travel.
        """
        if not self._products.weight > 0:
            return None
        products, off, size, rounding = self._products.mean(), 0.0, 0.0, 0.0
        for pair in self._pairs:
            wanted, applied = self._core(pair, after) if pair.r else self._factors(pair, products[pair.module], after)
            off += float((applied - wanted).square().sum())
            size += float(wanted.square().sum())
            rounding += 0.0 if pair.r else _ROUNDING**2 * float((pair.scaling * products[pair.module]).square().sum())
        return (off / size) ** 0.5 if size > rounding else None

    def _factors(self, pair: LoraPair, product: torch.Tensor, after: GlobalState) -> tuple[torch.Tensor, torch.Tensor]:
        was = plain_product(pair, self._before.tensors)
        applied = pair.scaling * (plain_product(pair, after.tensors) - was)
        if pair.module in after.folds:
            applied += after.folds[pair.module].double()
        if pair.module in self._before.folds:
            applied -= self._before.folds[pair.module].double()
        return pair.scaling * (product - was), applied

    def _core(self, pair: LoraPair, after: GlobalState) -> tuple[torch.Tensor, torch.Tensor]:
        name = str(pair.r)
        applied = after.tensors[name].double() - self._before.tensors[name].double()
        total = self._cores.sums.get(name)
        wanted = torch.zeros_like(applied) if total is None else total / self._cores.weight
        return pair.scaling * wanted, pair.scaling * applied


def mean_change(situation: Situation, exact: str = "") -> MeanChange:
    """Return an accumulator: `add` each update, then ask for the relative `error` of the state after.

    It holds one dense fp64 `(out, in)` for each LoRA layer.

    Args:
        situation: The round's.
        exact: The recipe's `facts.exact`; with `personal` there is nothing to compare, and the error is None.
    """
    return MeanChange(situation.state, () if exact == "personal" else situation.layout.pairs)
