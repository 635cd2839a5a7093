"""What every mean-like reducer keeps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeat.core import ClientUpdate, EngineError
from strategies import aggregate, chain, fed_avg, scale, weighted_mean
from tests.oracles import fed_avg as oracle

SHAPES = {"a": (3, 4), "b": (5,)}


def updates(seed, count, weights=None):
    generator = torch.Generator().manual_seed(seed)
    return [
        ClientUpdate(
            f"c{i}",
            1,
            {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()},
            weights[i] if weights else 1.0,
            {},
        )
        for i in range(count)
    ]


def reduce(reducer, items):
    folded = reducer.start()
    for item in items:
        folded = reducer.add(folded, item)
    return reducer.finish(folded)


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left) and set(left) == set(right)


@given(st.integers(0, 10**6), st.lists(st.integers(1, 5000), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_it_equals_the_slow_twin(seed, weights):
    items = updates(seed, len(weights), [float(weight) for weight in weights])
    got = reduce(weighted_mean(), items)
    want = oracle.weighted_average([{k: v.numpy() for k, v in item.delta.items()} for item in items], weights)
    for name in SHAPES:
        np.testing.assert_allclose(got[name].numpy(), want[name], rtol=0, atol=1e-7)


@given(st.integers(0, 10**6), st.floats(0.01, 1e6))
@settings(max_examples=60, deadline=None)
def test_one_client_gets_its_own_delta(seed, weight):
    (item,) = updates(seed, 1, [weight])
    got = reduce(weighted_mean(), [item])
    for name in SHAPES:
        torch.testing.assert_close(got[name], item.delta[name], rtol=1e-7, atol=0)
    (item,) = updates(seed, 1, [float(round(weight) + 1)])
    assert same(reduce(weighted_mean(), [item]), item.delta)


@given(st.integers(0, 10**6), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_equal_deltas_give_that_delta_and_weights_are_scale_free(seed, count):
    (item,) = updates(seed, 1)
    copies = [ClientUpdate(f"c{i}", 1, item.delta, 3.0, {}) for i in range(count)]
    assert same(reduce(weighted_mean(), copies), item.delta)
    items = updates(seed, count, [float(i + 1) for i in range(count)])
    doubled = [ClientUpdate(i.client, 1, i.delta, i.weight * 2, {}) for i in items]
    assert same(reduce(weighted_mean(), items), reduce(weighted_mean(), doubled))


def test_input_is_untouched_and_weights_of_zero_are_told():
    items = updates(1, 3)
    before = [{name: tensor.clone() for name, tensor in item.delta.items()} for item in items]
    reduce(weighted_mean(), items)
    assert all(same(item.delta, copy) for item, copy in zip(items, before, strict=True))
    with pytest.raises(EngineError, match="weights sum to 0"):
        reduce(weighted_mean(), updates(1, 2, [0.0, 0.0]))


def test_aggregate_applies_the_server_step_and_counts_replies():
    start = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    items = updates(3, 2, [1.0, 3.0])
    whole = aggregate(fed_avg(), start, {}, items)
    half = aggregate(fed_avg(server_learning_rate=0.5), start, {}, items)
    for name in SHAPES:
        torch.testing.assert_close(half.tensors[name], whole.tensors[name] / 2)
    assert set(whole.clients) == {"c0", "c1"}
    assert whole.clients["c1"]["bytes_up"] == (12 + 5) * 4
    with pytest.raises(EngineError, match="min_replies=3"):
        aggregate(fed_avg(), start, {}, items, min_replies=3)
    with pytest.raises(EngineError):
        aggregate(fed_avg(), start, {}, [])


def test_chain_of_nothing_is_identity_and_state_is_kept_by_step():
    delta = {"w": torch.ones(2)}
    assert same(chain().update(delta, {})[0], delta)
    assert same(chain(scale(2.0), scale(3.0)).update(delta, {})[0], {"w": torch.full((2,), 6.0)})
