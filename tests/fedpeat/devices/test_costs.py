import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.devices import Demand, Supply, round_costs, round_seconds, spent_until, transfer_seconds

SUPPLY = Supply(flops=2e9, down_bits=8e6, up_bits=1e6, compute_watt=3.0, transmit_watt=2.0, receive_watt=0.5)


def test_a_round_by_hand():
    costs = round_costs(Demand(bytes_down=2e6, bytes_up=1e6, bundle_bytes=4e6, flops=1e10), SUPPLY)
    assert float(costs.down_seconds) == 6.0
    assert float(costs.compute_seconds) == 5.0
    assert float(costs.up_seconds) == 8.0
    assert float(costs.total_seconds) == 19.0
    assert float(costs.joules) == 0.5 * 6 + 3 * 5 + 2 * 8


def test_arrays_are_devices():
    costs = round_costs(Demand(1e6, np.array([1e6, 2e6]), np.array([0, 7e6]), 2e9), SUPPLY)
    assert costs.down_seconds.tolist() == [1.0, 8.0]
    assert costs.total_seconds.tolist() == [1 + 1 + 8, 8 + 1 + 16]


@pytest.mark.parametrize(
    ("ends", "spent"), [(0.0, 0.0), (4.0, 2.0), (6.0, 3.0), (8.0, 3 + 6), (11.0, 18.0), (12.0, 20.0), (99.0, 34.0)]
)
def test_who_stops_early_spends_less(ends, spent):
    costs = round_costs(Demand(2e6, 1e6, 4e6, 1e10), SUPPLY)
    assert float(spent_until(costs, SUPPLY, ends)) == spent


def test_nothing_takes_no_time_and_a_dead_link_for_ever():
    assert float(transfer_seconds(0, 0)) == 0
    assert float(transfer_seconds(1, 0)) == float("inf")


amount = st.floats(0, 1e12, allow_subnormal=False)
rate = st.floats(1e-3, 1e12, allow_subnormal=False)


@given(st.tuples(amount, amount, amount, amount), st.tuples(rate, rate, rate), st.floats(1, 1e6))
def test_whatever_is_faster_is_never_later(demand, supply, more):
    costs = round_costs(Demand(*demand), Supply(*supply))
    for place in range(3):
        faster = [value * (more if place == number else 1) for number, value in enumerate(supply)]
        assert round_costs(Demand(*demand), Supply(*faster)).total_seconds <= costs.total_seconds
    for place in range(4):
        larger = [value * (more if place == number else 1) for number, value in enumerate(demand)]
        assert round_costs(Demand(*larger), Supply(*supply)).total_seconds >= costs.total_seconds


@given(st.lists(st.floats(0, 1e9), max_size=9), st.none() | st.floats(1e-3, 1e9))
def test_a_round_waits_for_the_slowest_or_for_the_deadline(ends, deadline):
    lasts = round_seconds(np.array(ends), deadline)
    slowest = max(ends, default=0.0)
    assert lasts == (slowest if deadline is None or slowest <= deadline else deadline)
