"""What Flower's own classes remember, kept as tensors."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from fedpeat.core import (
    EngineError,
    read_tensors,
    with_prefix,
    without_prefix,
    write_tensors,
)
from strategies.stock import recall, remember


def as_dict(value):
    if isinstance(value, ArrayRecord):
        return {key: array.numpy() for key, array in value.items()}
    return dict(enumerate(value)) if isinstance(value, list) else value


def record_of(arrays):
    return ArrayRecord({key: Array(np.asarray(value)) for key, value in arrays.items()})


ARRAYS = arrays_of.arrays(
    st.sampled_from([np.float32, np.float64, np.int64]), arrays_of.array_shapes(min_dims=0, max_side=3)
)
KEYS = st.text("abz.|_0", min_size=1, max_size=6)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    ARRAYS,
    st.dictionaries(KEYS, ARRAYS, max_size=3),
    st.lists(ARRAYS, max_size=12),
    st.dictionaries(KEYS, ARRAYS, max_size=3).map(record_of),
)


def flat(value):
    """A value as one that `==` compares by type, order and bits."""
    if isinstance(value, ArrayRecord | dict):
        return type(value).__name__, [(key, flat(as_dict(value)[key])) for key in sorted(value)]
    if isinstance(value, list):
        return "list", [flat(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    return type(value), np.float64(value).tobytes() if isinstance(value, float) else value


@given(st.dictionaries(st.sampled_from(["m_t", "v_t", "count", "last"]), VALUES))
@settings(max_examples=50, deadline=None)
def test_any_state_of_arrays_and_numbers_comes_back_to_the_bit(tmp_path_factory, attributes):
    path = tmp_path_factory.getbasetemp() / "memory"
    write_tensors(path, with_prefix("reducer|", remember(attributes, {})))
    back = recall(without_prefix("reducer|", read_tensors(path)))
    assert {key: flat(value) for key, value in back.items()} == {key: flat(value) for key, value in attributes.items()}


def test_settings_are_no_state_but_changed_ones_are():
    fresh = {"eta": 0.1, "rounds": 0, "name": "x", "m_t": None}
    assert remember(fresh, fresh) == {}
    assert recall(remember({**fresh, "rounds": 1, "m_t": {}}, fresh)) == {"rounds": 1, "m_t": {}}
    assert recall(remember({"m_t": None}, {"m_t": 1.5})) == {"m_t": None}


def test_what_comes_back_is_a_copy():
    memory = remember({"m_t": {"w": np.zeros(2)}, "last": np.zeros(2)}, {})
    attributes = recall(memory)
    attributes["m_t"]["w"] += 1
    attributes["last"] += 1
    assert not any(tensor.any() for tensor in memory.values())


@pytest.mark.parametrize(
    "value", ["changed", {"w": 1.0}, [object()], {1: np.ones(1)}, {1, 2}, np.array(["a"]), 2**70, b"x"]
)
def test_state_that_is_no_tensor_is_told(value):
    with pytest.raises(EngineError, match="cannot checkpoint 'odd'"):
        remember({"odd": value}, {"odd": "fresh"})
