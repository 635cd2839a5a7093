"""Scores against their definitions, written down slowly."""

import math

import pytest
import torch

from fedpeat.emulators import (
    Blocks,
    ablation,
    angular_distance,
    block_influence,
    gradient,
    stand_in,
)
from fedpeat.emulators.blocks import Block
from fedpeat.emulators.selection.measures import mean_cosine
from fedpeat.models import find_blocks, make_split

FAMILIES = ("gpt2", "opt", "llama", "qwen3", "gemma2")


@pytest.fixture(params=FAMILIES)
def five(request):
    return request.param


def without(loaded, split, index):
    """The full model, rebuilt without one block."""
    stack = find_blocks(loaded.model).of(loaded.model)
    rest = tuple(Block(place, stack[place]) for place in split.middle if place != index)
    return stand_in(loaded.model, split, Blocks(rest))


def row_by_row(context):
    """The states of each row alone, without its padding: `(blocks + 1, tokens, width)`, as the model tells them."""
    mask = context.rows.get("attention_mask", torch.ones_like(context.rows["input_ids"])).bool()
    for ids, real in zip(context.rows["input_ids"], mask, strict=True):
        with torch.no_grad():
            states = context.model(input_ids=ids[real][None], output_hidden_states=True, use_cache=False).hidden_states
        yield torch.stack(states)[:, 0].double()


def cos(one, other):
    return torch.nn.functional.cosine_similarity(one, other, dim=-1)


def test_block_influence_against_its_definition(five, miniature, make_context, kept_by):
    loaded = miniature(five, blocks=6)
    context = make_context(loaded, padded=True)
    kept, note = kept_by(block_influence(kept_blocks=2), context)
    expected = {}
    for block in (1, 2, 3, 4):
        cosines = torch.cat([cos(states[block], states[block + 1]) for states in row_by_row(context)])
        expected[str(block)] = 1 - float(cosines.mean())
    assert note["scores"] == pytest.approx(expected, abs=1e-5)
    assert kept == sorted(sorted((1, 2, 3, 4), key=lambda block: -expected[str(block)])[:2])
    assert note == {
        "builder": "block_influence",
        "what": "score",
        "unit": "1 - cosine",
        "higher_stays": True,
        "scores": note["scores"],
        "kept": kept,
        "dropped": sorted({1, 2, 3, 4} - set(kept)),
    }


@pytest.mark.parametrize(
    ("family_of_blocks", "tokens", "padded"),
    [(name, tokens, True) for name in FAMILIES for tokens in ("last", "all")] + [("llama", "last", False)],
)
def test_angular_distance_against_its_definition(family_of_blocks, tokens, padded, miniature, make_context, kept_by):
    loaded = miniature(family_of_blocks, blocks=7)
    context = make_context(loaded, padded=padded)
    kept, note = kept_by(angular_distance(kept_blocks=3, tokens=tokens), context)
    expected = {}
    for start in (1, 2, 3, 4):
        places = slice(-1, None) if tokens == "last" else slice(None)
        pairs = [(states[start, places], states[start + 2, places]) for states in row_by_row(context)]
        angles = torch.cat([cos(*pair).clamp(-1, 1).arccos() / math.pi for pair in pairs])
        expected[str(start)] = float(angles.mean())
    assert note["scores"] == pytest.approx(expected, abs=1e-5)
    start = min((1, 2, 3, 4), key=lambda block: expected[str(block)])
    assert note["dropped"] == [start, start + 1]
    assert kept == note["kept"] == [block for block in range(1, 6) if block not in note["dropped"]]
    assert (note["what"], note["unit"], note["length"], note["higher_stays"]) == ("run", "half turns", 2, True)


