"""Server optimisers for one entry at a time, in Python floats: slow, obvious, independent of the strategies package.

Each takes the mean deltas of the rounds and gives the steps. State is rounded to fp32 between rounds, as it is stored.
"""

import math

import numpy as np


def stored(value):
    return float(np.float32(value))


def momentum(deltas, rate, beta, nesterov=False):
    """FedAvgM (arXiv 1909.06335)."""
    velocity, steps = 0.0, []
    for delta in deltas:
        new = beta * velocity + delta
        steps.append(rate * (delta + beta * new) if nesterov else rate * new)
        velocity = stored(new)
    return steps


def adaptive(kind, deltas, rate, beta1, beta2, tau):
    """FedAdagrad, FedAdam and FedYogi (arXiv 2003.00295, algorithm 2)."""
    first, second, steps = 0.0, stored(tau * tau), []
    for delta in deltas:
        new_first = beta1 * first + (1 - beta1) * delta
        square = delta * delta
        if kind == "adagrad":
            new_second = second + square
        elif kind == "adam":
            new_second = beta2 * second + (1 - beta2) * square
        elif second > square:
            new_second = second - (1 - beta2) * square
        elif second < square:
            new_second = second + (1 - beta2) * square
        else:
            new_second = second
        steps.append(rate * new_first / (math.sqrt(new_second) + tau))
        first, second = stored(new_first), stored(new_second)
    return steps


def over_tensors(rule, rounds):
    """Apply a rule for one entry to all: `rounds` is a list of dicts of arrays, and so is what comes back."""
    out = [{name: np.zeros(value.shape) for name, value in tensors.items()} for tensors in rounds]
    for name, first in rounds[0].items():
        for index in np.ndindex(first.shape):
            for number, step in enumerate(rule([float(tensors[name][index]) for tensors in rounds])):
                out[number][name][index] = step
    return out
