"""SCAFFOLD and FedNova as their papers write them, over plain arrays: slow, obvious, independent of the strategies."""

import numpy as np


def scaffold_round(start, variate, locals_, changes, population, rate=1.0):
    """Equation 5 of arXiv 1910.06378, fp64: the next global tensors and variates, all clients alike."""
    after = {
        name: start[name] + rate * sum(local[name] - start[name] for local in locals_) / len(locals_) for name in start
    }
    count = len(changes)
    shift = {name: sum(change[name] for change in changes) / count for name in start}
    return after, {name: variate[name] + count / population * shift[name] for name in start}


def scaffold_client(start, variate, own, gradient, steps, rate):
    """Algorithm 1 of arXiv 1910.06378 on one client, option II, with plain SGD: `(local, own variate after)`."""
    local = start
    for _ in range(steps):
        local = local - rate * (gradient(local) - own + variate)
    return local, own - variate + (start - local) / (steps * rate)


def nova_round(start, locals_, work, weights):
    """Equation 6 of arXiv 2007.07481 with `tau_eff = sum p_k |a_k|_1`, fp64: the next global tensors."""
    shares = [weight / sum(weights) for weight in weights]
    effective = sum(share * steps for share, steps in zip(shares, work, strict=True))
    after = {}
    for name in start:
        directions = [(start[name] - local[name]) / steps for local, steps in zip(locals_, work, strict=True)]
        after[name] = start[name] - effective * sum(s * d for s, d in zip(shares, directions, strict=True))
    return after


def norm_of_weights(steps, momentum):
    """`|a|_1` of SGD with momentum: by how much each of the gradients moved the tensors, in learning rates."""
    return sum(sum(momentum**age for age in range(steps - step)) for step in range(steps))


def as_arrays(tensors):
    return {name: tensor.numpy().astype(np.float64) for name, tensor in tensors.items()}
