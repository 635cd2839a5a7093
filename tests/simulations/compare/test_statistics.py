import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulations.compare.statistics import (
    Point,
    _inside,
    first_reaching,
    interval,
    median_or_never,
    paired,
    t_quantile,
)

# From printed tables (two-sided 95 %).
KNOWN = {1: 12.7062047, 2: 4.3026527, 3: 3.1824463, 5: 2.5705818, 9: 2.2621572, 10: 2.2281389, 30: 2.0422725}
CURVE = [Point(0, 0, 40.0), Point(2, 10, 30.0), Point(4, 20, 31.0), Point(6, 30, 29.0)]


@pytest.mark.parametrize(("freedom", "expected"), KNOWN.items())
def test_quantiles_are_those_of_the_tables(freedom, expected):
    assert t_quantile(freedom) == pytest.approx(expected, rel=1e-7)


def test_quantiles_have_their_closed_forms():
    assert t_quantile(1) == pytest.approx(math.tan(0.95 * math.pi / 2))
    alpha = 4 * 0.975 * 0.025
    assert t_quantile(2) == pytest.approx(2 * 0.475 * math.sqrt(2 / alpha))


def test_many_degrees_are_nearly_normal():
    assert t_quantile(100_000) == pytest.approx(1.959964, abs=1e-4)


@given(st.integers(1, 300), st.floats(0.05, 0.999))
def test_a_quantile_holds_its_level(freedom, level):
    assert _inside(t_quantile(freedom, level), freedom) == pytest.approx(level, abs=1e-9)


def test_an_interval_is_the_textbook_one():
    found = interval([2.0, 4.0, 4.0, 6.0])
    spread = math.sqrt(8 / 3)
    assert found.mean == 4.0
    assert found.half == pytest.approx(3.1824463 * spread / 2, rel=1e-6)
    assert found.seeds == 4


def test_one_value_has_no_interval():
    assert interval([2.0]) == (2.0, None, 1)
    assert interval([2.0]).excludes_zero is None


@pytest.mark.parametrize(
    ("values", "expected"), [([1.0, 1.1, 0.9], True), ([1.0, -0.5, 0.2], False), ([2.0, 2.0], True), ([0, 0], False)]
)
def test_noise_is_what_the_interval_covers(values, expected):
    assert interval(values).excludes_zero is expected


def test_differences_are_paired_by_seed():
    noise = {0: 10.0, 1: 20.0, 2: 30.0}
    better = {seed: value - 1 for seed, value in noise.items()}
    found = paired({**better, 9: 0.0}, noise)
    assert (found.mean, found.half, found.seeds) == (-1.0, 0.0, 3)
    assert found.excludes_zero
    assert not interval([*better.values()]).half < 1  # unpaired, noise between seeds would hide it


def test_without_a_common_seed_there_is_no_difference():
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_the_first_point_at_the_target_counts():
    assert first_reaching(CURVE, 31.0, lower_is_better=True) == (2, 10, 30.0)
    assert first_reaching(CURVE, 29.0, lower_is_better=True).round == 6
    assert first_reaching(CURVE, 28.0, lower_is_better=True) is None
    assert first_reaching(CURVE, 40.0, lower_is_better=False).round == 0
    assert first_reaching([], 1.0, lower_is_better=True) is None


def test_a_point_that_is_not_finite_reaches_nothing():
    for value in (math.nan, math.inf):
        assert first_reaching([Point(1, 1, value)], 30.0, lower_is_better=True) is None


def test_the_median_counts_never_as_latest():
    assert median_or_never([1, None, 3]) == 3
    assert median_or_never([None, 1, None]) is None
    assert median_or_never([1, None]) is None
    assert median_or_never([]) is None
