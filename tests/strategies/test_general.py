import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeat.core import ClientUpdate, ConfigError, EngineError, GlobalState
from strategies import aggregate
from strategies.general import fed_avg, fed_prox, q_fed_avg
from tests.federations import make_layout, make_situation, make_state, make_updates
from tests.oracles import fed_avg as mean_oracle
from tests.oracles import general as oracle
from tests.oracles.drift import as_arrays

LAYOUT = make_layout(head=True)


def scored(updates, losses):
    pairs = zip(updates, losses, strict=True)
    return [dataclasses.replace(update, metrics={"start_loss": loss}) for update, loss in pairs]


def one(delta, loss=None, client="c00", weight=1.0):
    metrics = {} if loss is None else {"start_loss": loss}
    return ClientUpdate(client, 1, {"w": torch.tensor(delta)}, weight, metrics)


def step(recipe, updates, start=(0.0,)):
    state = GlobalState({"w": torch.tensor(start)})
    return aggregate(recipe, make_situation(state, make_layout(shapes={})), updates).state.tensors["w"].tolist()


@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_averaging_three_times_is_the_twins_three_averages(rate):
    recipe, state = fed_avg(server_learning_rate=rate), make_state(LAYOUT)
    twin = as_arrays(state.tensors)
    for number in (1, 2, 3):
        updates = make_updates(state, 4, seed=number, weights=[3, 1, 2, 7])
        state = aggregate(recipe, make_situation(state, LAYOUT, number), updates).state
        mean = mean_oracle.weighted_average([as_arrays(update.delta) for update in updates], [3, 1, 2, 7])
        twin = {name: value + rate * mean[name] for name, value in twin.items()}
    for name, value in twin.items():
        np.testing.assert_allclose(state.tensors[name].numpy(), value, atol=2e-6)


def test_the_proximal_pull_is_the_clients_and_the_mean_is_plain():
    updates = make_updates(make_state(LAYOUT), 3)
    situation = make_situation(make_state(LAYOUT), LAYOUT)
    prox, plain = (aggregate(recipe, situation, updates).state.tensors for recipe in (fed_prox(), fed_avg()))
    assert all(torch.equal(prox[name], plain[name]) for name in plain)
    assert fed_prox(proximal_mu=0.5).client(7) == {"proximal_mu": 0.5}
    with pytest.raises(ConfigError, match="proximal_mu=-1"):
        fed_prox(proximal_mu=-1)


def test_an_unknown_weighting_is_told():
    with pytest.raises(ConfigError, match="did you mean 'tokens'"):
        fed_avg(weight_by="token")


@settings(max_examples=30)
@given(
    st.integers(0, 10**6),
    st.lists(st.floats(1e-3, 20), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.3, 1.0, 2.0, 5.0]),
    st.floats(1e-3, 1e3),
)
def test_fair_averaging_equals_its_twin_in_three_rounds(seed, losses, q, lipschitz):
    state = make_state(LAYOUT, seed)
    twin = as_arrays(state.tensors)
    for number in (1, 2, 3):
        updates = scored(make_updates(state, len(losses), seed=seed + number), losses)
        state = aggregate(q_fed_avg(q=q, lipschitz=lipschitz), make_situation(state, LAYOUT, number), updates).state
        deltas = [as_arrays(update.delta) for update in updates]
        locals_ = [{name: value + delta[name] for name, value in twin.items()} for delta in deltas]
        twin = oracle.q_fed_avg(twin, locals_, losses, q, lipschitz)
    for name, value in twin.items():
        np.testing.assert_allclose(state.tensors[name].numpy(), value, atol=3e-6)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=6))
def test_with_q_of_0_it_is_the_plain_mean_to_the_bit(seed, losses):
    state = make_state(LAYOUT, seed)
    updates = scored(make_updates(state, len(losses), seed=seed), losses)
    situation = make_situation(state, LAYOUT)
    fair = aggregate(q_fed_avg(q=0.0, lipschitz=37.0), situation, updates).state.tensors
    plain = aggregate(fed_avg(weight_by="equal"), situation, updates).state.tensors
    assert all(torch.equal(fair[name], plain[name]) for name in plain)


def test_numbers_by_hand():
    # F L d = 4 * 1 * 2; h = 1 * 4^0 * 2^2 + 1 * 4.
    assert step(q_fed_avg(q=1.0, lipschitz=1.0), [one([2.0], 4.0)]) == [1.0]
    # Losses 1 and 3 with deltas -1 and 1: numerator 3 - 1; h = (1 + 1) + (1 + 3).
    assert step(q_fed_avg(q=1.0, lipschitz=1.0), [one([-1.0], 1.0), one([1.0], 3.0)]) == pytest.approx([1 / 3])


def test_the_worse_off_count_for_more_the_larger_q():
    updates = [one([-1.0], 1.0), one([1.0], 3.0)]
    shares = [step(q_fed_avg(q=q, lipschitz=1e-6), updates)[0] for q in (0.0, 1.0, 2.0, 5.0)]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[1] == pytest.approx(0.5, abs=1e-5)
    assert shares[-1] > 0.9


def test_a_larger_lipschitz_constant_takes_smaller_steps():
    steps = [step(q_fed_avg(lipschitz=constant), [one([2.0], 4.0)])[0] for constant in (1e-9, 1.0, 100.0)]
    assert steps == pytest.approx([2.0, 1.0, 2 / 101], rel=1e-6)


def test_a_loss_of_0_is_no_division_by_0():
    for q in (0.5, 1.0, 3.0):
        assert step(q_fed_avg(q=q), [one([0.0], 0.0), one([0.0], 0.0)]) == [0.0]
        assert abs(step(q_fed_avg(q=q), [one([1.0], 0.0), one([1.0], 0.0)])[0]) <= 1


@pytest.mark.parametrize("loss", [None, -0.1, float("nan"), float("inf")])
def test_a_missing_or_impossible_loss_is_told(loss):
    with pytest.raises(EngineError, match="start_loss of 'c01'"):
        step(q_fed_avg(), [one([1.0], 2.0), one([1.0], loss, client="c01")])


def test_weights_of_0_are_told_and_others_multiply():
    with pytest.raises(EngineError, match="weights sum to 0"):
        step(q_fed_avg(), [one([1.0], 2.0, weight=0.0)])
    twice = step(q_fed_avg(), [one([1.0], 2.0, weight=2.0), one([3.0], 1.0)])
    assert twice == pytest.approx(step(q_fed_avg(), [one([1.0], 2.0), one([1.0], 2.0), one([3.0], 1.0)]))


def test_clients_are_asked_to_score_rows_first():
    assert q_fed_avg(probe_rows=8).client(1) == {"probe_rows": 8}


@pytest.mark.parametrize(("key", "value"), [("q", -1.0), ("q", 21.0), ("lipschitz", 0.0), ("probe_rows", 0)])
def test_keywords_out_of_range_are_told(key, value):
    with pytest.raises(ConfigError, match=f"strategy.{key}="):
        q_fed_avg(**{key: value})
