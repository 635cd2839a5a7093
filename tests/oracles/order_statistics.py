"""Order statistics one coordinate at a time, on Python lists: slow, obvious, independent of the strategies package."""

import numpy as np


def by_coordinate(deltas, pick):
    """Apply `pick` (list of floats -> float) to each coordinate of numpy dicts; a name not sent is zeros."""
    shapes = {name: value.shape for delta in deltas for name, value in delta.items()}
    out = {}
    for name, shape in shapes.items():
        out[name] = np.zeros(shape)
        for place in np.ndindex(shape):
            out[name][place] = pick([float(delta[name][place]) if name in delta else 0.0 for delta in deltas])
    return out


def median(values):
    """The middle one of the sorted values, or the mean of the two in the middle."""
    ordered, count = sorted(values), len(values)
    return ordered[count // 2] if count % 2 else (ordered[count // 2 - 1] + ordered[count // 2]) / 2


def trimmed(share):
    """The mean of what is left after dropping `share` of the values at each end."""

    def pick(values):
        ordered, drop = sorted(values), int(share * len(values) + 1e-9)
        kept = ordered[drop : len(ordered) - drop]
        return sum(kept) / len(kept)

    return pick


def central(keep):
    """The mean of the `keep` values closest to the median; of two as close, the lower."""

    def pick(values):
        middle = median(values)
        return sum(sorted(sorted(values), key=lambda value: abs(value - middle))[:keep]) / keep

    return pick
