from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedpeat.core import ConfigError, ModelError, digest
from fedpeat.emulators import Block, Builder, EmulatorLora, Pace, Realigner, Weights, full_view, stand_in
from fedpeat.emulators.training.objective import measure
from fedpeat.emulators.training.realign import A, B
from fedpeat.models import model_tensors

PACE = Pace(steps=25, learning_rate=0.02, batch_size=4, warmup=0, clip_norm=1.0)


def fingerprint(model):
    return digest({name: tensor for name, tensor, _ in model_tensors(model)})


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def realigner_for(shop, kept=(2,), *, emulator=None, **settings):
    view = stand_in(shop.loaded.model, shop.split, emulator or shop.make(kept))
    settings = {"pace": PACE, "rank": 4, **settings}
    return Realigner(full_view(shop.loaded, shop.split), EmulatorLora(view, scaling=2.0), shop.context.rows, **settings)


def gap(realigner):
    return measure(realigner.full, realigner.lora.view, realigner.rows, batch_size=8)["gap"]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_it_lowers_the_gap_and_leaves_nothing_behind(kind, workshop):
    shop = workshop(kind, rows=32)
    realigner = realigner_for(shop)
    models = (shop.loaded.model, realigner.lora.view.model)
    adapter = list(realigner.lora.view.model.get_submodule(f"{realigner.full.path}.0").parameters())
    for parameter in adapter:
        parameter.requires_grad_(True)
    models[1].train()
    before, first = [fingerprint(model) for model in models], gap(realigner)
    hooks, random = [hooks_of(model) for model in models], torch.get_rng_state()
    with torch.no_grad():
        found = realigner()
    assert [fingerprint(model) for model in models] == before
    assert [hooks_of(model) for model in models] == hooks
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for model in models for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in adapter)
    assert (models[0].training, models[1].training) == (False, True)
    assert all(module.training for module in models[1].modules())
    assert found.losses[-1] < found.losses[0] == pytest.approx(first, rel=0.3)
    realigner.lora.apply(found.tensors)
    models[1].eval()
    assert gap(realigner) < 0.9 * first
    assert fingerprint(models[0]) == before[0]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_applied_to_any_copy_it_is_exact(kind, workshop):
    shop = workshop(kind)
    tensors = realigner_for(shop, pace=replace(PACE, steps=3))().tensors
    view = stand_in(shop.loaded.model, shop.split, shop.make([2]))
    before, lora = fingerprint(view.model), EmulatorLora(view, scaling=2.0)
    originals = {name: modules[0].weight.detach().clone() for name, modules in lora.layers.items()}
    for _ in range(2):
        lora.apply(tensors)
        for name, (module,) in lora.layers.items():
            change = 2.0 * (tensors[f"{name}.{B}"] @ tensors[f"{name}.{A}"])
            change = change.T if isinstance(module, Conv1D) else change
            assert change.any()
            assert torch.equal(module.weight, originals[name] + change)
    lora.apply({})
    assert fingerprint(view.model) == before


