"""Ranks that shrink and grow from round to round: what the global factors still hold of what was learned."""

from functools import partial

import numpy as np
import pytest

from strategies import aggregate
from strategies.folding import flora
from strategies.hetero import het_lora
from strategies.svd import flex_lora, florist
from tests.federations import SCALING, make_layout, make_situation, make_state, make_updates
from tests.strategies.layers import changes_of, close, layer_of

RANKS = (3, 1, 2, 3, 1, 3)
"""Of all devices, by round: it shrinks, grows, and shrinks again."""

KEEPING = {
    "flex_lora": partial(flex_lora, keep_rest=True),
    "florist": partial(florist, energy=1, keep_rest=True),
    "het_lora": partial(het_lora, keep_rest=True),
}
LOSING = {"flex_lora": flex_lora, "florist": partial(florist, energy=1), "het_lora": het_lora}


pytestmark = pytest.mark.usefixtures("one_thread")


def product_of(state, pair):
    """What a layer adds to its base weight at the start, folds and all: `(out, in)`."""
    b, a = layer_of(state, pair)
    folded = state.folds[pair.module].double().numpy() if pair.module in state.folds else 0.0
    return SCALING * b @ a + folded


def moved(state, pair, update):
    """What one device's work changes of the product, by hand: its own rows and columns alone moved."""
    b, a = layer_of(state, pair)
    (change,) = changes_of([update], pair)
    rank = change[1].shape[0]
    b, a = b[:, :rank], a[:rank]
    return SCALING * ((b + change[0]) @ (a + change[1]) - b @ a)


def play(recipe, ranks, size=0.5):
    """Rounds of one device each; yields layer, product after the round, and by hand."""
    layout = make_layout()
    state = make_state(layout, zero_b=recipe.name == "flora")
    wanted = {pair: product_of(state, pair) for pair in layout.pairs}
    for number, rank in enumerate(ranks, 1):
        (update,) = make_updates(state, 1, number, (2,), (rank,), layout, size=size)
        wanted = {pair: wanted[pair] + moved(state, pair, update) for pair in layout.pairs}
        state = aggregate(recipe, make_situation(state, layout, number), [update]).state
        for pair in layout.pairs:
            yield pair, product_of(state, pair), wanted[pair]


@pytest.mark.parametrize("make", [*KEEPING.values(), flora], ids=[*KEEPING, "flora"])
def test_nothing_that_was_learned_is_lost(make):
    """After every round the product is the start and all devices' changes, whatever ranks they had."""
    for _, found, wanted in play(make(), RANKS):
        close(found, wanted)


@pytest.mark.parametrize("make", LOSING.values(), ids=LOSING)
def test_as_published_a_round_of_small_ranks_keeps_those_alone(make):
    """Why the option is there: what a device of rank 1 sends back is all that is left."""
    ends = {}
    for pair, found, wanted in play(make(), (1,)):
        assert np.linalg.matrix_rank(found, tol=1e-4) == 1 < np.linalg.matrix_rank(wanted, tol=1e-4)
        ends[pair] = found
    assert len(ends) == 2


@pytest.mark.parametrize("name", KEEPING)
def test_devices_that_do_nothing_change_nothing_whatever_their_ranks(name):
    layout = make_layout(head=True)
    state = make_state(layout)
    updates = make_updates(state, 4, weights=(3, 1, 5, 2), ranks=(1, 3, 2, 1), layout=layout, size=0.0)
    after = aggregate(KEEPING[name](), make_situation(state, layout), updates).state
    for pair in layout.pairs:
        close(product_of(after, pair), product_of(state, pair))


@pytest.mark.parametrize("name", KEEPING)
def test_where_all_have_the_whole_rank_it_is_the_published_rule(name):
    layout = make_layout(head=True)
    state = make_state(layout)
    updates = make_updates(state, 3, weights=(3, 1, 5), layout=layout)
    found, published = (
        aggregate(make(), make_situation(state, layout), updates).state.tensors
        for make in (KEEPING[name], LOSING[name])
    )
    assert all(found[key].equal(published[key]) for key in published)


def test_het_lora_moves_the_rows_and_columns_that_were_sent_alone():
    layout = make_layout()
    state = make_state(layout)
    updates = make_updates(state, 3, weights=(3, 1, 5), ranks=(1, 2, 1), layout=layout)
    after = aggregate(KEEPING["het_lora"](), make_situation(state, layout), updates).state
    for pair in layout.pairs:
        (b, a), (b_after, a_after) = layer_of(state, pair), layer_of(after, pair)
        np.testing.assert_allclose(a_after[2:], a[2:], rtol=1e-6)
        np.testing.assert_allclose(b_after[:, 2:], b[:, 2:], rtol=1e-6)
        assert not np.allclose(a_after[:2], a[:2])
        assert not np.allclose(b_after[:, :2], b[:, :2])
