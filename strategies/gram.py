"""Inner products and sizes of clients' changes, on the products of LoRA layers without forming them.

What a client changed in a LoRA layer is `s (B_k A_k - B A) = s (dB_k A_k + B dA_k)`, `(out, in)`; the right side has no
difference of large numbers in it. Inner products of such changes are made of `(rank, rank)` blocks `dB_i^T dB_j`,
`dA_i dA_j^T` and the like, so that a round's whole matrix takes two matrix products a layer. All in fp64, where even
the fourth powers of the largest fp32 numbers are finite: a hostile client cannot make a distance NaN.

A client of a lower rank than the run's is measured by what it changed itself, not by what cutting its start left out.
Layers with a square core have their core measured, `s^2 <dR_i, dR_j>`: the same if the fixed factors are orthonormal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch

from fedpeat.core import ClientUpdate, LoraPair, Tensors
from strategies.reducers import Situation

MEASURES = ("products", "factors", "both")
"""What clients are compared by: what their LoRA layers compute, the factors as they are, or both side by side."""

ROUNDING = 2.0**-40
"""A squared distance this small beside the squared norms is no more than their rounding error."""

_ENTRIES = 1 << 21
_TILE = 128
"""Rows of inner products worked out at once: of all clients with all, only tiles of the lower half are needed."""

Kind = TypeVar("Kind", torch.Tensor, "Curve")


class Compared(NamedTuple, Generic[Kind]):
    """Inner products (tensors) or sizes (curves) of clients' changes.

    Attributes:
        products: Of LoRA layers' products: `sum <dW_i, dW_j>`.
        factors: Of LoRA layers' factors: `sum (<dA_i, dA_j> + <dB_i, dB_j>)`.
        others: Of all other tensors as they are.
    """

    products: Kind
    factors: Kind
    others: Kind


def grams(
    situation: Situation, updates: Sequence[ClientUpdate], of: Sequence[int] | None = None, measure: str = "both"
) -> Compared[torch.Tensor]:
    """Return the inner products between the clients' changes, `(of, clients)`, fp64.

    Args:
        situation: The round's.
        updates: At least one.
        of: The clients whose rows are wanted, by position; by default all.
        measure: What they are for, one of `MEASURES`: with `factors`, the products' are left at 0, which takes a
            `1 / rank` of the time.
    """
    count = len(updates)
    totals = Compared(*(torch.zeros(len(of or range(count)), count, dtype=torch.float64) for _ in range(3)))
    for pair in _pairs(situation):
        if measure == "factors":
            for factor in _factors(pair, updates):
                _add_plain(totals.factors, factor, of)
        else:
            stacks = _stacks(pair, situation.state.tensors, updates)
            if stacks is not None:
                _add_pair(totals, stacks, of, pair.scaling)
    for name, scaling in _plain(situation, updates).items():
        _add_plain(totals.others, [update.delta.get(name) for update in updates], of, scaling**2)
    return totals if of is not None else Compared(*map(_mirrored, totals))


def _mirrored(lower: torch.Tensor) -> torch.Tensor:
    return lower.tril() + lower.tril(-1).T


def _tiles(count: int, of: Sequence[int] | None, most: int) -> Iterator[tuple[slice, list[int], int]]:
    """Yield the rows to fill, whose they are, and how many columns they need: of all clients, up to the diagonal."""
    rows = list(range(count) if of is None else of)
    for start in range(0, len(rows), max(1, most)):
        some = rows[start : start + max(1, most)]
        yield slice(start, start + len(some)), some, count if of is not None else some[-1] + 1


def gram(situation: Situation, updates: Sequence[ClientUpdate], measure: str) -> torch.Tensor:
    """Return the inner products that a distance rule works with, `(clients, clients)`, fp64.

    With `both`, each client is one vector of two parts: the change of its products (with all plain tensors), and that
    of its factors. Each part is scaled so that the median client's (of an even number, the smaller one's) has length 1.
    Otherwise a client that is near in products but far in factors (`c B` and `A / c`: the same product) would be taken
    for harmless, though the mean of factors carries it on.

    Args:
        situation: The round's.
        updates: At least one.
        measure: One of `MEASURES`.
    """
    found = parts(grams(situation, updates, measure=measure), measure)
    return found[0] if len(found) == 1 else _by_median(found[0]) + _by_median(found[1])


def _by_median(inner: torch.Tensor) -> torch.Tensor:
    median = float(inner.diagonal().median())
    return inner / median if median > 1e-100 else inner  # by less, the largest numbers would overflow


def parts(of: Compared[Kind], measure: str) -> list[Kind]:
    """Return what is compared by `measure`: one part, or two with `both`. Plain tensors count once."""
    whole = of.products + of.others
    return {"products": [whole], "factors": [of.factors + of.others], "both": [whole, of.factors]}[measure]


def _pairs(situation: Situation) -> tuple[LoraPair, ...]:
    return tuple(pair for pair in situation.layout.pairs if pair.r is None)


def _plain(situation: Situation, updates: Sequence[ClientUpdate]) -> Mapping[str, float]:
    """Return the names that updates hold beside factors, with the scaling that theirs is."""
    factors = {name for pair in _pairs(situation) for name in (pair.a, pair.b)}
    cores = {pair.r: pair.scaling for pair in situation.layout.pairs if pair.r}
    return {name: cores.get(name, 1.0) for update in updates for name in update.delta if name not in factors}


def _blocks(deltas: Sequence[torch.Tensor | None]) -> Iterator[torch.Tensor]:
    """Yield one tensor of all clients as `(clients, entries)`, fp64, some at a time; zeros for what was not sent."""
    flat = [None if delta is None else delta.reshape(-1) for delta in deltas]
    entries = max(0 if delta is None else delta.numel() for delta in flat)
    step = max(1, _ENTRIES // len(flat))
    for start in range(0, entries, step):
        block = torch.zeros(len(flat), min(step, entries - start), dtype=torch.float64)
        for row, delta in zip(block, flat, strict=True):
            if delta is not None:
                piece = delta[start : start + step]
                row[: len(piece)] = piece
        yield block


class _Stacks(NamedTuple):
    """A layer's factors side by side, `(clients + 1, rank, width)`, fp64: the clients' changes, then the global one."""

    a: torch.Tensor
    b: torch.Tensor


def _stacks(pair: LoraPair, tensors: Tensors, updates: Sequence[ClientUpdate]) -> _Stacks | None:
    """Return the stacks at the largest rank that was sent, B transposed; None if no client sent either factor.

    Zeros in a client's change beyond its own rank also switch off the global factors there, so `dB_k A_k + B dA_k` is
    right for each client though the stacks have one rank.
    """
    a, b = _factors(pair, updates)
    rank = max((delta.shape[0] for delta in (*a, *b) if delta is not None), default=0)
    return _Stacks(_padded(a, tensors[pair.a][:rank]), _padded(b, tensors[pair.b].T[:rank])) if rank else None


def _padded(deltas: Sequence[torch.Tensor | None], common: torch.Tensor) -> torch.Tensor:
    stack = torch.zeros(len(deltas) + 1, *common.shape, dtype=torch.float64)
    for slot, delta in zip(stack, (*deltas, common), strict=True):
        if delta is not None:
            slot[: delta.shape[0]] = delta
    return stack


def _factors(pair: LoraPair, updates: Sequence[ClientUpdate]) -> list[list[torch.Tensor | None]]:
    """Return all clients' changes of A and of B transposed: so what a lower rank lacks is at the end of each."""
    a = [update.delta.get(pair.a) for update in updates]
    return [a, [None if (delta := update.delta.get(pair.b)) is None else delta.T for update in updates]]