def test_the_factors_have_canonical_names(workshop):
    realigner = realigner_for(workshop("gpt2"), [3])
    tensors = realigner.start()
    layers = {"attn.c_attn": (32, 96), "attn.c_proj": (32, 32), "mlp.c_fc": (32, 128), "mlp.c_proj": (128, 32)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"transformer.h.3.{name}.{part}": ((4, width) if part == A else (out, 4))
        for name, (width, out) in layers.items()
        for part in (A, B)
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert not any(tensor.any() for name, tensor in tensors.items() if name.endswith(B))


def test_rounds_go_on_from_each_other(workshop):
    shop = workshop(rows=32)
    realigner = realigner_for(shop, pace=replace(PACE, steps=6))
    one = realigner()
    assert digest(realigner().tensors) == digest(one.tensors)
    two = realigner(one.tensors, round_number=1)
    realigner.lora.apply(one.tensors)  # what is applied does not count twice
    now = fingerprint(realigner.lora.view.model)
    assert digest(realigner(one.tensors, round_number=1).tensors) == digest(two.tensors)
    assert fingerprint(realigner.lora.view.model) == now
    assert digest(realigner(one.tensors, round_number=2).tensors) != digest(two.tensors)
    assert sum(two.losses) < sum(one.losses)
    assert digest(replace(realigner, seed=1)().tensors) != digest(one.tensors)


@torch.no_grad()
def test_the_adapter_counts_as_it_is_now(workshop):
    shop = workshop()
    realigner = realigner_for(shop, pace=replace(PACE, steps=2))
    before = realigner()
    for view in (realigner.full, realigner.lora.view):
        layer = view.model.get_submodule(f"{view.path}.0").mlp.down_proj
        layer.weight.data = layer.weight + 0.5
    assert realigner().losses[0] != before.losses[0]


def test_it_comes_in_16_bits_and_with_other_terms(workshop):
    shop = workshop(dtype="bfloat16", padded=True)
    weights = Weights(hidden=1.0, lm=0.0, logit=1.0)
    realigner = realigner_for(shop, weights=weights, sublayers=("mlp",))
    found = realigner()
    assert {name.split(".")[3] for name in found.tensors} == {"mlp"}
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}
    assert sum(found.losses[-5:]) < sum(found.losses[:5])
    realigner.lora.apply(found.tensors)
    assert {parameter.dtype for parameter in realigner.lora.view.model.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_a_shared_block_changes_at_all_its_places(workshop, make_ids):
    shop = workshop()
    only = shop.make([2]).blocks[0]
    emulator = shop.make([2]).having((only, Block(2, only.module, place=3)))
    realigner = realigner_for(shop, emulator=emulator, pace=replace(PACE, steps=4))
    found = realigner()
    assert all(name.startswith("model.layers.2.") for name in found.tensors)
    realigner.lora.apply(found.tensors)
    layers = realigner.lora.view.model.model.layers
    assert torch.equal(layers[1].mlp.up_proj.weight, layers[2].mlp.up_proj.weight)
    assert not torch.equal(layers[1].mlp.up_proj.weight, only.module.mlp.up_proj.weight)


def test_what_does_not_fit_is_refused(workshop):
    shop = workshop()
    lora = EmulatorLora(stand_in(shop.loaded.model, shop.split, shop.make([2])))
    name = "model.layers.2.mlp.up_proj"
    before = fingerprint(lora.view.model)
    with pytest.raises(ModelError, match=r"the emulator has no layer for elsewhere\.realign_A"):
        lora.apply({f"elsewhere.{A}": torch.ones(1, 2)})
    good = {f"{name}.{A}": torch.ones(2, 32), f"{name}.{B}": torch.ones(48, 2)}
    lora.apply(good)
    assert fingerprint(lora.view.model) != before
    lora.apply({})
    for wrong in ({f"{name}.{A}": torch.ones(2, 31)}, {f"{name}.{B}": torch.ones(48, 3)}):
        with pytest.raises(ModelError, match=r"takes A \(rank, 32\) and B \(48, rank\)"):
            lora.apply({**good, **wrong})
    with pytest.raises(ModelError, match="takes A"):
        lora.apply({f"{name}.{A}": torch.ones(2, 32)})
    assert fingerprint(lora.view.model) == before


def test_stored_layers_and_none_are_refused(workshop):
    shop = workshop()
    view = stand_in(shop.loaded.model, shop.split, shop.make([2]))
    view.model.model.layers[1].mlp.up_proj.register_buffer("codes", torch.zeros(2, dtype=torch.int8))
    with pytest.raises(ModelError, match=r"block 2 of the emulator; its 'mlp.up_proj' is stored as a Linear"):
        EmulatorLora(view)

    class Odd(nn.Linear):
        """Neither of the two plain kinds."""

    view = stand_in(shop.loaded.model, shop.split, shop.make([2]))
    view.model.model.layers[1].mlp.up_proj = Odd(32, 48)
    with pytest.raises(ModelError, match="is stored as a Odd"):
        EmulatorLora(view)
    with pytest.raises(ModelError, match="it has no linear layers"):
        EmulatorLora(stand_in(shop.loaded.model, shop.split, shop.make([])))


def test_settings_out_of_range_are_refused(workshop):
    shop = workshop()
    for wrong in ({"rank": 0}, {"sublayers": ("norms",)}, {"pace": replace(PACE, steps=0)}):
        with pytest.raises(ConfigError, match="cannot"):
            realigner_for(shop, **wrong)
    with pytest.raises(ConfigError, match="cannot train an emulator for this"):
        realigner_for(shop, weights=Weights(0.0, 0.0, 0.0))
    empty = {name: tensor[:0] for name, tensor in shop.context.rows.items()}
    shop.context = replace(shop.context, rows=empty)
    with pytest.raises(ConfigError, match="the server has no public text"):
        realigner_for(shop)


def test_a_builder_may_stand_between(workshop):
    # The emulator's own changes do not matter as long as its layers are plain.
    nothing = Builder("nothing", {}, lambda blocks: blocks)
    shop = workshop()
    realigner = realigner_for(shop, emulator=shop.make([2], nothing), pace=replace(PACE, steps=2))
    assert len(realigner().losses) == 2
