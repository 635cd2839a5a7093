import copy
from contextlib import contextmanager

import pytest
import torch

from fedpeat.bundles import build_emulated
from fedpeat.core import ConfigError, ModelError, digest
from fedpeat.emulators import Block, BuildContext, Builder, harmonizers, stand_in
from fedpeat.emulators.harmonizer import Harmonizer, harmonize, hidden_input, hidden_output
from fedpeat.models import find_blocks, make_split, model_tensors
from tests.bundles import bundled
from tests.fedpeat.emulators.training.conftest import state
from tests.oracles.skipped_blocks import skipping

FAMILIES = ("gpt2", "opt", "llama", "qwen3", "gemma2")
ENDS, HEAD, TAIL = make_split(6, first=1, last=1), make_split(6, blocks=[0, 1]), make_split(6, blocks=[5])
# Split, kept blocks, and the doors that get a harmonizer: (host, door, first and last block of the run).
PLACES = {
    "before": (ENDS, [4], [(4, "before", 1, 3)]),
    "after": (ENDS, [1], [(1, "after", 2, 4)]),
    "between": (ENDS, [1, 4], [(4, "before", 2, 3)]),
    "both": (ENDS, [2], [(2, "before", 1, 1), (2, "after", 3, 4)]),
    "at the start": (TAIL, [2, 4], [(2, "before", 0, 1), (4, "before", 3, 3)]),
    "at the end": (HEAD, [2], [(2, "after", 3, 5)]),
}


def names_of(emulator):
    return {f"{block.source}.{name}" for block in emulator.blocks for name, _, _ in model_tensors(block.module)}


