"""LoRA aggregates by singular value decomposition: the mean of the clients' products, at the rank there is.

The mean `sum_k p_k B_k A_k` is `(out, in)` and never formed: it is the product of two stacks of factors, and its
decomposition comes from theirs (QR) and that of a small core.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fedpeat.core import ClientUpdate, LoraPair, Tensors
from strategies.exactness import local_factors, with_rest
from strategies.lora import checked
from strategies.recipe import Facts, Recipe, every_round, in_range
from strategies.reducers import Reducer, Situation, Step, WeightedSum

_TIED = 1 - 1e-6
_ROUNDING = torch.finfo(torch.float64).eps


class Decomposition(NamedTuple):
    """The leading part of a singular value decomposition, fp64.

    Attributes:
        u: `(out, k)`, orthonormal columns; the largest entry of each is positive, the first of them if several are.
        s: `(k,)`, falling, all above what rounding alone could make.
        vt: `(k, in)`, orthonormal rows.
        spectrum: `s` and the singular values that were left out.
    """

    u: torch.Tensor
    s: torch.Tensor
    vt: torch.Tensor
    spectrum: torch.Tensor


def decompose(b: torch.Tensor, a: torch.Tensor, rank: int) -> Decomposition:
    """Return the decomposition of `b @ a`, cut to the first `rank` singular values, without forming the product.

    With `b = Q_b R_b` and `a^T = Q_a R_a` it is that of the core `R_b R_a^T`, turned by `Q_b` and `Q_a`: time and
    memory are linear in `out + in`.

    Args:
        b: `(out, r)`, any `r`, also one above `out` or `in`.
        a: `(r, in)`.
        rank: Most singular values to keep; there are fewer where the product's rank is lower, none where it is zero.

    >>> found = decompose(torch.tensor([[3.0], [-4.0]]), torch.tensor([[3.0, -4.0]]), 1)
    >>> [part.numpy().round(6).tolist() for part in found]
    [[[-0.6], [0.8]], [25.0], [[-0.6, 0.8]], [25.0]]
    """
    b, a = b.double(), a.double()
    left, left_core = torch.linalg.qr(b)
    right, right_core = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    # QR errs relative to each column, so this is what errors add up to; the product of whole norms may be far larger.
    noise = _ROUNDING * max(*b.shape, *a.shape) * (b.norm(dim=0) * a.norm(dim=1)).sum()
    spectrum = s[s > noise]
    keep = min(rank, spectrum.shape[0])
    u, vt = left @ u[:, :keep], vt[:keep] @ right.T
    signs = _signs(u)
    return Decomposition(u * signs, s[:keep], vt * signs[:, None], spectrum)


def _signs(columns: torch.Tensor) -> torch.Tensor:
    """Return 1 or -1 for each column: that of its largest entry, so that LAPACK's choice does not show."""
    if not columns.shape[1]:
        return columns.new_ones(0)
    size = columns.abs()
    largest = (size >= _TIED * size.amax(0)).int().argmax(0)
    return torch.where(columns.gather(0, largest[None])[0] < 0, -1.0, 1.0).to(columns.dtype)


def completed(rows: torch.Tensor, toward: torch.Tensor) -> torch.Tensor:
    """Return orthonormal rows, as many as `toward` has: `rows`, then what `toward` holds beside them, strongest first.

    Where that is too little, any directions follow; once there are `in` of them, zeros.

    Args:
        rows: `(p, in)`, orthonormal.
        toward: `(rank, in)`, `rank >= p`.
    """
    have, (rank, width) = rows.shape[0], toward.shape
    beside = toward.to(rows.dtype)
    beside = beside - (beside @ rows.T) @ rows
    strongest = torch.linalg.svd(beside, full_matrices=False).Vh[: rank - have]
    # Householder's Q is orthonormal even where what it came from is not of full rank.
    basis = torch.linalg.qr(torch.cat([rows, strongest]).T).Q.T[have : min(rank, width)]
    more = basis * _signs(basis.T)[:, None]
    return torch.cat([rows, more, rows.new_zeros(rank - have - more.shape[0], width)])


