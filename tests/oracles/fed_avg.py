"""Federated averaging as a plain loop: slow, obvious, independent of the strategies package."""

import numpy as np


def weighted_average(deltas, weights):
    """Average numpy dicts by weights, with exact rational-free arithmetic in long double."""
    total = np.longdouble(sum(weights))
    out = {}
    for name in deltas[0]:
        acc = np.zeros(deltas[0][name].shape, dtype=np.longdouble)
        for delta, weight in zip(deltas, weights, strict=True):
            acc = acc + np.longdouble(weight) * delta[name].astype(np.longdouble)
        out[name] = (acc / total).astype(np.float32)
    return out
