"""A population of devices: who can be asked in a round, what the round takes each, and whose work counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from fedpeat.core import ClientFailure, ConfigError, DevicePlan, RoundPlan, nearest
from fedpeat.devices.channel import MBIT, Radio, drops_out_at, gain, is_available, radio_rates
from fedpeat.devices.costs import MIB, Costs, Demand, Supply, device_ends, round_costs, round_seconds, spent_until
from fedpeat.devices.ledger import COUNTED, DROPPED, LATE
from fedpeat.devices.profile import Profile
from fedpeat.devices.trace import Trace

MEMORY, SURPLUS = "memory", "surplus"


class Work(NamedTuple):
    """What training on an emulated model needs.

    Attributes:
        step_flops: Of an optimiser step, FLOP.
        memory_bytes: Of a visit, bytes.
    """

    step_flops: float
    memory_bytes: float


class Traffic(NamedTuple):
    """What crosses the network for one device in a round, bytes.

    Attributes:
        down: Tensor payload to it.
        up: Tensor payload from it.
        bundle: What it must fetch first; 0 if it holds its bundle.
    """

    down: int
    up: int
    bundle: int = 0


@dataclass(frozen=True)
class Played:
    """A round in simulated time.

    Attributes:
        plan: What is left of the plan: those whose work counts.
        failures: Why the others' does not.
        facts: Of each device asked, by name: `status`, `holds`, and columns of the ledger.
        seconds: How long the round lasts.
    """

    plan: RoundPlan
    failures: tuple[ClientFailure, ...]
    facts: Mapping[str, dict[str, Any]]
    seconds: float


@dataclass(frozen=True)
class Fleet:
    """All clients' devices.

    Attributes:
        profiles: By client.
        work: What training needs, by emulator; where ranks are measured too, also by `(emulator, rank)`.
        seed: What distances, fading, availability and drop-outs follow from.
        radio: The cell; None for links of the profiles' fixed rates.
        availability: Probability with which a client can be asked in a round.
        dropout: Probability with which a client that was asked is gone before it is done.
        deadline_seconds: When the server stops waiting, s; None for never.
        enforce_memory: Whether a client counts whose training does not fit its memory.
        trace: What is known of single rounds and clients.
    """

    profiles: Mapping[str, Profile]
    work: Mapping[Any, Work]
    seed: int
    radio: Radio | None = None
    availability: float = 1.0
    dropout: float = 0.0
    deadline_seconds: float | None = None
    enforce_memory: bool = False
    trace: Trace = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check probabilities, the deadline, and the clients that are named.

        Raises:
            ConfigError: If one is out of range, or a client does not exist.
        """
        for key in ("availability", "dropout"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"devices.{key}={getattr(self, key)}", "it is a probability", "set it from 0 to 1")
        if self.deadline_seconds is not None and not self.deadline_seconds > 0:
            raise ConfigError(f"devices.deadline_seconds={self.deadline_seconds}", "it must be above 0", "or null")
        weights = self.radio.weights if self.radio else {}
        for what, names in (
            ("devices.trace", dict.fromkeys(name for _, name in self.trace)),
            ("devices.radio.weights", weights),
        ):
            for name in names:
                if name not in self.profiles:
                    raise ConfigError(f"{what} names client {name!r}", "no such client", nearest(name, self.profiles))

    @property
    def leaves_out(self) -> bool:
        """Whether a client may be missing from a round that it would have been in."""
        absent = self.availability < 1 or self.dropout > 0 or bool(self.trace)
        return absent or self.deadline_seconds is not None or self.enforce_memory

    def available(self, clients: Sequence[str], round_number: int) -> list[str]:
        """Return those that can be asked in a round, in the order given."""
        return [client for client in clients if self._is_available(client, round_number)]

    def _is_available(self, client: str, round_number: int) -> bool:
        known = self.trace.get((round_number, client))
        if known is not None:
            return known.available
        return is_available(client, round_number, probability=self.availability, seed=self.seed)

    def rates(
        self, clients: Sequence[str], round_number: int, planned: Sequence[float] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the rates down and up of those that take part in a round, bit/s, each `(clients,)`.

        Args:
            clients: That take part.
            round_number: Counted from 1.
            planned: Their weights in the round's plan, in sharing the bands out; nothing for 1.
        """
        own = [self.profiles[client] for client in clients]
        if self.radio is None:
            down = np.array([MBIT * one.downlink_mbit for one in own], dtype=float)
            up = np.array([MBIT * one.uplink_mbit for one in own], dtype=float)
        else:
            radiated = [one.radiated_watt for one in own]
            down, up = radio_rates(self.radio, clients, radiated, round_number, seed=self.seed, planned=planned)
        self._trace_rates(clients, round_number, down, up)
        return down, up

    def _trace_rates(self, clients: Sequence[str], round_number: int, down: np.ndarray, up: np.ndarray) -> None:
        for place, client in enumerate(clients if self.trace else ()):
            known = self.trace.get((round_number, client))
            if known is not None:
                down[place] = down[place] if known.down_mbit is None else MBIT * known.down_mbit
                up[place] = up[place] if known.up_mbit is None else MBIT * known.up_mbit

    def links(self, clients: Sequence[str], round_number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what is known of the links before it is known who takes part, each `(clients,)`.

        Returns:
            The gains of the radio channel (1 without one); and the rates down and up, bit/s, NaN where they depend on
            how the bands are shared out.
        """
        if self.radio is None:
            return np.ones(len(clients)), *self.rates(clients, round_number)
        gains = [gain(self.radio, client, round_number, seed=self.seed) for client in clients]
        down, up = np.full(len(clients), np.nan), np.full(len(clients), np.nan)
        self._trace_rates(clients, round_number, down, up)
        return np.array(gains, dtype=float), down, up

    def work_for(self, device: DevicePlan) -> Work:
        """Return what a device's training needs: with its emulator and rank where that is known, else its emulator."""
        return self.work.get((device.emulator, device.rank)) or self.work[device.emulator]

    def costs(self, plan: RoundPlan, traffic: Sequence[Traffic]) -> tuple[Costs, Supply]:
        """Return what a plan takes each of its devices, if all stayed to the end, and what they have.

        Args:
            plan: Of the round.
            traffic: One a device, in the plan's order.
        """
        names = [device.client for device in plan.devices]
        own = [self.profiles[name] for name in names]
        columns = np.array(
            [(one.flops, one.compute_watt, one.transmit_watt, one.receive_watt) for one in own], dtype=float
        ).reshape(len(own), 4)
        supply = Supply(
            columns[:, 0], *self.rates(names, plan.round, [device.band for device in plan.devices]), *columns[:, 1:].T
        )
        sent = np.array(traffic, dtype=float).reshape(len(own), 3)
        flops = [device.local_steps * self.work_for(device).step_flops for device in plan.devices]
        return round_costs(Demand(sent[:, 0], sent[:, 1], sent[:, 2], np.array(flops, dtype=float)), supply), supply

    def play(self, plan: RoundPlan, traffic: Sequence[Traffic], *, enough: int | None = None) -> Played:
        """Return what becomes of a plan in simulated time.

        A device that drops out, or that is no longer waited for, is left out: it need not be trained. The server
        learns at once of who drops out or runs out of memory.

        Args:
            plan: Of the round.
            traffic: One a device, in the plan's order.
            enough: How many are waited for; None for all.
        """
        costs, supply = self.costs(plan, traffic)
        total = costs.total_seconds
        needed = [self.work_for(device).memory_bytes / MIB for device in plan.devices]
        ends, failed = total.copy(), dict[int, tuple[str, str]]()
        for place, device in enumerate(plan.devices):
            ends[place], kind, reason = self._end(plan.round, device.client, costs, place, needed[place])
            if kind:
                failed[place] = kind, reason
        lasts = self._enough(ends, failed, enough)
        if lasts is None:
            nobody = self.deadline_seconds if self.deadline_seconds is not None and not plan.devices else 0.0
            lasts = nobody or float(round_seconds(ends, self.deadline_seconds))
        until = np.minimum(ends, lasts)
        joules = spent_until(costs, supply, until)
        facts = {}
        for place, device in enumerate(plan.devices):
            facts[device.client] = {
                "status": failed[place][0] if place in failed else COUNTED,
                "holds": bool(costs.down_seconds[place] <= until[place]),
                "profile": self.profiles[device.client].name,
                "modelled_down_seconds": float(costs.down_seconds[place]),
                "modelled_compute_seconds": float(costs.compute_seconds[place]),
                "modelled_up_seconds": float(costs.up_seconds[place]),
                "modelled_seconds": float(total[place]),
                "modelled_memory_mib": float(needed[place]),
                "memory_limit_mib": float(self.profiles[device.client].memory_mib),
                "joules": float(joules[place]),
                "downlink_mbit": float(supply.down_bits[place] / MBIT),  # type: ignore[index]
                "uplink_mbit": float(supply.up_bits[place] / MBIT),  # type: ignore[index]
            }
        failures = tuple(
            ClientFailure(plan.devices[place].client, plan.round, *failed[place]) for place in sorted(failed)
        )
        kept = tuple(device for place, device in enumerate(plan.devices) if place not in failed)
        return Played(replace(plan, devices=kept), failures, facts, float(lasts))

    def _end(self, number: int, client: str, costs: Costs, place: int, needed_mib: float) -> tuple[float, str, str]:
        """Return when a device ends, s after the round's start, and of what kind and why its work does not count."""
        total, limit = float(costs.total_seconds[place]), self.profiles[client].memory_mib
        share = drops_out_at(client, number, probability=self.dropout, seed=self.seed)
        gone = float("inf") if share is None else share * total
        out = float(costs.down_seconds[place]) if self.enforce_memory and needed_mib > limit else float("inf")
        ends, counts = device_ends(total, min(out, gone), self.deadline_seconds)
        if counts:
            return total, "", ""
        if ends == total:
            latest = self.deadline_seconds
            return total, LATE, f"it would take {total:.3g} s of simulated time, devices.deadline_seconds={latest:g}"
        if out <= gone:
            return out, MEMORY, f"training takes {needed_mib:.0f} MiB, its device has {limit:.0f}"
        return gone, DROPPED, f"its device was gone after {gone:.3g} of {total:.3g} s of simulated time"

    @staticmethod
    def _enough(ends: np.ndarray, failed: dict[int, tuple[str, str]], enough: int | None) -> float | None:
        """Note who is not waited for; return when the last of those that are is done, None if all are waited for."""
        good = [place for place in range(len(ends)) if place not in failed]
        if enough is None or len(good) < enough:
            return None
        first = sorted(good, key=lambda place: (ends[place], place))[:enough]
        for place in set(good) - set(first):
            failed[place] = SURPLUS, "enough other devices were faster"
        return float(max(ends[place] for place in first))
