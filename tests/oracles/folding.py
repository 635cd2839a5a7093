"""Folding rules as plain loops over numpy arrays: slow, obvious, independent of the strategies package.

A federation is `(tensors, folds)`, a client `(weight, {name: its own tensor})`, a LoRA layer
`(module, name of A, name of B, scaling)`. Everything is fp64.
"""

import numpy as np


def mean(clients, name):
    total = sum(weight for weight, _ in clients)
    return sum(weight / total * own[name] for weight, own in clients)


def mean_product(clients, layer):
    _, a, b, scaling = layer
    total = sum(weight for weight, _ in clients)
    return sum(weight / total * scaling * (own[b] @ own[a]) for weight, own in clients)


def layer_weight(tensors, folds, layer):
    """What a layer adds to its pre-trained weight."""
    module, a, b, scaling = layer
    return folds.get(module, 0.0) + scaling * (tensors[b] @ tensors[a])


def _with_others(tensors, clients, layers):
    inside = {name for _, a, b, _ in layers for name in (a, b)}
    return {name: tensors[name] if name in inside else mean(clients, name) for name in tensors}


def flora(tensors, folds, clients, layers, new_a):
    """Clients of any rank: all of their product into the weight, `new_a` (by name) and zeros in its place."""
    after, folds = _with_others(tensors, clients, layers), dict(folds)
    for layer in layers:
        module, a, b, _ = layer
        folds[module] = folds.get(module, 0.0) + mean_product(clients, layer)
        after[a], after[b] = new_a[a], np.zeros_like(tensors[b])
    return after, folds


def fed_ex_lora(tensors, folds, clients, layers):
    after, folds = _with_others(tensors, clients, layers), dict(folds)
    for layer in layers:
        module, a, b, scaling = layer
        after[a], after[b] = mean(clients, a), mean(clients, b)
        residual = mean_product(clients, layer) - scaling * (after[b] @ after[a])
        folds[module] = folds.get(module, 0.0) + residual
    return after, folds


def fr_lora(tensors, folds, clients, layers, start, mean_of):
    """As the authors' code: aggregate, add the change of the product to the weight, put the start back."""
    after, folds = _with_others(tensors, clients, layers), dict(folds)
    for layer in layers:
        module, a, b, scaling = layer
        if mean_of == "factors":
            product = scaling * (mean(clients, b) @ mean(clients, a))
        else:
            product = mean_product(clients, layer)
        folds[module] = folds.get(module, 0.0) + product - scaling * (start[b] @ start[a])
        after[a], after[b] = start[a], start[b]
    return after, folds


def relative_error(before, after, clients, layers):
    """`|applied - mean| / |mean|` of what layers add to their weights; `before` and `after` are federations."""
    off = size = 0.0
    for layer in layers:
        _, a, b, scaling = layer
        wanted = mean_product(clients, layer) - scaling * (before[0][b] @ before[0][a])
        applied = layer_weight(*after, layer) - layer_weight(*before, layer)
        off, size = off + ((applied - wanted) ** 2).sum(), size + (wanted**2).sum()
    return (off / size) ** 0.5
