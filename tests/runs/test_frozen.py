"""What must not change does not, and what must not leave the server stays there."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.oracles import whole_run as oracle


def blocks(kind, *indices):
    path = {"llama": "model.layers", "gpt2": "transformer.h"}[kind]
    return tuple(f"{path}.{index}." for index in indices)


@pytest.mark.parametrize(
    ("kind", "chosen"),
    [("llama", "peft=lora"), ("llama", "peft=full"), ("gpt2", "peft=lora"), ("gpt2", "peft=full")],
)
def test_the_exported_model_is_the_original_outside_the_adapter(kind, chosen, run, model_folder):
    folder = model_folder(kind)
    ran = run(f"model.name={folder}", chosen, "client.learning_rate=0.01", "export=true", "server.train=off")
    before = load_file(folder / "model.safetensors")
    after = load_file(ran.folder / "export" / "model" / "model.safetensors")
    assert set(before) == set(after)
    adapter = blocks(kind, 0, 5)
    for name, tensor in before.items():
        if not name.startswith(adapter):
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name], tensor), name
    for block in adapter:
        assert any(not torch.equal(after[name], before[name]) for name in before if name.startswith(block)), block


def test_training_leaves_the_full_models_files_alone(run, model_folder):
    folder = model_folder()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run("peft=full", "server.train=full", "data.server_share=0.5")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_no_tensor_of_a_dropped_block_is_in_the_bundle(run, model_folder, tmp_path):
    """Neither by its name nor, under whatever name, by its bytes."""
    run(f"cache={tmp_path}", "control.kept_blocks={bob: 1}", "rounds=1")
    bundles = list((tmp_path / "bundles").iterdir())
    kept = {2: {1, 4}, 1: {2}}
    assert len(bundles) == 2
    full = load_file(model_folder() / "model.safetensors")
    for bundle in bundles:
        manifest = json.loads((bundle / "manifest.json").read_text())
        middle = {position["source"] for position in manifest["positions"] if position["role"] == "emulator"}
        assert middle == kept[len(middle)]
        dropped = blocks("llama", *({1, 2, 3, 4} - middle))
        content = b"".join(path.read_bytes() for path in bundle.rglob("*") if path.is_file())
        names = [name for path in bundle.glob("*.safetensors") for name in names_in(path)]
        assert [name for name in names if name.startswith(dropped)] == []
        for name, tensor in full.items():
            assert (tensor.numpy().tobytes() in content) == (not name.startswith(dropped)), name


def names_in(path):
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_emulator_of_the_whole_middle_is_the_full_model(method, run):
    ran = run("emulator.kept_blocks=4", f"peft={method}", "client.learning_rate=0.01")
    for line in ran.rounds:
        found = line["evaluations"]
        assert found["emulator_zero_shot"] == found["full_zero_shot"]
        assert found["emulator_tuned"] == found["plug_in"]
    assert ran.summary["privacy_margin"] == 0
    assert ran.losses["plug_in"] < ran.losses["full_zero_shot"]
    smaller = run("emulator.kept_blocks=3", f"peft={method}", "client.learning_rate=0.01")
    assert smaller.losses["emulator_zero_shot"] != smaller.losses["full_zero_shot"]
    assert smaller.losses["full_zero_shot"] == ran.losses["full_zero_shot"]
    assert smaller.digest != ran.digest


@pytest.mark.parametrize("method", ["lora", "full"])
def test_only_tensors_of_the_adapter_travel(method, run):
    ran = run("model.split.first=0", "model.split.last=0", "model.split.blocks=[1, 3]", f"peft={method}")
    assert all(name.startswith(blocks("llama", 1, 3)) for name in ran.tensors)
    for block in blocks("llama", 1, 3):
        assert any(name.startswith(block) for name in ran.tensors)


def test_an_emulator_of_nothing_is_the_adapter_alone(run, model_folder, held_out):
    ran = run("emulator.kept_blocks=0", "rounds=1")
    model, _ = oracle.set_up(model_folder(), adapter=(0, 5), kept=())
    loss = oracle.loss_of(model, oracle.read_rows(held_out, 16))
    assert ran.losses["emulator_zero_shot"] == pytest.approx(loss, rel=1e-6)
