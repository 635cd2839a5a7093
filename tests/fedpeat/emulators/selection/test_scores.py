import json
import math

import pytest
import torch

from fedpeat.bundles import build_emulated
from fedpeat.core import ConfigError, DataError, ModelError, digest
from fedpeat.emulators import (
    Blocks,
    BuildContext,
    ablation,
    angular_distance,
    block_influence,
    chain,
    gradient,
    make_emulator,
    stand_in,
    uniform,
)
from fedpeat.emulators.blocks import Block
from fedpeat.emulators.selection.measures import at_last, cosine
from fedpeat.models import find_blocks, make_split, model_tensors
from tests.bundles import bundled

FAMILIES = ("gpt2", "opt", "llama", "qwen3", "gemma2")
SCORED = {"block_influence": block_influence, "ablation": ablation, "gradient": gradient, "angular": angular_distance}


@pytest.fixture(params=FAMILIES)
def five(request):
    return request.param


@pytest.fixture(params=SCORED)
def scored(request):
    return SCORED[request.param]


@pytest.mark.parametrize("family_of_blocks", ["opt", "gemma2"])
def test_a_block_that_does_nothing_is_dropped(family_of_blocks, scored, miniature, make_context, kept_by, silence):
    loaded = miniature(family_of_blocks, blocks=6)
    silence(loaded, [3])
    kept, note = kept_by(scored(kept_blocks=3), make_context(loaded))
    assert note["scores"]["3"] == pytest.approx(0.0, abs=1e-7)
    if scored is not ablation:  # a random model may well be better without a block than with it
        assert (kept, note["dropped"]) == ([1, 2, 4], [3])


def test_a_model_misses_the_blocks_that_it_was_taught(miniature, make_context, kept_by):
    loaded = miniature("gpt2", blocks=6)
    context = make_context(loaded)
    taught = find_blocks(loaded.model).of(loaded.model)[2].requires_grad_(True)
    optimizer = torch.optim.Adam(taught.parameters(), lr=0.01)
    for _ in range(10):
        optimizer.zero_grad()
        loaded.model(**context.rows).loss.backward()
        optimizer.step()
    _, note = kept_by(ablation(kept_blocks=1), context)
    assert note["kept"] == [2]
    assert note["scores"]["2"] > 0.1


def test_a_run_that_does_nothing_is_dropped(five, miniature, make_context, kept_by, silence):
    loaded = miniature(five, blocks=8)
    silence(loaded, [3, 4, 5])
    for tokens in ("last", "all"):
        kept, note = kept_by(angular_distance(kept_blocks=3, tokens=tokens), make_context(loaded))
        assert kept == [1, 2, 6]
        assert note["scores"]["3"] == pytest.approx(0.0, abs=1e-7)


def test_of_equals_the_earlier_stays_and_the_earlier_run_goes(scored, miniature, make_context, kept_by, silence):
    loaded = miniature("llama", blocks=7)
    silence(loaded, [1, 2, 3, 4, 5])
    kept, note = kept_by(scored(kept_blocks=2), make_context(loaded))
    assert len(set(note["scores"].values())) == 1
    assert kept == ([4, 5] if note["what"] == "run" else [1, 2])


def test_whole_middles_and_one_block(scored, miniature, make_context, kept_by):
    loaded = miniature("gpt2", blocks=5)
    context = make_context(loaded)
    kept, note = kept_by(scored(kept_blocks=3), context)
    assert (kept, note["dropped"]) == ([1, 2, 3], [])
    assert len(kept_by(scored(kept_blocks=1), context)[0]) == 1


def test_after_another_builder_only_what_is_left_is_scored(scored, miniature, make_context, kept_by, tmp_path):
    loaded = miniature("llama", blocks=9)
    both = chain(stages={"thin": uniform(kept_blocks=4), "choose": scored(kept_blocks=2)})
    context = make_context(loaded, cache=tmp_path)
    kept_by(scored(kept_blocks=5), context)  # whose scores are of other blocks, but runs as long
    kept, note = kept_by(both, context)
    thinned = {1, 3, 5, 7}
    assert set(kept) | set(note["dropped"]) == thinned
    assert set(note["scores"]) == {str(place) for place in ((1, 3, 5) if note["what"] == "run" else thinned)}


