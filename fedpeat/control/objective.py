"""What a plan would take, and what that is worth: terms of the objective, one function each."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fedpeat.control.menu import OUT, PAIR, SHARE, STEPS
from fedpeat.control.problem import Observation, Problem
from fedpeat.core import ConfigError, nearest
from fedpeat.devices import Demand, Supply, device_ends, round_costs, round_seconds, shannon_bits, spent_until

QUALITIES = ("every", "change")


class Price(NamedTuple):
    """What a round takes.

    Attributes:
        seconds: Until the latest device is done or gone, or to the deadline, s, `(...)`. If nobody takes part: to the
            deadline, or 0 without one.
        bytes: All that crosses the network, bytes, `(...)`.
        joules: Of all devices, J, `(...)`.
        device_seconds: Of each device, if it stayed to the end, s, `(..., devices)`; 0 of those that stay out.
        counts: Whose work counts, `(..., devices)`.
        fetched: Who has its bundle after the round, of those that take part, `(..., devices)`.
    """

    seconds: np.ndarray
    bytes: np.ndarray
    joules: np.ndarray
    device_seconds: np.ndarray
    counts: np.ndarray
    fetched: np.ndarray


@dataclass(frozen=True)
class Objective:
    """What counts, and how much.

    The cost of a round is `time T / time_unit + quality Q + bytes B / bytes_unit + energy E / energy_unit`.

    Attributes:
        time: Weight of the round's simulated time.
        quality: Weight of the plug-in model's loss.
        bytes: Weight of the traffic.
        energy: Weight of the devices' energy.
        quality_of: `every`: Q is the loss after each round, so that all rounds count; `change`: what a round adds to
            the loss, so that over a run only the last one counts.
        time_unit: s.
        bytes_unit: bytes.
        energy_unit: J.

    Source: a reconstruction of FedPEAT's objective, Chua et al. 2023, arXiv:2310.17491.
    Departures: memory is no term of it, since what does not fit cannot be chosen; units make the terms comparable.
    """

    time: float = 1.0
    quality: float = 1.0
    bytes: float = 0.0
    energy: float = 0.0
    quality_of: str = "every"
    time_unit: float = 60.0
    bytes_unit: float = 1e7
    energy_unit: float = 100.0

    def __post_init__(self) -> None:
        """Check all numbers.

        Raises:
            ConfigError: If a weight is below 0, a unit not above 0, or the quality is unknown.
        """
        if self.quality_of not in QUALITIES:
            asked = f"control.objective.quality_of={self.quality_of}"
            raise ConfigError(asked, "no such way to count", nearest(str(self.quality_of), QUALITIES))
        for key in ("time", "quality", "bytes", "energy"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ConfigError(f"control.objective.{key}={getattr(self, key)}", "it is a weight, 0 or more", "")
        for key in ("time_unit", "bytes_unit", "energy_unit"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(f"control.objective.{key}={getattr(self, key)}", "it must be above 0", "raise it")


def time_term(objective: Objective, price: Price) -> np.ndarray:
    """Return the time's part of the cost, `(...)`."""
    return objective.time * price.seconds / objective.time_unit


def bytes_term(objective: Objective, price: Price) -> np.ndarray:
    """Return the traffic's part of the cost, `(...)`."""
    return objective.bytes * price.bytes / objective.bytes_unit


def energy_term(objective: Objective, price: Price) -> np.ndarray:
    """Return the energy's part of the cost, `(...)`."""
    return objective.energy * price.joules / objective.energy_unit


def quality_term(objective: Objective, before: np.ndarray | float, after: np.ndarray | float) -> np.ndarray:
    """Return the quality's part of the cost, `(...)`, from the loss before and after, nats a token."""
    counted = np.asarray(after) if objective.quality_of == "every" else np.asarray(after) - before
    return objective.quality * counted


def cost(objective: Objective, price: Price, before: np.ndarray | float, after: np.ndarray | float) -> np.ndarray:
    """Return what a round costs, `(...)`: the sum of all terms; a controller's reward is its negative."""
    spent = time_term(objective, price) + bytes_term(objective, price) + energy_term(objective, price)
    return spent + quality_term(objective, before, after)


