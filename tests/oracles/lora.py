"""Rules that choose among LoRA's factors, as plain loops over numpy arrays; see `folding.py` for the words."""

import numpy as np

from tests.oracles.folding import mean, mean_product


def average_only(tensors, clients, names):
    """The clients' mean of `names`, everything else as it was."""
    return {name: mean(clients, name) if name in names else tensor for name, tensor in tensors.items()}


def lora_fair(tensors, clients, layers, ridge):
    """The means, and B moved by a least-squares problem that is solved as one, `sqrt(ridge)` rows of its own added."""
    after = {name: mean(clients, name) for name in tensors}
    for layer in layers:
        _, a, b, scaling = layer
        gap = mean_product(clients, layer) / scaling - after[b] @ after[a]
        rank = len(after[a])
        left = np.concatenate([after[a].T, ridge**0.5 * np.eye(rank)])
        right = np.concatenate([gap.T, np.zeros((rank, len(gap)))])
        after[b] = after[b] + np.linalg.lstsq(left, right, rcond=None)[0].T
    return after
