"""What the parts that rules are made of keep: sums, shares, and one round's way from updates to the next state."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeat.core import ClientUpdate, EngineError, GlobalState
from strategies import Recipe, Reducer, Step, WeightedSum, aggregate, chain, gathering, scale, start, weighted_mean
from strategies.aggregate import seen_by_recipe
from strategies.general import fed_avg
from strategies.reducers import local_tensors, shares
from strategies.server_steps import momentum
from tests.federations import make_layout, make_situation, make_state, make_updates
from tests.oracles import fed_avg as oracle

LAYOUT = make_layout(head=True)
STATE = make_state(LAYOUT)
SITUATION = make_situation(STATE, LAYOUT)


def reduce(reducer, updates):
    folded = reducer.start(SITUATION)
    for update in updates:
        folded = reducer.add(folded, update)
    return reducer.finish(folded)


def same(left, right):
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


@given(st.integers(0, 10**6), st.lists(st.integers(1, 5000), min_size=1, max_size=6))
@settings(max_examples=40)
def test_the_weighted_mean_equals_its_slow_twin(seed, weights):
    updates = make_updates(STATE, len(weights), seed, weights)
    got = reduce(weighted_mean(), updates).tensors
    want = oracle.weighted_average([{k: v.numpy() for k, v in update.delta.items()} for update in updates], weights)
    for name, value in want.items():
        np.testing.assert_allclose(got[name].numpy(), value, rtol=0, atol=1e-7)


@given(st.integers(0, 10**6), st.integers(1, 2**20), st.integers(1, 6))
@settings(max_examples=40)
def test_clients_that_agree_get_their_delta_to_the_bit(seed, weight, count):
    (update,) = make_updates(STATE, 1, seed, [weight])
    copies = [dataclasses.replace(update, client=f"c{index}") for index in range(count)]
    assert same(reduce(weighted_mean(), copies).tensors, update.delta)


# Torch may flush subnormals to 0, and the same sum over twice the weights would lose other ones.
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=5))
@settings(max_examples=60)
def test_the_mean_of_any_numbers_lies_between_them(values):
    total = WeightedSum()
    for index, value in enumerate(values, 1):
        total.add({"w": torch.tensor([value])}, index)
    mean = total.mean()["w"].item()
    slack = 1e-6 * max(map(abs, values)) + 1e-37
    assert min(values) - slack <= mean <= max(values) + slack


def test_a_name_that_only_some_hold_counts_as_zeros_of_the_others():
    total = WeightedSum()
    total.add({"v": torch.ones(1), "w": torch.ones(1)}, 1)
    total.add({"w": torch.ones(1)}, 3)
    assert {name: value.item() for name, value in total.mean().items()} == {"v": 0.25, "w": 1.0}


def test_weights_of_zero_are_told():
    for weigh in (WeightedSum().mean, lambda: shares([]), lambda: shares(make_updates(STATE, 2, weights=[0.0, 0.0]))):
        with pytest.raises(EngineError, match="weights sum to 0"):
            weigh()
    assert shares(make_updates(STATE, 2, weights=[1, 3])) == [0.25, 0.75]


def test_gathering_hands_over_all_in_order():
    seen = []
    updates = make_updates(STATE, 3)
    reduce(gathering(lambda situation, gathered: seen.append((situation, gathered)) or Step({})), updates)
    assert seen == [(SITUATION, tuple(updates))]


def test_local_tensors_are_cut_to_the_clients_rank():
    (update,) = make_updates(STATE, 1, ranks=[2], layout=LAYOUT, parts=("A",))
    pair = LAYOUT.pairs[0]
    local = local_tensors(STATE, update)
    assert torch.equal(local[pair.a], STATE.tensors[pair.a][:2] + update.delta[pair.a])
    assert torch.equal(local_tensors(STATE, update, [pair.b])[pair.b], STATE.tensors[pair.b])


def test_steps_in_a_chain_follow_each_other_and_keep_state_apart():
    delta = {"w": torch.ones(2)}
    assert same(chain().update(delta, {})[0], delta)
    both = chain(scale(2.0), momentum(beta=0.5), scale(3.0), momentum(beta=0.5))
    state = both.start(delta)
    assert set(state) == {"1/momentum/w", "3/momentum/w"}
    for expected in (6.0, 12.0):  # 6, then 3 * (2 + 1) + 6 / 2
        taken, state = both.update(delta, state)
        assert same(taken, {"w": torch.full((2,), expected)})


def rule(step):
    """A recipe that takes `step` whatever comes."""
    return Recipe("rule", Reducer(lambda _: None, lambda folded, _: folded, lambda _: step))


def test_a_round_adds_the_step_and_tells_of_each_client():
    updates = make_updates(STATE, 2, weights=[1, 3])
    updates[0] = dataclasses.replace(updates[0], payload_bytes=7)
    whole = aggregate(fed_avg(), SITUATION, updates)
    half = aggregate(fed_avg(server_learning_rate=0.5), SITUATION, updates)
    for name, before in STATE.tensors.items():
        torch.testing.assert_close(half.state.tensors[name] - before, (whole.state.tensors[name] - before) / 2)
    assert set(whole.clients) == {"c00", "c01"}
    assert whole.clients["c00"]["bytes_up"] == 7
    assert whole.clients["c01"]["bytes_up"] == 4 * sum(delta.numel() for delta in updates[1].delta.values())
    assert half.update_norm == pytest.approx(whole.update_norm / 2)


def test_too_few_replies_are_told():
    for count, least in ((2, 3), (0, 1)):
        with pytest.raises(EngineError, match=f"min_replies={least}"):
            aggregate(fed_avg(), SITUATION, make_updates(STATE, count), min_replies=least)


def test_names_and_layers_that_a_step_leaves_out_stay():
    state = GlobalState({"v": torch.ones(1), "w": torch.ones(1)}, {"m": torch.ones(2, 2)})
    step = Step({"w": torch.ones(1)}, {"n": torch.ones(1, 1)})
    after = aggregate(rule(step), make_situation(state, LAYOUT), [update_of()]).state
    assert {name: value.item() for name, value in after.tensors.items()} == {"v": 1.0, "w": 2.0}
    assert {name: value.tolist() for name, value in after.folds.items()} == {"m": [[1.0, 1.0]] * 2, "n": [[1.0]]}
    again = aggregate(rule(step), make_situation(after, LAYOUT), [update_of()]).state
    assert again.folds["n"].tolist() == [[2.0]]


def update_of():
    return ClientUpdate("c0", 1, {"w": torch.ones(1)}, 1.0)


def test_a_reducer_sees_its_own_memory_and_replaces_the_whole_of_it():
    recipe = dataclasses.replace(rule(Step({"w": torch.ones(1)}, memory={"new": torch.ones(1)})), server=momentum())
    state = start(recipe, {"w": torch.zeros(1)})
    state = dataclasses.replace(state, memory={**state.memory, "reducer|old": torch.ones(1)})
    situation = make_situation(state, LAYOUT)
    assert set(seen_by_recipe(situation).state.memory) == {"old"}
    after = aggregate(recipe, situation, [update_of()]).state
    assert set(after.memory) == {"reducer|new", "server|momentum/w"}


@pytest.mark.parametrize("step", [Step({"w": torch.tensor([torch.inf])}), Step({}, {"m": torch.tensor([[torch.nan]])})])
def test_a_state_that_would_not_be_finite_is_told(step):
    with pytest.raises(EngineError, match="must be finite; strategy=rule"):
        aggregate(rule(step), make_situation(GlobalState({"w": torch.zeros(1)}), LAYOUT), [update_of()])
