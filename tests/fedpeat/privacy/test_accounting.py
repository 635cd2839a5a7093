import math
import sys
from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fedpeat.core import ConfigError
from fedpeat.privacy import Sampling, check_installed, delta_noise, epsilon_after, noise_multiplier_for

DELTA = 1e-5
ALL = Sampling(20, 20)


def epsilon(rounds, multiplier, sampling, delta=DELTA):
    return epsilon_after(rounds, noise_multiplier=multiplier, delta=delta, sampling=sampling)


def gaussian(sigma, delta=DELTA):
    """The Gaussian mechanism's epsilon: Balle and Wang 2018, theorem 8, solved for epsilon."""

    def excess(value):
        first = norm.cdf(1 / (2 * sigma) - value * sigma)
        second = math.exp(value + norm.logcdf(-1 / (2 * sigma) - value * sigma))
        return first - second - delta

    return brentq(excess, 0, 1000)


def sampled_once(share, sigma, delta=DELTA):
    """One round of the Poisson-sampled Gaussian mechanism: the hockey-stick divergence by its integral, both ways."""
    grid = np.linspace(-12 * sigma, 1 + 12 * sigma, 400_001)
    without = norm.pdf(grid, 0, sigma)
    mixed = (1 - share) * without + share * norm.pdf(grid, 1, sigma)

    def excess(value):
        ways = ((mixed, without), (without, mixed))
        return max(np.trapezoid(np.maximum(p - math.exp(value) * q, 0), grid) for p, q in ways) - delta

    return brentq(excess, 0, 100)


@pytest.mark.parametrize(("rounds", "multiplier"), [(1, 1.0), (10, 1.0), (100, 5.0), (7, 0.5)])
def test_with_all_taking_part_it_is_the_gaussian_mechanism(rounds, multiplier):
    assert epsilon(rounds, multiplier, ALL) == pytest.approx(gaussian(multiplier / math.sqrt(rounds)), rel=1e-6)


@pytest.mark.parametrize(("per_round", "multiplier"), [(2, 0.7), (2, 1.0), (10, 1.0), (10, 2.0)])
def test_one_poisson_sampled_round_is_its_integral(per_round, multiplier):
    found = epsilon(1, multiplier, Sampling(20, per_round, poisson=True))
    assert found == pytest.approx(sampled_once(per_round / 20, multiplier), rel=1e-3)


def test_poisson_sampling_of_all_is_all():
    for rounds, multiplier in ((1, 0.5), (10, 1.0), (100, 4.0)):
        assert epsilon(rounds, multiplier, Sampling(20, 20, poisson=True)) == epsilon(rounds, multiplier, ALL)


@pytest.mark.parametrize("poisson", [True, False])
def test_it_grows_with_rounds_and_share_and_falls_with_noise_and_delta(poisson):
    def rising(values):
        return all(left < right for left, right in pairwise(values))

    half = Sampling(100, 30, poisson)
    assert rising([epsilon(rounds, 2.0, half) for rounds in (0, 1, 2, 10, 50)])
    assert rising([epsilon(10, 2.0, Sampling(100, count, poisson)) for count in (3, 30)])
    assert rising([epsilon(10, multiplier, half) for multiplier in (8.0, 2.0, 0.3)])
    assert rising([epsilon(10, 2.0, half, delta) for delta in (1e-3, 1e-5, 1e-8)])


def test_replacing_a_client_moves_the_sum_twice_as_far():
    """And sampling without replacement is never worse than being drawn in each round."""
    for rounds, multiplier in ((1, 1.0), (10, 1.0), (10, 4.0)):
        most = gaussian(multiplier / 2 / math.sqrt(rounds))
        assert epsilon(rounds, multiplier, Sampling(20, 19)) <= most * (1 + 1e-9)
    assert epsilon(10, 4.0, Sampling(20, 2)) < gaussian(2 / math.sqrt(10))
    assert epsilon(10, 4.0, Sampling(20, 2)) > epsilon(10, 4.0, Sampling(20, 2, poisson=True))


def test_a_sampled_round_gives_no_less_away_than_its_lower_bound():
    """One round of `per_round` clients, one replaced: with probability `share` the Gaussian mechanism at distance 2."""
    multiplier, share = 2.0, 0.1
    found = epsilon(1, multiplier, Sampling(100, 10))
    grid = np.linspace(-1 - 12 * multiplier, 1 + 12 * multiplier, 400_001)
    left, right = (norm.pdf(grid, place, multiplier) for place in (-1, 1))
    base = norm.pdf(grid, 0, multiplier)
    apart = (1 - share) * (base - math.exp(found) * base) + share * (left - math.exp(found) * right)
    assert np.trapezoid(np.maximum(apart, 0), grid) <= DELTA


def test_no_noise_and_no_round():
    assert epsilon(0, 1.0, ALL) == 0
    assert epsilon(1, 0.0, ALL) == math.inf
    assert epsilon(0, 0.0, ALL) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "sampling"),
    [(0.5, ALL), (8.0, ALL), (8.0, Sampling(100, 10, poisson=True)), (8.0, Sampling(100, 10))],
)
def test_noise_for_an_epsilon_is_the_least(target, sampling):
    found = noise_multiplier_for(target, rounds=20, delta=DELTA, sampling=sampling)
    assert epsilon(20, found, sampling) <= target
    assert epsilon(20, found / 1.006, sampling) > target


def test_who_is_compared_is_said():
    assert ALL.neighbours == Sampling(20, 3, poisson=True).neighbours == "one client more or less"
    assert Sampling(20, 19).neighbours == "one client replaced by another"
    assert Sampling(20, 5).share == 0.25


def test_two_releases_are_as_private_as_one():
    """Gaussian mechanisms on one input add up by their squared distances."""
    for multiplier, bit_noise in ((1.0, 0.75), (0.3, 5.0), (2.0, 1.01)):
        of_deltas = delta_noise(multiplier, bit_noise)
        assert of_deltas > multiplier
        assert of_deltas**-2 + (0.5 / bit_noise) ** 2 == pytest.approx(multiplier**-2)
    assert delta_noise(0.0, 0.0) == 0
    for bit_noise in (0.0, 0.25, 0.5):
        with pytest.raises(ConfigError, match=r"bit_noise.*above half of privacy\.noise_multiplier=1"):
            delta_noise(1.0, bit_noise)


def test_a_missing_library_is_told(monkeypatch):
    check_installed()
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    for ask in (check_installed, lambda: epsilon(1, 1.0, ALL)):
        with pytest.raises(ConfigError, match=r"pip install 'fedpeat\[dp\]'"):
            ask()
