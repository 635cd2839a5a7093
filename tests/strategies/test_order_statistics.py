import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.core import ClientUpdate, ConfigError, EngineError
from strategies import aggregate
from strategies.order_statistics import by_coordinate, central, coordinate_median, middle, trimmed_mean
from tests.federations import make_layout, make_situation, make_state, make_updates
from tests.oracles import order_statistics as oracle

# Results may underflow to subnormal numbers, which torch may flush to zero: nothing smaller than this is compared.
TINY = 1e-37
VALUES = st.floats(-(2.0**120), 2.0**120, width=32, allow_subnormal=False) | st.sampled_from([-1.0, 0.0, 0.5, 1.0])


def updates_of(rows, name="w"):
    return [ClientUpdate(f"c{i}", 1, {name: torch.tensor(row)}, 1.0) for i, row in enumerate(rows)]


def reduce(recipe, updates, state=None, layout=None):
    layout = layout or make_layout()
    folded = recipe.reduce.start(make_situation(state or make_state(layout), layout))
    for update in updates:
        folded = recipe.reduce.add(folded, update)
    return recipe.reduce.finish(folded)


def same(got, want, rtol=2e-7):
    assert set(got) == set(want)
    for name in want:
        assert got[name].dtype == torch.float32
        np.testing.assert_allclose(got[name].numpy(), want[name], rtol=rtol, atol=TINY)


def rows(counts, values=VALUES):
    return counts.flatmap(
        lambda count: st.lists(st.lists(values, min_size=4, max_size=4), min_size=count, max_size=count)
    )


def scaled_rows(counts):
    """Values of one size, of which sums lose few digits: eighths from -4 to 4, times a power of two."""
    eighths = rows(counts, st.integers(-32, 32).map(lambda number: number / 8))
    return st.builds(lambda values, power: (values, 2.0**power), eighths, st.sampled_from([-100, 0, 100]))


def close(got, want, scale):
    np.testing.assert_allclose(got.numpy() / scale, want / scale, rtol=2e-7, atol=1e-14)


@given(rows(st.integers(1, 9)))
def test_the_median_is_that_of_the_slow_twin(values):
    got = reduce(coordinate_median(), updates_of(values)).tensors
    same(got, oracle.by_coordinate([{"w": np.float32(row)} for row in values], oracle.median))


@given(scaled_rows(st.integers(3, 11)), st.sampled_from([0.0, 0.34, 0.4, 0.49]))
def test_the_trimmed_mean_is_that_of_the_slow_twin(drawn, share):
    values, scale = drawn
    deltas = [{"w": np.float32(row) * np.float32(scale)} for row in values]
    got = reduce(trimmed_mean(share=share), updates_of([delta["w"].tolist() for delta in deltas])).tensors["w"]
    close(got, oracle.by_coordinate(deltas, oracle.trimmed(share))["w"], scale)


@given(scaled_rows(st.integers(3, 9)), st.integers(1, 9))
def test_the_central_values_are_those_of_the_slow_twin(drawn, keep):
    values, scale = drawn
    keep = min(keep, len(values))
    deltas = [{"w": np.float32(row) * np.float32(scale)} for row in values]
    got = by_coordinate(updates_of([delta["w"].tolist() for delta in deltas]), central(keep))["w"]
    close(got, oracle.by_coordinate(deltas, oracle.central(keep))["w"], scale)


@given(rows(st.integers(5, 9)), st.randoms(use_true_random=False))
def test_the_order_of_clients_changes_no_bit(values, chance):
    mixed = chance.sample(values, len(values))
    for recipe in (coordinate_median(), trimmed_mean()):
        left, right = (reduce(recipe, updates_of(some)).tensors["w"] for some in (values, mixed))
        assert left.tolist() == right.tolist()


def test_a_minority_of_hostile_clients_moves_nothing_beyond_the_honest_ones():
    honest = [[0.9, -0.1], [1.0, 0.0], [1.1, 0.1]]
    for hostile in ([[3e38, 3e38], [3e38, -3e38]], [[-1e30, 1e30], [-3e38, 3e38]]):
        for recipe in (coordinate_median(), trimmed_mean(share=0.4)):
            step = reduce(recipe, updates_of([hostile[0], *honest, hostile[1]])).tensors["w"]
            assert 0.89 < float(step[0]) < 1.11
            assert -0.11 < float(step[1]) < 0.11


def test_the_median_of_the_largest_numbers_is_finite():
    step = reduce(coordinate_median(), updates_of([[3e38], [3.2e38]])).tensors["w"]
    assert float(step) == pytest.approx(3.1e38)


def test_claimed_weights_play_no_part():
    layout = make_layout(head=True)
    state = make_state(layout)
    plain, claimed = (make_updates(state, 5, weights=weights) for weights in (None, [0, 1e30, 7, 0, 0]))
    for recipe in (coordinate_median(), trimmed_mean()):
        left, right = reduce(recipe, plain).tensors, reduce(recipe, claimed).tensors
        assert set(left) == set(state.tensors)
        assert all(torch.equal(left[name], right[name]) for name in left)
        assert recipe.weight_by == "equal"


def test_one_client_alone_is_followed():
    (update,) = updates_of([[0.1, -2.0]])
    for recipe in (coordinate_median(), trimmed_mean(share=0)):
        assert torch.equal(reduce(recipe, [update]).tensors["w"], update.delta["w"])


def test_shapes_stay_and_what_is_not_sent_is_zeros(monkeypatch):
    monkeypatch.setattr("strategies.order_statistics._AT_ONCE", 6)  # two coordinates of three clients at a time
    whole = torch.arange(15.0).reshape(3, 5)
    updates = [
        ClientUpdate("a", 1, {"x": whole, "s": torch.tensor(3.0), "none": torch.zeros(0)}, 1.0),
        ClientUpdate("b", 1, {"x": whole.T.contiguous().T, "s": torch.tensor(5.0)}, 1.0),
        ClientUpdate("c", 1, {"s": torch.tensor(9.0)}, 1.0),
    ]
    step = by_coordinate(updates, middle)
    assert torch.equal(step["x"], whole)
    assert step["s"].shape == ()
    assert float(step["s"]) == 5.0
    assert step["none"].shape == (0,)


def test_too_few_clients_to_trim_are_told():
    with pytest.raises(EngineError, match="needs 5 updates a round; 4 came"):
        reduce(trimmed_mean(), updates_of([[1.0]] * 4))
    assert float(reduce(trimmed_mean(), updates_of([[1.0]] * 4 + [[9.0]])).tensors["w"]) == 1.0


@pytest.mark.parametrize("share", [-0.1, 0.5])
def test_a_share_that_leaves_nothing_is_told(share):
    with pytest.raises(ConfigError, match=r"strategy\.share"):
        trimmed_mean(share=share)


@pytest.mark.parametrize(
    ("recipe", "pick"), [(coordinate_median(), oracle.median), (trimmed_mean(), oracle.trimmed(0.2))]
)
def test_three_rounds_are_those_of_the_twin(recipe, pick):
    layout = make_layout(head=True)
    state = make_state(layout)
    twin = {name: tensor.numpy().astype(np.float64) for name, tensor in state.tensors.items()}
    for number in (1, 2, 3):
        updates = make_updates(state, 6, seed=number)
        state = aggregate(recipe, make_situation(state, layout, number), updates).state
        step = oracle.by_coordinate([{name: d.numpy() for name, d in u.delta.items()} for u in updates], pick)
        twin = {name: twin[name] + step[name] for name in twin}
    for name, want in twin.items():
        np.testing.assert_allclose(state.tensors[name].numpy(), want, rtol=0, atol=1e-6)