@contextmanager
def by_hand(model, emulator):
    """Let the full model skip what was dropped and add each harmonizer's map itself."""
    blocks, handles = find_blocks(model).of(model), []
    for block in emulator.blocks:
        for door in ("before", "after"):
            own = getattr(block.module, door, None)
            if own is None:
                continue

            def mapped(hidden, own=own):
                return hidden + hidden @ own.down.weight.T @ own.up.weight.T + own.up.bias

            def enter(_, args, kwargs, mapped=mapped):
                if args:
                    return (mapped(args[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": mapped(kwargs["hidden_states"])}

            def leave(_, args, output, mapped=mapped):
                return (mapped(output[0]), *output[1:]) if isinstance(output, tuple) else mapped(output)

            host = blocks[block.source]
            handles.append(
                host.register_forward_pre_hook(enter, with_kwargs=True)
                if door == "before"
                else host.register_forward_hook(leave)
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("place", PLACES)
def test_a_harmonizer_stands_where_its_blocks_were(place, workshop, make_ids):
    split, kept, expected = PLACES[place]
    shop = workshop("llama", split=split)
    emulator = shop.make(kept, harmonizers(rank=3, rows=8))
    runs = emulator.notes[-1]["runs"]
    assert [(run["host"], run["door"], *run["blocks"]) for run in runs] == expected
    hosts = {name.removesuffix(".down.weight") for name in names_of(emulator) if name.endswith(".down.weight")}
    assert hosts == {f"{host}.{door}" for host, door, _, _ in expected}
    view = stand_in(shop.loaded.model, split, emulator)
    dropped = set(split.middle) - set(kept)
    with skipping(find_blocks(shop.loaded.model).of(shop.loaded.model), dropped):
        plain = shop.loaded.model(make_ids()).logits
        with by_hand(shop.loaded.model, emulator):
            wanted = shop.loaded.model(make_ids()).logits
    torch.testing.assert_close(view.model(make_ids()).logits, wanted)
    assert not torch.allclose(plain, wanted, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_is_wired(kind, workshop, make_ids):
    shop = workshop(kind)
    emulator = shop.make([2], harmonizers(rank=4))
    view = stand_in(shop.loaded.model, shop.split, emulator)
    blocks = find_blocks(shop.loaded.model).of(shop.loaded.model)
    with skipping(blocks, {1, 3, 4}), by_hand(shop.loaded.model, emulator):
        torch.testing.assert_close(view.model(make_ids()).logits, shop.loaded.model(make_ids()).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_generation_with_a_cache_equals_without(kind, workshop, make_ids):
    shop = workshop(kind)
    model = stand_in(shop.loaded.model, shop.split, shop.make([2], harmonizers(rank=4))).model
    ids = make_ids(2, 7)
    wish = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    assert torch.equal(model.generate(ids, use_cache=True, **wish), model.generate(ids, use_cache=False, **wish))


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_bundle_gives_the_same_bits(kind, workshop, make_ids, tmp_path):
    shop = workshop(kind)
    builder = Builder("kept", {}, lambda blocks: harmonizers(rank=4)(blocks.having(blocks.blocks[1:2])))
    bundle = bundled(shop.loaded, split=shop.split, builder=builder, folder=tmp_path, context=shop.context)
    model, again = (
        build_emulated(bundle).model,
        stand_in(shop.loaded.model, shop.split, shop.make([2], harmonizers(rank=4))),
    )
    assert torch.equal(model(make_ids()).logits, again.model(make_ids()).logits)
    kind = {"kind": "harmonizers", "before": 4, "after": 4, "width": 32}
    assert [position.changes for position in bundle.positions] == [(), (kind,), ()]


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_values_are_those_of_least_squares(padded, workshop):
    shop = workshop("llama", rows=20, padded=padded, batch_size=7)
    own = shop.make([4], harmonizers(rank=5, rows=12, damping=1e-2)).blocks[0].module.before
    text = shop.context.rows
    chosen = torch.tensor([index * 20 // 12 for index in range(12)])
    inputs = {name: tensor[chosen] for name, tensor in text.items() if name != "labels"}
    states = shop.loaded.model(**inputs, output_hidden_states=True).hidden_states
    real = inputs["attention_mask"].bool() if padded else torch.ones_like(inputs["input_ids"]).bool()
    hidden, moved = states[1][real].double(), (states[4].double() - states[1].double())[real]
    centred, width = hidden - hidden.mean(0), hidden.shape[1]
    ridge = (1e-2 * centred.square().sum(0).mean()).sqrt() * torch.eye(width)
    left = torch.cat([centred, ridge.double()])
    whole = torch.linalg.lstsq(left, torch.cat([moved - moved.mean(0), torch.zeros(width, width)])).solution
    directions = torch.linalg.svd(left @ whole, full_matrices=False)[2][:5]
    expected = whole @ directions.T @ directions
    torch.testing.assert_close((own.up.weight @ own.down.weight).T.double(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(own.up.bias.double(), moved.mean(0) - hidden.mean(0) @ expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("place", PLACES)
def test_a_linear_run_is_reproduced_at_full_rank(place, workshop, make_ids):
    split, kept, expected = PLACES[place]
    shop = workshop("llama", rows=24, split=split)
    blocks, generator = find_blocks(shop.loaded.model).of(shop.loaded.model), torch.Generator().manual_seed(0)
    for index in set(split.middle) - set(kept):
        matrix = torch.eye(32) + 0.1 * torch.randn(32, 32, generator=generator)
        shift = torch.randn(32, generator=generator)
        blocks[index].register_forward_hook(lambda _, args, __, m=matrix, s=shift: args[0] @ m + s)
    emulator = shop.make(kept, harmonizers(rank=32, rows=24, damping=0.0))
    assert [run["explained"] for run in emulator.notes[-1]["runs"]] == pytest.approx([1.0] * len(expected))
    view = stand_in(shop.loaded.model, split, emulator)
    torch.testing.assert_close(
        view.model(make_ids(seed=5)).logits, shop.loaded.model(make_ids(seed=5)).logits, atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_the_gap_closes_and_the_full_model_stays(workshop):
    shop = workshop("gpt2")
    before = shop.fingerprint
    emulator = shop.make([2], harmonizers(rank=8))
    assert shop.fingerprint == before
    assert not hasattr(shop.loaded.model.transformer.h[2], "before")
    assert not shop.loaded.model.transformer.h[2]._forward_pre_hooks
    weight = shop.loaded.model.transformer.h[2].attn.c_attn.weight
    assert emulator.blocks[0].module.attn.c_attn.weight is weight
    assert digest(state(emulator)) == digest(state(shop.make([2], harmonizers(rank=8))))
    plain = shop.make([2])
    text = shop.context.rows["input_ids"]
    wanted = shop.loaded.model(text, output_hidden_states=True).hidden_states[5]
    errors = [
        (stand_in(shop.loaded.model, shop.split, one).model(text, output_hidden_states=True).hidden_states[2] - wanted)
        for one in (plain, emulator)
    ]
    assert errors[1].norm() < 0.7 * errors[0].norm()


def test_the_random_state_stays_and_16_bits_do(workshop, make_ids):
    shop = workshop("llama", dtype="bfloat16")
    random = torch.get_rng_state()
    emulator = shop.make([2], harmonizers(rank=4))
    assert torch.equal(torch.get_rng_state(), random)
    assert {tensor.dtype for tensor in state(emulator).values()} == {torch.bfloat16}
    assert stand_in(shop.loaded.model, shop.split, emulator).model(make_ids()).logits.isfinite().all()


def test_gradients_reach_the_first_block(workshop, make_ids):
    shop = workshop("llama")
    model = stand_in(shop.loaded.model, shop.split, shop.make([2], harmonizers(rank=4))).model
    first = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    model(make_ids(), labels=make_ids()).loss.backward()
    assert first.grad.norm() > 0


@torch.no_grad()
def test_a_deep_copy_uses_its_own_harmonizer(workshop, make_ids):
    shop = workshop("opt")
    model = stand_in(shop.loaded.model, shop.split, shop.make([2], harmonizers(rank=4))).model
    other = copy.deepcopy(model)
    before = model(make_ids()).logits
    assert torch.equal(other(make_ids()).logits, before)
    other.model.decoder.layers[1].before.up.bias.add_(1.0)
    assert torch.equal(model(make_ids()).logits, before)
    assert not torch.allclose(other(make_ids()).logits, before)


def test_nothing_dropped_needs_nothing(workshop):
    shop = workshop()
    plain = shop.make([1, 2, 3, 4], harmonizers())
    assert [block.changes for block in plain.blocks] == [()] * 4


def test_a_rank_above_the_width_is_the_width(workshop):
    assert workshop().make([4], harmonizers(rank=99)).blocks[0].changes[0]["before"] == 32


def test_a_run_with_no_kept_block_beside_it_is_refused(workshop):
    shop = workshop(split=make_split(6, blocks=[0, 3, 5]))
    with pytest.raises(ConfigError, match=r"place of blocks 1, 2; no block of the emulator .*raise the selection"):
        shop.make([4], harmonizers())


def test_shared_blocks_and_second_harmonizers_are_refused(workshop):
    shop = workshop()
    with pytest.raises(ConfigError, match="have some already; use it once"):
        shop.make([2], harmonizers(), harmonizers())

    def share(blocks):
        only = blocks.blocks[0]
        return blocks.having((only, Block(only.source, only.module, place=only.source + 2)))

    with pytest.raises(ConfigError, match="several places; leave the sharing stage out"):
        shop.make([2], Builder("share", {}, share), harmonizers())


def test_parts_beside_the_blocks(workshop, make_ids):
    shop = workshop("odd", rows=24)
    with pytest.raises(ModelError, match=r"parts of its blocks at tower.gains; keep the last block of the middle"):
        shop.make([2], harmonizers())
    view = stand_in(shop.loaded.model, shop.split, shop.make([2, 4], harmonizers(rank=32)))
    assert view.model(make_ids()).logits.isfinite().all()


def test_hidden_states_that_are_not_finite_are_refused(workshop):
    shop = workshop()
    with torch.no_grad():
        shop.loaded.model.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(ModelError, match="blocks 1; the full model's hidden states are not finite"):
        shop.make([2, 3, 4], harmonizers())


def test_text_is_needed_and_some_of_it_real(workshop):
    shop = workshop()
    with pytest.raises(ConfigError, match="needs public text on the server"):
        shop.make([2], harmonizers(), context=BuildContext(shop.loaded.model, shop.split))
    text = {**shop.context.rows, "attention_mask": torch.zeros_like(shop.context.rows["input_ids"])}
    with pytest.raises(ConfigError, match="no tokens but padding"):
        shop.make([4], harmonizers(), context=BuildContext(shop.loaded.model, shop.split, text))


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"rows": 0}, {"damping": -0.1}, {"damping": float("nan")}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        harmonizers(**wrong)


def test_a_manifest_that_makes_no_sense_is_refused(miniature):
    block = miniature("llama").model.model.layers[0]
    good = {"kind": "harmonizers", "before": 2, "after": None, "width": 32}
    for wrong in ({"before": 0}, {"width": 0}):
        with pytest.raises(ValueError, match="a harmonizer of rank"):
            harmonize(block, {**good, **wrong})
    harmonize(block, good)
    assert isinstance(block.before, Harmonizer)
    assert block.before.up.weight.is_meta
    with pytest.raises(ValueError, match="something called 'before' already"):
        harmonize(block, good)


def test_what_is_no_hidden_state():
    with pytest.raises(ModelError, match=r"called with 0 arguments and the keywords \['x'\]"):
        hidden_input((), {"x": torch.ones(1)})
    with pytest.raises(ModelError, match="it returned a dict"):
        hidden_output({})
    assert torch.equal(hidden_output((torch.ones(2), None)), torch.ones(2))
