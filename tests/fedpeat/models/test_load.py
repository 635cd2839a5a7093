import errno
import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from fedpeat.core import ConfigError, ModelError, StorageError
from fedpeat.models import LoadedModel, load_model, load_tokenizer, save_model
from fedpeat.models.load import PACKAGED


@pytest.fixture
def folder(miniature, tmp_path):
    return save_model(miniature("llama"), tmp_path / "llama")


def test_what_is_saved_is_loaded(family, miniature, make_ids, tmp_path):
    if family == "odd":  # the Auto classes do not know it
        with pytest.raises(ModelError, match="odd"):
            load_model(save_model(miniature(family), tmp_path / "model"))
        return
    saved = miniature(family)
    folder = save_model(saved, tmp_path / "model")
    loaded = load_model(folder)
    assert (loaded.name, type(loaded.model)) == (str(folder), type(saved.model))
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    with torch.no_grad():
        assert torch.equal(loaded.model(make_ids()).logits, saved.model(make_ids()).logits)


def test_the_tokenizer_comes_along(folder):
    tokenizer = load_model(folder).tokenizer
    assert tokenizer.decode(tokenizer("To be, or not")["input_ids"]) == "To be, or not"


def test_others_load_what_is_saved(folder):
    assert isinstance(hf.AutoModelForCausalLM.from_pretrained(folder), hf.LlamaForCausalLM)
    assert hf.AutoTokenizer.from_pretrained(folder).eos_token == "</s>"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("fp16", torch.half), ("fp32", torch.float)])
def test_dtypes(name, dtype, folder):
    assert {parameter.dtype for parameter in load_model(folder, dtype=name).model.parameters()} == {dtype}


def test_attention(folder, miniature, tmp_path):
    assert load_model(folder).model.config._attn_implementation == "sdpa"
    assert load_model(folder, attention="eager").model.config._attn_implementation == "eager"
    gemma = save_model(miniature("gemma2"), tmp_path / "gemma2")
    assert load_model(gemma).model.config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match="did you mean 'sdpa'"):
        load_model(folder, attention="sdp")
    with pytest.raises(ConfigError, match="did you mean 'float32'"):
        load_model(folder, dtype="float3")


def test_a_tokenizer_without_padding_gets_its_end_of_text(folder):
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder).pad_token == "</s>"


def test_an_unset_padding_id_is_filled_for_generation(folder):
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "pad_token_id": None}))
    assert load_model(folder).model.generation_config.pad_token_id == 2


def test_missing_folders_and_files(folder, tmp_path):
    for name in (tmp_path / "nowhere", "./nowhere", "some/where/else", folder / "config.json"):
        with pytest.raises(ModelError, match=r"there is no folder .*; give a hub id"):
            load_model(name)
    for gone, message in (
        ("tokenizer.json", "cannot load tokenizer"),
        ("model.safetensors", "has no \\*.safetensors"),
        ("config.json", "has no config.json"),
    ):
        (folder / gone).unlink()
        with pytest.raises(ModelError, match=message):
            load_model(folder)


def test_a_folder_without_any_tokenizer_file(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"save the tokenizer into the model's folder"):
        load_model(folder)


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled \(pytorch_model\.bin\).*save_pretrained"):
        load_model(folder)


def test_truncated_weights(folder):
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ModelError, match="cannot load model"):
        load_model(folder)


def test_incomplete_weights_are_not_made_up(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors are missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder)


def test_weights_of_another_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 50}))
    with pytest.raises(ModelError, match="cannot load model"):
        load_model(folder)


def test_models_that_do_not_continue_text(folder):
    t5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    bert = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    for config, message in ((t5, "'t5' is not a causal"), (bert, "encoder .BertForMaskedLM, is_decoder=False")):
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=message):
            load_model(folder)


def test_a_config_of_no_known_type(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "martian"}))
    with pytest.raises(ModelError, match="martian"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load model"):
        load_model(folder)


def test_remote_code_is_refused(folder):
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "x.py").write_text("raise SystemExit('ran remote code')")
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_model(folder)


def test_a_hub_model_without_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"cannot load model 'some/model'.*check the name, the network"):
        load_model("some/model")


def test_a_packaged_name_stands_for_its_folder(folder, monkeypatch, tmp_path):
    monkeypatch.setitem(PACKAGED, "tiny_docs", folder)
    assert load_model("tiny_docs").name == "tiny_docs"
    monkeypatch.setitem(PACKAGED, "tiny_docs", tmp_path / "gone")
    with pytest.raises(ModelError, match="there is no folder"):
        load_model("tiny_docs")


def test_a_model_with_layers_attached_is_not_saved(miniature, tmp_path):
    loaded = miniature("llama")
    loaded.model.model.layers[0].mlp.up_proj.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"merge or remove attached PEFT layers"):
        save_model(loaded, tmp_path)
    assert not list(tmp_path.iterdir())


def test_saving_again_replaces_and_a_tokenizer_may_lack(miniature, make_ids, tmp_path):
    save_model(miniature("llama", seed=1), tmp_path)
    second = miniature("llama", seed=2)
    save_model(LoadedModel(second.model, None, "x"), tmp_path)
    assert torch.equal(load_model(tmp_path).model(make_ids()).logits, second.model(make_ids()).logits)


def test_a_full_disk_is_told(miniature, tmp_path, monkeypatch):
    def full(*_args, **_keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    loaded = miniature("llama")
    monkeypatch.setattr(type(loaded.model), "save_pretrained", full)
    with pytest.raises(StorageError, match="No space left"):
        save_model(loaded, tmp_path)
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.hub
def test_a_model_of_the_hub():
    loaded = load_model("sshleifer/tiny-gpt2")
    assert loaded.model.config.model_type == "gpt2"
