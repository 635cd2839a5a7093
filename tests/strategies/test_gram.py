from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.core import ClientUpdate, GlobalState, Layout, LoraPair
from strategies.gram import Curve, curves, distances_to, gram, grams, scale_to, squared_distances
from tests.federations import make_layout, make_situation, make_state, make_updates
from tests.oracles import robust as oracle

pytestmark = pytest.mark.usefixtures("one_thread")


CASES = {
    "plain": {},
    "head": {"head": True},
    "zero B": {"zero_b": True},
    "A only": {"parts": ("A",)},
    "B and head only": {"head": True, "parts": ("B", "other")},
    "mixed ranks": {"ranks": [1, 3, 2, 3, 1]},
    "one client": {"count": 1},
}


def federation(head=False, zero_b=False, parts=None, ranks=None, count=5, seed=0, size=0.1):
    layout = make_layout(head=head)
    state = make_state(layout, seed, zero_b=zero_b)
    updates = make_updates(state, count, seed + 1, ranks=ranks, layout=layout, parts=parts, size=size)
    return make_situation(state, layout), updates


def twin_grams(situation, updates):
    found = [oracle.vectors(situation.state, situation.layout, update.delta) for update in updates]
    return [np.stack(some) @ np.stack(some).T for some in zip(*found, strict=True)]


def close(got, want):
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-9, atol=1e-11 * max(1e-12, np.abs(want).max()))


@pytest.mark.parametrize(("entries", "tile"), [(1, 1), (1 << 21, 2), (1 << 21, 128)])
@pytest.mark.parametrize("case", CASES)
def test_inner_products_are_those_of_the_full_products(case, entries, tile, monkeypatch):
    monkeypatch.setattr("strategies.gram._ENTRIES", entries)
    monkeypatch.setattr("strategies.gram._TILE", tile)
    situation, updates = federation(**CASES[case])
    for got, want in zip(grams(situation, updates), twin_grams(situation, updates), strict=True):
        assert got.dtype == torch.float64
        close(got, want)
    for got, want in zip(grams(situation, updates, of=[len(updates) - 1]), twin_grams(situation, updates), strict=True):
        close(got, want[-1:])
    products, factors, others = grams(situation, updates, measure="factors")
    assert not products.any()
    close(factors, twin_grams(situation, updates)[1])
    close(others, twin_grams(situation, updates)[2])


@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([1e-4, 0.1, 10.0]), st.booleans())
def test_inner_products_of_random_federations(seed, count, size, head):
    situation, updates = federation(count=count, seed=seed, size=size, head=head)
    for got, want in zip(grams(situation, updates), twin_grams(situation, updates), strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-9 * max(1e-30, np.abs(want).max()))


def test_square_cores_are_measured_by_themselves():
    layout = Layout((LoraPair("m", "m.A", "m.B", 3.0, (6, 5), r="m.R"),), (), 2)
    updates = [ClientUpdate(f"c{i}", 1, {"m.R": torch.full((2, 2), 1.0 + i)}, 1.0) for i in range(2)]
    situation = make_situation(GlobalState({"m.R": torch.zeros(2, 2)}), layout)
    products, factors, others = grams(situation, updates)
    assert others.tolist() == [[36.0, 72.0], [72.0, 144.0]]
    assert not products.any()
    assert not factors.any()
    assert curves(situation, updates[1]).others.norm() == 12.0


def test_layers_that_a_client_did_not_send_count_as_unchanged():
    situation, updates = federation(count=3)
    part = {name: delta for name, delta in updates[1].delta.items() if name.startswith("m.0")}
    updates[1] = ClientUpdate("c01", 1, part, 1.0)
    for got, want in zip(grams(situation, updates), twin_grams(situation, updates), strict=True):
        close(got, want)


def test_changes_far_smaller_than_the_factors_lose_no_digits():
    pair = LoraPair("m", "m.A", "m.B", 1.0, (2, 2))
    state = GlobalState({"m.A": torch.tensor([[1000.1, -2000.3]]), "m.B": torch.tensor([[3000.7], [-900.9]])})
    deltas = [{"m.A": torch.tensor([[1e-9, k * 3e-9]]), "m.B": torch.tensor([[k * -2e-9], [7e-9]])} for k in (1.0, 2.0)]
    updates = [ClientUpdate(f"c{i}", 1, delta, 1.0) for i, delta in enumerate(deltas)]
    got = grams(make_situation(state, Layout((pair,), (), 1)), updates).products

    def change(delta):
        a, b, da, db = ([Fraction(float(x)) for x in t.flatten()] for t in (*state.tensors.values(), *delta.values()))
        return [(b[i] + db[i]) * (a[j] + da[j]) - b[i] * a[j] for i in range(2) for j in range(2)]

    for i, left in enumerate(deltas):
        for j, right in enumerate(deltas):
            exact = sum(x * y for x, y in zip(change(left), change(right), strict=True))
            assert float(got[i, j]) == pytest.approx(float(exact), rel=1e-13)