def test_angular_distance_with_a_spread_out_adapter(miniature, make_context, kept_by):
    loaded = miniature("llama", blocks=8)
    context = make_context(loaded, split=make_split(8, blocks=[0, 3, 7]))
    kept, note = kept_by(angular_distance(kept_blocks=2, tokens="all"), context)

    def distance(start, end):
        angles = [cos(states[start], states[end]).clamp(-1, 1).arccos() / math.pi for states in row_by_row(context)]
        return float(torch.cat(angles).mean())

    # The middle is 1, 2, 4, 5, 6: runs of three are 1-2 and 4, 2 and 4-5, 4-6.
    expected = {"1": distance(1, 3) + distance(4, 5), "2": distance(2, 3) + distance(4, 6), "4": distance(4, 7)}
    assert note["scores"] == pytest.approx(expected, abs=1e-5)
    assert kept == {"1": [5, 6], "2": [1, 6], "4": [1, 2]}[min(expected, key=lambda start: expected[start])]


def test_ablation_against_models_without_the_block(five, miniature, make_context, kept_by):
    loaded = miniature(five, blocks=6)
    context = make_context(loaded)
    kept, note = kept_by(ablation(kept_blocks=2), context)
    with torch.no_grad():
        whole = loaded.model(**context.rows).loss
        losses = {index: without(loaded, context.split, index).model(**context.rows).loss for index in (1, 2, 3, 4)}
    expected = {str(index): float(loss - whole) for index, loss in losses.items()}
    assert note["scores"] == pytest.approx(expected, abs=1e-5)
    assert kept == sorted(sorted((1, 2, 3, 4), key=lambda block: -expected[str(block)])[:2])
    assert note["unit"] == "nats/token"


def test_ablation_weighs_tokens_alike(miniature, make_context, kept_by):
    loaded = miniature("llama", blocks=4)
    context = make_context(loaded, padded=True)
    _, note = kept_by(ablation(kept_blocks=1), context)
    with torch.no_grad():
        whole = loaded.model(**context.rows).loss
        thinned = without(loaded, context.split, 2).model(**context.rows).loss
    assert note["scores"]["2"] == pytest.approx(float(thinned - whole), abs=1e-5)


def adapter_gradients(model, layers, rows):
    """The gradient of each of some blocks as one vector, by plain autograd."""
    model.requires_grad_(True)
    model.zero_grad()
    model(**rows).loss.backward()
    vectors = [torch.cat([one.grad.flatten() for one in layer.parameters()]).double() for layer in layers]
    model.zero_grad()
    model.requires_grad_(False)
    return vectors


@pytest.mark.parametrize(
    ("family_of_blocks", "adapter"),
    [(name, [0, 5]) for name in FAMILIES] + [("llama", [4, 5]), ("gpt2", [0, 3])],
)
def test_gradient_against_plain_autograd(family_of_blocks, adapter, miniature, make_context, kept_by):
    loaded = miniature(family_of_blocks, blocks=6)
    split = make_split(6, blocks=adapter)
    context = make_context(loaded, split=split)
    kept, note = kept_by(gradient(kept_blocks=2), context)
    stack = find_blocks(loaded.model).of(loaded.model)
    whole = adapter_gradients(loaded.model, [stack[index] for index in adapter], context.rows)
    expected = {}
    for index in split.middle:
        thinned = without(loaded, split, index)
        layers = [thinned.model.get_submodule(f"{thinned.path}.{place}") for place in thinned.adapter_positions]
        pairs = zip(whole, adapter_gradients(thinned.model, layers, context.rows), strict=True)
        expected[str(index)] = 1 - sum(float(cos(*pair)) for pair in pairs) / len(adapter)
    assert note["scores"] == pytest.approx(expected, abs=1e-5)
    assert kept == sorted(sorted(split.middle, key=lambda block: -expected[str(block)])[:2])


def test_a_gradient_that_vanishes():
    zero, one = {0: [torch.zeros(2)]}, {0: [torch.tensor([3.0, 4.0])]}
    assert [mean_cosine(*pair) for pair in ((zero, zero), (zero, one), (one, zero), (one, one))] == [1, 0, 0, 1]
