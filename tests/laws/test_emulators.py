"""Laws of every way to make an emulator: each option of `conf/emulator`, on several families."""

import functools

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fedpeat.bundles import build_emulated
from fedpeat.core import ConfigError, digest
from fedpeat.emulators import BuildContext, make_emulator, stand_in
from fedpeat.models import find_blocks, make_split, model_tensors
from simulations.building import built
from simulations.ladder import keeping
from simulations.settings import conf_folder
from tests.bundles import bundled

OPTIONS = sorted(path.stem for path in (conf_folder() / "emulator").glob("*.yaml"))
FAMILIES = ("gpt2", "llama", "gemma2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("opt", "qwen3")))
SPLIT = make_split(6, first=1, last=1)
SELECTING = [
    name
    for name in OPTIONS
    if "kept_blocks" in yaml.safe_load((conf_folder() / "emulator" / f"{name}.yaml").read_text(encoding="utf-8"))
]
pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def node_of(option):
    """An option as it stands, made small: two of four blocks stay, two steps of distillation."""
    node = yaml.safe_load((conf_folder() / "emulator" / f"{option}.yaml").read_text(encoding="utf-8"))
    for stage in (node, *node.get("stages", {}).values()):
        for key, value in {"kept_blocks": 2, "blocks": [1, 4], "steps": 2}.items():
            if key in stage:
                stage[key] = value
    return node


def rows(make_ids, seed=0):
    ids = make_ids(6, 12, seed)
    return {"input_ids": ids, "labels": ids}


@pytest.fixture
def make(miniature, make_ids):
    """Return a maker of `(loaded, context, builder)`."""

    def made(option, family="llama", **more):
        loaded = miniature(family, blocks=6, **more)
        return loaded, BuildContext(loaded.model, SPLIT, rows(make_ids), batch_size=4), built(node_of(option))

    return made


def emulated(loaded, context, builder):
    return stand_in(loaded.model, SPLIT, make_emulator(loaded, split=SPLIT, builder=builder, context=context))


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_bundle_rebuilds_the_emulator_to_the_bit(option, kind, make, make_ids, tmp_path):
    loaded, context, builder = make(option, kind)
    untouched = digest({name: tensor for name, tensor, _ in model_tensors(loaded.model)})
    bundle = bundled(loaded, split=SPLIT, builder=builder, folder=tmp_path, context=context)
    model, ids = build_emulated(bundle).model, make_ids()
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(logits, emulated(loaded, context, builder).model(ids).logits), "made twice, it is the same"
    assert torch.isfinite(logits).all()
    assert digest({name: tensor for name, tensor, _ in model_tensors(loaded.model)}) == untouched
    assert bundled(loaded, split=SPLIT, builder=builder, folder=tmp_path, context=context).version == bundle.version
    stored = [load_file(path) for path in bundle.folder.glob("*.safetensors")]
    assert bundle.payload_bytes == sum(tensor.nbytes for tensors in stored for tensor in tensors.values())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("option", OPTIONS)
def test_no_tensor_of_a_dropped_block_is_sent(option, make, tmp_path):
    loaded, context, builder = make(option)
    bundle = bundled(loaded, split=SPLIT, builder=builder, folder=tmp_path, context=context)
    dropped = set(range(6)) - set(bundle.sources)
    content = b"".join(path.read_bytes() for path in bundle.folder.rglob("*.safetensors"))
    blocks = find_blocks(loaded.model).of(loaded.model)
    for index in dropped:
        for name, tensor in blocks[index].named_parameters():
            assert tensor.numpy().tobytes() not in content, (index, name)


@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_reach_the_first_adapter_block(option, make, make_ids):
    view, ids = emulated(*make(option)), make_ids()
    first = view.model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    view.model(ids, labels=ids).loss.backward()
    assert first.grad is not None
    assert torch.isfinite(first.grad).all()
    assert first.grad.abs().sum() > 0
    others = [parameter for parameter in view.model.parameters() if parameter is not first]
    assert all(parameter.grad is None for parameter in others)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
@pytest.mark.parametrize("option", OPTIONS)
def test_generation_with_a_cache_equals_without(option, kind, make, make_ids):
    model, ids = emulated(*make(option, kind)).model, make_ids(2, 9)
    wish = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    assert torch.equal(model.generate(ids, use_cache=True, **wish), model.generate(ids, use_cache=False, **wish))


@pytest.mark.parametrize("option", OPTIONS)
def test_the_models_dtype_is_kept(option, make, make_ids):
    view = emulated(*make(option, dtype="bfloat16"))
    floats = {
        parameter.dtype
        for name, parameter in view.model.named_parameters()
        if parameter.is_floating_point() and not name.rpartition(".")[2].startswith(("scale", "zero"))
    }
    assert floats == {torch.bfloat16}
    with torch.no_grad():
        assert view.model(make_ids()).logits.dtype is torch.bfloat16


@pytest.mark.parametrize("option", SELECTING)
def test_keeping_everything_is_the_full_model(option, make, make_ids):
    loaded, context, _ = make(option)
    view = emulated(loaded, context, built(keeping(node_of(option), 4)))
    assert view.sources == tuple(range(6))
    with torch.no_grad():
        assert torch.equal(view.model(make_ids()).logits, loaded.model(make_ids()).logits)


@pytest.mark.parametrize("option", [name for name in SELECTING if name != "uniform"])
def test_nothing_kept_is_refused(option, make):
    loaded, context, _ = make(option)
    with pytest.raises(ConfigError, match=r"kept_blocks=0|cannot keep 0"):
        emulated(loaded, context, built(keeping(node_of(option), 0)))


@pytest.mark.parametrize("option", SELECTING)
def test_more_than_there_is_is_refused(option, make):
    loaded, context, _ = make(option)
    with pytest.raises(ConfigError, match="cannot keep 5 middle blocks; there are 4"):
        emulated(loaded, context, built(keeping(node_of(option), 5)))
