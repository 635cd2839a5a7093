"""What a policy sees of a round, as numbers of moderate size."""

import numpy as np

from fedpeat.control.objective import rates
from fedpeat.control.problem import Observation, Problem
from fedpeat.control.surrogate import Curves

BOUND = 10.0
"""Features are cut at this size."""


def feature_count(problem: Problem) -> int:
    """Return how many features there are: `devices (5 + pairs + 2 emulators) + 3`."""
    return len(problem.clients) * (5 + len(problem.menu.pairs) + 2 * len(problem.menu.emulators)) + 3


def features(problem: Problem, curves: Curves, seen: Observation, loss: np.ndarray, age: np.ndarray) -> np.ndarray:
    """Return what is known of a round, `(..., features)`, fp32.

    Of each device: whether it can be asked, its rates down and up if all shared the bands equally, and its speed (all
    as logarithms), its share of the data, which pairs fit it, which emulators it holds and which of them are old. Of
    all: how much of the run is done, how far the loss has come, and how old the emulator is.

    Args:
        problem: The run.
        curves: Whose start and least loss the loss is measured by.
        seen: Of the round, with any dimensions in front.
        loss: Before it, nats a token, `(...)`.
        age: Rounds since the emulator was re-aligned, `(...)`.
    """
    front, devices = seen.available.shape[:-1], len(problem.clients)
    down, up = rates(problem, seen, np.ones((*front, devices)))
    own = [
        seen.available[..., None],
        np.log10(np.maximum(down, 1.0))[..., None] - 7.0,
        np.log10(np.maximum(up, 1.0))[..., None] - 6.0,
        np.broadcast_to(np.log10(problem.flops)[:, None] - 11.0, (*front, devices, 1)),
        np.broadcast_to(problem.data_share[:, None] * devices - 1.0, (*front, devices, 1)),
        np.broadcast_to(problem.fits, (*front, devices, len(problem.menu.pairs))),
        seen.holds,
        seen.stale,
    ]
    rest = np.stack(
        [
            np.broadcast_to((seen.round - 1) / max(problem.rounds, 1), front),
            (np.asarray(loss) - curves.least) / max(curves.start - curves.least, 1e-6),
            np.asarray(age) / max(problem.rounds, 1),
        ],
        axis=-1,
    )
    flat = np.concatenate([np.concatenate(own, axis=-1).reshape(*front, -1), rest], axis=-1)
    return np.clip(flat, -BOUND, BOUND).astype(np.float32)
