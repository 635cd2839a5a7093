"""Robust rules on whole vectors, LoRA's products formed in full: slow, obvious, independent of the strategies."""

import numpy as np

from tests.oracles import order_statistics


def product_change(pair, tensors, delta):
    """s (B_k A_k - B A) at the client's own rank, formed in full, fp64."""
    a, b = (tensors[name].numpy().astype(np.float64) for name in (pair.a, pair.b))
    sent = {name: delta[name].numpy().astype(np.float64) for name in (pair.a, pair.b) if name in delta}
    rank = sent[pair.a].shape[0] if pair.a in sent else sent[pair.b].shape[1] if sent else a.shape[0]
    a, b = a[:rank], b[:, :rank]
    return pair.scaling * ((b + sent.get(pair.b, 0.0)) @ (a + sent.get(pair.a, 0.0)) - b @ a)


def vectors(state, layout, delta):
    """A client's change as three flat vectors: of products, of factors (padded with zeros) and of other tensors."""
    products, factors, others = [np.zeros(1)], [np.zeros(1)], [np.zeros(1)]
    for pair in layout.pairs:
        if pair.r:
            others.append(pair.scaling * delta[pair.r].numpy().astype(np.float64).ravel())
            continue
        products.append(product_change(pair, state.tensors, delta).ravel())
        for name in (pair.a, pair.b):
            padded = np.zeros(tuple(state.tensors[name].shape))
            if name in delta:
                value = delta[name].numpy()
                padded[tuple(slice(size) for size in value.shape)] = value
            factors.append(padded.ravel())
    known = {name for pair in layout.pairs for name in (pair.a, pair.b, pair.r)}
    others += [delta[name].numpy().astype(np.float64).ravel() for name in sorted(delta) if name not in known]
    return tuple(np.concatenate(some) for some in (products, factors, others))


def points(state, layout, deltas, measure):
    """The vectors that distances are taken between, one row a client."""
    found = [vectors(state, layout, delta) for delta in deltas]
    products = np.stack([np.concatenate([product, other]) for product, _, other in found])
    factors = np.stack([factor for _, factor, _ in found])
    if measure == "products":
        return products
    if measure == "factors":
        return np.stack([np.concatenate([factor, other]) for _, factor, other in found])
    return np.concatenate([_typical(products), _typical(factors)], axis=1)


def _typical(rows):
    lengths = sorted(np.linalg.norm(row) for row in rows)
    median = lengths[(len(lengths) - 1) // 2]
    return rows / median if median > 0 else rows


def distances(rows):
    """Squared distances, `(clients, clients)`."""
    return np.array([[np.sum((left - right) ** 2) for right in rows] for left in rows])


def krum_scores(squared, byzantine, among):
    """Krum's scores by client, looking at the clients `among` only."""
    near = max(1, len(among) - byzantine - 2)
    return {i: sum(sorted(squared[i, j] for j in among if j != i)[:near]) for i in among}


def krum(rows, byzantine, count=1):
    """The `count` clients with the best scores."""
    scores = krum_scores(distances(rows), byzantine, range(len(rows)))
    return sorted(scores, key=lambda i: (scores[i], i))[:count]


def bulyan(rows, deltas, byzantine):
    """The step, by coordinate, of the clients that repeated Krum chooses."""
    squared, left, chosen = distances(rows), list(range(len(rows))), []
    while len(chosen) < len(rows) - 2 * byzantine:
        scores = krum_scores(squared, byzantine, left)
        chosen.append(min(left, key=lambda i: (scores[i], i)))
        left.remove(chosen[-1])
    keep = len(chosen) - 2 * byzantine
    return order_statistics.by_coordinate([deltas[i] for i in chosen], order_statistics.central(keep))


def geometric_median(rows, shares, iterations=3000):
    """Weiszfeld's algorithm on the vectors themselves, from their mean."""
    point = np.average(rows, axis=0, weights=shares)
    for _ in range(iterations):
        away = np.array([np.linalg.norm(row - point) for row in rows])
        weights = np.array(shares) / np.maximum(away, 1e-12)
        weights = weights / weights.sum()
        point = weights @ rows
    return weights


def scale_to(state, layout, delta, norm, parts, most=1.0):
    """The smallest c <= most at which the scaled change is as long as `norm`, from the roots of a polynomial.

    The squared length is a polynomial of degree 4 in c without lower terms than the second: three values tell it.
    """
    scales = np.array([1.0, 2.0, -1.0])
    squares = []
    for scale in scales:
        scaled = {name: value.double() * scale for name, value in delta.items()}
        squares.append(sum(np.sum(vector**2) for vector in parts(vectors(state, layout, scaled))))
    two, three, four = np.linalg.solve(np.stack([scales**2, scales**3, scales**4], axis=1), np.array(squares))
    roots = np.roots([four, three, two, 0.0, -(norm**2)])
    real = sorted(root.real for root in roots if abs(root.imag) < 1e-7 and 0 < root.real <= most)
    return real[0] if real else most


def mean(deltas, weights):
    """The weighted mean of numpy or torch dicts, fp64."""
    total = sum(weights)
    return {
        name: sum(
            weight * np.asarray(delta[name], dtype=np.float64) for delta, weight in zip(deltas, weights, strict=True)
        )
        / total
        for name in deltas[0]
    }