def rates(problem: Problem, seen: Observation, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rates down and up, bit/s, `(..., devices)` each; of those that stay out, of no meaning.

    Args:
        problem: The run.
        seen: Of the round.
        weights: In sharing the bands out, 0 for those that stay out, `(..., devices)`.
    """
    radio = problem.radio
    if radio is None:
        shape = np.broadcast_shapes(weights.shape, seen.down_bits.shape)
        return np.broadcast_to(seen.down_bits, shape), np.broadcast_to(seen.up_bits, shape)
    total = weights.sum(-1, keepdims=True)
    shares = weights / np.where(total > 0, total, 1.0)
    # Both ways at once: for few devices, what counts is how many operations there are.
    bands, powers = np.empty((2, *shares.shape)), np.empty((2, *shares.shape))
    bands[0], bands[1] = shares * radio.bandwidth_down_hz, shares * radio.bandwidth_up_hz
    powers[0], powers[1] = shares * radio.station_watt, problem.watt[:, 3]
    down, up = shannon_bits(bands, powers, seen.gains, radio.noise_watt_hz)
    return (
        np.where(np.isnan(seen.down_bits), down, seen.down_bits),
        np.where(np.isnan(seen.up_bits), up, seen.up_bits),
    )


def to_fetch(problem: Problem, seen: Observation, emulator: np.ndarray, refresh: np.ndarray) -> np.ndarray:
    """Return what devices must fetch of an emulator before they train, bytes, `(..., devices)`.

    A bundle that a device lacks comes as a whole; of one that it holds, what was re-aligned since.

    Args:
        problem: The run.
        seen: Of the round.
        emulator: Place of each device's emulator, `(..., devices)`; -1 for those that stay out, which fetch nothing.
        refresh: Whether it is re-aligned before this round, `(...)`.
    """
    old = seen.stale | (np.asarray(refresh) > 0)[..., None, None]
    amount = np.where(seen.holds, 0.0, problem.bundle_bytes) + np.where(old, problem.refresh_bytes, 0.0)
    # By comparing, not by an index: several times as fast for a few emulators.
    return np.where(emulator[..., None] == np.arange(len(problem.kept)), amount, 0.0).sum(-1)


class _Levels(NamedTuple):
    """What a level of the first branch stands for, with 0 for staying out; a place a level, first pairs."""

    bytes_down: np.ndarray
    bytes_up: np.ndarray
    emulator: np.ndarray
    flops: np.ndarray
    weights: np.ndarray


@lru_cache(maxsize=8)
def _of_levels(problem: Problem) -> _Levels:
    into = np.arange(1 + len(problem.menu.pairs))[:, None] != OUT
    return _Levels(
        np.concatenate([[0.0], problem.bytes_down]),
        np.concatenate([[0.0], problem.bytes_up]),
        np.concatenate([[-1], problem.emulator_of]),
        into * np.concatenate([[0.0], problem.step_flops])[:, None] * np.array(problem.menu.steps),
        into * np.array(problem.menu.shares),
    )


def price(
    problem: Problem, seen: Observation, levels: np.ndarray, refresh: np.ndarray, leaves: np.ndarray | None = None
) -> Price:
    """Return what a round takes.

    As on the ledger, a device whose work does not count is not sent the travelling tensors; what it has to fetch of the
    emulator first is counted.

    Args:
        problem: The run.
        seen: Of the round.
        levels: Of each device's branches, `(..., devices, 3)`.
        refresh: Whether the emulator is re-aligned before it, `(...)`.
        leaves: After which share of its own time each device is gone, infinite for those that stay, `(..., devices)`;
            None if everybody stays to the end.
    """
    chosen, of_levels = levels[..., PAIR], _of_levels(problem)
    into = chosen != OUT
    weights = of_levels.weights[chosen, levels[..., SHARE]] * problem.band_weights
    down, up = rates(problem, seen, weights)
    bundle = to_fetch(problem, seen, of_levels.emulator[chosen], refresh)
    flops = of_levels.flops[chosen, levels[..., STEPS]]
    demand = Demand(of_levels.bytes_down[chosen], of_levels.bytes_up[chosen], bundle, flops)
    receives, computes, sends = (problem.watt[:, place] for place in range(3))
    supply = Supply(problem.flops, down, up, computes, sends, receives)
    costs = round_costs(demand, supply)
    took = costs.total_seconds
    if leaves is None and problem.deadline_seconds is None:
        sent = np.asarray(demand.bytes_down) + np.asarray(demand.bytes_up) + np.asarray(demand.bundle_bytes)
        return Price(took.max(-1, initial=0.0), sent.sum(-1), costs.joules.sum(-1), took, into, into)
    stays = np.ones_like(into) if leaves is None else np.isinf(leaves)
    gone = np.where(stays, np.inf, np.where(stays, 1.0, 1.0 if leaves is None else leaves) * took)
    ends, counts = device_ends(took, gone, problem.deadline_seconds)
    lasts = round_seconds(ends, problem.deadline_seconds)
    lasts = np.where(into.any(-1), lasts, problem.deadline_seconds or 0.0)
    until = np.minimum(ends, lasts[..., None])
    counts = counts & into
    sent = np.where(counts, np.asarray(demand.bytes_down) + np.asarray(demand.bytes_up), 0.0) + demand.bundle_bytes
    joules = spent_until(costs, supply, until).sum(-1)
    return Price(lasts, sent.sum(-1), joules, took, counts, into & (costs.down_seconds <= until))
