import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeat.core import ClientUpdate, ConfigError
from strategies import aggregate, start
from strategies.adaptive import fed_adagrad, fed_adam, fed_avg_m, fed_yogi
from strategies.general import fed_avg
from tests.federations import make_layout, make_situation, make_state, make_updates
from tests.oracles import adaptive as oracle
from tests.oracles import fed_avg as mean_oracle
from tests.oracles.drift import as_arrays

LAYOUT = make_layout(head=True)


def taken(recipe, deltas):
    """The steps of one entry, given its mean deltas."""
    state = start(recipe, {"w": torch.zeros(1)})
    steps = []
    for number, delta in enumerate(deltas, 1):
        update = ClientUpdate("c0", number, {"w": torch.tensor([delta])}, 1.0)
        before = state.tensors["w"]
        state = aggregate(recipe, make_situation(state, make_layout(shapes={}), number), [update]).state
        steps.append(float(state.tensors["w"] - before))
    return steps


def test_momentum_by_hand():
    assert taken(fed_avg_m(momentum_beta=0.5, server_learning_rate=1.0), [2.0, 2.0, -1.0]) == [2.0, 3.0, 0.5]
    assert taken(fed_avg_m(momentum_beta=0.5, server_learning_rate=0.5), [2.0, 2.0]) == [1.0, 1.5]
    assert taken(fed_avg_m(momentum_beta=0.5, server_learning_rate=2.0, nesterov=True), [2.0, 2.0, -1.0]) == [
        6.0,
        7.0,
        -1.5,
    ]


def test_adagrad_by_hand():
    recipe = fed_adagrad(server_learning_rate=1.0, tau=3.0)  # v: 9, 9 + 16, 25 + 144
    assert taken(recipe, [4.0, 12.0]) == [0.5, 0.75]
    recipe = fed_adagrad(server_learning_rate=1.0, tau=3.0, beta1=0.5)
    assert taken(recipe, [4.0, 12.0]) == [2 / 8, 7 / 16]


def test_adam_by_hand_without_bias_correction():
    recipe = fed_adam(server_learning_rate=1.0, beta1=0.5, beta2=0.5, tau=1.0)  # v: 1, (1 + 49) / 2, (25 + 25) / 2
    assert taken(recipe, [7.0, 5.0]) == pytest.approx([3.5 / 6, 4.25 / 6], rel=1e-6)


def test_yogi_by_hand_rises_rests_and_falls():
    recipe = fed_yogi(server_learning_rate=1.0, beta1=0.5, beta2=0.5, tau=1.0)  # v: 1, 1 + 8, 9, 9 - 1/2
    expected = [2 / 4, 2.5 / 4, 1.75 / (math.sqrt(8.5) + 1)]
    assert taken(recipe, [4.0, 3.0, 1.0]) == pytest.approx(expected, rel=1e-6)


def test_after_a_burst_yogi_holds_back_for_longer_than_adam():
    quiet = [1.0, *[0.01] * 60]
    rates = {"beta1": 0.0, "beta2": 0.9}
    assert taken(fed_yogi(**rates), quiet)[-1] < taken(fed_adam(**rates), quiet)[-1] / 2


BUILDERS = {"adagrad": fed_adagrad, "adam": fed_adam, "yogi": fed_yogi}


@settings(max_examples=15)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["adagrad", "adam", "yogi"]),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.sampled_from([0.0, 0.9, 0.99]),
    st.sampled_from([1e-12, 1e-3, 1.0]),
)
def test_three_rounds_are_the_twins(seed, kind, beta1, beta2, tau):
    second = {} if kind == "adagrad" else {"beta2": beta2}
    recipe = BUILDERS[kind](server_learning_rate=0.1, beta1=beta1, tau=tau, **second)
    rule = partial(oracle.adaptive, kind, rate=0.1, beta1=beta1, beta2=beta2, tau=tau)
    compare(recipe, rule, seed)


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 0.9]), st.booleans())
def test_three_rounds_of_momentum_are_the_twins(seed, beta, nesterov):
    recipe = fed_avg_m(server_learning_rate=0.5, momentum_beta=beta, nesterov=nesterov)
    compare(recipe, partial(oracle.momentum, rate=0.5, beta=beta, nesterov=nesterov), seed)


