import pathlib

import pytest
import torch
from safetensors.torch import load_file

from fedpeat.bundles import build_emulated, open_bundle
from fedpeat.bundles.bundle import Bundle
from fedpeat.core import ModelError, StorageError
from fedpeat.emulators import full_view, uniform
from fedpeat.models import make_split
from tests.bundles import bundled

SPLIT = make_split(4, first=1, last=1)


@pytest.fixture
def bundle(miniature, tmp_path):
    return bundled(miniature("llama"), split=SPLIT, builder=uniform(kept_blocks=1), folder=tmp_path)


def with_manifest(bundle, **changes):
    return Bundle(bundle.folder, bundle.version, {**bundle.manifest, **changes}, bundle.payload_bytes)


def test_a_view_of_the_full_model(miniature):
    loaded = miniature("bloom")
    view = full_view(loaded, make_split(4, blocks=[1]))
    assert view.model is loaded.model
    assert (view.path, view.sources, view.adapter_positions) == ("transformer.h", (0, 1, 2, 3), (1,))
    with pytest.raises(ModelError, match=r"split 2\+2 of 5; the model has 4 blocks"):
        full_view(loaded, make_split(5))


def test_a_view_of_a_bundle(bundle):
    view = build_emulated(bundle)
    assert (view.path, view.sources, view.adapter_positions) == ("model.layers", (0, 1, 3), (0, 2))
    assert (view.model.config.num_hidden_layers, view.model.training) == (3, False)
    assert not any(parameter.requires_grad for parameter in view.model.parameters())


def test_parameters_lie_in_the_mapped_files(bundle):
    view = build_emulated(bundle)
    with pathlib.Path("/proc/self/maps").open(encoding="utf-8") as file:
        mapped = [line.split()[0].split("-") for line in file if str(bundle.folder) in line]
    ranges = [range(int(start, 16), int(end, 16)) for start, end in mapped]
    for parameter in view.model.parameters():
        assert any(parameter.data_ptr() in places for places in ranges)
    for buffer in view.model.buffers():
        assert not any(buffer.data_ptr() in places for places in ranges)


def test_two_models_of_one_bundle_do_not_disturb_each_other(bundle):
    one, two = build_emulated(bundle).model, build_emulated(bundle).model
    with torch.no_grad():
        for tensor in (*one.parameters(), *one.buffers()):
            tensor.add_(1)
    stored = load_file(bundle.folder / "adapter.safetensors")
    assert torch.equal(two.model.norm.weight, stored["model.norm.weight"])
    assert torch.equal(two.model.rotary_emb.inv_freq, stored["model.rotary_emb.inv_freq"])
    assert open_bundle(bundle.folder).version == bundle.version


def test_only_a_known_class_is_built(bundle):
    model = {**bundle.manifest["model"], "class": "os.system"}
    with pytest.raises(ModelError, match="neither transformers' own nor registered"):
        build_emulated(with_manifest(bundle, model=model))


def test_blocks_must_be_where_the_manifest_says(bundle):
    with pytest.raises(ModelError, match="its blocks are at"):
        build_emulated(with_manifest(bundle, blocks={**bundle.manifest["blocks"], "path": "model.norm"}))


def test_changed_blocks_need_their_version(bundle):
    positions = [{**position, "changes": [{"kind": "folded"}]} for position in bundle.manifest["positions"]]
    with pytest.raises(ModelError, match="no such kind"):
        build_emulated(with_manifest(bundle, positions=positions))


def test_files_that_vanish_or_lack_tensors(bundle):
    fewer = {name: entry for name, entry in bundle.manifest["files"].items() if name != "emulator.safetensors"}
    with pytest.raises(ModelError, match=r"it holds no tensor 'model\.layers\.1"):
        build_emulated(with_manifest(bundle, files=fewer))
    (bundle.folder / "adapter.safetensors").unlink()
    with pytest.raises(StorageError, match=r"adapter\.safetensors"):
        build_emulated(bundle)


@pytest.mark.gpu
def test_on_a_gpu(bundle, make_ids):
    on_cpu, on_gpu = build_emulated(bundle), build_emulated(bundle, device="cuda")
    assert {tensor.device.type for tensor in (*on_gpu.model.parameters(), *on_gpu.model.buffers())} == {"cuda"}
    assert on_gpu.model.lm_head.weight.device.type == "cuda"
    with torch.no_grad():
        logits = on_gpu.model(make_ids().cuda()).logits.cpu()
        torch.testing.assert_close(logits, on_cpu.model(make_ids()).logits, atol=1e-3, rtol=1e-3)
