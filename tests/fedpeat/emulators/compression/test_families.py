"""Laws of all compressing builders, over families."""

import pytest
import torch

from fedpeat.bundles import build_emulated
from fedpeat.core import digest
from fedpeat.emulators import (
    Block,
    Blocks,
    Builder,
    chain,
    ffn_channels,
    int4,
    int8,
    low_rank,
    magnitude_pruning,
    make_emulator,
    stand_in,
    uniform,
)
from fedpeat.models import find_blocks, model_tensors
from tests.bundles import bundled

pytestmark = pytest.mark.usefixtures("one_thread")

BUILDERS = {
    "low_rank": low_rank(),
    "calibrated": low_rank(calibrated=True),
    "ffn_channels": ffn_channels(),
    "pruned": magnitude_pruning(stored="dense"),
    "sparse": magnitude_pruning(),
    "int8": int8(),
    "int4": int4(),
    "both": chain(stages={"fewer": ffn_channels(), "shrink": low_rank(), "store": int4()}),
}
SMALLER = [name for name in BUILDERS if name != "pruned"]


def tensors_of(model):
    return {name: tensor for name, tensor, _ in model_tensors(model)}


def emulated_from(made, builder, folder):
    return bundled(made.loaded, split=made.split, builder=builder, folder=folder, context=made.context)


@torch.no_grad()
@pytest.mark.parametrize("name", list(BUILDERS))
def test_a_model_from_the_bundle_has_the_same_bits(name, emulate, make_ids, tmp_path):
    check_bits(emulate("llama", BUILDERS[name]), BUILDERS[name], make_ids(), tmp_path)


@torch.no_grad()
def test_in_every_family(named_family, emulate, make_ids, tmp_path):
    check_bits(emulate(named_family, BUILDERS["both"]), BUILDERS["both"], make_ids(), tmp_path)
    check_bits(emulate(named_family, BUILDERS["sparse"]), BUILDERS["sparse"], make_ids(), tmp_path)


def check_bits(made, builder, ids, folder):
    view = build_emulated(emulated_from(made, builder, folder))
    assert digest(tensors_of(view.model)) == digest(tensors_of(made.view.model))
    logits = view.model(ids).logits
    assert torch.equal(logits, made.view.model(ids).logits)
    assert not torch.equal(logits, made.loaded.model(ids).logits)
    assert not any(parameter.requires_grad for parameter in view.model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", list(BUILDERS))
def test_in_bf16(name, emulate, make_ids, tmp_path):
    made = emulate("opt", BUILDERS[name], dtype="bfloat16")
    view = build_emulated(emulated_from(made, BUILDERS[name], tmp_path))
    logits = view.model(make_ids()).logits
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, made.view.model(make_ids()).logits)
    floats = {parameter.dtype for parameter in view.model.parameters() if parameter.is_floating_point()}
    assert floats == {torch.bfloat16}


@pytest.mark.parametrize("name", SMALLER)
def test_bundles_are_smaller_by_what_the_note_says(name, emulate, tmp_path):
    made = emulate("gemma2", BUILDERS[name])
    small, whole = (emulated_from(made, builder, tmp_path) for builder in (BUILDERS[name], uniform(kept_blocks=2)))
    notes = made.blocks.notes
    assert [note["what"] for note in notes] == ["compression"] * len(notes)
    assert whole.payload_bytes - small.payload_bytes == notes[0]["bytes_before"] - notes[-1]["bytes_after"] > 0
    assert small.file_bytes < whole.file_bytes
    assert 0 < notes[0]["error"] < 1


@torch.no_grad()
def test_generation_with_a_cache(named_family, emulate, make_ids):
    model = emulate(named_family, BUILDERS["both"]).view.model
    ids = make_ids(rows=1, tokens=5)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    texts = [model.generate(ids, use_cache=cache, **settings) for cache in (True, False)]
    assert texts[0].shape == (1, 9)
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_equal_inputs_give_equal_blocks_and_the_full_model_stays(name, emulate):
    made = emulate("phi", BUILDERS[name])
    before = digest(tensors_of(made.loaded.model))
    again = make_emulator(made.loaded, split=made.split, builder=BUILDERS[name], context=made.context)
    assert digest(tensors_of(made.loaded.model)) == before
    assert again.notes == made.blocks.notes
    own = {parameter.data_ptr() for parameter in made.loaded.model.parameters()}
    for one, other in zip(made.blocks.blocks, again.blocks, strict=True):
        assert one.changes == other.changes
        assert digest(tensors_of(one.module)) == digest(tensors_of(other.module))
        # Whoever trains these blocks later does not train the full model.
        assert not own & {parameter.data_ptr() for parameter in one.module.parameters()}
        assert not any(parameter.requires_grad for parameter in one.module.parameters())


def filling(blocks):
    """Block 1 in its own place and in that of block 2."""
    first = blocks.blocks[0]
    return blocks.having((first, Block(first.source, first.module, place=2)))


@pytest.mark.parametrize("name", list(BUILDERS))
def test_a_shared_block_is_changed_once(name, emulate, make_ids, tmp_path):
    sharing = chain(stages={"select": Builder("filling", {}, filling), "then": BUILDERS[name]})
    made = emulate("llama", sharing)
    one, other = made.blocks.blocks
    assert one.module is other.module
    assert one.changes == other.changes
    assert (one.place, other.place) == (1, 2)
    alone = emulate("llama", chain(stages={"select": uniform(kept_blocks=1), "then": BUILDERS[name]})).blocks
    for key in ("parameters_before", "parameters_after", "bytes_before", "bytes_after"):
        assert [note[key] for note in made.blocks.notes] == [note[key] for note in alone.notes]
    view = build_emulated(emulated_from(made, sharing, tmp_path))
    assert view.sources == (0, 1, 1, 3)
    with torch.no_grad():
        assert torch.equal(view.model(make_ids()).logits, made.view.model(make_ids()).logits)


def test_what_is_told_on_the_way(emulate):
    made = emulate("llama", uniform(kept_blocks=2))
    told = []
    context = type(made.context)(made.context.model, made.split, tell=lambda text, share: told.append((text, share)))
    make_emulator(made.loaded, split=made.split, builder=int8(), context=context)
    assert told == [("int8: block 1", 0.0), ("int8: block 2", 0.5)]


def test_blocks_alone_need_no_model(miniature):
    model = miniature("llama").model
    blocks = Blocks(tuple(Block(index, block) for index, block in enumerate(find_blocks(model).of(model))))
    assert len(int8()(low_rank()(blocks)).blocks) == 4


def test_without_a_middle_stand_in_is_the_adapter_alone(emulate):
    made = emulate("llama", uniform(kept_blocks=0))
    assert stand_in(made.loaded.model, made.split, made.blocks).sources == (0, 3)
