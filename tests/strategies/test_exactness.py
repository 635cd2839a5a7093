from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeat.core import EngineError, GlobalState
from strategies import aggregate
from strategies.exactness import MeanProduct, mean_change
from strategies.folding import fed_ex_lora
from strategies.general import fed_avg
from tests import federations
from tests.oracles import folding as twin


def numbers(tensors):
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def layers_of(layout):
    return [(pair.module, pair.a, pair.b, pair.scaling) for pair in layout.pairs]


def clients_of(state, layout, updates):
    """What clients ended with: a factor that was not sent is the global one at the rank of the other."""
    clients = []
    for update in updates:
        own = {}
        for pair in layout.pairs:
            a, b = update.delta.get(pair.a), update.delta.get(pair.b)
            rank = layout.rank if a is None and b is None else (len(a) if a is not None else b.shape[1])
            own[pair.a] = state.tensors[pair.a][:rank].double().numpy() + (0 if a is None else a.double().numpy())
            own[pair.b] = state.tensors[pair.b][:, :rank].double().numpy() + (0 if b is None else b.double().numpy())
        clients.append((update.weight, own))
    return clients


def error_of(situation, updates, after, **options):
    change = mean_change(situation, **options)
    for update in updates:
        change.add(update)
    return change.error(after)


@settings(max_examples=40)
@given(
    weights=st.lists(st.integers(1, 10**6), min_size=1, max_size=4),
    parts=st.sampled_from(["A", "B", "AB"]),
    ranks=st.lists(st.integers(1, 3), min_size=4, max_size=4),
    seed=st.integers(0, 10**6),
)
def test_the_mean_product_is_the_twins(weights, parts, ranks, seed):
    layout = federations.make_layout(rank=3)
    state = federations.make_state(layout, seed=seed)
    updates = federations.make_updates(
        state, len(weights), seed=seed + 1, weights=weights, ranks=ranks, layout=layout, parts=parts
    )
    products = MeanProduct(state, layout.pairs)
    for update in updates:
        products.add(update)
    mean, clients = products.mean(), clients_of(state, layout, updates)
    for layer in layers_of(layout):
        np.testing.assert_allclose(layer[3] * mean[layer[0]].numpy(), twin.mean_product(clients, layer), atol=1e-10)


@pytest.mark.parametrize("ranks", [None, [1, 3, 2]])
def test_the_error_is_the_twins_wherever_the_state_went(ranks):
    layout = federations.make_layout(rank=3, head=True)
    state = replace(federations.make_state(layout), folds={"m.0": torch.randn(6, 5)})
    updates = federations.make_updates(state, 3, weights=[1, 2, 5], ranks=ranks, layout=layout)
    moved = federations.make_state(layout, seed=9).tensors
    after = GlobalState(moved, {"m.0": torch.randn(6, 5), "m.1": torch.randn(4, 7)})
    error = error_of(federations.make_situation(state, layout), updates, after)
    wanted = twin.relative_error(
        (numbers(state.tensors), numbers(state.folds)),
        (numbers(after.tensors), numbers(after.folds)),
        clients_of(state, layout, updates),
        layers_of(layout),
    )
    assert error == pytest.approx(wanted, rel=1e-9)


def test_by_hand():
    layout = federations.make_layout(rank=1, shapes={"m": (1, 1)}, scaling=2.0)
    pair = layout.pairs[0]
    state = GlobalState({pair.a: torch.tensor([[1.0]]), pair.b: torch.tensor([[1.0]])})
    one, other = federations.make_updates(state, 2)
    zero = torch.zeros(1, 1)
    one = replace(one, delta={pair.a: zero + 1, pair.b: zero + 1})
    other = replace(other, delta={pair.b: zero - 1})
    # products 4 and 0, their mean 2, the change of the mean 2 * (2 - 1) = 2
    situation = federations.make_situation(state, layout)
    half = GlobalState({**state.tensors, pair.b: torch.tensor([[1.5]])})
    assert error_of(situation, [one, other], half) == pytest.approx(0.5)
    assert error_of(situation, [one, other], replace(half, folds={"m": torch.tensor([[1.0]])})) == pytest.approx(0.0)


def test_rules_are_told_apart():
    layout = federations.make_layout(head=True)
    state = federations.make_state(layout)
    situation = federations.make_situation(state, layout)
    updates = federations.make_updates(state, 4, size=1.0)
    exact, plain = (
        error_of(situation, updates, aggregate(recipe, situation, updates).state)
        for recipe in (fed_ex_lora(), fed_avg())
    )
    assert exact < 1e-6
    assert plain > 0.05


def test_cores_are_compared_where_factors_do_not_travel():
    layout = federations.make_layout()
    pairs = tuple(replace(pair, r=f"{pair.module}.core") for pair in layout.pairs)
    layout = replace(layout, pairs=pairs)
    state = GlobalState({pair.r: torch.eye(3) for pair in pairs})
    situation = federations.make_situation(state, layout)
    updates = federations.make_updates(state, 3, weights=[1, 2, 3], layout=layout, parts=["R"])
    right = aggregate(fed_avg(), situation, updates).state
    assert error_of(situation, updates, right) < 1e-6
    doubled = aggregate(fed_avg(server_learning_rate=2.0), situation, updates).state
    assert error_of(situation, updates, doubled) == pytest.approx(1.0, rel=1e-5)


def test_there_is_no_error_without_something_to_compare():
    layout = federations.make_layout(head=True)
    state = federations.make_state(layout)
    updates = federations.make_updates(state, 2)
    situation = federations.make_situation(state, layout)
    assert error_of(situation, updates, state) == pytest.approx(1.0)
    assert error_of(situation, updates, state, exact="personal") is None
    assert error_of(replace(situation, layout=replace(layout, pairs=())), updates, state) is None
    assert error_of(situation, federations.make_updates(state, 2, size=0.0), state) is None
    assert error_of(situation, federations.make_updates(state, 2, weights=[0, 0]), state) is None
    assert error_of(situation, [], state) is None


def test_a_mean_product_of_no_weight_is_refused():
    layout = federations.make_layout()
    with pytest.raises(EngineError, match="weights sum to 0"):
        MeanProduct(federations.make_state(layout), layout.pairs).mean()
