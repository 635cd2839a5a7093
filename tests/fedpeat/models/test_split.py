import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.core import ConfigError
from fedpeat.models import Split, make_split


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 60))
def test_ends_divide_all_blocks(count, first, last):
    if first + last > count or first + last == 0:
        with pytest.raises(ConfigError):
            make_split(count, first=first, last=last)
        return
    split = make_split(count, first=first, last=last)
    assert sorted(split.adapter + split.middle) == list(range(count))
    assert split.adapter == (*range(first), *range(count - last, count))
    assert split.count == count


def test_any_list_in_any_order():
    assert make_split(6, blocks=[5, 0, 2]) == Split((0, 2, 5), (1, 3, 4))
    assert make_split(3, blocks="all") == Split((0, 1, 2), ())


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"first": 3, "last": 2}, r"first 3 and last 2 .* has 4 blocks; .*model.split.first \+ model.split.last <= 4"),
        ({"first": 0, "last": 0}, "no block is the adapter"),
        ({"first": -1}, "0 or more"),
        ({"blocks": []}, "no block is the adapter"),
        ({"blocks": [4]}, "4 is none of the model's 4 blocks; list each index from 0 to 3"),
        ({"blocks": [-1]}, "-1 is none"),
        ({"blocks": [1, 1]}, "stands there twice"),
        ({"blocks": [True]}, "True is none"),
        ({"blocks": "al"}, "or 'all'"),
    ],
)
def test_what_cannot_be_split(wish, message):
    with pytest.raises(ConfigError, match=message):
        make_split(4, **wish)
