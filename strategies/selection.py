"""Who counts, and how much: from a matrix of distances or inner products between clients to choices and weights."""

from collections.abc import Sequence
from math import inf

import torch

from fedpeat.core import ClientUpdate
from strategies.gram import ROUNDING, Curve, curves, distances_to, grams, parts, scale_to, squared_distances
from strategies.reducers import Situation


def krum_scores(squared: torch.Tensor, byzantine: int) -> torch.Tensor:
    """Return Krum's scores, `(clients,)`: the sum of the squared distances to the `n - f - 2` nearest others.

    At least one other counts, if there is one.

    Args:
        squared: Squared distances, `(clients, clients)`.
        byzantine: f.
    """
    count = squared.shape[0]
    near = min(max(count - byzantine - 2, 1), count - 1)
    apart = squared.clone().fill_diagonal_(float("inf"))
    return apart.sort(dim=1).values[:, :near].sum(dim=1)


def best(scores: torch.Tensor, count: int) -> list[int]:
    """Return the positions of the `count` smallest scores, the smallest first; of equals, the first.

    >>> best(torch.tensor([2.0, 1.0, 1.0]), 2)
    [1, 2]
    """
    return scores.argsort(stable=True)[:count].tolist()


def repeated_krum(squared: torch.Tensor, byzantine: int, count: int) -> list[int]:
    """Return the positions of `count` clients, each chosen by Krum among those that are left."""
    left = list(range(squared.shape[0]))
    chosen: list[int] = []
    for _ in range(count):
        (place,) = best(krum_scores(squared[left][:, left], byzantine), 1)
        chosen.append(left.pop(place))
    return chosen


def weiszfeld(inner: torch.Tensor, shares: torch.Tensor, iterations: int, smoothing: float) -> torch.Tensor:
    """Return the weights, `(clients,)` with the sum 1, whose mean is near `argmin_z sum_k shares_k |z - x_k|`.

    Every iterate is a mean of the clients, so its distances to them follow from their inner products.

    Args:
        inner: Inner products of the clients, `(clients, clients)`, fp64.
        shares: Weights of the distances, `(clients,)`, fp64, with the sum 1.
        iterations: How often distances are taken anew.
        smoothing: Distances below `smoothing` times the median one count as that.
    """
    # As many clients as make up half are near those that they are nearest to: no far outlier is among these.
    nearness = squared_distances(inner).median(dim=1).values
    core = torch.where(nearness <= nearness.median(), shares, 0.0)
    weights = core / core.sum() if core.sum() > 0 else shares
    # Equals may lie at no distance at all; the least that is not 0 keeps 1 / distance finite.
    least = max(smoothing * float(distances_to(inner, weights).median()), 1e-150)
    for _ in range(iterations):
        pulls = shares / distances_to(inner, weights).clamp(min=least)
        weights = pulls / pulls.sum()
    return weights


def trust(
    situation: Situation, updates: Sequence[ClientUpdate], server: int, measure: str
) -> list[tuple[float, float]]:
    """Return each update's cosine with the server's, and the scale that gives its change the server's size.

    In each part that is compared the server's change is given length 1; a part that it did not change is left out.

    Args:
        situation: The round's.
        updates: The server's among them.
        server: Its position.
        measure: One of `strategies.gram.MEASURES`.
    """
    own = [parts(curves(situation, update), measure) for update in updates]
    along = torch.zeros(len(updates), dtype=torch.float64)
    sizes = [Curve() for _ in updates]
    for index, (row,) in enumerate(parts(grams(situation, updates, of=[server], measure=measure), measure)):
        square = own[server][index].norm() ** 2
        if square > 0:
            along += row / square
            sizes = [size + (1 / square) * part[index] for size, part in zip(sizes, own, strict=True)]
    length = sizes[server].norm()
    return [
        (_cosine(dot, size.norm() * length), scale_to(size, length, most=inf))
        for dot, size in zip(along.tolist(), sizes, strict=True)
    ]


def _cosine(dot: float, lengths: float) -> float:
    """Return the cosine; 0 if it is no more than rounding error, as all trust may rest on one client."""
    return dot / lengths if abs(dot) > ROUNDING * lengths else 0.0