def test_scores_are_worked_out_once(scored, miniature, make_context, kept_by, count_passes, tmp_path):
    loaded = miniature("gpt2", blocks=6)
    passes = count_passes(loaded.model)
    context = make_context(loaded, cache=tmp_path)
    first = kept_by(scored(kept_blocks=2), context)
    once = len(passes)
    assert once in {2, 2 * 5}  # two batches; for each block, or all blocks at once
    assert kept_by(scored(kept_blocks=2), make_context(loaded, cache=tmp_path)) == first
    assert len(passes) == once
    (path,) = tmp_path.glob("*/value.json")
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    assert kept_by(scored(kept_blocks=2), context) == first
    assert len(passes) == 2 * once
    assert json.loads(path.read_text(encoding="utf-8"))["key"]["what"] == first[1]["builder"]
    # Another text is another result; so is another model.
    other = kept_by(scored(kept_blocks=2), make_context(loaded, cache=tmp_path, seed=1))
    assert len(passes) == 3 * once
    assert other[1]["scores"] != first[1]["scores"]
    with torch.no_grad():
        loaded.model.transformer.h[2].ln_1.weight.add_(1.0)
    assert kept_by(scored(kept_blocks=2), make_context(loaded, cache=tmp_path))[1] != first[1]
    assert len(passes) == 4 * once


def test_another_number_of_kept_blocks_needs_no_other_scores(miniature, make_context, kept_by, count_passes, tmp_path):
    loaded = miniature("gpt2", blocks=6)
    passes = count_passes(loaded.model)
    context = make_context(loaded, cache=tmp_path)
    for builder in (block_influence, ablation, gradient):
        _, note = kept_by(builder(kept_blocks=1), context)
        before = len(passes)
        assert kept_by(builder(kept_blocks=3), context)[1]["scores"] == note["scores"]
        assert len(passes) == before
    # Runs of another length have distances of their own, and so have other tokens.
    kept_by(angular_distance(kept_blocks=1), context)
    for more in ({"kept_blocks": 2}, {"kept_blocks": 2, "tokens": "all"}):
        before = len(passes)
        kept_by(angular_distance(**more), context)
        assert len(passes) > before


def test_the_model_is_left_as_it_was(scored, miniature, make_context, kept_by):
    loaded = miniature("llama", blocks=5)
    model = loaded.model
    context = make_context(loaded)
    # Flags, modes and gradients as nobody would set them.
    model.train()
    model.model.layers[2].eval()
    for position, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(position % 3 == 0)
        if position % 6 == 0:
            parameter.grad = torch.full_like(parameter, 7.0)

    def state():
        return (
            digest({name: tensor for name, tensor, _ in model_tensors(model)}),
            [(one.requires_grad, None if one.grad is None else float(one.grad.mean())) for one in model.parameters()],
            [
                (module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
                for module in model.modules()
            ],
        )

    before = state()
    with torch.inference_mode(False), torch.set_grad_enabled(False):
        kept_by(scored(kept_blocks=2), context)
        assert not torch.is_grad_enabled()
    assert state() == before


def test_a_model_in_training_is_scored_without_dropout(scored, miniature, make_context, kept_by):
    loaded = miniature("gpt2", blocks=5, resid_pdrop=0.5)
    expected = kept_by(scored(kept_blocks=2), make_context(loaded))
    loaded.model.train()
    assert kept_by(scored(kept_blocks=2), make_context(loaded)) == expected


def test_progress_and_its_text(scored, miniature, make_context, kept_by):
    told = []
    loaded = miniature("gpt2", blocks=5)
    context = make_context(loaded, tell=lambda text, share: told.append((text, share)))
    _, note = kept_by(scored(kept_blocks=2), context)
    assert {text for text, _ in told} == {f"scoring blocks: {note['builder']}"}
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)


def test_only_some_rows_are_used(scored, miniature, make_context, kept_by):
    loaded = miniature("gpt2", blocks=5)
    context = make_context(loaded, rows=5)
    fewer = BuildContext(
        loaded.model, context.split, {name: tensor[[0, 2, 4]] for name, tensor in context.rows.items()}, batch_size=4
    )
    some = kept_by(scored(kept_blocks=2, rows=3), context)
    assert some == kept_by(scored(kept_blocks=2), fewer)
    assert some[1] != kept_by(scored(kept_blocks=2), context)[1]


