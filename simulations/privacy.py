"""Settings to client-level differential privacy: what it goes with, how much noise, and what it amounts to."""

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fedpeat.control import FixedControl
from fedpeat.core import ConfigError
from fedpeat.privacy import Sampling, check_installed, delta_noise, epsilon_after, noise_multiplier_for
from simulations.devices import check_private
from strategies import Recipe
from strategies.privacy import Clipping, private

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Privacy:
    """What a federation runs with, and what its reports say of it.

    Attributes:
        recipe: The aggregation rule, clipped and noised where that is asked for.
        control: Who does what in each round; from a secret seed where noise is secret.
        epsilon: From rounds to what is given away after them; None without differential privacy.
        facts: What the summary says beside epsilon; nothing without differential privacy.
    """

    recipe: Recipe
    control: FixedControl
    epsilon: Callable[[int], float] | None = None
    facts: Mapping[str, Any] | None = None


def privacy_of(settings: Settings, recipe: Recipe, control: FixedControl) -> Privacy:
    """Return what `settings["privacy"]` makes of a recipe and a controller.

    Raises:
        ConfigError: If a value is out of range, something does not go with differential privacy, or the library that
            accounts is not installed.
    """
    asked = settings["privacy"]
    if not asked["kind"]:
        return Privacy(recipe, control)
    _check_company(settings)
    check_installed()
    sampling = Sampling(len(control.clients), control.per_round, poisson=control.sampling == "poisson")
    _check_numbers(asked, sampling.population)
    multiplier = _multiplier(asked, settings["rounds"], sampling)
    clipping, of_deltas = _clipping(asked, multiplier, sampling.per_round)
    seed = asked["noise_seed"]
    noisy = private(recipe, noise_multiplier=of_deltas, clipping=clipping, expected=sampling.per_round, noise_seed=seed)
    # Sampling protects only those of whom nobody knows whether they were sampled.
    control = control if seed is not None else replace(control, seed=secrets.randbits(63))
    facts = {
        "delta": asked["delta"],
        "noise_multiplier": multiplier,
        "clip_norm": clipping.norm,
        "adaptive": bool(clipping.quantile),
        "sampling": control.sampling if sampling.share < 1 else "all",
        "share": sampling.share,
        "neighbours": sampling.neighbours,
        "repeatable": seed is not None,
    }
    spent = partial(epsilon_after, noise_multiplier=multiplier, delta=asked["delta"], sampling=sampling)
    return Privacy(noisy, control, spent, facts)


def _multiplier(asked: Settings, rounds: int, sampling: Sampling) -> float:
    if asked["epsilon"] is None:
        return float(asked["noise_multiplier"])
    return noise_multiplier_for(asked["epsilon"], rounds=max(rounds, 1), delta=asked["delta"], sampling=sampling)


def _clipping(asked: Settings, multiplier: float, per_round: int) -> tuple[Clipping, float]:
    """Return how clients are clipped, and what is left of the noise multiplier for their deltas."""
    adaptive = asked["adaptive"]
    bit_noise = per_round / 20 if adaptive["bit_noise"] is None else adaptive["bit_noise"]
    clipping = Clipping(
        norm=asked["clip_norm"],
        on=asked["clip_on"],
        quantile=adaptive["quantile"],
        learning_rate=adaptive["learning_rate"],
        bit_noise=bit_noise if adaptive["quantile"] else 0.0,
    )
    return clipping, delta_noise(multiplier, bit_noise) if adaptive["quantile"] else multiplier


def _check_numbers(asked: Settings, population: int) -> None:
    for key, fits, must in (
        ("noise_multiplier", 0 <= asked["noise_multiplier"] < math.inf, "be 0 or more"),
        ("epsilon", asked["epsilon"] is None or 0 < asked["epsilon"] < math.inf, "be null, or above 0"),
        ("delta", 0 < asked["delta"] < 1 / population, f"be above 0, below 1 / {population} clients"),
    ):
        if not fits:
            raise ConfigError(f"cannot use privacy.{key}={asked[key]}", f"it must {must}", f"change privacy.{key}")


def _check_company(settings: Settings) -> None:
    """Check the settings that would make a guarantee for clients void or meaningless."""
    server, client = settings["server"]["train"], settings["client"]
    check_private(settings)
    if settings["round"]["over_select"]:
        raise ConfigError(
            "privacy=client_level does not go with round.over_select",
            "who is fast decides then who counts, which is not the sampling that is accounted for",
            "set round.over_select=0",
        )
    if server not in {"off", False, None}:
        raise ConfigError(
            f"privacy=client_level does not go with server.train={server}",
            "the server's own delta would be clipped and noised like a client's, for nobody's sake",
            "set server.train=off",
        )
    if settings["clients"]["pool"]:
        raise ConfigError(
            "privacy=client_level protects single clients",
            "clients.pool=true makes one of all",
            "set clients.pool=false",
        )
    if client["unfreeze"] and client["unfreeze_policy"] == "local":
        raise ConfigError(
            "privacy=client_level does not go with client.unfreeze_policy=local",
            "its clients keep tensors of their own, which no noise is added to",
            "choose client.unfreeze_policy=map_back or discard",
        )
