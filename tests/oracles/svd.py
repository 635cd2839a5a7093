"""The SVD rules with full products, in plain numpy fp64: slow, obvious, independent of the strategies package.

A layer is a pair (b, a), `(out, rank)` and `(rank, in)`; a client's change is a pair of the same kind at its own rank,
or (db, None) where it trains B only.
"""

import numpy as np


def full_svd(product):
    """u, s, vt of a matrix, the first of the largest entries of each column of u positive."""
    u, s, vt = np.linalg.svd(product, full_matrices=False)
    for column in range(s.size):
        size = np.abs(u[:, column])
        first = next(row for row in range(size.size) if size[row] > size.max() * 0.999999)
        if u[first, column] < 0:
            u[:, column] *= -1
            vt[column] *= -1
    return u, s, vt


def best(product, rank):
    """The best approximation of a rank."""
    u, s, vt = np.linalg.svd(product, full_matrices=False)
    return u[:, :rank] @ np.diag(s[:rank]) @ vt[:rank]


def local(layer, change):
    """What a client ended with: the global factors cut to its rank, and its change."""
    (b, a), (db, da) = layer, change
    rank = db.shape[1]
    return b[:, :rank] + db, a[:rank] if da is None else a[:rank] + da


def mean_product(layer, changes, weights):
    """The weighted mean of the clients' products, formed in full."""
    total = 0
    for change, weight in zip(changes, weights, strict=True):
        b, a = local(layer, change)
        total = total + weight * (b @ a)
    return total / sum(weights)


def from_product(product, rank, energy=None):
    """b = u s and a = vt of a product, cut to a rank, b also to the singular values that hold the energy."""
    u, s, vt = full_svd(product)
    kept = rank
    if energy is not None:
        kept = min(rank, next(p for p in range(1, s.size + 1) if (s[:p] ** 2).sum() >= energy * (s**2).sum()))
    b = u * s
    b[:, kept:] = 0
    return b[:, :rank], vt[:rank]


def flex_lora(layer, changes, weights):
    """The layer after a round of FlexLoRA."""
    return from_product(mean_product(layer, changes, weights), layer[1].shape[0])


def florist(layer, changes, weights, energy):
    """The layer after a round of FLoRIST."""
    return from_product(mean_product(layer, changes, weights), layer[1].shape[0], energy)


def fed_svd(layer, changes, weights):
    """The layer after a round of FedSVD."""
    mean = sum(weight * local(layer, change)[0] for change, weight in zip(changes, weights, strict=True))
    return from_product(mean / sum(weights) @ layer[1], layer[1].shape[0])


def het_lora(layers, changes, weights, scaling):
    """All layers after a round of HetLoRA; changes is a list of one dict of changes a client."""
    norms = []
    for client in changes:
        ends = [local(layer, client[name]) for name, layer in layers.items()]
        norms.append(np.sqrt(sum(np.linalg.norm(scaling * (b @ a)) ** 2 for b, a in ends)))
    if not any(norms):
        norms = weights
    after = {}
    for name, (b, a) in layers.items():
        new_b, new_a = np.zeros(b.shape), np.zeros(a.shape)
        for client, norm in zip(changes, norms, strict=True):
            local_b, local_a = local((b, a), client[name])
            rank = local_b.shape[1]
            new_b[:, :rank] += norm / sum(norms) * local_b
            new_a[:rank] += norm / sum(norms) * local_a
        after[name] = new_b, new_a
    return after
