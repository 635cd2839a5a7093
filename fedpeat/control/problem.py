"""What a controller knows: of a run once, and of each round before it."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedpeat.control.menu import Menu
from fedpeat.core import ConfigError
from fedpeat.devices import Radio

_OF_DEVICES = ("flops", "memory_bytes", "watt", "data_share")
_OF_PAIRS = ("step_flops", "needs_bytes", "bytes_down", "bytes_up")
_OF_EMULATORS = ("kept", "bundle_bytes", "refresh_bytes")


@dataclass(frozen=True, eq=False)
class Problem:
    """What does not change from round to round.

    Attributes:
        clients: Names; all arrays of devices follow their order.
        menu: What can be decided.
        rounds: Of the run.
        flops: Of each device, FLOP/s, `(devices,)`.
        memory_bytes: What training may take on each, bytes, `(devices,)`.
        watt: Drawn for receiving, computing and sending, and radiated, W, `(devices, 4)`.
        data_share: Share of all training rows that each holds; they add up to 1, `(devices,)`.
        step_flops: Of an optimiser step with each pair, FLOP, `(pairs,)`.
        needs_bytes: Memory of training each pair, bytes, `(pairs,)`.
        bytes_down: Tensor payload to a device with each pair, bytes, `(pairs,)`.
        bytes_up: Tensor payload from it, bytes, `(pairs,)`.
        kept: Share of the middle that each emulator keeps, 0 to 1, `(emulators,)`.
        bundle_bytes: Of each emulator's bundle, bytes, `(emulators,)`.
        refresh_bytes: What a device fetches of each emulator after it was re-aligned, bytes, `(emulators,)`.
        radio: The cell whose bands are shared; None for links of fixed rates.
        deadline_seconds: When the server stops waiting in a round, s; None for never.
        links: What each device's link is like before it fades: in a cell the share of radiated power that arrives,
            `(devices, 1)`, else the rates down and up, bit/s, `(devices, 2)`; None where that is not known.
    """

    clients: tuple[str, ...]
    menu: Menu
    rounds: int
    flops: np.ndarray
    memory_bytes: np.ndarray
    watt: np.ndarray
    data_share: np.ndarray
    step_flops: np.ndarray
    needs_bytes: np.ndarray
    bytes_down: np.ndarray
    bytes_up: np.ndarray
    kept: np.ndarray
    bundle_bytes: np.ndarray
    refresh_bytes: np.ndarray
    radio: Radio | None = None
    deadline_seconds: float | None = None
    links: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Check shapes.

        Raises:
            ConfigError: If an array has another length than there are devices, pairs or emulators.
        """
        for name in (*_OF_DEVICES, *_OF_PAIRS, *_OF_EMULATORS):
            if len(getattr(self, name)) != self._size(name):
                raise ConfigError(f"cannot use {name}", f"it should have {self._size(name)} entries", "give as many")

    def _size(self, name: str) -> int:
        if name in _OF_DEVICES:
            return len(self.clients)
        return len(self.menu.pairs if name in _OF_PAIRS else self.menu.emulators)

    @cached_property
    def fits(self) -> np.ndarray:
        """Whether a pair fits a device's memory, `(devices, pairs)`."""
        return self.needs_bytes <= self.memory_bytes[:, None]

    @cached_property
    def emulator_of(self) -> np.ndarray:
        """Place of each pair's emulator, `(pairs,)`."""
        return np.array([self.menu.emulators.index(pair.emulator) for pair in self.menu.pairs])

    @cached_property
    def rank_share(self) -> np.ndarray:
        """Each pair's rank as a share of the largest; 1 for the run's own, `(pairs,)`."""
        ranks = [pair.rank for pair in self.menu.pairs]
        largest = max((rank for rank in ranks if rank), default=1)
        return np.array([1.0 if rank is None else rank / largest for rank in ranks])

    @cached_property
    def band_weights(self) -> np.ndarray:
        """Each client's own weight in sharing the bands out, which a plan's is multiplied with, `(devices,)`."""
        own = self.radio.weights if self.radio else {}
        return np.array([own.get(client, 1.0) for client in self.clients], dtype=float)


@dataclass(frozen=True, eq=False)
class Observation:
    """What is known of a round before it. Who will drop out is not.

    Attributes:
        round: Counted from 1.
        available: Who can be asked, `(..., devices)`.
        gains: Share of radiated power that arrives, `(..., devices)`; of no meaning without a radio link.
        down_bits: Rates down that do not depend on the plan, bit/s; NaN where the radio link decides, `(..., devices)`.
        up_bits: Rates up, likewise.
        holds: Whether a device holds an emulator's bundle, `(..., devices, emulators)`.
        stale: Whether it lacks what was re-aligned of it since its bundle, or has older changes, likewise.
    """

    round: int
    available: np.ndarray
    gains: np.ndarray
    down_bits: np.ndarray
    up_bits: np.ndarray
    holds: np.ndarray
    stale: np.ndarray
