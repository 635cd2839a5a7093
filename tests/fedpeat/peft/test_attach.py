import pytest
import torch

from fedpeat.core import PeftError
from fedpeat.peft import attach


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def test_lora_is_on_every_linear_layer_of_the_adapter_blocks(view, attached):
    tuned = attached(view(), kind="lora", rank=2)
    layers = {name.rsplit(".lora_", 1)[0] for name in tuned.names}
    inside = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    inside |= {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert layers == {f"model.layers.{block}.{name}" for block in (0, 1, 5) for name in inside}
    assert all(2 in parameter.shape for parameter in tuned.parameters)


def test_names_are_the_full_models(view, attached):
    tuned = attached(view(), kind="lora", targets=["q_proj"])
    assert tuned.names == tuple(
        f"model.layers.{block}.self_attn.q_proj.lora_{half}.weight" for block in (0, 1, 5) for half in "AB"
    )
    assert tuned.model.model.layers[3].self_attn.q_proj.lora_A["default"].weight is tuned.parameters[4]


def test_rank_alpha_and_dropout_reach_the_layers(view, attached):
    layer = attached(view(), kind="lora", rank=4, alpha=10, dropout=0.25).model.model.layers[0].mlp.up_proj
    assert layer.scaling["default"] == 2.5
    assert layer.lora_dropout["default"].p == 0.25


def test_conv1d_layers_of_gpt2_are_linear_layers_too(view, attached):
    tuned = attached(view("gpt2"), kind="lora", rank=2)
    assert {name.split(".lora_")[0] for name in tuned.names if ".h.5." in name} == {
        f"transformer.h.5.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert tuned.wrapper.peft_config["default"].fan_in_fan_out


def test_only_the_adapter_blocks_own_weights_train_in_full(view, attached):
    tuned = attached(view(), kind="full")
    assert {name.split(".")[2] for name in tuned.names} == {"0", "1", "5"}
    training = {name for name, parameter in tuned.model.named_parameters() if parameter.requires_grad}
    assert training == {name for name, _ in tuned.model.named_parameters() if name.startswith("model.layers.")} - {
        name for name, _ in tuned.model.named_parameters() if name.startswith("model.layers.2.")
    }
    assert tuned.frozen_digest == ""
    assert tuned.identity_at_start


def test_own_weights_leave_the_storage_they_were_read_from(view, attached):
    model = view()
    stored = {name: parameter.data_ptr() for name, parameter in model.model.named_parameters()}
    attached(model, kind="full")
    for name, parameter in model.model.named_parameters():
        assert (parameter.data_ptr() == stored[name]) != parameter.requires_grad, name


def test_embeddings_and_head_train_where_asked(view, attached):
    ends = {"model.embed_tokens.weight", "lm_head.weight"}
    for kind, keys, wanted in (
        ("full", {"train_head": True}, {"lm_head.weight"}),
        ("full", {"train_embeddings": True}, {"model.embed_tokens.weight"}),
        ("full", {"train_head": True, "train_embeddings": True}, ends),
        ("lora", {"train_head": True}, {"lm_head.weight"}),
        ("hf", {"type": "IA3", "train_head": True}, {"lm_head.weight"}),
    ):
        assert ends & set(attached(view(), kind=kind, **keys).names) == wanted


def test_a_tied_head_is_one_tensor_with_one_name(view, attached):
    tuned = attached(view(tie_word_embeddings=True), kind="full", train_head=True, train_embeddings=True)
    assert "model.embed_tokens.weight" in tuned.names
    assert "lm_head.weight" not in tuned.names
    assert tuned.model.lm_head.weight is tuned.model.model.embed_tokens.weight
    for kind in ("full", "lora"):
        with pytest.raises(PeftError, match="tied to the embeddings"):
            attached(view(tie_word_embeddings=True), kind=kind, train_head=True)


def test_a_method_that_starts_elsewhere_by_its_options_is_refused(view, attached):
    with pytest.raises(PeftError, match="should leave the output unchanged"):
        attached(view(), kind="hf", type="LORA", options={"init_lora_weights": False})


@pytest.mark.parametrize(
    ("options", "where"),
    [({"modules_to_save": ["lm_head"]}, "lm_head"), ({"bias": "all"}, "model.decoder")],
)
def test_training_outside_the_adapter_blocks_is_refused(view, attached, options, where):
    with pytest.raises(PeftError, match=f"this method trains {where}"):
        attached(view("opt" if "bias" in options else "llama"), kind="hf", type="LORA", options=options)


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ({"kind": "lara"}, "did you mean 'lora'"),
        ({}, "no such kind"),
        ({"kind": "lora", "rnak": 4}, "did you mean 'rank'"),
        ({"kind": "lora", "rank": 0}, "raise peft.rank"),
        ({"kind": "lora", "targets": ["q_prj"]}, "q_proj"),
        ({"kind": "hf"}, "set peft.type"),
        ({"kind": "hf", "type": "LARA"}, "did you mean 'LORA'"),
        ({"kind": "hf", "type": "LORA", "options": {"rr": 1}}, "did you mean 'r'"),
        ({"kind": "hf", "type": "LORA", "options": {"layers_to_transform": [0]}}, "model.split decides"),
        ({"kind": "hf", "type": "LOHA", "options": {"r": 0}}, "HF peft says"),
        ({"kind": "hf", "type": "LORA", "options": {"init_lora_weights": "no such"}}, "HF peft says"),
    ],
)
def test_bad_methods_are_told(view, method, told):
    model = view()
    places = {"path": model.path, "sources": model.sources, "adapter_positions": model.adapter_positions}
    with pytest.raises(PeftError, match=told):
        attach(model.model, method=method, seed=1, **places)


def test_a_model_takes_one_method(view, attached):
    model = view()
    attached(model, kind="lora")
    with pytest.raises(PeftError, match="fresh model"):
        attached(model, kind="lora")


def test_an_adapter_without_blocks_is_told(view):
    model = view()
    with pytest.raises(PeftError, match="no blocks"):
        attach(
            model.model, method={"kind": "lora"}, path=model.path, sources=model.sources, adapter_positions=(), seed=1
        )


def test_input_prompts_come_before_the_tokens(view, attached, make_ids):
    model, ids = view(), make_ids()
    tuned = attached(model, kind="hf", type="PROMPT_TUNING", options={"num_virtual_tokens": 3})
    assert tuned.prompt_tokens == 3
    assert tuned.names == ("prompt_encoder.embedding.weight",)
    assert logits(tuned.model, ids).shape == (2, 3 + 12, model.model.config.vocab_size)
    assert not tuned.identity_at_start
