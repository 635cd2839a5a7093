import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.control import Menu, Pair
from fedpeat.core import ConfigError

PAIRS = (Pair("a", 2), Pair("a", 8), Pair("b", None))


@st.composite
def menus(draw):
    pairs = draw(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4)), min_size=1, max_size=5, unique=True))
    steps = draw(st.lists(st.integers(1, 50), min_size=1, max_size=3, unique=True))
    shares = draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=1, max_size=3, unique=True))
    return Menu(tuple(Pair(*pair) for pair in pairs), tuple(steps), tuple(shares), draw(st.booleans()))


def bits(draw, *shape):
    size = int(np.prod(shape))
    return np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size))).reshape(shape)


@given(st.data(), menus(), st.integers(1, 4))
def test_masks_are_never_empty_and_close_what_does_not_fit(data, menu, devices):
    fits = bits(data.draw, devices, len(menu.pairs))
    available = bits(data.draw, devices)
    pairs, steps, shares = menu.masks(fits, available)
    for mask in (pairs, steps, shares):
        assert mask[:, 0].all()
    assert (pairs[:, 1:] == (fits & available[:, None])).all()
    able = pairs[:, 1:].any(1)
    assert (steps[:, 1:] == able[:, None]).all()
    assert (shares[:, 1:] == able[:, None]).all()
    flat, branches = menu.flat_mask(fits, available), menu.branches(devices)
    assert flat.shape == (branches.sum(),)
    ends = np.cumsum(branches)
    assert all(flat[end - size : end].any() for end, size in zip(ends, branches, strict=True))
    assert flat[: menu.levels[0]].tolist() == pairs[0].tolist()
    assert flat[-branches[-1] :].all()


@given(st.data(), menus(), st.integers(1, 3))
def test_masks_of_several_environments_are_those_of_each(data, menu, devices):
    fits, available = bits(data.draw, devices, len(menu.pairs)), bits(data.draw, 2, devices)
    both = menu.flat_mask(fits, available)
    assert [row.tolist() for row in both] == [menu.flat_mask(fits, one).tolist() for one in available]


def test_a_flat_action_is_device_by_device():
    levels, refresh = Menu(PAIRS, (1, 2), refresh=True).split(np.array([3, 1, 0, 0, 0, 0, 1]))
    assert levels.tolist() == [[3, 1, 0], [0, 0, 0]]
    assert refresh == 1


def test_options_name_staying_out_once():
    options = Menu(PAIRS, (1, 2), (1.0, 2.0)).options([1, 3]).tolist()
    assert len(options) == 1 + 2 * 2 * 2 == len({tuple(option) for option in options})
    assert options[0] == [0, 0, 0]
    assert {option[0] for option in options} == {0, 1, 3}


def test_emulators_come_in_the_order_of_the_pairs():
    assert Menu(PAIRS, (1,)).emulators == ("a", "b")


@pytest.mark.parametrize(
    ("levels", "key"),
    [
        ({"pairs": ()}, "pairs"),
        ({"steps": (0, 2)}, "steps"),
        ({"steps": (2, 2)}, "steps"),
        ({"shares": (1.0, -1.0)}, "shares"),
        ({"shares": (float("nan"),)}, "shares"),
    ],
)
def test_levels_are_checked(levels, key):
    with pytest.raises(ConfigError, match=rf"control\.menu\.{key}"):
        Menu(**{"pairs": PAIRS, "steps": (1,), **levels})
