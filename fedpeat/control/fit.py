"""Response curves from measured runs: bounded least squares on whole loss curves."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedpeat.control.surrogate import Curves, moved, work_of_device
from fedpeat.core import ConfigError

BOUNDS: Mapping[str, tuple[float, float]] = {
    "least": (0.3, 1.0),
    "gap": (0.0, 1.0),
    "pace": (1e-3, 5.0),
    "steps": (0.0, 2.0),
    "rank": (0.0, 2.0),
    "apart": (0.0, 1.0),
}
"""What each parameter may be; losses as shares of the one before training."""

LOSSES = ("least", "gap", "apart")

STARTS = 8


class Trial(NamedTuple):
    """A measured run.

    Attributes:
        name: What it is called.
        losses: Of the plug-in model before training and after each round, nats a token, `(rounds + 1,)`.
        share: Share of all data of each device that counted in a round, 0 of all others, `(rounds, devices)`.
        kept: Share of the middle that its emulator kept, `(rounds, devices)`.
        rank: Its PEFT rank as a share of the largest, `(rounds, devices)`.
        steps: Its local steps, `(rounds, devices)`.
        seconds: Simulated time before training and after each round, s, `(rounds + 1,)`.
    """

    name: str
    losses: np.ndarray
    share: np.ndarray
    kept: np.ndarray
    rank: np.ndarray
    steps: np.ndarray
    seconds: np.ndarray


class Fitted(NamedTuple):
    """What a fit found.

    Attributes:
        curves: The response, as it starts at the mean of the runs' first losses.
        deviations: Standard deviation of each fitted parameter, by its name and in its unit, as far as the curvature at
            the optimum tells; infinite where the runs say nothing of it.
        residual: Root mean square of foretold minus measured losses, all rounds, nats a token.
        spread: Standard deviation of the measured losses about their mean in each round, nats a token: what a fit that
            knows no plan would leave.
    """

    curves: Curves
    deviations: dict[str, float]
    residual: float
    spread: float


def foretold(curves: Curves, trial: Trial) -> np.ndarray:
    """Return the losses that curves foretell of a run from its first loss on, nats a token, `(rounds + 1,)`."""
    return _foretold(curves.starting_at(1.0), _stacked([trial]))[0] * trial.losses[0]


def fit(trials: Sequence[Trial], *, unit_steps: float, seed: int = 0) -> Fitted:
    """Return the response curves that come nearest to measured runs.

    Losses count relative to each run's first one, all rounds alike. Several starts, drawn by `seed`; of equals, the
    first.

    Args:
        trials: Measured runs.
        unit_steps: Local steps at which the pace is told.
        seed: Of the starts.

    Raises:
        ConfigError: If there are fewer measured rounds than parameters, or scipy is missing.
    """
    try:
        from scipy.optimize import least_squares
    except ImportError as error:
        raise ConfigError("cannot fit response curves", str(error), "pip install 'fedpeat[control]'") from error
    rounds = sum(len(trial.share) for trial in trials)
    if rounds < len(BOUNDS):
        raise ConfigError(f"cannot fit {len(BOUNDS)} parameters", f"there are {rounds} measured rounds", "measure more")
    stacked = _stacked(trials)
    low, high = np.array(list(BOUNDS.values())).T

    def curves_at(point: np.ndarray) -> Curves:
        return Curves(start=1.0, unit_steps=unit_steps, **dict(zip(BOUNDS, point.tolist(), strict=True)))

    def off(point: np.ndarray) -> np.ndarray:
        return (_foretold(curves_at(point), stacked) - stacked.relative)[stacked.measured]

    draw = np.random.default_rng(seed)
    found = [
        least_squares(off, draw.uniform(low, high), bounds=(low, high), x_scale=high - low, method="trf")
        for _ in range(STARTS)
    ]
    best = min(found, key=lambda one: one.cost)
    start = float(np.mean([trial.losses[0] for trial in trials]))
    deviations = {
        name: off * (start if name in LOSSES else 1.0)
        for name, off in zip(BOUNDS, _deviations(best.jac, best.fun), strict=True)
    }
    return Fitted(
        curves=curves_at(best.x).starting_at(start),
        deviations=deviations,
        residual=float(np.sqrt(np.mean(best.fun**2))) * start,
        spread=_spread(stacked) * start,
    )


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's rank correlation, equal values sharing their mean rank; NaN where one side is constant.

    >>> round(spearman([1.0, 2.0, 3.0], [10.0, 30.0, 20.0]), 9)
    0.5
    """
    first, second = (_ranks(np.asarray(values, dtype=float)) for values in (one, other))
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


class _Stacked(NamedTuple):
    """Runs side by side; a shorter one goes on with nobody in its rounds."""

    relative: np.ndarray  # (trials, rounds + 1)
    measured: np.ndarray  # (trials, rounds + 1)
    share: np.ndarray  # (trials, rounds, devices), and so on
    kept: np.ndarray
    rank: np.ndarray
    steps: np.ndarray


def _stacked(trials: Sequence[Trial]) -> _Stacked:
    rounds, devices = (max(trial.share.shape[axis] for trial in trials) for axis in (0, 1))

    def joined(values: Sequence[np.ndarray], shape: tuple[int, ...], filler: float) -> np.ndarray:
        whole = np.full((len(values), *shape), filler)
        for place, one in enumerate(values):
            whole[(place, *map(slice, one.shape))] = one
        return whole

    own = {
        name: joined([getattr(trial, name) for trial in trials], (rounds, devices), float(name != "share"))
        for name in ("share", "kept", "rank", "steps")
    }
    measured = joined([np.arange(len(trial.losses)) > 0 for trial in trials], (rounds + 1,), 0.0) > 0
    relative = joined([trial.losses / trial.losses[0] for trial in trials], (rounds + 1,), 1.0)
    return _Stacked(relative, measured, **own)


def _foretold(curves: Curves, runs: _Stacked) -> np.ndarray:
    """Return relative losses, `(trials, rounds + 1)`, by curves that start at 1."""
    losses = [np.ones(len(runs.share))]
    work = work_of_device(curves, runs.rank, runs.steps)
    for place in range(runs.share.shape[1]):
        losses.append(moved(curves, losses[-1], 0, runs.share[:, place], work[:, place], runs.kept[:, place]))
    return np.stack(losses, axis=1)


def _deviations(jacobian: np.ndarray, residuals: np.ndarray) -> list[float]:
    """Return standard deviations of parameters, by the linear approximation; infinite along what nothing depends on."""
    rounds, count = jacobian.shape
    noise = float(residuals @ residuals) / max(rounds - count, 1)
    _, sizes, directions = np.linalg.svd(jacobian, full_matrices=False)
    known = sizes > 1e-9 * max(sizes.max(), 1e-300)
    variance = noise * ((directions[known] / sizes[known, None]) ** 2).sum(0)
    unknown = (directions[~known] ** 2).sum(0) > 1e-6
    return np.where(unknown, np.inf, np.sqrt(variance)).tolist()


def _spread(runs: _Stacked) -> float:
    counts = runs.measured.sum(0)
    mean = (runs.relative * runs.measured).sum(0) / np.maximum(counts, 1)
    return float(np.sqrt(np.mean((runs.relative - mean)[runs.measured] ** 2)))
