import numpy as np
import pytest

from fedpeat.control import (
    Menu,
    Objective,
    Observation,
    Pair,
    Price,
    Problem,
    bytes_term,
    cost,
    energy_term,
    price,
    quality_term,
    time_term,
)
from fedpeat.control.objective import to_fetch
from fedpeat.core import ConfigError, DevicePlan, RoundPlan
from fedpeat.devices import Fleet, Profile, Radio, Traffic, Work
from tests.fedpeat.control.problems import problem, seen

PRICE = Price(np.array(120.0), np.array(3e7), np.array(50.0), np.array([120.0]), np.array([True]), np.array([True]))


def test_each_term_alone():
    objective = Objective(time=2, quality=3, bytes=5, energy=7, time_unit=60, bytes_unit=1e7, energy_unit=100)
    assert time_term(objective, PRICE) == 4.0
    assert bytes_term(objective, PRICE) == 15.0
    assert energy_term(objective, PRICE) == 3.5
    assert quality_term(objective, 4.0, 3.5) == 10.5
    assert quality_term(Objective(quality=3, quality_of="change"), 4.0, 3.5) == -1.5


@pytest.mark.parametrize(("term", "value"), [("time", 4.0), ("quality", 3.5), ("bytes", 6.0), ("energy", 1.0)])
def test_the_cost_is_their_sum(term, value):
    weights = dict.fromkeys(("time", "quality", "bytes", "energy"), 0.0)
    units = {"time_unit": 30, "bytes_unit": 5e6, "energy_unit": 50}
    assert cost(Objective(**{**weights, term: 1.0}, **units), PRICE, 4.0, 3.5) == value
    assert cost(Objective(1, 1, 1, 1, **units), PRICE, 4.0, 3.5) == 14.5


@pytest.mark.parametrize("wrong", [{"time": -1}, {"energy_unit": 0}, {"quality_of": "chance"}, {"bytes": np.nan}])
def test_numbers_are_checked(wrong):
    with pytest.raises(ConfigError, match=r"control\.objective"):
        Objective(**wrong)


def by_hand():
    return Problem(
        clients=("ann", "bob"),
        menu=Menu((Pair("small", 2), Pair("large", 2)), (5, 10)),
        rounds=2,
        flops=np.array([1e9, 2e9]),
        memory_bytes=np.array([10.0, 10.0]),
        watt=np.array([[1.0, 2.0, 3.0, 0.2], [1.0, 2.0, 3.0, 0.2]]),
        data_share=np.array([0.5, 0.5]),
        step_flops=np.array([1e9, 4e9]),
        needs_bytes=np.array([1.0, 2.0]),
        bytes_down=np.array([1e6, 2e6]),
        bytes_up=np.array([5e5, 1e6]),
        kept=np.array([0.5, 1.0]),
        bundle_bytes=np.array([1e7, 3e7]),
        refresh_bytes=np.array([1e5, 2e5]),
    )


def of_round(holds, stale):
    return Observation(
        1, np.ones(2, bool), np.ones(2), np.full(2, 8e6), np.full(2, 4e6), np.array(holds), np.array(stale)
    )


def test_a_round_by_hand():
    fresh = of_round([[False, False], [False, True]], np.zeros((2, 2), bool))
    found = price(by_hand(), fresh, np.array([[1, 0, 0], [2, 1, 0]]), np.array(0))
    # ann: 11 MB at 1 MB/s, 5 GFLOP at 1, 0.5 MB at 0.5 MB/s; bob: 2 MB, 40 GFLOP at 2, 1 MB.
    assert found.device_seconds.tolist() == [11 + 5 + 1, 2 + 20 + 2]
    assert found.seconds == 24
    assert found.bytes == 11.5e6 + 3e6
    assert found.joules == (11 + 2 * 5 + 3 * 1) + (2 + 2 * 20 + 3 * 2)


def test_who_stays_out_costs_nothing():
    found = price(
        by_hand(), of_round(np.zeros((2, 2), bool), np.zeros((2, 2), bool)), np.zeros((2, 3), int), np.array(0)
    )
    assert (found.seconds, found.bytes, found.joules) == (0, 0, 0)


def test_what_was_realigned_is_fetched_where_it_is_old():
    one, small = by_hand(), np.array([0, 0])
    known = of_round([[True, True], [False, True]], [[True, False], [False, False]])
    assert to_fetch(one, known, small, np.array(0)).tolist() == [1e5, 1e7]
    assert to_fetch(one, known, small, np.array(1)).tolist() == [1e5, 1e7 + 1e5]
    assert to_fetch(one, known, np.array([1, 1]), np.array(0)).tolist() == [0, 0]
    assert to_fetch(one, known, np.array([1, 1]), np.array(1)).tolist() == [2e5, 2e5]


@pytest.mark.parametrize("radio", [None, Radio(), Radio(weights={"client-1": 3.0})], ids=["fixed", "cell", "weighted"])
def test_it_is_what_the_fleet_says(radio):
    of = problem(3, shares=(0.5, 1.0, 2.0), radio=radio)
    profiles = {
        name: Profile(name, flops, 100.0, 40.0, 10.0, watt[1], watt[2], watt[0], watt[3])
        for name, flops, watt in zip(of.clients, of.flops, of.watt, strict=True)
    }
    work = {pair: Work(flops, 1.0) for pair, flops in zip(of.menu.pairs, of.step_flops, strict=True)}
    fleet = Fleet(profiles, work, seed=4, radio=radio)
    gains, down, up = fleet.links(of.clients, 1)
    holds = np.array([[True, False], [False, False], [False, False]])
    known = Observation(1, np.ones(3, bool), gains, down, up, holds, np.zeros((3, 2), bool))
    levels = np.array([[1, 0, 2], [0, 0, 0], [4, 1, 0]])
    plan = RoundPlan(
        1, 0, 9, (DevicePlan("client-0", 5, "small", 2, band=2.0), DevicePlan("client-2", 10, "large", 8, band=0.5))
    )
    sent = [(of.bytes_down[place], of.bytes_up[place]) for place in (0, 3)]
    played = fleet.play(plan, [Traffic(*sent[0], 0), Traffic(*sent[1], of.bundle_bytes[1])])
    found = price(of, known, levels, np.array(0))
    assert found.seconds == pytest.approx(played.seconds)
    for place in (0, 2):
        assert found.device_seconds[place] == pytest.approx(played.facts[of.clients[place]]["modelled_seconds"])
    assert found.joules == pytest.approx(sum(fact["joules"] for fact in played.facts.values()))


def test_many_plans_at_once_cost_what_each_costs():
    of = problem(3, shares=(1.0, 2.0), radio=Radio())
    known, draw = seen(of), np.random.default_rng(1)
    levels = np.stack([draw.integers(0, 5, (20, 3)), draw.integers(0, 2, (20, 3)), draw.integers(0, 2, (20, 3))], -1)
    flags = draw.integers(0, 2, 20)
    together = price(of, known, levels, flags)
    alone = [price(of, known, *one) for one in zip(levels, flags, strict=True)]
    assert together.seconds == pytest.approx([one.seconds for one in alone])
    assert together.bytes == pytest.approx([one.bytes for one in alone])