class ProductSum:
    """A running weighted sum of low-rank products `B A`, kept as stacks of factors.

    The stacks grow with the clients until they are of twice the rank that the sum can have, `min(out, in)`; then their
    decomposition replaces them, whole. That is exact, and bounds the memory.

    >>> total = ProductSum()
    >>> total.add(torch.ones(2, 1), torch.ones(1, 3), weight=4)
    >>> total.add(torch.ones(2, 1), torch.ones(1, 3), weight=5)
    >>> b, a = total.factors()
    >>> (b @ a).tolist()
    [[9.0, 9.0, 9.0], [9.0, 9.0, 9.0]]
    """

    def __init__(self) -> None:
        self.stack: list[tuple[torch.Tensor, torch.Tensor, float]] = []

    @property
    def rank(self) -> int:
        """Columns of all B together."""
        return sum(b.shape[1] for b, _, _ in self.stack)

    def add(self, b: torch.Tensor, a: torch.Tensor, weight: float) -> None:
        """Add `weight * b @ a`; the tensors are kept, so nobody may change them afterwards."""
        self.stack.append((b, a, weight))
        most = min(b.shape[0], a.shape[1])
        if self.rank > 2 * most:
            whole = decompose(*self.factors(), most)
            self.stack = [(whole.u * whole.s, whole.vt, 1.0)]

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the stacks, fp64, `(out, r)` with the weights in it and `(r, in)`, whose product is the sum."""
        left = torch.cat([b.double() * weight for b, _, weight in self.stack], dim=1)
        return left, torch.cat([a.double() for _, a, _ in self.stack])


def only(names: tuple[str, ...], tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return the tensors of these names, where they are."""
    return {name: tensors[name] for name in names if name in tensors}


def replaced(state: Tensors, pair: LoraPair, found: Decomposition) -> dict[str, torch.Tensor]:
    """Return the change of a layer's factors to `B = U S` and `A = V^T`, fp32.

    Columns of B past those found are zeros. The rows of A there are orthonormal to the others and not zero: with zeros
    on both sides a direction would never get a gradient again. Where nothing was found, B is zero and A stays.
    """
    a, b = state[pair.a].double(), state[pair.b].double()
    scaled = found.u * found.s
    after = torch.cat([scaled, scaled.new_zeros(b.shape[0], b.shape[1] - scaled.shape[1])], dim=1)
    rows = completed(found.vt, a) if found.s.shape[0] else a
    return {pair.a: (rows - a).float(), pair.b: (after - b).float()}


@dataclass(frozen=True)
class Collected:
    """What a round brought so far; changed in place.

    Attributes:
        situation: The round's.
        products: The clients' products, by LoRA layer.
        others: The changes of tensors in no LoRA layer.
    """

    situation: Situation
    products: Mapping[str, ProductSum]
    others: WeightedSum = field(default_factory=WeightedSum)


def _product_mean(
    strategy: str, cut: Callable[[Decomposition], Decomposition] = lambda found: found, *, keep_rest: bool = False
) -> Reducer:
    """Return a reducer that replaces the factors by the decomposed mean of the products, after a cut.

    With `keep_rest`, what the global product holds beside a client's rank counts to that client's product.
    """

    def start(situation: Situation) -> Collected:
        return Collected(situation, {pair.module: ProductSum() for pair in situation.layout.pairs})

    def add(collected: Collected, update: ClientUpdate) -> Collected:
        layout = collected.situation.layout
        collected.others.add(only(layout.others, update.delta), update.weight)
        for pair in layout.pairs:
            b, a = local_factors(collected.situation.state, update, pair)
            if keep_rest:
                b, a = with_rest(collected.situation.state, b, a, pair)
            collected.products[pair.module].add(b.float(), a.float(), update.weight)
        return collected

    def finish(collected: Collected) -> Step:
        layout, state = collected.situation.layout, collected.situation.state.tensors
        step = collected.others.mean()
        for pair in layout.pairs:
            b, a = collected.products[pair.module].factors()
            step |= replaced(state, pair, cut(decompose(b / collected.others.weight, a, layout.rank)))
        return Step(step)

    return checked(strategy, Reducer(start, add, finish))


def flex_lora(*, keep_rest: bool = False, weight_by: str = "tokens") -> Recipe:
    """Return FlexLoRA: average the products, and give each client as much of the average as its rank holds.

    `W = sum_k p_k s B_k A_k = U S V^T`; the global factors are `B = U S / s` and `A = V^T`, cut to the run's rank.
    Their first `r_k` columns and rows, what a client of rank `r_k` starts from, are the best approximation of that rank
    (Eckart and Young).

    Args:
        keep_rest: Whether what a client of smaller rank was not given stays: its product is taken to be
            `B_k A_k + B[:, r_k:] A[r_k:]`, so that a round of small ranks alone loses nothing of the global product.
            Else, as in the paper, that is averaged away with the client's share.
        weight_by: `tokens`, `rows` or `equal`.

    Source: Bai et al. 2024, arXiv 2402.11505, section 3.2.
    Departures: `p_k` counts tokens trained on, not rows held (`weight_by=rows` gives the paper's). `W` is decomposed by
        its factors, with the same result. The scaling `s` is the same at each rank; the published code has `16 / r_k`.
        Where `W` has a lower rank than the run, the columns of B left over are zeros and the rows of A orthonormal to
        the others. A head in no LoRA layer is averaged. `keep_rest` is ours.
    """
    facts = Facts(
        "lora",
        "Bai et al. 2024, arXiv 2402.11505",
        exact="best rank-r",
        needs="pairs",
        rebases=True,
        note="The server's time grows with the square of the clients' summed ranks.",
    )
    reduce = _product_mean("flex_lora", keep_rest=keep_rest)
    return Recipe("flex_lora", reduce, weight_by=weight_by, mixes_ranks=True, facts=facts)


