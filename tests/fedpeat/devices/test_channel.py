import math
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.core import ConfigError
from fedpeat.devices import (
    Radio,
    band_shares,
    distance_km,
    drops_out_at,
    equal_shares,
    fading,
    gain,
    is_available,
    path_loss_db,
    radio_rates,
    shannon_bits,
)

RADIO = Radio()
NAMES = [f"client {number}" for number in range(3000)]


def test_path_loss_by_hand():
    assert path_loss_db(1.0) == 128.1
    assert path_loss_db(0.1) == pytest.approx(90.5)
    assert path_loss_db(2.0) - path_loss_db(1.0) == pytest.approx(37.6 * math.log10(2))


def test_the_rate_by_hand():
    # 1 MHz; what arrives is 7 times the noise in it: log2(1 + 7) = 3.
    assert float(shannon_bits(1e6, 0.7, 1e-11, 1e-18)) == pytest.approx(3e6)
    assert shannon_bits(np.array([0.0, 1e6]), 0.7, 1e-11, 1e-18).tolist() == [0.0, pytest.approx(3e6)]


def test_noise_by_hand():
    assert replace(RADIO, noise_dbm_hz=-170.0, noise_figure_db=0.0).noise_watt_hz == pytest.approx(1e-20)


# No subnormal numbers: what a cell has is far from them, and a product of them may be 0.
positive = st.floats(1e-15, 1e9, allow_subnormal=False)


@given(positive, positive, positive, st.floats(1e-21, 1e-15), st.floats(1.0, 1e3))
def test_more_bandwidth_power_or_gain_is_never_slower(band, power, through, noise, more):
    rate = float(shannon_bits(band, power, through, noise))
    nearly = 1 - 1e-9
    assert float(shannon_bits(more * band, power, through, noise)) >= rate * nearly
    assert float(shannon_bits(band, more * power, through, noise)) >= rate * nearly
    assert float(shannon_bits(band, power, more * through, noise)) >= rate * nearly
    assert 0 <= rate < math.inf


def test_distances_fill_the_annulus_evenly():
    radio = replace(RADIO, radius_min_km=0.1, radius_max_km=0.5)
    found = [distance_km(radio, name, seed=0) for name in NAMES]
    assert min(found) >= 0.1
    assert max(found) <= 0.5
    # Half of the area lies within sqrt((0.01 + 0.25) / 2) km.
    assert fmean(distance < math.sqrt(0.13) for distance in found) == pytest.approx(0.5, abs=0.04)
    assert distance_km(replace(radio, radius_max_km=0.1), "ann", seed=0) == pytest.approx(0.1)


def test_fading_is_exponential_of_mean_1():
    found = [fading(RADIO, name, 1, seed=0) for name in NAMES]
    assert fmean(found) == pytest.approx(1, abs=0.08)
    assert fmean(one > 1 for one in found) == pytest.approx(math.exp(-1), abs=0.04)
    assert fading(replace(RADIO, rayleigh=False), "ann", 1, seed=0) == 1


def test_a_draw_follows_seed_client_and_round():
    one = gain(RADIO, "ann", 3, seed=0)
    assert gain(RADIO, "ann", 3, seed=0) == one
    assert len({one, gain(RADIO, "ann", 4, seed=0), gain(RADIO, "ann", 3, seed=1), gain(RADIO, "bob", 3, seed=0)}) == 4
    assert distance_km(RADIO, "ann", seed=0) != distance_km(RADIO, "ann", seed=1)


@given(st.lists(st.text(), min_size=1, max_size=20, unique=True), st.floats(0.01, 100))
def test_shares_add_up_to_the_band(clients, weight):
    assert equal_shares(len(clients)).sum() == pytest.approx(1)
    shares = band_shares(replace(RADIO, weights={clients[0]: weight}), clients)
    assert shares.sum() == pytest.approx(1)
    assert shares[0] == pytest.approx(weight / (weight + len(clients) - 1))


def test_nobody_has_no_share():
    assert len(band_shares(RADIO, [])) == len(band_shares(replace(RADIO, weights={"ann": 2.0}), [])) == 0


def test_rates_in_a_cell_by_hand():
    radio = replace(RADIO, rayleigh=False, radius_min_km=0.1, radius_max_km=0.1, bandwidth_down_hz=10e6)
    down, up = radio_rates(radio, ["ann", "bob"], [0.2, 0.1], 1, seed=0)
    through, noise = 10 ** (-90.5 / 10), 10 ** (-16.7) / 1000
    assert down.tolist() == pytest.approx([5e6 * math.log2(1 + 20 * through / (noise * 10e6))] * 2)
    assert up[0] == pytest.approx(10e6 * math.log2(1 + 0.2 * through / (noise * 10e6)))
    assert up[1] == pytest.approx(10e6 * math.log2(1 + 0.1 * through / (noise * 10e6)))


def test_others_change_a_clients_share_but_not_its_fading():
    alone, _ = radio_rates(RADIO, ["ann"], [0.2], 5, seed=0)
    among, _ = radio_rates(RADIO, ["bob", "ann", "eve", "zoe"], [0.2] * 4, 5, seed=0)
    assert among[1] == pytest.approx(alone[0] / 4)  # down, a device's signal to noise does not depend on its share


@pytest.mark.parametrize(
    "wrong",
    [
        {"bandwidth_up_hz": 0},
        {"station_watt": -1},
        {"radius_min_km": 0.6},
        {"radius_max_km": math.inf},
        {"weights": {"ann": 0}},
    ],
)
def test_a_cell_that_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"devices\.radio\."):
        replace(RADIO, **wrong)


def test_availability_and_drop_outs_have_their_probabilities():
    there = [is_available(name, 1, probability=0.3, seed=0) for name in NAMES]
    assert fmean(there) == pytest.approx(0.3, abs=0.04)
    assert all(is_available(name, 1, probability=1, seed=0) for name in NAMES[:50])
    assert not any(is_available(name, 1, probability=0, seed=0) for name in NAMES[:50])
    gone = [drops_out_at(name, 1, probability=0.3, seed=0) for name in NAMES]
    places = [place for place in gone if place is not None]
    assert len(places) / len(NAMES) == pytest.approx(0.3, abs=0.04)
    assert fmean(places) == pytest.approx(0.5, abs=0.05)
    assert 0 < min(places) < max(places) < 1
    assert drops_out_at("ann", 1, probability=0, seed=0) is None
    # The two do not hang together.
    both = [one and place is not None for one, place in zip(there, gone, strict=True)]
    assert fmean(both) == pytest.approx(0.09, abs=0.03)