def compare(recipe, rule, seed):
    state = start(recipe, make_state(LAYOUT, seed).tensors)
    twin, means = as_arrays(state.tensors), []
    for number in (1, 2, 3):
        updates = make_updates(state, 3, seed=seed + number, weights=[1, 4, 2])
        state = aggregate(recipe, make_situation(state, LAYOUT, number), updates).state
        means.append(mean_oracle.weighted_average([as_arrays(update.delta) for update in updates], [1, 4, 2]))
    for step in oracle.over_tensors(rule, means):
        twin = {name: value + step[name] for name, value in twin.items()}
    for name, value in twin.items():
        np.testing.assert_allclose(state.tensors[name].numpy(), value, atol=3e-6)


@settings(max_examples=50)
# Subnormal deltas may be flushed to 0 by torch, and then have no sign.
@given(st.lists(st.floats(-(2.0**50), 2.0**50, width=32, allow_subnormal=False), min_size=1, max_size=6))
def test_adagrads_steps_go_with_the_delta_and_stay_below_the_rate(deltas):
    for delta, step in zip(deltas, steps_alone(fed_adagrad(server_learning_rate=0.5), deltas), strict=True):
        assert abs(step) <= 0.5
        assert step == 0 or (step > 0) == (delta > 0)
        assert step != 0 or abs(delta) < 1e-20


def steps_alone(recipe, deltas):
    state, steps = recipe.server.start({"w": torch.zeros(1)}), []
    for delta in deltas:
        step, state = recipe.server.update({"w": torch.tensor([delta])}, state)
        steps.append(float(step["w"]))
    return steps


@settings(max_examples=50)
@given(
    st.sampled_from([fed_adam, fed_yogi]),
    st.lists(st.floats(-(2.0**50), 2.0**50, width=32, allow_subnormal=False), min_size=1, max_size=6),
)
def test_steps_stay_below_two_and_a_half_rates(build, deltas):
    """By Cauchy and Schwarz, `m^2 <= v * sum_i (0.81 / 0.98)^i` with the default betas."""
    assert all(abs(step) <= 2.5 for step in steps_alone(build(server_learning_rate=1.0), deltas))


def test_without_momentum_it_is_averaging_to_the_bit():
    state = make_state(LAYOUT)
    situation, updates = make_situation(start(fed_avg_m(), state.tensors), LAYOUT), make_updates(state, 4)
    recipes = (fed_avg_m(momentum_beta=0.0, server_learning_rate=1.0), fed_avg())
    still, plain = (aggregate(recipe, situation, updates).state.tensors for recipe in recipes)
    assert all(torch.equal(still[name], plain[name]) for name in plain)


@pytest.mark.parametrize("build", [fed_avg_m, fed_adagrad, fed_adam, fed_yogi])
def test_rounds_of_zero_deltas_move_nothing_at_first(build):
    assert taken(build(), [0.0, 0.0]) == [0.0, 0.0]


@pytest.mark.parametrize("build", [fed_avg_m, fed_adagrad, fed_adam, fed_yogi])
def test_what_a_round_does_not_send_keeps_its_value_and_state(build):
    recipe = build()
    before = start(recipe, {"v": torch.ones(1), "w": torch.ones(1)})
    update = ClientUpdate("c0", 1, {"w": torch.ones(1)}, 1.0)
    after = aggregate(recipe, make_situation(before, make_layout(shapes={})), [update]).state
    assert after.tensors["v"] == 1
    assert after.tensors["w"] > 1
    assert set(after.memory) == set(before.memory)
    assert all(torch.equal(after.memory[key], before.memory[key]) for key in before.memory if key.endswith("/v"))


def test_the_second_moment_starts_at_tau_squared():
    memory = start(fed_yogi(tau=0.25), {"w": torch.ones(2)}).memory
    assert memory["server|0/second/w"].tolist() == [0.0625, 0.0625]
    assert memory["server|0/momentum/w"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("build", "key", "value"),
    [
        (fed_avg_m, "momentum_beta", 1.0),
        (fed_avg_m, "server_learning_rate", -1.0),
        (fed_adagrad, "tau", 0.0),
        (fed_adagrad, "beta1", -0.1),
        (fed_adam, "beta1", 1.0),
        (fed_adam, "beta2", 1.0),
        (fed_yogi, "beta2", float("nan")),
        (fed_yogi, "server_learning_rate", -0.1),
    ],
)
def test_keywords_out_of_range_are_told(build, key, value):
    with pytest.raises(ConfigError, match=f"strategy.{key}="):
        build(**{key: value})
