"""What a plan would take, and what that is worth: terms of the objective, one function each."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedpeat.control.menu import OUT, PAIR, SHARE, STEPS
from fedpeat.control.problem import Observation, Problem
from fedpeat.core import ConfigError, nearest
from fedpeat.devices import Demand, Supply, round_costs, shannon_bits

QUALITIES = ("every", "change")


class Price(NamedTuple):
    """What a round takes.

    Attributes:
        seconds: Until the latest device is done, s, `(...)`; 0 if nobody takes part.
        bytes: All that crosses the network, bytes, `(...)`.
        joules: Of all devices, J, `(...)`.
        device_seconds: Of each device, s, `(..., devices)`; 0 of those that stay out.
    """

    seconds: np.ndarray
    bytes: np.ndarray
    joules: np.ndarray
    device_seconds: np.ndarray


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
    noise = radio.noise_watt_hz
    down = shannon_bits(shares * radio.bandwidth_down_hz, shares * radio.station_watt, seen.gains, noise)
    up = shannon_bits(shares * radio.bandwidth_up_hz, problem.watt[:, 3], seen.gains, noise)
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
        emulator: Place of each device's emulator, `(..., devices)`.
        refresh: Whether it is re-aligned before this round, `(...)`.
    """
    shape = (*emulator.shape, problem.kept.shape[0])
    place = emulator[..., None]
    holds = np.take_along_axis(np.broadcast_to(seen.holds, shape), place, -1)[..., 0]
    stale = np.take_along_axis(np.broadcast_to(seen.stale, shape), place, -1)[..., 0]
    renewed = np.where(stale | (np.asarray(refresh) > 0)[..., None], problem.refresh_bytes[emulator], 0.0)
    return np.where(holds, renewed, problem.bundle_bytes[emulator] + renewed)


def price(problem: Problem, seen: Observation, levels: np.ndarray, refresh: np.ndarray) -> Price:
    """Return what a round takes, if everybody stays to the end.

    Args:
        problem: The run.
        seen: Of the round.
        levels: Of each device's branches, `(..., devices, 3)`.
        refresh: Whether the emulator is re-aligned before it, `(...)`.
    """
    menu = problem.menu
    into = levels[..., PAIR] != OUT
    pair = np.maximum(levels[..., PAIR] - 1, 0)
    steps = np.array(menu.steps)[levels[..., STEPS]]
    weights = np.where(into, np.array(menu.shares)[levels[..., SHARE]] * problem.band_weights, 0.0)
    down, up = rates(problem, seen, weights)
    bundle = to_fetch(problem, seen, problem.emulator_of[pair], refresh)
    demand = Demand(
        np.where(into, problem.bytes_down[pair], 0.0),
        np.where(into, problem.bytes_up[pair], 0.0),
        np.where(into, bundle, 0.0),
        np.where(into, steps * problem.step_flops[pair], 0.0),
    )
    receives, computes, sends = (problem.watt[:, place] for place in range(3))
    costs = round_costs(demand, Supply(problem.flops, down, up, computes, sends, receives))
    sent = np.asarray(demand.bytes_down) + np.asarray(demand.bytes_up) + np.asarray(demand.bundle_bytes)
    took = costs.total_seconds
    return Price(took.max(-1, initial=0.0), sent.sum(-1), costs.joules.sum(-1), took)
