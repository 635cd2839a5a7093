import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedpeat.bundles import bundle as bundle_module
from fedpeat.bundles import bundle_tokenizer, open_bundle
from fedpeat.core import ModelError, StorageError
from fedpeat.emulators import Block, Blocks, Builder, uniform
from fedpeat.models import LoadedModel, load_model, make_split, save_model
from tests.bundles import bundled

SPLIT = make_split(6, first=1, last=1)


def write(loaded, folder, kept=2, split=SPLIT):
    return bundled(loaded, split=split, builder=uniform(kept_blocks=kept), folder=folder)


@pytest.fixture(scope="module")
def loaded(miniature):
    return miniature("gpt2", blocks=6)


@pytest.fixture
def bundle(loaded, tmp_path):
    return write(loaded, tmp_path)


def test_what_it_tells(bundle, tmp_path):
    assert bundle.folder == tmp_path / bundle.version
    assert (bundle.sources, bundle.adapter_positions) == ((0, 1, 4, 5), (0, 3))
    assert (bundle.stack.path, bundle.stack.count) == ("transformer.h", 6)
    assert bundle.manifest["builder"] == {"name": "uniform", "kept_blocks": 2}
    tensors = {**load_file(bundle.folder / "adapter.safetensors"), **load_file(bundle.folder / "emulator.safetensors")}
    assert bundle.payload_bytes == sum(tensor.nbytes for tensor in tensors.values())
    files = [path for path in bundle.folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert bundle.file_bytes == sum(path.stat().st_size for path in files)
    assert {path.relative_to(bundle.folder).as_posix() for path in files} == set(bundle.manifest["files"])


def test_equal_content_is_one_bundle(loaded, miniature, bundle, tmp_path):
    inode = (bundle.folder / "adapter.safetensors").stat().st_ino
    assert write(loaded, tmp_path).version == bundle.version
    assert (bundle.folder / "adapter.safetensors").stat().st_ino == inode
    assert write(loaded, tmp_path / "elsewhere").version == bundle.version
    versions = {write(loaded, tmp_path, kept=1).version, write(miniature("gpt2", blocks=6, seed=1), tmp_path).version}
    assert len(versions | {bundle.version}) == 3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_bundles_of_one_split_share_the_adapter_file(loaded, bundle, tmp_path):
    other = write(loaded, tmp_path, kept=0)
    assert other.manifest["files"]["adapter.safetensors"] == bundle.manifest["files"]["adapter.safetensors"]
    assert "emulator.safetensors" not in other.manifest["files"]


def test_equal_buffers_are_stored_once(miniature, tmp_path):
    bundle = write(miniature("llama", blocks=6), tmp_path)
    assert bundle.manifest["aliases"]["model.rotary_emb.original_inv_freq"] == "model.rotary_emb.inv_freq"


def test_nothing_tells_where_the_model_came_from(miniature, tmp_path):
    full = load_model(save_model(miniature("llama", blocks=6), tmp_path / "owners-secret-place"))
    bundle = write(full, tmp_path)
    for path in bundle.folder.rglob("*"):
        assert path.is_dir() or b"owners-secret-place" not in path.read_bytes()


def test_the_tokenizer_comes_along(loaded, bundle, tmp_path):
    assert bundle_tokenizer(bundle)("Ay, sir").input_ids == loaded.tokenizer("Ay, sir").input_ids
    without = write(LoadedModel(loaded.model, None, "x"), tmp_path)
    assert without.version != bundle.version
    with pytest.raises(ModelError, match="tokenizer"):
        bundle_tokenizer(without)


@pytest.mark.parametrize("name", ["adapter.safetensors", "emulator.safetensors", "tokenizer/tokenizer.json"])
def test_damage_is_found(name, bundle):
    path = bundle.folder / name
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    for verify in (True, False):
        with pytest.raises(StorageError, match=f"{name} has {len(raw) - 1} bytes instead of {len(raw)}"):
            open_bundle(bundle.folder, verify=verify)
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(StorageError, match=f"{name} was altered"):
        open_bundle(bundle.folder)
    assert open_bundle(bundle.folder, verify=False).version == bundle.version
    path.unlink()
    with pytest.raises(StorageError, match=f"{name} is missing"):
        open_bundle(bundle.folder, verify=False)


def test_a_damaged_bundle_is_written_anew(loaded, bundle, tmp_path):
    (bundle.folder / "adapter.safetensors").write_bytes(b"")
    assert write(loaded, tmp_path).version == bundle.version
    assert open_bundle(bundle.folder).version == bundle.version


def test_an_interrupted_write_leaves_nothing(loaded, tmp_path, monkeypatch):
    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle_module, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(loaded, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told(loaded, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bundle_module, "write_tensor_file", full)
    with pytest.raises(StorageError, match="the disk is full; free some space"):
        write(loaded, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file(loaded, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="check the folder"):
        write(loaded, tmp_path / "file")


def test_two_writers_at_once(loaded, tmp_path, monkeypatch):
    finished = write(loaded, tmp_path / "other")

    def overtaken(self, target):
        finished.folder.replace(target)
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(Path, "rename", overtaken)
    assert write(loaded, tmp_path).version == finished.version


def test_a_split_of_another_model(loaded, tmp_path):
    with pytest.raises(ModelError, match=r"split 2\+2 of 9; GPT2LMHeadModel has 6 blocks"):
        write(loaded, tmp_path, split=make_split(9))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Block(0, torch.nn.Identity()), "block 0, not of the middle"),
        (Block(2, torch.nn.Identity(), ({"kind": "shrunk"},)), "no such kind"),
    ],
)
def test_builders_that_go_astray(block, message, loaded, tmp_path):
    astray = Builder("astray", {}, lambda _: Blocks((block,)))
    with pytest.raises(ModelError, match=message):
        bundled(loaded, split=SPLIT, builder=astray, folder=tmp_path)


def test_a_model_with_layers_attached(miniature, tmp_path):
    loaded = miniature("llama", blocks=6)
    loaded.model.model.layers[0].mlp.up_proj.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"cannot build an emulator; .*up_proj\.extra\.bias"):
        write(loaded, tmp_path)


def test_any_adapter_keeps_the_order_of_depth(loaded, tmp_path):
    bundle = write(loaded, tmp_path, kept=2, split=make_split(6, blocks=[1, 3]))
    assert (bundle.sources, bundle.adapter_positions) == ((0, 1, 3, 5), (1, 2))


def test_manifests_are_plain_json(bundle):
    assert json.loads((bundle.folder / "manifest.json").read_text()) == bundle.manifest
