import json

import pytest
import torch
from peft import PeftModel

from fedpeat.peft import export_adapter

PATTERN = {".*_proj": 2}


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def moved(tuned, size=0.01):
    tuned.write({name: tensor + size * torch.randn_like(tensor) for name, tensor in tuned.read().items()})
    return tuned


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # HF peft of HF transformers
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize(
    "method",
    [
        {"kind": "lora", "rank": 2},
        {"kind": "lora", "targets": ["q_proj"], "train_head": True},
        {"kind": "hf", "type": "IA3"},
        {"kind": "hf", "type": "LN_TUNING"},
        {"kind": "hf", "type": "VERA", "train_head": True},
        {"kind": "hf", "type": "LILY"},
        {"kind": "hf", "type": "LOKR"},
        {"kind": "hf", "type": "PROMPT_TUNING", "options": {"num_virtual_tokens": 3}},
        {"kind": "hf", "type": "P_TUNING", "options": {"num_virtual_tokens": 3, "encoder_hidden_size": 8}},
    ],
    ids=lambda method: method.get("type", "lora"),
)
def test_hf_peft_loads_the_folder_onto_the_full_model(method, full, attached, make_ids, tmp_path):
    tuned = moved(attached(full(), **method))
    assert export_adapter(tuned, tmp_path / "export", "a/base")
    loaded = PeftModel.from_pretrained(full().model, tmp_path / "export").eval()
    torch.testing.assert_close(logits(loaded, make_ids()), logits(tuned.model, make_ids()), atol=1e-6, rtol=1e-6)


def lora(**options):
    return {"kind": "hf", "type": "LORA", "options": options}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # HF peft of HF transformers
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("method", "folded"),
    [
        ({"kind": "lora", "rank": 2}, True),
        ({"kind": "lora_sb", "rank": 3}, False),
        ({"kind": "lora_sb", "rank": 3}, True),
        (lora(init_lora_weights="pissa", target_modules="all-linear"), False),
        (lora(init_lora_weights="pissa", target_modules="all-linear"), True),
        (lora(use_rslora=True, r=4), True),
        (lora(r=4, target_modules="all-linear", rank_pattern=PATTERN, alpha_pattern=PATTERN), True),
    ],
    ids=["lora folded", "cores", "cores folded", "PiSSA", "PiSSA folded", "rsLoRA folded", "patterns folded"],
)
def test_what_is_folded_and_what_starts_elsewhere_is_in_the_folder(
    kind, method, folded, full, attached, make_ids, tmp_path
):
    tuned = moved(attached(full(kind), **method), size=0.1)
    if folded:
        generator = torch.Generator().manual_seed(4)
        tuned.fold({pair.module: 0.1 * torch.randn(pair.shape, generator=generator) for pair in tuned.layout.pairs[1:]})
    before = logits(tuned.model, make_ids())
    assert export_adapter(tuned, tmp_path / "export", "a/base")
    assert torch.equal(logits(tuned.model, make_ids()), before)
    loaded = PeftModel.from_pretrained(full(kind).model, tmp_path / "export").eval()
    torch.testing.assert_close(logits(loaded, make_ids()), before, atol=2e-5, rtol=2e-5)
    assert float((logits(full(kind).model, make_ids()) - before).abs().max()) > 0.01


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_device_exports_its_folds_as_the_server_does(kind, view, full, attached, make_ids, tmp_path):
    device, server = (attached(make(kind), kind="lora", rank=2) for make in (view, full))
    folds = {pair.module: torch.full(pair.shape, 0.01) for pair in server.layout.pairs}
    for name, tuned in {"device": device, "server": server}.items():
        tuned.fold(folds)
        assert export_adapter(tuned, tmp_path / name, "a/base")
        tuned.fold({})
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "device" / file).read_bytes() == (tmp_path / "server" / file).read_bytes()
    config = json.loads((tmp_path / "server" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 1  # no factor has moved from 0, and each fold is of rank 1


@pytest.mark.parametrize("size", [1.0, 1e-5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_folder_has_the_rank_it_takes(dtype, size, full, attached, tmp_path):
    """What is folded into a base weight, and rounded there to its precision, is not read back from it."""
    tuned = moved(attached(full(dtype=dtype), kind="lora", rank=2), size=size)
    generator, folds = torch.Generator().manual_seed(5), {}
    for pair in tuned.layout.pairs:
        left, right = (torch.randn(side, 3, generator=generator) for side in pair.shape)
        folds[pair.module] = size**2 * left @ right.T
    tuned.fold(folds)
    assert export_adapter(tuned, tmp_path / "export", "a/base")
    assert json.loads((tmp_path / "export" / "adapter_config.json").read_text())["r"] == 5


def test_a_device_exports_the_full_models_names(view, full, attached, tmp_path):
    assert export_adapter(attached(view(), kind="lora", rank=2), tmp_path / "device", "a/base")
    assert export_adapter(attached(full(), kind="lora", rank=2), tmp_path / "server", "a/base")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "device" / file).read_bytes() == (tmp_path / "server" / file).read_bytes()
    config = json.loads((tmp_path / "server" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "a/base"
    assert config["task_type"] == "CAUSAL_LM"
    assert len(config["target_modules"]) == 3 * 7
    assert "model.layers.5.mlp.up_proj" in config["target_modules"]


def test_own_weights_are_not_a_peft_folder(full, attached, tmp_path):
    assert not export_adapter(attached(full(), kind="full"), tmp_path / "export", "a/base")
    assert not (tmp_path / "export").exists()
