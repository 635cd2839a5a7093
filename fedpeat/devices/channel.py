"""How fast a device's link is in a round, and whether the device is there at all."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedpeat.core import ConfigError
from fedpeat.devices.profile import uniform

MBIT = 1e6
"""Bits of a Mbit."""


@dataclass(frozen=True)
class Radio:
    """One cell: a base station, and devices around it that share a band each way.

    Attributes:
        bandwidth_down_hz: Of the band in which the station sends, Hz.
        bandwidth_up_hz: Of the band in which devices send, Hz.
        station_watt: What the station radiates over its whole band, W.
        noise_dbm_hz: Noise density, dBm/Hz: -174 is thermal noise at 290 K.
        noise_figure_db: What a receiver adds to it, dB.
        radius_min_km: Least distance of a device, km.
        radius_max_km: Largest distance of a device, km.
        rayleigh: Whether the channel fades from round to round.
        weights: By client, its weight in sharing a band out; 1 for those left out.
    """

    bandwidth_down_hz: float = 20e6
    bandwidth_up_hz: float = 20e6
    station_watt: float = 20.0
    noise_dbm_hz: float = -174.0
    noise_figure_db: float = 7.0
    radius_min_km: float = 0.035
    radius_max_km: float = 0.5
    rayleigh: bool = True
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check all numbers.

        Raises:
            ConfigError: If one is out of range.
        """
        for name in ("bandwidth_down_hz", "bandwidth_up_hz", "station_watt", "radius_min_km"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"devices.radio.{name}={getattr(self, name)}", "it must be above 0", "raise it")
        if not self.radius_min_km <= self.radius_max_km < math.inf:
            found = f"devices.radio.radius_min_km={self.radius_min_km}"
            raise ConfigError(f"devices.radio.radius_max_km={self.radius_max_km}", found, "raise the former")
        for client, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise ConfigError(f"devices.radio.weights of {client!r}: {weight}", "it must be above 0", "raise it")

    @property
    def noise_watt_hz(self) -> float:
        """Noise density at a receiver, W/Hz."""
        return 10 ** ((self.noise_dbm_hz + self.noise_figure_db) / 10) / 1000


def path_loss_db(distance_km: float) -> float:
    """Return what a signal loses on its way, dB: `128.1 + 37.6 log10(d / km)`.

    Source: 3GPP TR 36.814, table A.2.1.1-3 (macro cell at 2 GHz), without shadowing and penetration.

    >>> path_loss_db(1.0), round(path_loss_db(0.1), 6)
    (128.1, 90.5)
    """
    return 128.1 + 37.6 * math.log10(distance_km)


def distance_km(radio: Radio, client: str, *, seed: int) -> float:
    """Return a client's distance from the station, km: uniform over the area of the annulus, the same in all rounds."""
    inner, outer = radio.radius_min_km**2, radio.radius_max_km**2
    return math.sqrt(inner + (outer - inner) * uniform(seed, "device distance", client))


def fading(radio: Radio, client: str, round_number: int, *, seed: int) -> float:
    """Return a round's fading, a factor of mean 1 on the gain: `|h|^2` of a Rayleigh channel, which is exponential.

    One draw a client and round, for both directions; it does not depend on who else takes part.
    """
    return -math.log(uniform(seed, "device fading", round_number, client)) if radio.rayleigh else 1.0


def gain(radio: Radio, client: str, round_number: int, *, seed: int) -> float:
    """Return the share of radiated power that arrives: path loss times fading."""
    lost = path_loss_db(distance_km(radio, client, seed=seed))
    return 10 ** (-lost / 10) * fading(radio, client, round_number, seed=seed)


def equal_shares(count: int) -> np.ndarray:
    """Return the shares of a band, `(count,)`, where all get the same."""
    return np.full(count, 1 / max(count, 1))


def band_shares(radio: Radio, clients: Sequence[str], planned: Sequence[float] = ()) -> np.ndarray:
    """Return the shares of a band, `(clients,)`, by the clients' weights; they add up to 1.

    Args:
        radio: The cell, with the clients' own weights.
        clients: That share the band.
        planned: What a round's plan multiplies these with, one a client; nothing for 1.
    """
    if not radio.weights and all(weight == 1.0 for weight in planned):
        return equal_shares(len(clients))
    weights = np.array([radio.weights.get(client, 1.0) for client in clients], dtype=float)
    weights = weights * np.array(planned, dtype=float) if planned else weights
    return weights / weights.sum() if len(clients) else weights


def shannon_bits(
    bandwidth_hz: np.ndarray | float,
    power_watt: np.ndarray | float,
    gains: np.ndarray | float,
    noise_watt_hz: float,
) -> np.ndarray:
    """Return the rate of a link, bit/s: `b log2(1 + p g / (N0 b))`; of no bandwidth, 0.

    Args:
        bandwidth_hz: `b`, what the device has of the band, Hz.
        power_watt: `p`, radiated in it, W.
        gains: `g`, the share that arrives.
        noise_watt_hz: `N0`, W/Hz.

    >>> float(shannon_bits(1e6, 0.3, 1e-11, 1e-18))  # signal to noise is 3
    2000000.0
    """
    band = np.asarray(bandwidth_hz, dtype=float)
    some = np.where(band > 0, band, 1.0)
    # log1p, so that the rate of a faint signal is not rounded away
    rate = some * np.log1p(np.asarray(power_watt) * np.asarray(gains) / (noise_watt_hz * some)) / math.log(2)
    return np.where(band > 0, rate, 0.0)


def radio_rates(
    radio: Radio,
    clients: Sequence[str],
    radiated_watt: Sequence[float],
    round_number: int,
    *,
    seed: int,
    planned: Sequence[float] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rates down and up of those that share the bands in a round, bit/s, each `(clients,)`.

    Down, the station's power is spread evenly over its band, so a device's signal to noise does not depend on its
    share. Up, a device puts all its power into its share.
    """
    shares = band_shares(radio, clients, planned)
    gains = np.array([gain(radio, client, round_number, seed=seed) for client in clients], dtype=float)
    noise = radio.noise_watt_hz
    down = shannon_bits(shares * radio.bandwidth_down_hz, shares * radio.station_watt, gains, noise)
    up = shannon_bits(shares * radio.bandwidth_up_hz, np.asarray(radiated_watt, dtype=float), gains, noise)
    return down, up


def is_available(client: str, round_number: int, *, probability: float, seed: int) -> bool:
    """Return whether a client can be asked in a round; it does not depend on the others."""
    return probability >= 1 or uniform(seed, "device available", round_number, client) < probability


def drops_out_at(client: str, round_number: int, *, probability: float, seed: int) -> float | None:
    """Return the share of its round after which a client is gone, between 0 and 1; None if it stays to the end."""
    place = uniform(seed, "device drops out", round_number, client)
    return place / probability if probability > 0 and place < probability else None
