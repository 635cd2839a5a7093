"""The controllers that look at devices: `random`, `capability`, `greedy`."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.control import (
    CapabilityControl,
    Curves,
    GreedyControl,
    Objective,
    RandomControl,
    cost,
    greedy,
    next_loss,
    price,
)
from fedpeat.control.greedy import best
from fedpeat.core import Evaluation, RoundReport
from tests.fedpeat.control.problems import CELL, PAIRS, problem, seen

CURVES = Curves(pace=1.0, ageing=0.3)


def controllers(of):
    return [
        RandomControl(of, 2, 5, seed=3),
        CapabilityControl(of, 2, 5, seed=3),
        GreedyControl(of, Objective(time=0.1), CURVES, 5),
    ]


def report(number, loss):
    return RoundReport(number, {}, (), {"plug_in": Evaluation(loss, 0.5, 10)}, 0, 0, {}, {})


@given(
    st.lists(st.integers(0, 5), min_size=3, max_size=3),
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.integers(0, 2),
    st.integers(1, 50),
)
def test_what_does_not_fit_is_never_chosen(memory, available, which, number):
    of = problem(memory=memory)
    controller = controllers(of)[which]
    plan, _ = controller.choose(None, controller.start(), seen(of, number=number, available=available))
    for device in plan.devices:
        place = of.clients.index(device.client)
        assert available[place]
        assert of.needs_bytes[PAIRS.index((device.emulator, device.rank))] <= memory[place]
        assert device.local_steps in of.menu.steps
    names = [device.client for device in plan.devices]
    assert names == sorted(set(names))


def brute_force(of, objective, known, loss, age):
    """The least cost of a round, one plan after the other."""
    levels = [range(1 + len(of.menu.pairs)), range(len(of.menu.steps)), range(len(of.menu.shares))]
    own = list(itertools.product(*levels))
    least = np.inf
    for flag in range(1 + of.menu.refresh):
        for chosen in itertools.product(own, repeat=len(of.clients)):
            array = np.array(chosen)
            fits = [
                pair == 0 or (known.available[place] and of.fits[place, pair - 1])
                for place, pair in enumerate(array[:, 0])
            ]
            if all(fits):
                after = next_loss(of, CURVES, loss, 0 if flag else age, array)
                least = min(least, float(cost(objective, price(of, known, array, np.array(flag)), loss, after)))
    return least


@pytest.mark.parametrize(
    ("shape", "objective"),
    [
        (
            {"devices": 3, "pairs": PAIRS[:2], "steps": (5,), "memory": [1, 2, 0]},
            Objective(time=0.05, quality_of="change"),
        ),
        ({"devices": 2, "refresh": True}, Objective(time=0.02, bytes=0.01, energy=0.01)),
        ({"devices": 2, "pairs": PAIRS[1:3], "shares": (1.0, 3.0), "radio": CELL}, Objective(time=0.02)),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_the_best_of_all(shape, objective, seed):
    of = problem(seed=seed, **shape)
    known = seen(
        of, seed=seed, holds=np.random.default_rng(seed).random((len(of.clients), len(of.menu.emulators))) < 0.5
    )
    levels, flag = best(of, objective, CURVES, known, (4.0, 3), 5)
    after = next_loss(of, CURVES, 4.0, 0 if flag else 3, levels)
    found = float(cost(objective, price(of, known, levels, np.array(flag)), 4.0, after))
    assert found == pytest.approx(brute_force(of, objective, known, 4.0, 3), rel=1e-12)


def test_one_device_after_the_other_cannot_be_bettered_by_one(monkeypatch):
    of, objective = problem(4, seed=5), Objective(time=0.05)
    known = seen(of, seed=5)
    levels, flag = best(of, objective, CURVES, known, (4.0, 0), 5)

    def worth(levels, flag=flag):
        return float(
            cost(objective, price(of, known, levels, np.array(flag)), 4.0, next_loss(of, CURVES, 4.0, 0, levels))
        )

    least = worth(levels)
    monkeypatch.setattr(greedy, "EXACT_BELOW", 1)
    found, _ = best(of, objective, CURVES, known, (4.0, 0), 5)
    assert worth(found) <= worth(np.zeros((4, 3), int))
    assert worth(found) >= least - 1e-12
    for place in range(4):
        for option in of.menu.options([1, 2, 3, 4]):
            tried = found.copy()
            tried[place] = option
            assert worth(tried) >= worth(found) - 1e-12


@pytest.mark.parametrize("which", range(3))
def test_it_follows_seed_and_round_and_its_state_is_json(which):
    of = problem(refresh=True)

    def play(through_json):
        controller, plans, before = controllers(of)[which], [], None
        state = controller.start()
        for number in range(1, 5):
            plan, state = controller.choose(before, state, seen(of, number=number, seed=number))
            state = json.loads(json.dumps(state)) if through_json else state
            before = report(number, 4.0 - number / 10)
            plans.append(plan)
        return plans, state

    plans, state = play(through_json=True)
    assert (plans, state) == play(through_json=False)
    assert [plan.start_step for plan in plans] == [0, 5, 10, 15]
    assert state["global_step"] == 20
    assert all(plan.total_steps == 15 for plan in plans)


def test_random_choices_differ_from_round_to_round_and_seed_to_seed():
    of = problem(6)

    def drawn(seed):
        controller = RandomControl(of, 3, 5, seed=seed)
        return [controller.choose(None, controller.start(), seen(of, number=number))[0].devices for number in (1, 2)]

    assert drawn(1)[0] != drawn(1)[1]
    assert drawn(1) != drawn(2)
    assert {len(devices) for devices in drawn(1)} == {3}


def test_capability_gives_the_largest_that_fits():
    of = problem(memory=[4, 2, 0])
    plan, _ = CapabilityControl(of, 3, 10, seed=0).choose(None, {"global_step": 0}, seen(of))
    assert [(device.client, device.emulator, device.rank, device.local_steps) for device in plan.devices] == [
        ("client-0", "large", 8, 10),
        ("client-1", "small", 8, 10),
    ]


def test_greedy_believes_what_was_measured():
    of = problem()
    controller = GreedyControl(of, Objective(time=0.0), CURVES, 5)
    _, first = controller.choose(report(0, 9.0), controller.start(), seen(of))
    _, second = controller.choose(None, controller.start(), seen(of))
    assert first["loss"] > second["loss"]
    assert first["age"] == second["age"] == 1
    _, third = controller.choose(report(0, float("nan")), controller.start(), seen(of))
    assert third == second


def test_a_refresh_is_said_only_where_there_is_one():
    of = problem(refresh=True)
    controller = GreedyControl(of, Objective(time=0.0, bytes=0.0), CURVES, 5)
    plan, state = controller.choose(None, {**controller.start(), "age": 4}, seen(of))
    assert plan.refresh is True
    assert state["age"] == 1
    without = problem()
    plan, _ = GreedyControl(without, Objective(), CURVES, 5).choose(
        None, {"global_step": 0, "loss": 4.0, "age": 4}, seen(without)
    )
    assert plan.refresh is None