def _add_plain(
    total: torch.Tensor, deltas: Sequence[torch.Tensor | None], of: Sequence[int] | None, scale: float = 1.0
) -> None:
    for block in _blocks(deltas):
        for where, some, stop in _tiles(len(deltas), of, _TILE):
            total[where, :stop].addmm_(block[some], block[:stop].T, alpha=scale)


def _add_pair(totals: Compared[torch.Tensor], stacks: _Stacks, of: Sequence[int] | None, scaling: float) -> None:
    count, rank, _ = stacks.a.shape
    for where, some, stop in _tiles(count - 1, of, min(_TILE, _ENTRIES // (rank * rank * count))):
        rows, columns = [*some, count - 1], [*range(stop), count - 1]
        b, a = _overlaps(stacks.b, rows, columns), _overlaps(stacks.a, rows, columns)
        totals.products[where, :stop] += scaling**2 * _inner(b, a)
        totals.factors[where, :stop] += (b + a)[:-1, :-1].diagonal(dim1=2, dim2=3).sum(2)


def _overlaps(stack: torch.Tensor, rows: Sequence[int], columns: Sequence[int]) -> torch.Tensor:
    """Return all blocks `stack[i] @ stack[j]^T`, `(rows, columns, rank, rank)`."""
    _, rank, width = stack.shape
    flat = stack[list(rows)].reshape(-1, width) @ stack[list(columns)].reshape(-1, width).T
    return flat.reshape(len(rows), rank, len(columns), rank).transpose(1, 2)


def _inner(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Return `<dB_i A_i + B dA_i, dB_j A_j + B dA_j>`, `(some, clients)`, from the overlaps; the globals come last.

    That is with `A_i = A + dA_i` multiplied out; `c` stands for what is common.
    """
    b_ij, b_ic, b_cj, b_cc = b[:-1, :-1], b[:-1, -1:], b[-1:, :-1], b[-1:, -1:]
    a_ij, a_ic, a_cj, a_cc = a[:-1, :-1], a[:-1, -1:], a[-1:, :-1], a[-1:, -1:]
    terms = b_ij * (a_ij + a_ic + a_cj + a_cc) + b_ic * (a_ij + a_cj) + b_cj * (a_ij + a_ic) + b_cc * a_ij
    return terms.sum((2, 3))


def squared_distances(inner: torch.Tensor) -> torch.Tensor:
    """Return the squared distances that belong to inner products, `(clients, clients)`, fp64.

    What is no more than rounding error is 0, so that equals tie; what is not finite counts as infinitely far.

    >>> squared_distances(torch.tensor([[1.0, 0.0], [0.0, 4.0]]).double())
    tensor([[0., 5.],
            [5., 0.]], dtype=torch.float64)
    """
    sums = inner.diagonal()[:, None] + inner.diagonal()[None, :]
    return _cleaned(sums - inner - inner.T, sums).fill_diagonal_(0.0)


def distances_to(inner: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return each client's distance to the point `sum_k weights_k x_k`, `(clients,)`, fp64; the weights sum to 1."""
    along = inner @ weights
    point = weights @ along
    return _cleaned(inner.diagonal() - 2 * along + point, inner.diagonal() + point).sqrt()


def _cleaned(squares: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    near = (squares <= ROUNDING * sums) & sums.isfinite()
    return torch.where(near, 0.0, squares).nan_to_num(nan=math.inf, posinf=math.inf)


@dataclass(frozen=True)
class Curve:
    """The squared norm of a change whose tensors are all scaled by `c`: `c^2 (linear + 2 c mixed + c^2 square)`.

    A LoRA layer's change has a part linear in its factors' changes and a quadratic one, `s c (dB A + B dA)` and
    `s c^2 dB dA`. So it does not grow by `c` itself; where the two parts oppose each other it may even shrink for a
    while. Curves add up over parts that are orthogonal, such as layers.
    """

    linear: float = 0.0
    mixed: float = 0.0
    square: float = 0.0

    def norm(self, c: float = 1.0) -> float:
        """Return the norm at the scale `c`.

        >>> Curve(linear=4.0).norm(0.5)
        1.0
        """
        return c * math.sqrt(max(0.0, self.linear + c * (2 * self.mixed + c * self.square)))

    def __add__(self, other: Curve) -> Curve:
        return Curve(self.linear + other.linear, self.mixed + other.mixed, self.square + other.square)

    def __rmul__(self, weight: float) -> Curve:
        return Curve(weight * self.linear, weight * self.mixed, weight * self.square)


def curves(situation: Situation, update: ClientUpdate) -> Compared[Curve]:
    """Return how the norms of one client's change grow with its scale; at the scale 1 they are those of `grams`."""
    products, factors, others = Curve(), Curve(), Curve()
    for pair in _pairs(situation):
        stacks = _stacks(pair, situation.state.tensors, [update])
        if stacks is not None:
            b, a = _overlaps(stacks.b, range(2), range(2)), _overlaps(stacks.a, range(2), range(2))
            products += pair.scaling**2 * _bilinear(b, a)
            factors += Curve(float((b + a)[0, 0].trace()))
    for name, scaling in _plain(situation, [update]).items():
        square = sum(float(block.square().sum()) for block in _blocks([update.delta[name]]))
        others += scaling**2 * Curve(square)
    return Compared(products, factors, others)


def _bilinear(b: torch.Tensor, a: torch.Tensor) -> Curve:
    """Return the curve of `c (dB A + B dA) + c^2 dB dA` from the overlaps of the change (first) and the globals."""
    linear = b[0, 0] * a[1, 1] + 2 * b[0, 1] * a[1, 0] + b[1, 1] * a[0, 0]
    mixed = b[0, 0] * a[1, 0] + b[1, 0] * a[0, 0]
    square = b[0, 0] * a[0, 0]
    return Curve(max(0.0, float(linear.sum())), float(mixed.sum()), max(0.0, float(square.sum())))


def scale_to(curve: Curve, norm: float, most: float = 1.0) -> float:
    """Return the smallest scale `c <= most` at which `curve` reaches `norm`; `most` if it stays below until there.

    At no smaller scale is the norm larger than `norm`.

    >>> round(scale_to(Curve(linear=4.0), 1.0), 12)
    0.5
    """
    for low, high in _rising(curve, norm, most):
        if curve.norm(high) >= norm:
            return _bisect(curve, norm, low, high)
    return most


def _rising(curve: Curve, norm: float, most: float) -> Iterator[tuple[float, float]]:
    """Yield the stretches of scales up to `most`, in order, on which the norm rises."""
    low, high = 0.0, most
    inside = 9 * curve.mixed * curve.mixed - 8 * curve.linear * curve.square
    if curve.mixed < 0 < curve.square and inside > 0:
        root = math.sqrt(inside) - 3 * curve.mixed
        # The smaller root from the product of both: as a difference it would lose its digits.
        yield 0.0, min(most, 2 * curve.linear / root)
        low = root / (4 * curve.square)
    if math.isinf(most):
        high = max(1.0, 2 * low)
        while curve.norm(high) < norm and high < 1e100:
            high *= 2
    if low < high:
        yield low, high


def _bisect(curve: Curve, norm: float, low: float, high: float) -> float:
    if curve.norm(high) == norm:
        return high
    if norm == 0:
        return low
    middle = (low + high) / 2
    while low < middle < high and high - low > 1e-15 * high:
        low, high = (middle, high) if curve.norm(middle) <= norm else (low, middle)
        middle = (low + high) / 2
    return low
