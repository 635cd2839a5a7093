import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.core import ConfigError, EngineError, Layout, LoraPair
from strategies import aggregate
from strategies.svd import ProductSum, completed, decompose, fed_svd, flex_lora, florist
from tests.federations import make_layout, make_situation, make_state, make_updates
from tests.oracles import svd as oracle
from tests.strategies.layers import changes_of, close, factors, layer_of, plain, scale_of

RANKS = (1, 3, 2, 3)
WEIGHTS = (3, 0, 5, 2)


pytestmark = pytest.mark.usefixtures("one_thread")


def product_of(layer):
    return layer[0] @ layer[1]


def is_orthonormal(rows, size=1e-6):
    return np.abs(rows @ rows.T - np.eye(rows.shape[0])).max(initial=0) < size


def mean_of(name, updates):
    return sum(update.weight * plain(update.delta[name]) for update in updates) / sum(u.weight for u in updates)


def one_round(recipe, state, layout, updates, number=1):
    return aggregate(recipe, make_situation(state, layout, number), updates).state


# Decomposition


@given(factors(), st.integers(1, 7))
def test_a_decomposition_is_that_of_the_full_product(both, rank):
    b, a = both
    u, s, vt, spectrum = (part.numpy() for part in decompose(torch.tensor(b), torch.tensor(a), rank))
    exact = np.linalg.svd(b @ a, compute_uv=False)
    slack = 1e-12 * scale_of(b, a)
    np.testing.assert_allclose(np.pad(spectrum, (0, exact.size - spectrum.size)), exact, rtol=0, atol=slack)
    assert s.size == min(rank, spectrum.size)
    assert np.all(s > 0)
    assert np.all(np.diff(spectrum) <= 0)
    # Eckart and Young: nothing of that rank comes nearer.
    assert np.linalg.norm(b @ a - u * s @ vt) <= np.sqrt((exact[rank:] ** 2).sum()) + 10 * slack
    assert is_orthonormal(u.T, 1e-12)
    assert is_orthonormal(vt, 1e-12)
    # The largest entry of each column is positive; several may be as large.
    assert np.all(u.max(0, initial=0) >= (1 - 1e-5) * np.abs(u).max(0, initial=0))


def test_signs_do_not_depend_on_how_the_product_came_about():
    generator = np.random.default_rng(5)
    b, a = generator.normal(size=(9, 4)), generator.normal(size=(4, 7))
    wanted = decompose(torch.tensor(b), torch.tensor(a), 3)
    mixed = generator.normal(size=(4, 4))
    for left, right in ((-b, -a), (b[:, ::-1], a[::-1]), (b @ mixed, np.linalg.solve(mixed, a)), (b @ a, np.eye(7))):
        found = decompose(torch.tensor(left.copy()), torch.tensor(right.copy()), 3)
        for part, other in zip(found[:3], wanted[:3], strict=True):
            torch.testing.assert_close(part, other, rtol=0, atol=1e-10)


def test_equal_entries_do_not_leave_the_sign_to_rounding():
    for size in (1.0, 3.7, 1e-3):
        b = torch.tensor([[-size], [size]]) * torch.tensor([[1.0], [1 + 1e-7]])
        assert decompose(b, torch.ones(1, 3), 1).u[0, 0] > 0


def test_a_product_of_zero_has_no_singular_values():
    generator = np.random.default_rng(1)
    b, a = torch.tensor(generator.normal(size=(5, 2))), torch.tensor(generator.normal(size=(2, 4)))
    for left, right in ((torch.zeros(5, 2), a), (torch.cat([b, -b], 1), torch.cat([a, a]))):
        found = decompose(left, right, 3)
        assert [part.shape for part in found] == [(5, 0), (0,), (0, 4), (0,)]


def test_a_small_product_of_large_factors_is_not_taken_for_rounding():
    b, a = torch.diag(torch.tensor([1e15, 1e-15])), torch.diag(torch.tensor([1e-15, 1e15]))
    torch.testing.assert_close(decompose(b, a, 2).s, torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_product_is_never_formed():
    wide = 300_000  # squared: 720 GB
    found = decompose(torch.ones(wide, 2), torch.ones(2, wide), 1)
    assert found.s.item() == pytest.approx(2.0 * wide)


@given(factors(), st.integers(0, 3))
def test_rows_are_completed_to_an_orthonormal_set(both, have):
    _, toward = both
    rank, width = toward.shape
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(width, width)))[0][: min(have, rank, width)]
    found = completed(torch.tensor(rows), torch.tensor(toward)).numpy()
    assert found.shape == toward.shape
    assert (found[: rows.shape[0]] == rows).all()
    assert is_orthonormal(found[:width], 1e-10)
    assert not found[width:].any()


def test_rows_are_completed_with_the_directions_there_were():
    toward = np.random.default_rng(2).normal(size=(4, 9))
    # The strongest directions of what they are completed with are among them already.
    rows = decompose(torch.eye(4), torch.tensor(toward), 2).vt
    found = completed(rows, torch.tensor(toward)).numpy()
    np.testing.assert_allclose(toward @ found.T @ found, toward, atol=1e-10)


