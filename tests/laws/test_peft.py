"""Laws of what trains and travels, over every PEFT type and every family of miniatures."""

import copy
import importlib.util

import pytest
import torch
from peft import PeftModel, PeftType

from fedpeat.bundles import build_emulated, open_bundle
from fedpeat.core import PeftError, digest
from fedpeat.emulators import full_view, uniform
from fedpeat.models import make_split
from fedpeat.peft import attach, export_adapter, merged_model, supported
from tests.bundles import bundled

# HF's defaults are made for widths that a miniature does not have.
OPTIONS = {
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "BEFT": {"target_modules": ["v_proj"]},
    "C3A": {"block_size": 16},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [5, 6, 7], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]},
    "FOURIERFT": {"n_frequency": 20},
    "MISS": {"r": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PSOFT": {"r": 4},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "VBLORA": {"vector_length": 16, "num_vectors": 20},
    "WAVEFT": {"n_frequency": 32},
}
NOT_MERGED = {"ADAPTION_PROMPT", "BEFT", "CPT", "LILY", "PROMPT_TUNING", "P_TUNING"}
ALLOWED = [method.name for method in supported() if method.allowed]
REFUSED = [method.name for method in supported() if not method.allowed]
DECLARED = {method.name: method.identity_at_start for method in supported()}
WITHOUT_SCIKIT_LEARN = {"ADAMSS"} if importlib.util.find_spec("sklearn") is None else set()


def method_of(name):
    return {"kind": "hf", "type": name, "options": OPTIONS.get(name, {})}


def attached(view, method, seed=7):
    return attach(
        view.model,
        method=method,
        path=view.path,
        sources=view.sources,
        adapter_positions=view.adapter_positions,
        seed=seed,
    )


@pytest.fixture(scope="module")
def ends(miniature, tmp_path_factory):
    """A maker of the two ends of a federation, both fresh: the full model, and a device's of a third less depth."""
    bundles = {}

    def make(family="llama", **config):
        key = (family, *sorted(config.items()))
        loaded = miniature(family, blocks=6, **config)
        split = make_split(6, first=2, last=1)
        if key not in bundles:
            folder = tmp_path_factory.mktemp("bundles")
            bundles[key] = bundled(loaded, split=split, builder=uniform(kept_blocks=1), folder=folder).folder
        return full_view(loaded, split), build_emulated(open_bundle(bundles[key], verify=False))

    return make


def frozen(tuned):
    outer = tuned.wrapper or tuned.model
    return {
        name: tensor.detach()
        for name, tensor in [*outer.named_parameters(), *outer.named_buffers()]
        if not tensor.requires_grad
    }