def test_equals_are_at_no_distance_and_the_largest_numbers_are_far():
    situation, (update, *_) = federation(head=True)
    huge = {name: torch.full_like(delta, 3e38) for name, delta in update.delta.items()}
    updates = [update, update, ClientUpdate("x", 1, huge, 1.0), update]
    for measure in ("products", "factors", "both"):
        squared = squared_distances(gram(situation, updates, measure))
        assert squared.isfinite().all()
        assert not squared[[0, 1, 3]][:, [0, 1, 3]].any()
        assert (squared[2, [0, 1, 3]] > 1e70).all()


def test_what_is_not_finite_is_infinitely_far():
    inner = torch.tensor([[1.0, 0.5, 1.0], [0.5, 1.0, 1.0], [1.0, 1.0, torch.inf]], dtype=torch.float64)
    squared = squared_distances(inner)
    assert squared[0, 1] == 1.0
    assert squared[2].tolist() == [torch.inf, torch.inf, 0.0]


@pytest.mark.parametrize("measure", ["products", "factors", "both"])
def test_distances_are_those_between_the_vectors(measure):
    situation, updates = federation(head=True, count=4)
    points = oracle.points(situation.state, situation.layout, [update.delta for update in updates], measure)
    inner = gram(situation, updates, measure)
    np.testing.assert_allclose(squared_distances(inner).numpy(), oracle.distances(points), rtol=1e-9)
    weights = np.array([0.5, 0.25, 0.25, 0.0])
    want = np.linalg.norm(points - weights @ points, axis=1)
    np.testing.assert_allclose(distances_to(inner, torch.tensor(weights)).numpy(), want, rtol=1e-9)


def test_both_tells_a_client_that_only_rescaled_its_factors():
    situation, updates = federation(count=4)
    tensors = situation.state.tensors
    rescaled = {}
    for pair in situation.layout.pairs:
        rescaled |= {pair.a: tensors[pair.a] * (1e-3 - 1), pair.b: tensors[pair.b] * (1e3 - 1)}
    updates[2] = ClientUpdate("x", 1, rescaled, 1.0)
    products, both = (squared_distances(gram(situation, updates, measure)) for measure in ("products", "both"))
    assert products[0, 2] < products[0, 1]
    assert both[0, 2] > 100 * both[0, 1]


@given(st.integers(0, 10**6), st.sampled_from([0.0, 1e-3, 0.5, 1.0, 2.0]), st.booleans())
def test_a_curve_is_the_norm_of_the_scaled_change(seed, c, zero_b):
    situation, (update,) = federation(count=1, seed=seed, head=True, zero_b=zero_b, size=1.0)
    scaled = {name: c * delta.double() for name, delta in update.delta.items()}
    want = [np.linalg.norm(vector) for vector in oracle.vectors(situation.state, situation.layout, scaled)]
    got = [curve.norm(c) for curve in curves(situation, update)]
    np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-9)


def test_curves_begin_where_grams_are():
    situation, updates = federation(head=True, ranks=[1, 3, 2, 3, 1])
    for index, update in enumerate(updates):
        for curve, inner in zip(curves(situation, update), grams(situation, updates), strict=True):
            assert curve.norm() ** 2 == pytest.approx(float(inner[index, index]), rel=1e-9)


def some_curves():
    """Curves that a change can have: of two random vectors, `c x + c^2 y`, long or short, apart or opposed."""
    size = st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 3.0, 1e20, 1e75])
    return st.builds(
        lambda x, y, cosine: Curve(x * x, cosine * x * y, y * y),
        size,
        size,
        st.sampled_from([-1.0, -0.97, -0.5, 0.0, 1.0]),
    )


@given(some_curves(), st.sampled_from([1e-9, 0.1, 1.0, 7.0]), st.sampled_from([1.0, float("inf")]))
def test_no_smaller_scale_is_longer_than_the_norm(curve, norm, most):
    c = scale_to(curve, norm, most)
    assert 0 <= c <= most
    below = [c * share for share in np.linspace(0, 1, 200)] if c < float("inf") else [1.0, 1e10]
    assert max(curve.norm(x) for x in below) <= norm * (1 + 1e-9)
    if c < most:
        assert curve.norm(c) == pytest.approx(norm, rel=1e-6)


def test_where_the_norm_is_reached_more_than_once_the_first_counts():
    curve = Curve(1.0, -0.99, 1.0)  # rises to 0.255 at c = 0.52, falls to 0.14 at 0.97, rises again
    assert scale_to(curve, 0.2, most=2.0) == pytest.approx(0.2741, abs=1e-4)
    assert curve.norm(1.2) > 0.2
    assert 1.0 < scale_to(curve, 0.3, most=2.0) < 2.0
    assert scale_to(curve, 100.0) == 1.0
    assert scale_to(Curve(4.0), 2.0) == 1.0
    assert scale_to(Curve(4.0), 0.0) == 0.0
    assert scale_to(Curve(4.0), 1e-300) == pytest.approx(5e-301)
    assert scale_to(Curve(), 0.0) == 1.0
