import time
from dataclasses import replace

import pytest

from fedpeat.core import ConfigError, DevicePlan, RoundPlan
from fedpeat.devices import Fleet, Moment, Profile, Radio, Traffic, Work

SLOW = Profile("slow", 1e9, 100, downlink_mbit=8, uplink_mbit=1, compute_watt=3, transmit_watt=2, receive_watt=1)
FAST = replace(SLOW, name="fast", flops=1e10, uplink_mbit=8, memory_mib=1000)
FLEET = Fleet({"ann": SLOW, "bob": FAST, "eve": FAST}, {"default": Work(1e9, 200 * 2**20)}, seed=0)
TRAFFIC = [Traffic(1_000_000, 1_000_000, 2_000_000), Traffic(1_000_000, 1_000_000), Traffic(1_000_000, 2_000_000)]
"""ann: 3 s down, 2 s of training, 8 s up; bob: 1 + 0.2 + 1; eve: 1 + 0.2 + 2."""


def plan_of(*names, number=1, steps=2):
    return RoundPlan(number, 0, 9, tuple(DevicePlan(name, steps) for name in names))


PLAN = plan_of("ann", "bob", "eve")


def test_a_round_by_hand():
    played = FLEET.play(PLAN, TRAFFIC)
    assert played.plan == PLAN
    assert played.failures == ()
    assert played.seconds == 13
    ann = played.facts["ann"]
    assert [ann[f"modelled_{part}seconds"] for part in ("down_", "compute_", "up_", "")] == [3, 2, 8, 13]
    assert ann["joules"] == 3 * 1 + 2 * 3 + 8 * 2
    assert (ann["modelled_memory_mib"], ann["memory_limit_mib"], ann["profile"]) == (200, 100, "slow")
    assert (ann["downlink_mbit"], ann["uplink_mbit"], ann["holds"], ann["status"]) == (8, 1, True, "counted")
    assert played.facts["eve"]["modelled_seconds"] == pytest.approx(3.2)


def test_a_deadline_ends_the_round():
    played = replace(FLEET, deadline_seconds=4.0).play(PLAN, TRAFFIC)
    assert [device.client for device in played.plan.devices] == ["bob", "eve"]
    assert [(failure.client, failure.kind) for failure in played.failures] == [("ann", "late")]
    assert played.seconds == 4
    assert played.facts["ann"]["joules"] == 3 * 1 + 1 * 3
    assert played.facts["ann"]["holds"]
    assert not replace(FLEET, deadline_seconds=2.9).play(PLAN, TRAFFIC).facts["ann"]["holds"]
    assert replace(FLEET, deadline_seconds=13.0).play(PLAN, TRAFFIC).failures == ()


def test_enough_are_waited_for():
    played = FLEET.play(PLAN, TRAFFIC, enough=2)
    assert [(failure.client, failure.kind) for failure in played.failures] == [("ann", "surplus")]
    assert played.seconds == pytest.approx(3.2)
    assert FLEET.play(PLAN, TRAFFIC, enough=3).failures == ()


def test_who_drops_out_ends_then():
    played = replace(FLEET, dropout=1.0).play(PLAN, TRAFFIC)
    assert [failure.kind for failure in played.failures] == ["dropped"] * 3
    assert played.plan.devices == ()
    assert 0 < played.seconds < 13
    # Gone after the deadline, a device is late like others.
    tight = replace(FLEET, dropout=1.0, deadline_seconds=1e-9).play(PLAN, TRAFFIC)
    assert [failure.kind for failure in tight.failures] == ["late"] * 3


def test_memory_counts_where_it_is_enforced():
    played = replace(FLEET, enforce_memory=True).play(PLAN, TRAFFIC)
    assert [(failure.client, failure.kind) for failure in played.failures] == [("ann", "memory")]
    assert "takes 200 MiB, its device has 100" in played.failures[0].reason
    assert played.seconds == pytest.approx(3.2)
    assert played.facts["ann"]["joules"] == 3


def test_nobody_asked_lasts_to_the_deadline():
    assert FLEET.play(plan_of(), []).seconds == 0
    assert replace(FLEET, deadline_seconds=60.0).play(plan_of(), []).seconds == 60


def test_a_trace_goes_first():
    trace = {(1, "ann"): Moment(False), (1, "bob"): Moment(True, 1.0, 0.5), (2, "eve"): Moment(True)}
    fleet = replace(FLEET, trace=trace, availability=0.0)
    assert fleet.available(["ann", "bob", "eve"], 1) == ["bob"]
    assert fleet.available(["ann", "bob", "eve"], 2) == ["eve"]
    down, up = fleet.rates(["eve", "bob"], 1)
    assert down.tolist() == [8e6, 1e6]
    assert up.tolist() == [8e6, 0.5e6]
    with pytest.raises(ConfigError, match=r"devices\.trace names client 'anne'; no such client; did you mean 'ann'"):
        replace(FLEET, trace={(1, "anne"): Moment(True)})


def test_a_round_does_not_depend_on_the_order_or_on_other_rounds():
    fleet = replace(FLEET, radio=Radio(), availability=0.5, dropout=0.5)
    one = fleet.play(PLAN, TRAFFIC)
    fleet.play(plan_of("ann", "bob", "eve", number=2), TRAFFIC)
    assert fleet.play(PLAN, TRAFFIC) == one
    back = fleet.play(plan_of("eve", "bob", "ann"), TRAFFIC[::-1])
    assert back.facts == one.facts
    assert back.seconds == one.seconds


@pytest.mark.parametrize(
    "harmful",
    [
        {"availability": 0.9},
        {"dropout": 0.1},
        {"deadline_seconds": 1.0},
        {"enforce_memory": True},
        {"trace": {(1, "ann"): Moment(True)}},
    ],
)
def test_it_knows_whether_anyone_may_be_missing(harmful):
    assert not FLEET.leaves_out
    assert replace(FLEET, **harmful).leaves_out


@pytest.mark.parametrize("wrong", [{"availability": 1.1}, {"dropout": -0.1}, {"deadline_seconds": 0}])
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"devices\."):
        replace(FLEET, **wrong)


def test_a_plan_of_a_hundred_devices_is_cheap():
    """No bound on time in a test that may run anywhere: it only shows the number, with -s."""
    names = [f"client {number}" for number in range(100)]
    fleet = Fleet(dict.fromkeys(names, SLOW), {"default": Work(1e9, 1)}, seed=0)
    plan, traffic = plan_of(*names), [Traffic(10, 10)] * 100
    began = time.perf_counter()
    costs, _ = fleet.costs(plan, traffic)
    print(f"{1000 * (time.perf_counter() - began):.2f} ms")
    assert costs.total_seconds.shape == (100,)