def take_steps(tuned, ids, steps=2):
    tuned.model.train()
    optimizer = torch.optim.SGD(tuned.parameters, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        tuned.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert all(parameter.grad is not None for parameter in tuned.parameters)
        optimizer.step()
    tuned.model.eval()


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", sorted(set(ALLOWED) - WITHOUT_SCIKIT_LEARN))
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_a_type_starts_alike_at_both_ends_trains_in_the_adapter_and_travels_whole(name, ends, make_ids):
    server, device = ends()
    before = logits(server.model, make_ids())
    there, here = attached(server, method_of(name)), attached(device, method_of(name))
    assert here.names == there.names
    assert digest(here.read()) == digest(there.read())
    assert here.frozen_digest == there.frozen_digest
    assert {parameter.dtype for parameter in here.parameters} == {torch.float32}
    assert here.identity_at_start == there.identity_at_start == DECLARED[name]
    if DECLARED[name]:
        torch.testing.assert_close(logits(there.model, make_ids()), before, atol=1e-4, rtol=1e-4)

    kept = digest(frozen(here))
    take_steps(here, make_ids())
    assert digest(frozen(here)) == kept
    again = attached(ends()[1], method_of(name))
    again.write(here.read())
    assert torch.equal(logits(again.model, make_ids()), logits(here.model, make_ids()))
    if name in NOT_MERGED:
        assert merged_model(here) is None
    else:
        plain = merged_model(here)
        assert set(dict(plain.named_parameters())) == set(dict(ends()[1].model.named_parameters()))
        torch.testing.assert_close(logits(plain, make_ids()), logits(here.model, make_ids()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_a_type_that_cannot_work_here_is_refused_with_the_reason(name, ends):
    reason = next(method.reason for method in supported() if method.name == name)
    with pytest.raises(PeftError) as told:
        attached(ends()[1], method_of(name))
    assert reason
    assert reason in str(told.value)


@pytest.mark.parametrize("name", sorted(WITHOUT_SCIKIT_LEARN))
def test_a_type_that_needs_another_package_says_so(name, ends):
    with pytest.raises(PeftError, match="scikit-learn"):
        attached(ends()[1], method_of(name))


def test_every_type_is_known():
    assert sorted(kind.name for kind in PeftType) == [method.name for method in supported()]
    assert len(supported()) == 45


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # HF peft of HF transformers
def test_lora_in_every_family(family, ends, make_ids, miniature, tmp_path):
    method = {"kind": "lora", "rank": 3, "alpha": 6}
    server, device = ends(family)
    before = logits(device.model, make_ids())
    there, here = attached(server, method), attached(device, method)
    assert here.names == there.names
    assert digest(here.read()) == digest(there.read())
    assert here.identity_at_start
    assert torch.equal(logits(here.model, make_ids()), before)
    blocks = {int(name.removeprefix(server.path).split(".")[1]) for name in here.names}
    assert blocks == {0, 1, 5}

    take_steps(here, make_ids())
    there.write(here.read())
    assert export_adapter(there, tmp_path / "server", "base")
    assert export_adapter(here, tmp_path / "device", "base")
    for end in ("server", "device"):
        loaded = PeftModel.from_pretrained(miniature(family, blocks=6).model, tmp_path / end).eval()
        assert torch.equal(logits(loaded, make_ids()), logits(there.model, make_ids()))


def test_square_cores_and_folds_in_every_family(family, ends, make_ids):
    server, device = ends(family)
    before = logits(device.model, make_ids())
    there, here = attached(server, {"kind": "lora_sb", "rank": 3}), attached(device, {"kind": "lora_sb", "rank": 3})
    assert here.names == there.names
    assert here.layout == there.layout
    assert set(here.names) == here.layout.names(["R"])
    assert here.frozen_digest == there.frozen_digest != ""
    assert torch.equal(logits(here.model, make_ids()), before)

    kept, generator = digest(frozen(here)), torch.Generator().manual_seed(3)
    folds = {pair.module: 0.02 * torch.randn(pair.shape, generator=generator) for pair in here.layout.pairs}
    for tuned in (here, there):
        tuned.fold(folds)
    assert not torch.equal(logits(here.model, make_ids()), before)
    take_steps(here, make_ids())
    there.write(here.read())
    torch.testing.assert_close(logits(merged_model(there), make_ids()), logits(there.model, make_ids()))
    here.fold({})
    assert digest(frozen(here)) == kept


def test_whole_adapter_blocks_in_every_family(family, ends, make_ids):
    server, device = ends(family)
    before = logits(device.model, make_ids())
    there, here = attached(server, {"kind": "full"}), attached(device, {"kind": "full"})
    assert here.names == there.names
    assert digest(here.read()) == digest(there.read())
    assert torch.equal(logits(here.model, make_ids()), before)
    kept = digest(frozen(here))
    take_steps(here, make_ids())
    assert digest(frozen(here)) == kept
    there.write(here.read())
    assert digest(there.read()) == digest(here.read())
    assert torch.equal(logits(merged_model(there), make_ids()), logits(there.model, make_ids()))


@pytest.mark.parametrize("method", [{"kind": "lora", "rank": 2}, {"kind": "full"}, method_of("LN_TUNING")], ids=str)
def test_trainable_tensors_are_fp32_in_a_bf16_model(method, named_family, ends, make_ids):
    _, device = ends(named_family, dtype="bfloat16")
    if method["kind"] == "hf":
        norms = [name.rsplit(".", 1)[-1] for name, _ in device.model.get_submodule(device.path)[0].named_modules()]
        targets = sorted({name for name in norms if "norm" in name.lower() or name.startswith("ln")})
        method = {**method, "options": {"target_modules": targets}}
    kept_dtype = {name: tensor.dtype for name, tensor in device.model.named_parameters()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = logits(device.model, make_ids())
    here = attached(device, method)
    torch.testing.assert_close(logits(here.model, make_ids()), before, atol=0.1, rtol=0.1)  # fp32 norms round less
    assert {parameter.dtype for parameter in here.parameters} == {torch.float32}
    for name, tensor in here.model.named_parameters():
        if not tensor.requires_grad:
            assert tensor.dtype == kept_dtype[name.replace(".base_layer", "")]
    start = here.read()
    take_steps(here, make_ids())
    assert digest(start) != digest(here.read())


def test_the_global_random_state_is_left_alone(ends):
    _, device = ends()
    state = torch.get_rng_state()
    attached(device, {"kind": "lora"})
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_decides_the_start(ends):
    starts = [digest(attached(ends()[1], {"kind": "lora"}, seed=seed).read()) for seed in (1, 1, 2)]
    assert starts[0] == starts[1] != starts[2]


def test_a_deep_copy_is_on_its_own(ends, make_ids):
    here = attached(ends(dtype="bfloat16")[1], {"kind": "full"})
    other = copy.deepcopy(here)
    take_steps(other, make_ids())
    assert not torch.equal(logits(other.model, make_ids()), logits(here.model, make_ids()))
