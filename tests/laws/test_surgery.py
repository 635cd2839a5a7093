"""Laws of taking apart and putting together, over every family of miniatures."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fedpeat.bundles import build_emulated, open_bundle
from fedpeat.core import digest
from fedpeat.emulators import Builder, full_view, uniform
from fedpeat.emulators.blocks import Blocks
from fedpeat.models import (
    assemble,
    canonical_name,
    describe,
    find_blocks,
    load_model,
    make_split,
    model_tensors,
    plug_in,
    save_model,
    take_apart,
)
from tests.bundles import bundled
from tests.conftest import FAMILIES
from tests.oracles.skipped_blocks import skipping

BLOCKS = 6


def bundle_of(loaded, folder, *, kept=2, first=1, last=1, blocks=None, builder=None):
    split = make_split(find_blocks(loaded.model).count, first=first, last=last, blocks=blocks)
    return bundled(loaded, split=split, builder=builder or uniform(kept_blocks=kept), folder=folder)


def keeping(sources):
    """A builder that keeps the listed blocks of the middle."""

    def build(blocks):
        return Blocks(tuple(block for block in blocks.blocks if block.source in sources), blocks.origin)

    return Builder("keeping", {"sources": sorted(sources)}, build)


def all_tensors(model):
    return {name: tensor for name, tensor, _ in model_tensors(model)}


# Every family twice: Gemma-2 has no sdpa attention, the class of our own neither knows nor asks.
ATTENTIONS = {"gemma2": ["eager"], "odd": [None]}


@torch.no_grad()
def test_nothing_dropped_is_the_full_model_to_the_bit(family, miniature, make_ids, tmp_path):
    for attention in ATTENTIONS.get(family, ["sdpa", "eager"]):
        loaded = miniature(family, blocks=BLOCKS, attention=attention)
        emulated = build_emulated(bundle_of(loaded, tmp_path, kept=4))
        assert emulated.sources == tuple(range(BLOCKS))
        assert emulated.model.config._attn_implementation == loaded.model.config._attn_implementation
        assert torch.equal(emulated.model(make_ids()).logits, loaded.model(make_ids()).logits)


@torch.no_grad()
def test_dropping_equals_skipping_in_the_full_model(family, miniature, make_ids, tmp_path):
    loaded = miniature(family, blocks=BLOCKS)
    # Blocks 1 and 2 differ in kind from 3 and 4 where a family alternates: settings must come with the block.
    for kept in ({1, 4}, {2}, {3, 4}, set()):
        emulated = build_emulated(bundle_of(loaded, tmp_path, builder=keeping(kept)))
        dropped = set(range(BLOCKS)) - set(emulated.sources)
        if family == "odd":  # its gains beside the blocks are dropped with them
            for index in dropped:
                loaded.model.tower.gains[index].fill_(1.0)
        with skipping(find_blocks(loaded.model).of(loaded.model), dropped):
            expected = loaded.model(make_ids()).logits
        assert torch.equal(emulated.model(make_ids()).logits, expected)
        loaded = miniature(family, blocks=BLOCKS)


@torch.no_grad()
def test_generation_with_a_cache_equals_without(family, miniature, make_ids, tmp_path):
    loaded, ids = miniature(family, blocks=BLOCKS), make_ids(2, 9)
    wish = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    for kept in (0, 1, 2):
        model = build_emulated(bundle_of(loaded, tmp_path, kept=kept)).model
        cached = model.generate(ids, use_cache=True, **wish)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **wish))
        # Token by token, what the cache gives is what the whole sequence gives.
        cache, steps = None, []
        for token in ids.split(1, dim=1):
            step = model(token, past_key_values=cache, use_cache=True)
            cache, steps = step.past_key_values, [*steps, step.logits]
        torch.testing.assert_close(torch.cat(steps, dim=1), model(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_split_assembles_to_the_same_model(named_family, miniature, make_ids, data):
    loaded = miniature(named_family, blocks=4)
    adapter = data.draw(st.sets(st.integers(0, 3), min_size=1), label="adapter")
    split = make_split(4, blocks=sorted(adapter))
    parts = take_apart(loaded.model, split)
    before = digest(parts.all)
    again = assemble(describe(loaded.model), parts)
    assert digest(all_tensors(again)) == before
    assert parts.adapter.keys().isdisjoint(parts.middle)
    assert len(parts.all) == len(parts.adapter) + len(parts.middle) + len(parts.rest)
    with torch.no_grad():
        assert torch.equal(again(make_ids()).logits, loaded.model(make_ids()).logits)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_emulator_has_its_blocks_at_their_names(miniature, tmp_path, data):
    loaded = miniature("llama", blocks=BLOCKS)
    adapter = data.draw(st.sets(st.integers(0, 5), min_size=1, max_size=5), label="adapter")
    kept = data.draw(st.integers(0, BLOCKS - len(adapter)), label="kept")
    view = build_emulated(bundle_of(loaded, tmp_path, kept=kept, blocks=sorted(adapter)))
    assert {view.sources[position] for position in view.adapter_positions} == adapter
    assert list(view.sources) == sorted(view.sources)
    full = dict(loaded.model.named_parameters())
    for name, parameter in view.model.named_parameters():
        assert torch.equal(parameter, full[canonical_name(name, path=view.path, sources=view.sources)])
    assert [block.self_attn.layer_idx for block in view.model.model.layers] == list(range(len(view.sources)))


@torch.no_grad()
def test_untouched_plug_in_is_an_identity(family, miniature, make_ids, tmp_path):
    loaded = miniature(family, blocks=BLOCKS)
    view = build_emulated(bundle_of(loaded, tmp_path, kept=1))
    blocks = find_blocks(view.model).of(view.model)
    adapter = {
        canonical_name(f"{view.path}.{position}.{name}", path=view.path, sources=view.sources): parameter
        for position in view.adapter_positions
        for name, parameter in blocks[position].named_parameters()
    }
    before, logits = digest(all_tensors(loaded.model)), loaded.model(make_ids()).logits
    plug_in(loaded.model, adapter)
    assert digest(all_tensors(loaded.model)) == before
    assert torch.equal(loaded.model(make_ids()).logits, logits)
    plug_in(loaded.model, {name: parameter + 1 for name, parameter in adapter.items()})
    assert digest(all_tensors(loaded.model)) != before


def test_ties_stay_ties(family, miniature, tmp_path):
    for tied in (True, False):
        loaded = miniature(family, blocks=4, tie_word_embeddings=tied)
        bundle = bundle_of(loaded, tmp_path, kept=1)
        for model in (build_emulated(bundle).model, full_view(loaded, make_split(4)).model):
            head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
            if family == "odd":
                head = model.speak
            assert (head.weight is embeddings.weight) == tied
        names = [name for name, _ in loaded.model.named_parameters(remove_duplicate=False)]
        stored = set(load_file(bundle.folder / "adapter.safetensors"))
        head_name = next(
            name for name in names if name.endswith(("lm_head.weight", "embed_out.weight", "speak.weight"))
        )
        assert (head_name in bundle.manifest["aliases"]) == tied
        assert len({head_name, bundle.manifest["aliases"].get(head_name, head_name)} & stored) == 1


def test_training_the_adapter_leaves_all_else_as_it_was(family, miniature, make_ids, tmp_path):
    bundle = bundle_of(miniature(family, blocks=4), tmp_path, kept=1)
    view = build_emulated(bundle)
    adapter = tuple(f"{view.path}.{position}." for position in view.adapter_positions)
    frozen = {name: tensor for name, tensor in all_tensors(view.model).items() if not name.startswith(adapter)}
    trained = [parameter for name, parameter in view.model.named_parameters() if name.startswith(adapter)]
    assert not any(parameter.requires_grad for parameter in view.model.parameters())
    before = digest(frozen)
    at_first = [parameter.clone() for parameter in trained]
    optimizer = torch.optim.SGD([parameter.requires_grad_(True) for parameter in trained], lr=0.1)
    view.model.train()
    ids = make_ids()
    view.model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert digest(frozen) == before
    assert sum(not torch.equal(old, new) for old, new in zip(at_first, trained, strict=True)) > len(trained) / 2
    # The adapter was written to where its file is mapped: the file must not notice.
    assert open_bundle(bundle.folder, verify=True).version == bundle.version


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_is_kept(family, dtype, miniature, make_ids, tmp_path):
    loaded = miniature(family, blocks=4, dtype=dtype)
    model = build_emulated(bundle_of(loaded, tmp_path, kept=2)).model
    assert model.dtype == getattr(torch, dtype)
    old, new = all_tensors(loaded.model), all_tensors(model)
    assert {name: tensor.dtype for name, tensor in new.items()} == {name: old[name].dtype for name in new}
    assert torch.equal(model(make_ids()).logits, loaded.model(make_ids()).logits)


def test_a_bundle_holds_nothing_of_a_dropped_block(family, miniature, tmp_path):
    loaded = miniature(family, blocks=BLOCKS)
    bundle = bundle_of(loaded, tmp_path, kept=2)
    raw = b"".join(path.read_bytes() for path in sorted(bundle.folder.rglob("*.safetensors")))
    for index, block in enumerate(find_blocks(loaded.model).of(loaded.model)):
        present = [parameter.numpy().tobytes() in raw for parameter in block.parameters()]
        assert all(present) if index in bundle.sources else not any(present)
    assert len(raw) == sum(e["bytes"] for name, e in bundle.manifest["files"].items() if name.endswith("safetensors"))


def test_devices_build_from_bundles_alone(miniature, make_ids, tmp_path):
    """In a process of its own, in which the full models' folders are gone and no file but the bundles' is opened."""
    expected = {}
    for family in FAMILIES:
        full = miniature(family, blocks=4)
        if family != "odd":
            full = load_model(save_model(full, tmp_path / "full" / family))
        bundle = bundle_of(full, tmp_path / "bundles", kept=1)
        with torch.no_grad():
            expected[str(bundle.folder)] = build_emulated(bundle).model(make_ids()).logits.double().sum().item()
    shutil.rmtree(tmp_path / "full")
    script = f"""
import json, sys
import torch
import tests.miniatures
from fedpeat.bundles import build_emulated, open_bundle
torch.set_num_threads({torch.get_num_threads()})
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
sums = {{}}
with torch.no_grad():
    for folder in {list(expected)!r}:
        sums[folder] = build_emulated(open_bundle(folder)).model(ids).logits.double().sum().item()
ours = [path for path in opened if path.startswith({str(tmp_path)!r})]
assert ours and all(path.startswith({str(tmp_path / "bundles")!r}) for path in ours), ours
print(json.dumps(sums))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected
