from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedpeat.core import ConfigError
from fedpeat.emulators import Block, Blocks, uniform, write_bundle
from fedpeat.emulators.select import uniform_positions
from fedpeat.models import make_split


@given(st.integers(1, 200), st.data())
def test_uniform_is_even(middle, data):
    kept = data.draw(st.integers(0, middle))
    chosen = uniform_positions(middle, kept)
    assert len(set(chosen)) == len(chosen) == kept
    assert list(chosen) == sorted(chosen)
    assert all(0 <= position < middle for position in chosen)
    if kept >= 2:
        assert (chosen[0], chosen[-1]) == (0, middle - 1)
        # Against exact arithmetic: no position is off by float rounding.
        assert list(chosen) == [round(Fraction(i * (middle - 1), kept - 1)) for i in range(kept)]
    if kept == 1:
        assert chosen == ((middle - 1) // 2,)
    if kept == middle:
        assert chosen == tuple(range(middle))


def test_an_empty_middle_is_allowed():
    assert uniform(kept_blocks=0)(Blocks(())).blocks == ()


def test_too_many_kept_blocks_are_told_with_the_split(miniature, tmp_path):
    loaded = miniature("gpt2", blocks=6)
    message = (
        "cannot keep 14 of 2 middle blocks (GPT2LMHeadModel, split 2+2 of 6); "
        "set emulator.kept_blocks <= 2 or shrink model.split"
    )
    with pytest.raises(ConfigError) as caught:
        write_bundle(loaded, split=make_split(6), builder=uniform(kept_blocks=14), folder=tmp_path)
    assert str(caught.value) == message
    assert not list(tmp_path.iterdir())


def test_too_many_of_an_unnamed_row():
    with pytest.raises(ConfigError, match="cannot keep 2 of 1 middle blocks; set"):
        uniform(kept_blocks=2)(Blocks((Block(0, nn.Identity()),)))


def test_a_negative_number():
    with pytest.raises(ConfigError, match="kept_blocks >= 0"):
        uniform(kept_blocks=-1)
