"""q-FedAvg as its paper writes it, over plain arrays: slow, obvious, independent of the strategies package."""

import numpy as np


def q_fed_avg(start, locals_, losses, q, lipschitz, weights=None):
    """One round of algorithm 2 of arXiv 1905.10497, fp64: the next global tensors.

    `start` and each of `locals_` are dicts of arrays; a weight counts a client that often.
    """
    weights = weights or [1.0] * len(locals_)
    total, numerator = 0.0, {name: np.zeros_like(value, dtype=float) for name, value in start.items()}
    for local, loss, weight in zip(locals_, losses, weights, strict=True):
        gradient = {name: lipschitz * (start[name] - local[name]) for name in start}
        flat = np.concatenate([value.ravel() for value in gradient.values()])
        total += weight * (q * loss ** (q - 1) * (flat @ flat) + lipschitz * loss**q)
        for name in start:
            numerator[name] += weight * loss**q * gradient[name]
    return {name: start[name] - numerator[name] / total for name in start}
