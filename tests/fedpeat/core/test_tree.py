import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.core import (
    UpdateRefused,
    add,
    all_finite,
    check_like,
    clip,
    count_bytes,
    digest,
    norm,
    subtract,
    zeros_like,
)

ONE = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}
TWO = {"b": torch.tensor([[1.0]]), "a": torch.tensor([0.5, 0.5])}


def test_arithmetic_is_by_name_whatever_the_order():
    assert torch.equal(add(ONE, TWO)["b"], torch.tensor([[4.0]]))
    assert torch.equal(subtract(ONE, TWO)["a"], torch.tensor([0.5, 1.5]))
    assert float(zeros_like(ONE)["a"].sum()) == 0
    assert norm({"x": torch.tensor([3.0]), "y": torch.tensor([4.0])}) == pytest.approx(5)


def test_clipping_keeps_the_direction_and_what_is_short_enough():
    tensors = {"x": torch.tensor([3.0]), "y": torch.tensor([[0.0], [4.0]])}
    short, cut = clip(tensors, 5.0)
    assert not cut
    assert all(torch.equal(short[name], tensors[name]) for name in tensors)
    short, cut = clip(tensors, 0.5)
    assert cut
    torch.testing.assert_close(short, {name: tensor / 10 for name, tensor in tensors.items()})
    huge, _ = clip({"x": torch.full((9,), 3e38)}, 3.0)
    torch.testing.assert_close(huge["x"], torch.ones(9))


def test_bytes_are_the_sum_over_tensors():
    assert count_bytes({"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16)}) == 3 * 5 * 4 + 7 * 2


@given(st.permutations(["a", "b", "c"]), st.floats(-1, 1, width=32))
def test_digest_ignores_order_and_sees_every_bit(order, value):
    tensors = {name: torch.full((2,), value) for name in "abc"}
    assert digest({name: tensors[name] for name in order}) == digest(tensors)
    changed = {**tensors, "b": torch.nextafter(tensors["b"], torch.tensor(9.0))}
    assert digest(changed) != digest(tensors)
    assert digest({"a": torch.zeros(2, 3)}) != digest({"a": torch.zeros(3, 2)})


def test_not_finite_is_seen():
    assert all_finite(ONE)
    assert not all_finite({"a": torch.tensor([1.0, float("nan")])})
    assert not all_finite({"a": torch.tensor([float("inf")])})


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a": ONE["a"]}, "missing: b"),
        ({**ONE, "c": ONE["a"]}, "unknown: c"),
        ({**ONE, "a": torch.zeros(3)}, "(3,)"),
        ({**ONE, "a": ONE["a"].double()}, "float64"),
    ],
)
def test_a_mismatch_is_told_with_both_sides(tensors, words):
    check_like(ONE, TWO, what="the update")
    with pytest.raises(UpdateRefused, match="the update") as caught:
        check_like(tensors, ONE, what="the update")
    assert words in str(caught.value)


def test_an_empty_tensor_from_numpy_has_a_digest():
    empty = torch.from_numpy(np.empty((0,), dtype=np.float32))
    assert digest({"w": empty}) == digest({"w": torch.zeros(0)}) != digest({"v": empty})
