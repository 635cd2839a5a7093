"""What a plan costs: pure functions of plain numbers or arrays, `(devices,)`, with units. Nothing here reads a file."""

from typing import NamedTuple

import numpy as np

Numbers = np.ndarray | float

MIB = 2**20
"""Bytes of a MiB."""


class Demand(NamedTuple):
    """What devices are asked for in a round; each a number or `(devices,)`.

    Attributes:
        bytes_down: Tensor payload that each receives, bytes.
        bytes_up: Tensor payload that each sends, bytes.
        bundle_bytes: What it must fetch of the emulated model first, bytes; 0 for those that hold it.
        flops: Of all its local steps, FLOP.
    """

    bytes_down: Numbers
    bytes_up: Numbers
    bundle_bytes: Numbers
    flops: Numbers


class Supply(NamedTuple):
    """What devices have; each a number or `(devices,)`.

    Attributes:
        flops: FLOP/s.
        down_bits: bit/s.
        up_bits: bit/s.
        compute_watt: W.
        transmit_watt: W.
        receive_watt: W.
    """

    flops: Numbers
    down_bits: Numbers
    up_bits: Numbers
    compute_watt: Numbers = 0.0
    transmit_watt: Numbers = 0.0
    receive_watt: Numbers = 0.0


class Costs(NamedTuple):
    """What it takes them; each `(devices,)` or a number.

    Attributes:
        down_seconds: To receive bundle and tensors, s.
        compute_seconds: To train, s.
        up_seconds: To send, s.
        joules: Energy of all three, J.
    """

    down_seconds: np.ndarray
    compute_seconds: np.ndarray
    up_seconds: np.ndarray
    joules: np.ndarray

    @property
    def total_seconds(self) -> np.ndarray:
        """Time from the start of the round to the device's last bit, s."""
        return self.down_seconds + self.compute_seconds + self.up_seconds


def transfer_seconds(amount_bytes: Numbers, rate_bits: Numbers) -> np.ndarray:
    """Return the time that bytes take at a rate in bit/s; nothing takes none, and over a dead link the rest for ever.

    >>> float(transfer_seconds(1_000_000, 8e6))
    1.0
    """
    amount, rate = np.asarray(amount_bytes, dtype=float), np.asarray(rate_bits, dtype=float)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(amount > 0, 8 * amount / rate, 0.0)


def round_costs(demand: Demand, supply: Supply) -> Costs:
    """Return what each device of a round takes.

    `T = 8 (bytes down + bundle) / R_down + FLOP / f + 8 bytes up / R_up`, and
    `E = P_receive T_down + P_compute T_compute + P_transmit T_up`.

    Source: a reconstruction of FedPEAT's system model, Chua et al. 2023, arXiv:2310.17491: the terms are those usual in
    the literature on federated learning over wireless networks.
    Departures: energy is power times time; the term `kappa f^2 cycles` for dynamic voltage is that power at a given
    clock.

    >>> costs = round_costs(Demand(1e6, 5e5, 0, 3e9), Supply(1e9, 8e6, 4e6, 2.0, 1.0, 0.5))
    >>> [float(value) for value in (*costs, costs.total_seconds)]
    [1.0, 3.0, 1.0, 7.5, 5.0]
    """
    down = transfer_seconds(np.asarray(demand.bytes_down) + np.asarray(demand.bundle_bytes), supply.down_bits)
    with np.errstate(divide="ignore", over="ignore"):
        compute = np.asarray(demand.flops, dtype=float) / np.asarray(supply.flops, dtype=float)
    up = transfer_seconds(demand.bytes_up, supply.up_bits)
    return Costs(down, compute, up, _joules(down, compute, up, supply))


def _joules(down: Numbers, compute: Numbers, up: Numbers, supply: Supply) -> np.ndarray:
    spent = np.asarray(supply.receive_watt) * down + np.asarray(supply.compute_watt) * compute
    return np.asarray(spent + np.asarray(supply.transmit_watt) * up)


def spent_until(costs: Costs, supply: Supply, ends: Numbers) -> np.ndarray:
    """Return the energy of devices that stop at `ends`, s after the round's start, or when they are done, J."""
    left = np.asarray(ends, dtype=float)
    down = np.minimum(costs.down_seconds, left)
    left = np.maximum(left - costs.down_seconds, 0.0)
    compute = np.minimum(costs.compute_seconds, left)
    up = np.minimum(costs.up_seconds, np.maximum(left - costs.compute_seconds, 0.0))
    return _joules(down, compute, up, supply)


def device_ends(
    total: Numbers, leaves: Numbers, deadline_seconds: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return when devices end, s after the round's start, and whether their work counts.

    A device that leaves before it is done and before the deadline ends there; one that would be done later than the
    deadline is late, and goes on until it is done. Neither's work counts.

    Args:
        total: What each would take, s.
        leaves: When each is gone, s; infinite for those that stay.
        deadline_seconds: When the server stops waiting; None for never.

    >>> ends, counts = device_ends(np.array([3.0, 8.0, 8.0]), np.array([np.inf, np.inf, 2.0]), 5.0)
    >>> ends.tolist(), counts.tolist()
    ([3.0, 8.0, 2.0], [True, False, False])
    """
    total, leaves = np.asarray(total, dtype=float), np.asarray(leaves, dtype=float)
    latest = np.inf if deadline_seconds is None else deadline_seconds
    gone = leaves < np.minimum(total, latest)
    return np.where(gone, leaves, total), ~gone & (total <= latest)


def round_seconds(ends: Numbers, deadline_seconds: float | None = None) -> np.ndarray:
    """Return how long a round lasts, s: until the last device is done or gone, but no longer than the deadline.

    Args:
        ends: When each device is done, or is gone, s after the round's start, `(..., devices)`; may be empty.
        deadline_seconds: When the server stops waiting; None for never.

    >>> [float(round_seconds(np.array(ends), 5.0)) for ends in ([3.0, 4.0], [3.0, 8.0], [])]
    [4.0, 5.0, 0.0]
    """
    last = np.max(ends, axis=-1, initial=0.0)
    return np.asarray(last if deadline_seconds is None else np.minimum(last, deadline_seconds))