def test_a_sum_of_many_products_stays_small_and_exact():
    generator = np.random.default_rng(3)
    total, wanted = ProductSum(), np.zeros((5, 3))
    for number in range(40):
        b, a, weight = generator.normal(size=(5, 2)), generator.normal(size=(2, 3)), float(number)
        total.add(torch.tensor(b, dtype=torch.float32), torch.tensor(a), weight)
        wanted += weight * (b.astype(np.float32).astype(np.float64) @ a)
        assert total.rank <= 6
    b, a = total.factors()
    np.testing.assert_allclose((b @ a).numpy(), wanted, rtol=1e-12, atol=1e-10)


# FlexLoRA and FLoRIST

SHAPES = {
    "as wide as high": {"m.0": (6, 6)},
    "two layers": None,
    "narrower than the rank": {"m.0": (2, 9), "m.1": (9, 2), "m.2": (2, 2)},
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("ranks", [None, RANKS])
def test_flex_lora_is_the_best_approximation_of_the_mean_product(name, ranks):
    layout = make_layout(shapes=SHAPES[name])
    state = make_state(layout)
    updates = make_updates(state, 4, weights=WEIGHTS, ranks=ranks, layout=layout)
    after = one_round(flex_lora(), state, layout, updates)
    for pair in layout.pairs:
        wanted = oracle.mean_product(layer_of(state, pair), changes_of(updates, pair), WEIGHTS)
        b, a = layer_of(after, pair)
        # What a client of each rank starts from is the best of that rank.
        for rank in (1, 2, 3):
            close(b[:, :rank] @ a[:rank], oracle.best(wanted, rank))
        assert is_orthonormal(a[: pair.shape[1]])


@pytest.mark.parametrize(
    ("recipe", "twin"),
    [
        (flex_lora(), oracle.flex_lora),
        (florist(energy=0.9), lambda *known: oracle.florist(*known, energy=0.9)),
        (florist(energy=1), oracle.flex_lora),
    ],
    ids=["flex_lora", "florist", "florist of all"],
)
@pytest.mark.parametrize("ranks", [None, RANKS])
def test_three_rounds_are_those_of_the_twin(recipe, twin, ranks):
    layout = make_layout(head=True)
    state = make_state(layout, zero_b=True)
    layers = {pair: layer_of(state, pair) for pair in layout.pairs}
    head = plain(state.tensors["head.weight"])
    for number in (1, 2, 3):
        updates = make_updates(state, 4, number, WEIGHTS, ranks, layout, size=0.5)
        state = one_round(recipe, state, layout, updates, number)
        for pair in layout.pairs:
            layers[pair] = twin(layers[pair], changes_of(updates, pair), WEIGHTS)
            close(product_of(layer_of(state, pair)), product_of(layers[pair]))
        head = head + mean_of("head.weight", updates)
        close(plain(state.tensors["head.weight"]), head)


def test_florist_keeps_as_many_singular_values_as_hold_the_energy():
    layout = make_layout(shapes={"m.0": (6, 5)})
    pair = layout.pairs[0]
    state = make_state(layout, zero_b=True)
    update = make_updates(state, 1)[0]
    # Singular values 2, 1, 0.5: energies 4, 1, 0.25, and so 76, 95 and 100 % of it.
    update.delta[pair.b].copy_(torch.eye(6, 3) * torch.tensor([1.0, 2.0, 0.5]))
    update.delta[pair.a].copy_(torch.eye(3, 5) - state.tensors[pair.a])
    for energy, kept in ((0.01, 1), (0.75, 1), (0.77, 2), (0.94, 2), (0.96, 3), (1, 3)):
        b, a = layer_of(one_round(florist(energy=energy), state, layout, [update]), pair)
        np.testing.assert_allclose(np.linalg.norm(b, axis=0), [2, 1, 0.5][:kept] + [0] * (3 - kept), atol=1e-6)
        assert is_orthonormal(a)


def test_florist_keeps_the_smallest_singular_value_if_all_energy_is_asked_for():
    layout = make_layout(shapes={"m.0": (6, 5)})
    pair = layout.pairs[0]
    state = make_state(layout, zero_b=True)
    update = make_updates(state, 1)[0]
    update.delta[pair.b].copy_(torch.eye(6, 3) * torch.tensor([1.0, 1e-4, 1e-10]))
    update.delta[pair.a].copy_(torch.eye(3, 5) - state.tensors[pair.a])
    for energy, kept in ((0.999, 1), (1 - 1e-12, 2), (1, 3)):
        b, _ = layer_of(one_round(florist(energy=energy), state, layout, [update]), pair)
        assert np.count_nonzero(np.linalg.norm(b, axis=0)) == kept


def test_a_round_without_change_leaves_the_product():
    layout = make_layout()
    state = make_state(layout)
    updates = make_updates(state, 3, weights=(1, 2, 3), size=0.0)
    for recipe in (flex_lora(), florist(energy=1), fed_svd()):
        after = one_round(recipe, state, layout, updates)
        for pair in layout.pairs:
            close(product_of(layer_of(after, pair)), product_of(layer_of(state, pair)))


def test_before_any_training_nothing_changes():
    layout = make_layout()
    state = make_state(layout, zero_b=True)
    updates = make_updates(state, 2, size=0.0)
    for recipe in (flex_lora(), florist(), fed_svd()):
        after = one_round(recipe, state, layout, updates)
        for name, tensor in state.tensors.items():
            assert torch.equal(after.tensors[name], tensor)


def test_directions_that_no_client_held_can_still_learn():
    layout = make_layout(rank=4)
    state = make_state(layout, zero_b=True)
    updates = make_updates(state, 1, ranks=[2], layout=layout)
    for recipe in (flex_lora(), florist(energy=1)):
        after = one_round(recipe, state, layout, updates)
        for pair in layout.pairs:
            b, a = layer_of(after, pair)
            close(b @ a, oracle.mean_product(layer_of(state, pair), changes_of(updates, pair), [1]))
            assert is_orthonormal(a)
            assert not b[:, 2:].any()
            assert b[:, :2].any()


def test_the_server_counts_like_a_client_and_weights_are_relative():
    layout = make_layout()
    state = make_state(layout)
    updates = make_updates(state, 2, weights=(1, 3))
    thousands = make_updates(state, 2, weights=(1000, 3000))
    for recipe in (flex_lora(), florist(), fed_svd()):
        left, right = (one_round(recipe, state, layout, which) for which in (updates, thousands))
        for name in left.tensors:
            torch.testing.assert_close(left.tensors[name], right.tensors[name])


# FedSVD


@pytest.mark.parametrize("name", ["as wide as high", "two layers"])
def test_three_rounds_of_fed_svd_are_those_of_the_twin(name):
    layout = make_layout(shapes=SHAPES[name], head=True)
    state = make_state(layout, zero_b=True)
    layers = {pair: layer_of(state, pair) for pair in layout.pairs}
    head = plain(state.tensors["head.weight"])
    for number in (1, 2, 3):
        updates = make_updates(state, 4, number, WEIGHTS, layout=layout, parts=["B", "other"], size=0.5)
        state = one_round(fed_svd(), state, layout, updates, number)
        for pair in layout.pairs:
            layers[pair] = oracle.fed_svd(layers[pair], changes_of(updates, pair), WEIGHTS)
            b, a = layer_of(state, pair)
            close(b @ a, product_of(layers[pair]))
            assert is_orthonormal(a)
        head = head + mean_of("head.weight", updates)
        close(plain(state.tensors["head.weight"]), head)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=list(SHAPES))
