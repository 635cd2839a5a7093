"""HetLoRA: LoRA factors of different ranks, padded with zeros and weighted by how much they hold."""

from dataclasses import dataclass, field
from functools import partial

import torch

from fedpeat.core import ClientUpdate, LoraPair, Tensors
from strategies.exactness import local_factors, with_rest
from strategies.lora import checked
from strategies.recipe import Facts, Recipe, every_round, in_range
from strategies.reducers import Reducer, Situation, Step, WeightedSum
from strategies.svd import only


def product_norm(b: torch.Tensor, a: torch.Tensor) -> float:
    """Return the Frobenius norm of `b @ a` from the factors' Gram matrices, `(r, r)` each.

    >>> product_norm(torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 2.0]]))
    10.0
    """
    b, a = b.double(), a.double()
    return max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0) ** 0.5


def padded(tensors: Tensors, pair: LoraPair, rank: int) -> dict[str, torch.Tensor]:
    """Return a layer's factors, `(rank, in)` and `(out, rank)`: zeros in the rows of A and columns of B they lack."""
    a, b = tensors[pair.a], tensors[pair.b]
    return {
        pair.a: torch.cat([a, a.new_zeros(rank - a.shape[0], a.shape[1])]),
        pair.b: torch.cat([b, b.new_zeros(b.shape[0], rank - b.shape[1])], dim=1),
    }


@dataclass
class _Sums:
    """What a round brought so far.

    Attributes:
        situation: The round's.
        others: Changes of the tensors in no LoRA layer, by the clients' weights.
        factors: The clients' factors, by the norms of their products; while all norms are 0, by the clients' weights.
        blank: Whether all norms are 0 so far.
        keep_rest: Whether factors are filled up with the global ones instead of zeros.
    """

    situation: Situation
    others: WeightedSum = field(default_factory=WeightedSum)
    factors: WeightedSum = field(default_factory=WeightedSum)
    blank: bool = True
    keep_rest: bool = False


def _add(sums: _Sums, update: ClientUpdate) -> _Sums:
    layout = sums.situation.layout
    sums.others.add(only(layout.others, update.delta), update.weight)
    factors: dict[str, torch.Tensor] = {}
    squares = 0.0
    for pair in layout.pairs:
        b, a = local_factors(sums.situation.state, update, pair)
        squares += (pair.scaling * product_norm(b, a)) ** 2
        if sums.keep_rest:
            b, a = with_rest(sums.situation.state, b, a, pair)
        factors |= padded({pair.a: a, pair.b: b}, pair, layout.rank)
    weight = squares**0.5 if update.weight else 0.0
    if weight and sums.blank:
        # Beside this norm the zeros before it weigh nothing: what was kept in case all are zero is not needed.
        sums.factors, sums.blank = WeightedSum(), False
    sums.factors.add(factors, update.weight if sums.blank else weight)
    return sums


def _finish(sums: _Sums) -> Step:
    step, state = sums.others.mean(), sums.situation.state.tensors
    return Step(step | {name: mean - state[name] for name, mean in sums.factors.mean().items()})


def het_lora(
    *, tail_weight: float = 0.005, tail_share: float = 0.99, keep_rest: bool = False, weight_by: str = "tokens"
) -> Recipe:
    """Return HetLoRA: pad the clients' factors to one rank, average them by the norms of their products.

    `A <- sum_k q_k A_k` and `B <- sum_k q_k B_k` with zeros where a client's rank ends and `q_k` in proportion to
    `|B_k A_k|`; a client of rank `r_k` starts from the first `r_k` rows and columns. Locally, the loss gains
    `tail_weight * |B[:, k:]| |A[k:]|` a layer, `k` being the whole part of `tail_share` times the client's rank.

    Args:
        tail_weight: lambda, how much the loss gains; 0 leaves it as it is.
        tail_share: gamma, where the tail begins, 0 to 1.
        keep_rest: Whether a smaller rank's factors are filled up with the rows and columns of the global ones that the
            client was not given, so that they stay as they are; else with zeros, as in the paper.
        weight_by: `tokens`, `rows` or `equal`; only for what is in no LoRA layer, and where all products are zero.

    Raises:
        ConfigError: If `tail_weight` is negative, or `tail_share` out of range.

    Source: Cho et al. 2024, arXiv 2401.06432, section 3.
    Departures: clients do not prune their own ranks, which are the plan's; the penalty stays. The norm is that of all
        layers' products taken as one vector. Where all products are zero (B before any training), the clients' weights
        stand in for the norms; a client of weight 0 never counts. A head in no LoRA layer is averaged by weight. The
        defaults of lambda and gamma are ours, and so is `keep_rest`.
    """
    in_range("het_lora", "tail_weight", tail_weight, 0)
    in_range("het_lora", "tail_share", tail_share, 0, 1)

    facts = Facts(
        "lora",
        "Cho et al. 2024, arXiv 2401.06432",
        exact="no",
        needs="pairs",
        note="Directions that only clients of high rank hold shrink by the others' zeros.",
    )
    half = every_round(tail_penalty=[tail_weight, tail_share]) if tail_weight else every_round()
    reduce = checked("het_lora", Reducer(partial(_Sums, keep_rest=keep_rest), _add, _finish))
    return Recipe("het_lora", reduce, weight_by=weight_by, client=half, mixes_ranks=True, facts=facts)
