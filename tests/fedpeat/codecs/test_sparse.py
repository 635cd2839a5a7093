import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fedpeat.codecs import TINY, top_k, top_k_int8
from fedpeat.core import UpdateRefused
from tests.fedpeat.codecs.numbers import FLOATS, from_seed
from tests.oracles import codecs as slow

for_all = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
# Few different values, so that ties are common.
FEW = FLOATS | st.sampled_from([0.0, 1.0, -1.0, 2.0, -2.0])
pairs = st.lists(st.tuples(FEW, FEW), max_size=12) | st.builds(
    lambda count, seed: list(zip(from_seed(count, seed), from_seed(count, seed + 1), strict=True)),
    st.integers(0, 150),
    st.integers(0, 2**32),
)
shares = st.floats(0.01, 1.0)
HUGE = torch.finfo(torch.float32).max
EDGES = [(2.9e-42, 1e-39), (HUGE, HUGE), (-HUGE, -1.0), (TINY, -TINY), (1.0, 1e-30), (-0.0, 0.0)]


def tensor(values):
    return {"w": torch.tensor(values, dtype=torch.float32)}


def plain(values):
    return [float(x) for x in values]


@for_all
@given(pairs, shares)
@example(EDGES, 0.5)
@example(EDGES, 1.0)
@example([(1.0, 0.0)] * 7, 0.5)
def test_top_k_is_its_slow_twin(send, values, share):
    delta, error = [x for x, _ in values], [e for _, e in values]
    decoded, encoded, after = send(top_k(share=share), tensor(delta), tensor(error))
    index, expected, left = slow.feed_back(delta, error, share)
    assert encoded["w|index"].tolist() == index
    assert encoded["w"].tolist() == [float(expected[place]) for place in index]
    assert decoded["w"].tolist() == plain(expected)
    assert after["w"].tolist() == plain(left)


@for_all
@given(pairs, shares, st.integers(1, 40))
@example(EDGES, 1.0, 64)
@example([(8e-31 * 3, 0.0), (8e-31 * 127, 0.0)], 1.0, 64)
def test_top_k_int8_is_its_slow_twin(send, values, share, block_size):
    delta, error = [x for x, _ in values], [e for _, e in values]
    decoded, encoded, after = send(top_k_int8(share=share, block_size=block_size), tensor(delta), tensor(error))
    index, expected, left = slow.feed_back(delta, error, share, block_size)
    assert encoded["w|index"].tolist() == index
    assert decoded["w"].tolist() == plain(expected)
    assert after["w"].tolist() == plain(left)


@for_all
@given(
    # Sums of twelve rounds must stay in fp32's range: what exceeds it is clamped, not kept.
    st.lists(st.lists(st.floats(-(2.0**119), 2.0**119, width=32), min_size=6, max_size=6), min_size=1, max_size=12),
    st.sampled_from([top_k(share=0.1), top_k(share=0.5), top_k_int8(share=0.3, block_size=4)]),
)
def test_nothing_is_lost_over_rounds(send, rounds, codec):
    state = codec.start(tensor(rounds[0]))
    received = torch.zeros(6, dtype=torch.float64)
    for values in rounds:
        decoded, _, state = send(codec, tensor(values), state)
        received += decoded["w"].double()
    wanted = torch.tensor(rounds, dtype=torch.float64)
    error = (received + state["w"].double() - wanted.sum(0)).abs()
    # A rounding of the sum and one of the difference a round; neither is larger than all that came in together.
    magnitude = wanted.abs().sum(0).clamp(min=TINY) + wanted.abs().sum() * (codec.name == "top_k_int8")
    assert (error <= len(rounds) * (magnitude * 2**-22 + 2 * TINY)).all()


def test_entries_that_wait_are_sent_in_time(send):
    codec = top_k(share=0.25)
    state = codec.start(tensor([0.0] * 4))
    received = torch.zeros(4)
    for _ in range(40):
        decoded, _, state = send(codec, tensor([4.0, 3.0, 2.0, 1.0]), state)
        received += decoded["w"]
    assert torch.equal(received + state["w"], torch.tensor([160.0, 120.0, 80.0, 40.0]))
    assert (received > 0).all()
    assert (state["w"] < 20).all()


def test_the_largest_are_sent_and_of_equal_ones_the_first(send):
    _, encoded, after = send(top_k(share=0.5), tensor([1.0, -3.0, 1.0, -1.0, 3.0, 0.5]))
    assert encoded["w|index"].tolist() == [0, 1, 4]
    assert encoded["w|index"].dtype == torch.int32
    assert encoded["w"].tolist() == [1.0, -3.0, 3.0]
    assert after["w"].tolist() == [0.0, 0.0, 1.0, -1.0, 0.0, 0.5]


def test_of_each_tensor_at_least_one_entry_is_sent(send):
    _, encoded, _ = send(top_k(share=0.01), {"a": torch.randn(3), "b": torch.tensor(2.0), "c": torch.zeros(0)})
    assert [encoded[f"{name}|index"].numel() for name in "abc"] == [1, 1, 0]


@pytest.mark.parametrize("codec", [top_k(share=0.3), top_k_int8(share=0.3)])
@pytest.mark.parametrize(
    "index", [[0, 1, 10], [-1, 1, 2], [1, 1, 2], [2, 1, 3], [0, 2, 2], [0, 1, 2**31 - 1], [-(2**31), 0, 1]]
)
def test_indices_out_of_range_repeated_or_out_of_order_are_refused(send, codec, index):
    _, encoded, _ = send(codec, {"w": torch.randn(10)})
    encoded["w|index"] = torch.tensor(index, dtype=torch.int32)
    with pytest.raises(UpdateRefused, match=r"must rise and lie in 0\.\.9"):
        codec.decode(encoded, {"w": torch.Size([10])})


@pytest.mark.parametrize(
    "state", [{}, {"v": torch.zeros(4)}, {"w": torch.zeros(5)}, {"w": torch.zeros(4, dtype=torch.float64)}]
)
def test_error_feedback_of_other_tensors_is_refused(state):
    with pytest.raises(UpdateRefused, match="error feedback of codec=top_k"):
        top_k().encode({"w": torch.randn(4)}, state, 0)
