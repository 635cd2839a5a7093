"""What a device is: its speed, memory, links and power, as data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from fedpeat.core import ConfigError, nearest, seed_for, shorten


@dataclass(frozen=True)
class Profile:
    """One kind of device.

    Attributes:
        name: What it is called in configs and the ledger.
        flops: What it sustains in training, FLOP/s (a multiplication and an addition are two), not its peak.
        memory_mib: Memory that training may take, MiB.
        downlink_mbit: Rate at which it receives where links are fixed, Mbit/s (10^6 bits).
        uplink_mbit: Rate at which it sends, likewise.
        compute_watt: Power that it draws for computing, beside what it draws anyway, W.
        transmit_watt: Power that it draws for sending, W.
        receive_watt: Power that it draws for receiving, W.
        radiated_watt: Power that its antenna radiates, W; only a radio link asks for it.
        share: Its weight where profiles are drawn, 0 or more.
    """

    name: str
    flops: float
    memory_mib: float
    downlink_mbit: float
    uplink_mbit: float
    compute_watt: float
    transmit_watt: float
    receive_watt: float
    radiated_watt: float = 0.2
    share: float = 1.0

    def __post_init__(self) -> None:
        """Check all numbers.

        Raises:
            ConfigError: If a speed, a size or a rate is not above 0, or a power or the share is below 0.
        """
        above = ("flops", "memory_mib", "downlink_mbit", "uplink_mbit", "radiated_watt")
        for one in fields(self)[1:]:
            value, least = getattr(self, one.name), "above 0" if one.name in above else "0 or more"
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0 or (one.name in above and value == 0):
                raise ConfigError(
                    f"cannot use {one.name}={value!r} of the device profile {self.name!r}",
                    f"it must be a finite number, {least}",
                    f"set devices.profiles.{self.name}.{one.name}",
                )


def profiles_of(described: Mapping[str, Mapping[str, Any]]) -> dict[str, Profile]:
    """Return profiles by name, from their numbers by name.

    Raises:
        ConfigError: If there are none, a number is missing, unknown or out of range.
    """
    if not described:
        raise ConfigError("devices need a profile", "devices.profiles is empty", "choose devices=mixed")
    return {str(name): _profile(str(name), numbers) for name, numbers in described.items()}


def _profile(name: str, numbers: Mapping[str, Any]) -> Profile:
    what, remedy = f"cannot read the device profile {name!r}", "see conf/devices/profiles for what one has"
    if not isinstance(numbers, Mapping):
        raise ConfigError(what, f"it is {type(numbers).__name__}, not a mapping", remedy)
    known = [one.name for one in fields(Profile)[1:]]
    unknown = sorted(str(key) for key in numbers if key not in known)
    if unknown:
        raise ConfigError(what, f"no such key: {shorten(unknown)}", nearest(unknown[0], known))
    missing = [key for key in known if key not in numbers and key not in {"radiated_watt", "share"}]
    if missing:
        raise ConfigError(what, f"it lacks {shorten(missing)}", remedy)
    return Profile(name, **{str(key): value for key, value in numbers.items()})


def uniform(seed: int, purpose: str, *parts: object) -> float:
    """Return a number between 0 and 1, neither included, that follows from its arguments alone.

    From a hash's bits, without a generator: a thousand take a few milliseconds.

    >>> 0 < uniform(0, "fading", 1, "ann") < 1
    True
    """
    return ((seed_for(seed, purpose, *parts) >> 11) + 0.5) / 2**52


def assign(
    clients: Sequence[str],
    profiles: Mapping[str, Profile],
    *,
    seed: int,
    shares: Mapping[str, float] | None = None,
    named: Mapping[str, str] | None = None,
) -> dict[str, Profile]:
    """Return each client's profile: the one named for it, or one drawn by the shares.

    A draw follows the seed and the client's name: it does not depend on who else there is.

    Args:
        clients: All names.
        profiles: By name.
        seed: The run's.
        shares: Weights of profiles by name, those left out 0; None or nothing for the profiles' own.
        named: Names of profiles by client.

    Raises:
        ConfigError: If a name is unknown, or the shares do not add up to more than 0.
    """
    named = named or {}
    weights = {str(name): float(share) for name, share in (shares or {}).items()}
    weights = weights or {name: profile.share for name, profile in profiles.items()}
    _check_names("devices.shares", weights, profiles)
    _check_names("devices.named", named.values(), profiles)
    known = set(clients)
    for client in named:
        if client not in known:
            raise ConfigError(f"devices.named names client {client!r}", "no such client", nearest(client, known))
    total = sum(weights.values())
    if min(weights.values()) < 0 or not 0 < total < math.inf:
        raise ConfigError(f"devices.shares={weights}", "shares are 0 or more, and one is above 0", "change them")
    chosen = {}
    for client in clients:
        if client in named:
            chosen[client] = profiles[named[client]]
        else:
            chosen[client] = profiles[_drawn(weights, total * uniform(seed, "device profile", client))]
    return chosen


def _drawn(weights: Mapping[str, float], place: float) -> str:
    *firsts, last = sorted(name for name, weight in weights.items() if weight > 0)
    for name in firsts:
        place -= weights[name]
        if place < 0:
            return name
    return last


def _check_names(key: str, names: Any, profiles: Mapping[str, Profile]) -> None:
    for name in names:
        if name not in profiles:
            raise ConfigError(f"{key} names the profile {name!r}", "no such profile", nearest(str(name), profiles))
