"""From rounds, noise and sampling to epsilon, and back."""

import math
from dataclasses import dataclass
from functools import cache

from fedpeat.core import ConfigError

_CLOSE = 1.005
"""How near a noise multiplier comes to the least that will do, as a factor."""

_ORDERS = (*range(2, 33), 40, 48, 64, 96, 128, 512, 1024)
"""Of Renyi divergences without replacement: whole ones, as those between follow from them. Any give a valid bound."""


@dataclass(frozen=True)
class Sampling:
    """How clients come into a round; nobody but the server may know who did.

    Attributes:
        population: How many clients there are.
        per_round: How many take part in a round: exactly, or with `poisson` on average.
        poisson: Whether each client is drawn by itself, rather than `per_round` of them.
    """

    population: int
    per_round: int
    poisson: bool = False

    @property
    def share(self) -> float:
        """The probability with which a client takes part in a round."""
        return self.per_round / self.population

    @property
    def replaces(self) -> bool:
        """Whether the guarantee compares federations of one size, in which a client is replaced by any other."""
        return not self.poisson and self.per_round < self.population

    @property
    def neighbours(self) -> str:
        """Which two federations cannot be told apart, in words."""
        return "one client replaced by another" if self.replaces else "one client more or less"


def epsilon_after(rounds: int, *, noise_multiplier: float, delta: float, sampling: Sampling) -> float:
    """Return the epsilon of (epsilon, delta)-differential privacy after so many rounds; infinite without noise.

    A round publishes the sum of vectors, one a client that takes part, of norm 1 at most, with Gaussian noise.

    - All take part: rounds of the Gaussian mechanism are together one with `noise_multiplier / sqrt(rounds)`, exactly.
    - Poisson sampling: numerical composition of the privacy loss, rounded upwards.
    - `per_round` of them: Renyi differential privacy of sampling without replacement. Its relation replaces a client by
      another, which changes the sum by 2, not 1: the multiplier counts half. Where it is better, the bound of all
      taking part, which holds whoever is drawn.

    Args:
        rounds: 0 or more.
        noise_multiplier: Standard deviation of the noise on the sum of vectors of norm 1.
        delta: Above 0, below 1.
        sampling: How clients come into a round.

    Raises:
        ConfigError: If the library is not installed.

    Source: Balle and Wang 2018, arXiv 1805.06530, theorem 8 (Gaussian); Doroshenko et al. 2022, arXiv 2207.04380
        (privacy loss distributions); Wang, Balle and Kasiviswanathan 2018, arXiv 1808.00087, theorem 27 (without
        replacement).
    Departures: steps of the privacy loss are 1e-3 at a multiplier of 1, and finer or coarser with its spread.
    """
    check_installed()
    if rounds == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    if sampling.replaces:
        return min(_gaussian(rounds, noise_multiplier / 2, delta), _replaced(rounds, noise_multiplier, delta, sampling))
    if sampling.share == 1:
        return _gaussian(rounds, noise_multiplier, delta)
    return _poisson(rounds, noise_multiplier, delta, sampling.share)


def _gaussian(rounds: int, noise_multiplier: float, delta: float) -> float:
    from dp_accounting import get_epsilon_gaussian

    return float(get_epsilon_gaussian(noise_multiplier / math.sqrt(rounds), delta))


def _poisson(rounds: int, noise_multiplier: float, delta: float, share: float) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    spread = max(1 / noise_multiplier, 1 / noise_multiplier**2)
    accountant = PLDAccountant(value_discretization_interval=1e-3 * spread)
    accountant.compose(PoissonSampledDpEvent(share, GaussianDpEvent(noise_multiplier)), rounds)
    # Whoever is not sampled is not told of: sampling can but help, and rounding may hide that.
    return min(float(accountant.get_epsilon(delta)), _gaussian(rounds, noise_multiplier, delta))


def _replaced(rounds: int, noise_multiplier: float, delta: float, sampling: Sampling) -> float:
    from dp_accounting.rdp import compute_epsilon

    orders, renyi = _renyi_of_one_round(noise_multiplier / 2, sampling)
    return float(compute_epsilon(orders, [rounds * one for one in renyi], delta)[0])


@cache
def _renyi_of_one_round(noise_multiplier: float, sampling: Sampling) -> tuple[list[float], list[float]]:
    """Return orders and the divergences at them, which add up over rounds."""
    from dp_accounting import GaussianDpEvent, NeighboringRelation, SampledWithoutReplacementDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(_ORDERS, neighboring_relation=NeighboringRelation.REPLACE_ONE)
    event = SampledWithoutReplacementDpEvent(sampling.population, sampling.per_round, GaussianDpEvent(noise_multiplier))
    accountant.compose(event)
    return accountant.orders.tolist(), accountant.rdp.tolist()


def noise_multiplier_for(epsilon: float, *, rounds: int, delta: float, sampling: Sampling) -> float:
    """Return a noise multiplier that keeps within `epsilon`, at most 0.5 % above the least one that does.

    Args:
        epsilon: Above 0.
        rounds: 1 or more.
        delta: As in `epsilon_after`.
        sampling: How clients come into a round.

    Raises:
        ConfigError: If the library is not installed.
    """

    def enough(noise_multiplier: float) -> bool:
        found = epsilon_after(rounds, noise_multiplier=noise_multiplier, delta=delta, sampling=sampling)
        return found <= epsilon

    high = 1.0
    while not enough(high):
        high *= 2
    while enough(high / 2):
        high /= 2
    low = high / 2
    while high / low > _CLOSE:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def delta_noise(noise_multiplier: float, bit_noise: float) -> float:
    """Return the noise multiplier of the sum of deltas, where a noisy count of clipped clients is published beside it.

    Both together are as private as the sum alone with `noise_multiplier`: `(z^-2 - (2 sigma_b)^-2)^(-1/2)`.

    Args:
        noise_multiplier: z, of the two together; 0 for no noise.
        bit_noise: sigma_b, standard deviation of the noise on the count of bits, each less 1/2.

    Raises:
        ConfigError: If `bit_noise` is too small for that.

    Source: Andrew et al. 2021, arXiv 1905.03871, theorem 1.

    >>> round(delta_noise(1.0, 1.0), 6)
    1.154701
    """
    if noise_multiplier == 0:
        return 0.0
    if 2 * bit_noise <= noise_multiplier:
        raise ConfigError(
            f"privacy.adaptive.bit_noise={bit_noise:.4g} leaves no noise multiplier for the deltas",
            f"it must be above half of privacy.noise_multiplier={noise_multiplier:.4g}",
            "raise it (well above half, or the deltas need far more noise), lower the noise multiplier, or leave"
            " clip_norm fixed (privacy.adaptive.quantile=0)",
        )
    return (noise_multiplier**-2 - (2 * bit_noise) ** -2) ** -0.5


def check_installed() -> None:
    """Check that the library that accounts is there.

    Raises:
        ConfigError: If it is not.
    """
    try:
        import dp_accounting  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "privacy=client_level accounts by the library dp-accounting",
            "it is not installed",
            "pip install 'fedpeat[dp]' (or dp-accounting itself)",
        ) from error