def florist(*, energy: float = 0.99, keep_rest: bool = False, weight_by: str = "tokens") -> Recipe:
    """Return FLoRIST: as FlexLoRA, but only with as many singular values as hold most of the energy.

    The smallest `p` with `sum_(i <= p) S_i^2 >= energy * sum_i S_i^2`; then `B = U_p S_p / s` and `A = V_p^T`.

    Args:
        energy: tau, the share of the squared singular values to keep, above 0; 1 keeps all that the run's rank holds.
        keep_rest: As with `flex_lora`.
        weight_by: `tokens`, `rows` or `equal`.

    Raises:
        ConfigError: If `energy` is out of range.

    Source: Ramesh and Dass 2025, arXiv 2506.09199, section 3 and algorithm 1.
    Departures: factors have one shape on the wire, so that `p` is at most the run's rank and no bytes are saved:
        columns of B past `p` are zeros, rows of A past `p` the next singular directions (with zeros on both sides they
        could not learn again). Clients go on from the global factors, cut to their rank; in the paper they merge the
        product into their base weights and start from new factors. The stacks are taken apart by QR, in the paper by
        two decompositions of their own; the cores differ by rotations only. `p_k` counts tokens trained on, not rows
        held. A head in no LoRA layer is averaged.
    """
    in_range("florist", "energy", energy, 1e-9, 1)

    def cut(found: Decomposition) -> Decomposition:
        # What is left from each value on; summed from the small end, so that energy=1 keeps even the smallest.
        left = found.spectrum.square().flip(0).cumsum(0).flip(0)
        dropped = left <= (1 - energy) * left[:1]
        return found._replace(s=found.s.masked_fill(dropped[: found.s.shape[0]], 0.0))

    facts = Facts(
        "lora",
        "Ramesh and Dass 2025, arXiv 2506.09199",
        exact="approximate",
        needs="pairs",
        rebases=True,
        note="Saves no bytes here: factors travel at the run's rank, whatever the energy keeps.",
    )
    reduce = _product_mean("florist", cut, keep_rest=keep_rest)
    return Recipe("florist", reduce, weight_by=weight_by, mixes_ranks=True, facts=facts)


def fed_svd(*, weight_by: str = "tokens") -> Recipe:
    """Return FedSVD: clients train B only; the server turns `B A` into orthonormal rows and the rest.

    `B <- sum_k p_k B_k`, then `U S V^T = B A`, `A <- V^T` and `B <- U S`: the product, and so the model, stays as it
    is, while clients of the next round train in its principal directions.

    Args:
        weight_by: `tokens`, `rows` or `equal`.

    Source: Lee et al. 2025, arXiv 2505.12805, section 3 and algorithm 1.
    Departures: `p_k` counts tokens trained on, not rows held. The product is decomposed by its factors, in every round.
        Where it is zero, A stays; where its rank is lower than A's, the new A goes on with the old one's other
        directions, made orthonormal, so that none that clients could train in is lost. A head in no LoRA layer is
        trained and averaged.
    """

    def start(situation: Situation) -> tuple[Situation, WeightedSum]:
        return situation, WeightedSum()

    def add(total: tuple[Situation, WeightedSum], update: ClientUpdate) -> tuple[Situation, WeightedSum]:
        total[1].add(update.delta, update.weight)
        return total

    def finish(total: tuple[Situation, WeightedSum]) -> Step:
        layout, state = total[0].layout, total[0].state.tensors
        change = total[1].mean()
        step = only(layout.others, change)
        for pair in layout.pairs:
            b = state[pair.b].double() + change[pair.b]
            step |= replaced(state, pair, decompose(b, state[pair.a], layout.rank))
        return Step(step)

    facts = Facts(
        "lora",
        "Lee et al. 2025, arXiv 2505.12805",
        exact="yes",
        linear=True,
        of_mean=True,
        needs="pairs",
        rebases=True,
        note="Clients send half of what plain LoRA sends, and are sent all of it.",
    )
    half = every_round(train_only=["B", "other"])
    reduce = checked("fed_svd", Reducer(start, add, finish))
    return Recipe("fed_svd", reduce, weight_by=weight_by, client=half, facts=facts)
