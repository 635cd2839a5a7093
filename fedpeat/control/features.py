"""What a policy sees of a round, as numbers of moderate size: a row for each device, and what all have in common."""

from functools import lru_cache

import numpy as np

from fedpeat.control.objective import rates
from fedpeat.control.problem import Observation, Problem
from fedpeat.control.surrogate import Curves

BOUND = 10.0
"""Features are cut at this size."""

COMMON = 5
"""Features that all devices have in common."""


def device_features(problem: Problem) -> int:
    """Return how many features a device has: `9 + 3 pairs + 2 emulators`."""
    return 9 + 3 * len(problem.menu.pairs) + 2 * len(problem.kept)


def feature_count(problem: Problem) -> int:
    """Return how many features there are: those of all devices, then those in common."""
    return len(problem.clients) * device_features(problem) + COMMON


def split_features(problem: Problem, observed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return features, `(..., features)`, as those of devices, `(..., devices, own)`, and those in common."""
    own = observed[..., :-COMMON]
    return own.reshape(*own.shape[:-1], len(problem.clients), -1), observed[..., -COMMON:]


def middle_seconds(problem: Problem) -> np.ndarray:
    """Return the time that the middle one of the menu's steps takes each device with each pair, s."""
    steps = problem.menu.steps[len(problem.menu.steps) // 2]
    return steps * problem.step_flops / problem.flops[:, None]


@lru_cache(maxsize=8)
def _fixed(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    seconds = middle_seconds(problem)
    own = np.concatenate(
        [
            (problem.data_share * len(problem.clients) - 1.0)[:, None],
            np.log10(problem.flops)[:, None] - 11.0,
            np.log10(np.maximum(problem.watt, 1e-3)),
            problem.fits,
            np.log10(np.maximum(seconds, 1e-6)),
        ],
        axis=-1,
    )
    return own.astype(np.float32), seconds


def features(problem: Problem, curves: Curves, seen: Observation, loss: np.ndarray, age: np.ndarray) -> np.ndarray:
    """Return what is known of a round, `(..., features)`, fp32.

    Of each device: its share of the data, speed, watts, which pairs fit it, and how long it would train with each
    (`middle_seconds`); whether it can be asked, and its rates down and up if all shared the bands equally; how long a
    round would take it with each pair at these rates, with what it would have to fetch first; which emulators it holds
    and which of them are old. Speeds, watts, times and rates are logarithms. In common: how much of the run is done,
    the inverse of what is left, how far the loss has come, how old the emulator is, and how many can be asked.

    Args:
        problem: The run.
        curves: Whose start and least loss the loss is measured by.
        seen: Of the round, with any dimensions in front.
        loss: Before it, nats a token, `(...)`.
        age: Rounds since the emulator was re-aligned, `(...)`.
    """
    front, devices, pairs = seen.available.shape[:-1], len(problem.clients), len(problem.menu.pairs)
    out = np.empty((*front, feature_count(problem)), dtype=np.float32)
    own, common = split_features(problem, out)
    fixed, training = _fixed(problem)
    place, emulators = fixed.shape[-1], len(problem.kept)
    own[..., :place] = fixed
    own[..., place] = seen.available
    down, up = rates(problem, seen, np.ones((*front, devices)))
    down, up = np.maximum(down, 1.0), np.maximum(up, 1.0)
    fetch = np.where(seen.holds, 0.0, problem.bundle_bytes) + np.where(seen.stale, problem.refresh_bytes, 0.0)
    logs = own[..., place + 1 : place + 3 + pairs]
    logs[..., 0], logs[..., 1] = 1e-7 * down, 1e-6 * up
    seconds = (problem.bytes_down + fetch[..., problem.emulator_of]) * (8 / down)[..., None]
    seconds += problem.bytes_up * (8 / up)[..., None] + training
    np.maximum(seconds, 1e-6, out=logs[..., 2:])
    np.log10(logs, out=logs)
    place += 3 + pairs
    own[..., place : place + emulators] = seen.holds
    own[..., place + emulators :] = seen.stale
    common[..., 0] = (seen.round - 1) / max(problem.rounds, 1)
    common[..., 1] = 1.0 / max(problem.rounds - seen.round + 1, 1)
    common[..., 2] = (np.asarray(loss) - curves.least) / max(curves.start - curves.least, 1e-6)
    common[..., 3] = np.asarray(age) / max(problem.rounds, 1)
    common[..., 4] = seen.available.sum(-1) / max(devices, 1)
    np.maximum(out, -BOUND, out=out)
    return np.minimum(out, BOUND, out=out)