def test_fed_svd_keeps_the_mean_product_whatever_the_shapes(shapes):
    layout = make_layout(shapes=shapes)
    state = make_state(layout)
    updates = make_updates(state, 3, weights=(1, 2, 3), layout=layout, parts=["B"])
    after = one_round(fed_svd(), state, layout, updates)
    for pair in layout.pairs:
        wanted = oracle.mean_product(layer_of(state, pair), changes_of(updates, pair), (1, 2, 3))
        close(product_of(layer_of(after, pair)), wanted)


def test_fed_svd_loses_no_direction_that_clients_could_train_in():
    layout = make_layout()
    state = make_state(layout, zero_b=True)
    updates = make_updates(state, 2, layout=layout, parts=["B"])
    for update in updates:
        for pair in layout.pairs:
            update.delta[pair.b][:, 1:] = 0
    after = one_round(fed_svd(), state, layout, updates)
    for pair in layout.pairs:
        before, (b, a) = layer_of(state, pair)[1], layer_of(after, pair)
        close(before @ a.T @ a, before)
        assert is_orthonormal(a)
        assert not b[:, 1:].any()


def test_fed_svd_has_clients_train_b_only():
    recipe = fed_svd()
    assert recipe.client(7) == {"train_only": ["B", "other"]}
    assert recipe.facts.linear
    assert recipe.facts.rebases
    assert not recipe.mixes_ranks


# What is refused


@pytest.mark.parametrize("recipe", [flex_lora(), florist(), fed_svd()], ids=lambda recipe: recipe.name)
def test_factors_are_needed(recipe):
    core = LoraPair("m", "m.A", "m.B", 1.0, (3, 4), r="m.R")
    for layout in (Layout(), Layout((core,), (), 2)):
        with pytest.raises(ConfigError, match=rf"strategy={recipe.name}\b.*factors.*peft=lora"):
            recipe.reduce.start(make_situation(make_state(make_layout()), layout))


@pytest.mark.parametrize("recipe", [flex_lora(), florist(), fed_svd()], ids=lambda recipe: recipe.name)
def test_weights_of_zero_are_refused(recipe):
    layout = make_layout()
    state = make_state(layout)
    with pytest.raises(EngineError, match="weights sum to 0"):
        one_round(recipe, state, layout, make_updates(state, 2, weights=(0, 0)))


@pytest.mark.parametrize("energy", [0, -1, 1.01, float("nan")])
def test_an_energy_out_of_range_is_refused(energy):
    with pytest.raises(ConfigError, match="energy"):
        florist(energy=energy)
