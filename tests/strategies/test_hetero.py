import numpy as np
import pytest
import torch
from hypothesis import given

from fedpeat.core import ConfigError, EngineError, Layout
from strategies import aggregate
from strategies.hetero import het_lora, padded, product_norm
from tests.federations import SCALING, make_layout, make_situation, make_state, make_updates
from tests.oracles import svd as oracle
from tests.strategies.layers import changes_of, close, factors, layer_of, plain, scale_of

RANKS = (1, 3, 2, 3)
WEIGHTS = (3, 1, 5, 2)


pytestmark = pytest.mark.usefixtures("one_thread")


def twin_round(layers, updates, weights):
    by_client = [{pair: changes_of([update], pair)[0] for pair in layers} for update in updates]
    return oracle.het_lora(layers, by_client, weights, SCALING)


def one_round(state, layout, updates, number=1):
    return aggregate(het_lora(), make_situation(state, layout, number), updates).state


@given(factors())
def test_the_norm_of_a_product_is_that_of_the_full_product(both):
    b, a = both
    # From squares: where the product is small beside its factors, half of the digits.
    wanted = np.linalg.norm(b @ a)
    assert abs(product_norm(torch.tensor(b), torch.tensor(a)) - wanted) <= 1e-7 * scale_of(b, a)


def test_factors_are_padded_with_zeros():
    pair = make_layout().pairs[0]
    found = padded({pair.a: torch.ones(1, 5), pair.b: torch.ones(6, 1)}, pair, 3)
    assert found[pair.a].sum(1).tolist() == [5, 0, 0]
    assert found[pair.b].sum(0).tolist() == [6, 0, 0]


@pytest.mark.parametrize("ranks", [None, RANKS])
@pytest.mark.parametrize("zero_b", [True, False])
def test_three_rounds_are_those_of_the_twin(ranks, zero_b):
    layout = make_layout(head=True)
    state = make_state(layout, zero_b=zero_b)
    layers = {pair: layer_of(state, pair) for pair in layout.pairs}
    head = plain(state.tensors["head.weight"])
    for number in (1, 2, 3):
        updates = make_updates(state, 4, number, WEIGHTS, ranks, layout, size=0.5)
        state = one_round(state, layout, updates, number)
        layers = twin_round(layers, updates, WEIGHTS)
        head = head + sum(w * plain(u.delta["head.weight"]) for u, w in zip(updates, WEIGHTS, strict=True)) / 11
        for pair in layout.pairs:
            for found, wanted in zip(layer_of(state, pair), layers[pair], strict=True):
                close(found, wanted)
        close(plain(state.tensors["head.weight"]), head)


def test_a_client_that_holds_more_counts_more():
    layout = make_layout(rank=1, shapes={"m.0": (2, 2)})
    pair = layout.pairs[0]
    state = make_state(layout, zero_b=True)
    updates = make_updates(state, 2, weights=(1, 100))
    for update, (size, b) in zip(updates, ((3.0, [[1.0], [0.0]]), (1.0, [[0.0], [1.0]])), strict=True):
        update.delta[pair.b].copy_(size * torch.tensor(b))
        update.delta[pair.a].copy_(torch.tensor([[1.0, 0.0]]) - state.tensors[pair.a])
    # Norms 3 and 1: B is 3/4 of the first's and 1/4 of the second's.
    after = one_round(state, layout, updates)
    torch.testing.assert_close(after.tensors[pair.b], torch.tensor([[2.25], [0.25]]))


def test_where_all_products_are_zero_the_clients_weights_stand_in():
    layout = make_layout()
    state = make_state(layout, zero_b=True)
    updates = make_updates(state, 4, weights=WEIGHTS, ranks=RANKS, layout=layout)
    for update in updates:
        for pair in layout.pairs:
            update.delta[pair.b].zero_()
    after = one_round(state, layout, updates)
    layers = twin_round({pair: layer_of(state, pair) for pair in layout.pairs}, updates, WEIGHTS)
    for pair in layout.pairs:
        close(layer_of(after, pair)[1], layers[pair][1])
        assert not after.tensors[pair.b].any()


@pytest.mark.parametrize("blank", [(0,), (1,), (0, 1), (3,), (0, 3)])
def test_a_client_with_products_of_zero_counts_for_nothing_beside_others(blank):
    layout = make_layout()
    state = make_state(layout, zero_b=True)
    updates = make_updates(state, 4, weights=WEIGHTS)
    for index in blank:
        for pair in layout.pairs:
            updates[index].delta[pair.b].zero_()
    after = one_round(state, layout, updates)
    rest = one_round(state, layout, [update for index, update in enumerate(updates) if index not in blank])
    for pair in layout.pairs:
        torch.testing.assert_close(after.tensors[pair.a], rest.tensors[pair.a])
        torch.testing.assert_close(after.tensors[pair.b], rest.tensors[pair.b])


def test_a_client_of_weight_zero_does_not_count():
    layout = make_layout(head=True)
    state = make_state(layout)
    after = one_round(state, layout, make_updates(state, 3, weights=(1, 2, 0)))
    rest = one_round(state, layout, make_updates(state, 2, weights=(1, 2)))
    for name, tensor in rest.tensors.items():
        assert torch.equal(after.tensors[name], tensor)
    with pytest.raises(EngineError, match="weights sum to 0"):
        one_round(state, layout, make_updates(state, 2, weights=(0, 0)))


def test_the_clients_half_is_the_penalty():
    assert het_lora(tail_weight=0.1, tail_share=0.5).client(3) == {"tail_penalty": [0.1, 0.5]}
    assert het_lora(tail_weight=0).client(1) == {}
    assert het_lora().mixes_ranks
    assert het_lora().facts.exact == "no"


@pytest.mark.parametrize("keyword", [{"tail_weight": -1}, {"tail_share": 1.1}, {"tail_share": -0.1}])
def test_bad_keywords_are_refused(keyword):
    with pytest.raises(ConfigError, match=next(iter(keyword))):
        het_lora(**keyword)


def test_factors_are_needed():
    with pytest.raises(ConfigError, match=r"het_lora.*peft=lora"):
        het_lora().reduce.start(make_situation(make_state(make_layout()), Layout()))
