import json

import pytest
import torch
from peft import PeftModel

from fedpeat.peft import export_adapter


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def moved(tuned):
    tuned.write({name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in tuned.read().items()})
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