def test_without_public_text(scored, miniature):
    loaded = miniature("gpt2", blocks=5)
    with pytest.raises(ConfigError, match=r"needs public text on the server; .*; set data\.public_share"):
        make_emulator(loaded, split=make_split(5, first=1, last=1), builder=scored(kept_blocks=2))
    with pytest.raises(ConfigError, match="no full model came with the blocks"):
        scored(kept_blocks=1)(Blocks((Block(0, torch.nn.Identity()), Block(1, torch.nn.Identity()))))


def test_numbers_that_make_no_sense(scored, miniature, make_context, kept_by):
    with pytest.raises(ConfigError, match=r"use emulator=uniform emulator\.kept_blocks=0"):
        scored(kept_blocks=0)
    with pytest.raises(ConfigError, match=r"cannot score blocks on 0 public rows; .*; set emulator\.rows >= 1"):
        scored(kept_blocks=1, rows=0)
    loaded = miniature("gpt2", blocks=5)
    with pytest.raises(ConfigError, match="cannot keep 4 middle blocks; there are 3"):
        kept_by(scored(kept_blocks=4), make_context(loaded))
    with pytest.raises(ConfigError, match="did you mean 'last'"):
        angular_distance(kept_blocks=1, tokens="lst")


@pytest.mark.parametrize("builder", [ablation, gradient])
def test_text_without_labels(builder, miniature, make_context, kept_by):
    loaded = miniature("gpt2", blocks=5)
    context = make_context(loaded)
    context.rows["labels"].fill_(-100)
    with pytest.raises(DataError, match="cannot score blocks without tokens"):
        kept_by(builder(kept_blocks=2), context)


def test_a_model_that_overflows(scored, miniature, make_context, kept_by, tmp_path):
    loaded = miniature("llama", blocks=5)
    with torch.no_grad():
        loaded.model.model.layers[2].mlp.down_proj.weight.fill_(math.inf)
    with pytest.raises(ModelError, match=r"the score of block \d is nan"):
        kept_by(scored(kept_blocks=2), make_context(loaded, cache=tmp_path))
    assert not list(tmp_path.iterdir())


def test_in_half_precision(scored, miniature, make_context, kept_by, silence):
    loaded = miniature("llama", blocks=5, dtype="bfloat16")
    silence(loaded, [2])
    kept, note = kept_by(scored(kept_blocks=2), make_context(loaded))
    assert note["scores"]["2"] == pytest.approx(0.0, abs=1e-7)
    assert kept == [1, 3] or scored is ablation


def test_a_bundle_of_scored_blocks(miniature, make_context, tmp_path):
    loaded = miniature("qwen3", blocks=6)
    context = make_context(loaded)
    bundle = bundled(
        loaded, split=context.split, builder=block_influence(kept_blocks=2), folder=tmp_path, context=context
    )
    emulator = make_emulator(loaded, split=context.split, builder=block_influence(kept_blocks=2), context=context)
    expected = stand_in(loaded.model, context.split, emulator)
    built = build_emulated(bundle)
    assert built.sources == expected.sources
    with torch.no_grad():
        assert torch.equal(built.model(**context.rows).logits, expected.model(**context.rows).logits)
    assert "scores" not in json.dumps(bundle.manifest)  # notes stay with the server


def test_a_row_of_padding_counts_nowhere(miniature, make_context, kept_by):
    loaded = miniature("llama", blocks=5)
    context = make_context(loaded, rows=4, padded=True)
    empty = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in context.rows.items()}
    empty["attention_mask"][-1] = 0
    more = BuildContext(loaded.model, context.split, empty, batch_size=5)
    for builder in (angular_distance, block_influence):
        _, expected = kept_by(builder(kept_blocks=2), context)
        _, found = kept_by(builder(kept_blocks=2), more)
        assert found["scores"] == pytest.approx(expected["scores"], abs=1e-6)


def test_small_parts():
    states = torch.arange(12.0).view(2, 3, 2)
    real = torch.tensor([[False, True, False], [False, False, False]])
    assert at_last(states, real).tolist() == [[2.0, 3.0], [6.0, 7.0]]
    tiny = torch.tensor([[1e-30, 0.0]])
    assert float(cosine(tiny, tiny)) == 1.0  # its square is no fp32 number
