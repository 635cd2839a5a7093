import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.core import ClientUpdate, DevicePlan, UpdateRefused
from strategies.limits import Limits

DEVICES = (DevicePlan("ann", 5), DevicePlan("bob", 5), DevicePlan("eve", 10))
ROWS = {"ann": 10, "bob": 20, "eve": 70}


def update(weight=1.0, size=1.0, **more):
    return ClientUpdate("ann", 3, {"w": torch.tensor([size, 0.0])}, weight, **more)


def applied(limits, made, weight_by="rows"):
    return limits.applied(made, DEVICES[0], DEVICES, weight_by)


def test_without_bounds_anything_passes_untouched():
    made = update(weight=1e9, size=1e30)
    assert applied(Limits(update_norm=None), made) == (made, False)


@pytest.mark.parametrize("made", [update(size=1.001e6), update(extras={"w": torch.tensor([-2e6])})])
def test_absurd_norms_are_refused_by_default(made):
    with pytest.raises(UpdateRefused, match=r"norm of at most round.max_update_norm=1e\+06; it has"):
        applied(Limits(), made)


@pytest.mark.parametrize(
    ("weight_by", "most", "why"),
    [("rows", 10, "as it declared"), ("tokens", 5 * 512, "5 steps of 512 tokens"), ("equal", 1, "weigh alike")],
)
def test_nobody_weighs_more_than_it_declared(weight_by, most, why):
    limits = Limits(rows=ROWS, tokens_a_step=512)
    assert applied(limits, update(weight=most), weight_by)[0].weight == most
    with pytest.raises(UpdateRefused, match=rf"'ann' in round 3 may weigh {most} {weight_by}.*{why}"):
        applied(limits, update(weight=most * 1.001), weight_by)


def test_what_was_not_declared_is_not_bounded():
    limits = Limits(rows={"bob": 1})
    for weight_by in ("rows", "tokens", "something else"):
        assert applied(limits, update(weight=1e6), weight_by)[1] is False


def test_a_share_is_of_what_all_could_weigh():
    limits = Limits(rows={**ROWS, "ann": 70, "eve": 10}, weight_share=0.5)
    found, cut = applied(limits, update(weight=70))
    assert (found.weight, cut) == (50.0, True)
    assert torch.equal(found.delta["w"], update().delta["w"])
    assert applied(limits, update(weight=50))[1] is False
    unknown = Limits(rows={"ann": 70}, weight_share=0.5)
    assert applied(unknown, update(weight=70))[1] is False


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=8), st.floats(0.01, 1.0))
def test_no_client_gets_more_than_its_share(rows, share):
    devices = tuple(DevicePlan(str(number), 1) for number in range(len(rows)))
    limits = Limits(rows={str(number): count for number, count in enumerate(rows)}, weight_share=share)
    for device, count in zip(devices, rows, strict=True):
        made = ClientUpdate(device.client, 1, {"w": torch.ones(1)}, float(count))
        found, cut = limits.applied(made, device, devices, "rows")
        assert found.weight <= share * sum(rows)
        assert found.weight == min(count, share * sum(rows))
        assert cut == (found.weight < count)
