from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedpeat.core import ConfigError
from fedpeat.emulators import (
    Block,
    Blocks,
    BuildContext,
    first,
    last,
    listed,
    make_emulator,
    middle_out,
    random_blocks,
    uniform,
)
from fedpeat.emulators.selection.rules import between_adapters, uniform_positions
from fedpeat.models import make_split
from tests.bundles import bundled

EMPTY = "use emulator=uniform emulator.kept_blocks=0 for an empty middle"


def row(*places, **more):
    return Blocks(tuple(Block(place, nn.Identity()) for place in places), **more)


def sources(blocks):
    return [block.source for block in blocks.blocks]


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
        "cannot keep 14 middle blocks; there are 2 (GPT2LMHeadModel, split 2+2 of 6); "
        "set emulator.kept_blocks <= 2, or shrink model.split"
    )
    with pytest.raises(ConfigError) as caught:
        bundled(loaded, split=make_split(6), builder=uniform(kept_blocks=14), folder=tmp_path)
    assert str(caught.value) == message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rule", [uniform, first, last, middle_out, random_blocks])
def test_too_many_of_an_unnamed_row(rule):
    with pytest.raises(ConfigError, match=r"cannot keep 2 middle blocks; there are 1; set emulator\.kept_blocks <= 1"):
        rule(kept_blocks=2)(row(0))
    with pytest.raises(ConfigError, match=f"there are 0; {EMPTY}"):
        rule(kept_blocks=1)(row())


def test_a_negative_number():
    with pytest.raises(ConfigError, match="kept_blocks >= 0"):
        uniform(kept_blocks=-1)


@pytest.mark.parametrize("kept", [0, -1])
@pytest.mark.parametrize("rule", [first, last, middle_out, random_blocks])
def test_only_uniform_keeps_none(rule, kept):
    with pytest.raises(ConfigError, match=f"cannot keep {kept} middle blocks; .*; {EMPTY}"):
        rule(kept_blocks=kept)


@given(st.lists(st.integers(0, 60), min_size=1, unique=True), st.data())
def test_the_ends(places, data):
    places = sorted(places)
    kept = data.draw(st.integers(1, len(places)))
    assert sources(first(kept_blocks=kept)(row(*places))) == places[:kept]
    assert sources(last(kept_blocks=kept)(row(*places))) == places[-kept:]


@given(st.integers(1, 40), st.data())
def test_the_centre_grows_from_the_middle_out(middle, data):
    kept = data.draw(st.integers(1, middle))
    chosen = sources(middle_out(kept_blocks=kept)(row(*range(middle))))
    # Step by step: the nearest block to the centre that is not yet there, the earlier of two.
    grown = []
    for _ in range(kept):
        distances = {
            abs(Fraction(middle - 1, 2) - place): place for place in range(middle - 1, -1, -1) if place not in grown
        }
        grown.append(distances[min(distances)])
    assert chosen == sorted(grown)
    assert chosen == list(range(chosen[0], chosen[0] + kept))


def test_the_centre_of_places_is_by_position():
    assert sources(middle_out(kept_blocks=2)(row(1, 2, 3, 20))) == [2, 3]


def test_random_blocks_follow_the_seed(miniature):
    loaded = miniature("gpt2", blocks=12)
    split = make_split(12, first=1, last=1)

    def kept(seed=None, run=0, count=4):
        context = BuildContext(loaded.model, split, seed=run)
        builder = random_blocks(kept_blocks=count, seed=seed)
        return sources(make_emulator(loaded, split=split, builder=builder, context=context))

    assert kept(seed=3) == kept(seed=3, run=1) == sorted(kept(seed=3))
    assert kept(run=3) == kept(seed=3)
    assert len({tuple(kept(run=run)) for run in range(10)}) > 5
    assert set(kept(run=1, count=4)) < set(kept(run=1, count=5))
    assert kept(run=1, count=10) == list(split.middle)


def test_random_blocks_are_all_as_likely():
    middle = row(*range(6))
    counts = [0] * 6
    for seed in range(600):
        for source in sources(random_blocks(kept_blocks=2, seed=seed)(middle)):
            counts[source] += 1
    assert sum(counts) == 1200
    assert all(150 < count < 250 for count in counts), counts  # expected 200, standard deviation 12


def test_random_blocks_without_a_run_need_a_seed():
    with pytest.raises(ConfigError, match="emulator=random"):
        random_blocks(kept_blocks=1)(row(1, 2))


def test_listed_blocks():
    builder = listed(blocks=(6, 3))
    assert sources(builder(row(2, 3, 5, 6))) == [3, 6]
    assert builder.describe() == {"name": "listed", "blocks": [3, 6]}
    assert builder.describe() == listed(blocks=[3, 6]).describe()


@pytest.mark.parametrize(
    ("blocks", "found"),
    [([], EMPTY), ([2, 2], "an index stands there twice"), ([2.0], "2.0 is no index"), ([True], "True is no index")],
)
def test_lists_that_are_refused(blocks, found):
    with pytest.raises(ConfigError, match=found) as caught:
        listed(blocks=blocks)
    assert caught.value.remedy


def test_listed_blocks_must_be_there(miniature):
    loaded = miniature("gpt2", blocks=6)
    split = make_split(6, blocks=[0, 3])

    def message(*blocks):
        with pytest.raises(ConfigError) as caught:
            make_emulator(loaded, split=split, builder=listed(blocks=blocks))
        return str(caught.value)

    origin = "of GPT2LMHeadModel, split at blocks [0, 3] of 6; choose from: 1, 2, 4, 5"
    assert message(1, 3) == f"cannot keep the middle blocks [1, 3]; block 3 is the adapter's {origin}"
    assert message(6, 1) == f"cannot keep the middle blocks [6, 1]; there is no block 6 in the middle {origin}"
    assert "there is no block -1 in the middle" in message(-1)
    with pytest.raises(ConfigError, match="there is no block 4 in the middle; choose from: 1"):
        listed(blocks=[4])(row(1))


@given(st.sets(st.integers(0, 20)))
def test_runs_between_adapters(adapter):
    middle = sorted(set(range(21)) - adapter)
    runs = between_adapters(middle, sorted(adapter))
    assert [place for run in runs for place in run] == middle
    assert all(run == list(range(run[0], run[-1] + 1)) for run in runs)
    assert len(runs) == sum(place - 1 not in middle for place in middle)
    # Blocks that were dropped before divide nothing.
    assert len(between_adapters(middle[::2], [])) == min(len(middle), 1)
