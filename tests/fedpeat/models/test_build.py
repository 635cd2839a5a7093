import json

import pytest
import torch
import transformers as hf

from fedpeat.core import ModelError
from fedpeat.models import build_skeleton, describe, fill, model_tensors, register_model_class, tied_names
from fedpeat.models.build import find_class


def tensors_of(model):
    return {name: tensor for name, tensor, _ in model_tensors(model)}


def test_a_description_is_json_and_rebuilds_the_structure(family, miniature, make_ids):
    model = miniature(family).model
    description = json.loads(json.dumps(describe(model)))
    skeleton = build_skeleton(description)
    assert type(skeleton) is type(model)
    assert not skeleton.training
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    tensors = tensors_of(model)
    fill(skeleton, tensors, tied=tied_names(tensors))
    assert not any(tensor.is_meta for tensor in tensors_of(skeleton).values())
    with torch.no_grad():
        assert torch.equal(skeleton(make_ids()).logits, model(make_ids()).logits)


def test_a_description_says_nothing_of_the_machine(miniature):
    model = miniature("llama").model
    model.config.name_or_path = "/home/owner/secret"
    text = json.dumps(describe(model))
    assert "secret" not in text
    assert "transformers_version" not in text


def test_numbers_that_json_lacks_survive(miniature):
    model = miniature("llama").model
    model.config.time_step_limit = [0.0, float("inf")]
    assert build_skeleton(json.loads(json.dumps(describe(model)))).config.time_step_limit == [0.0, float("inf")]


def test_parameters_are_taken_as_they_are_and_buffers_copied(miniature):
    model = miniature("llama").model
    skeleton, tensors = build_skeleton(describe(model)), tensors_of(model)
    fill(skeleton, tensors, tied=tied_names(tensors))
    for name, tensor, kind in model_tensors(skeleton):
        assert (tensor.data_ptr() == tensors[name].data_ptr()) == (kind == "parameter")
        assert not tensor.requires_grad


def test_generation_settings_are_kept(miniature):
    model = miniature("llama").model
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.eos_token_id = [2, 5]
    rebuilt = build_skeleton(json.loads(json.dumps(describe(model)))).generation_config
    assert (rebuilt.repetition_penalty, rebuilt.eos_token_id) == (1.5, [2, 5])


def test_an_untied_head_stays_untied_whatever_the_config_says(miniature):
    model = miniature("gpt2").model
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1, requires_grad=False)
    tensors = tensors_of(model)
    skeleton = build_skeleton(describe(model))
    fill(skeleton, tensors, tied=tied_names(tensors))
    skeleton.tie_weights(recompute_mapping=False)
    assert torch.equal(skeleton.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(skeleton.lm_head.weight, skeleton.transformer.wte.weight)


@pytest.mark.parametrize("name", ["os", "AutoTokenizer", "NoSuchModel", "modeling_utils", "a.b", "", "GPT2Config"])
def test_only_known_model_classes(name):
    with pytest.raises(ModelError, match="neither transformers' own nor registered"):
        find_class(name)


def test_registering():
    class MyLlamaForCausalLM(hf.LlamaForCausalLM):
        pass

    assert register_model_class(MyLlamaForCausalLM) is MyLlamaForCausalLM
    assert register_model_class(MyLlamaForCausalLM) is MyLlamaForCausalLM
    assert find_class("MyLlamaForCausalLM") is MyLlamaForCausalLM
    impostor = type("LlamaForCausalLM", (hf.LlamaForCausalLM,), {"__module__": "elsewhere"})
    with pytest.raises(ModelError, match=r"that name belongs to transformers\.models\.llama"):
        register_model_class(impostor)
    with pytest.raises(ModelError, match="no PreTrainedModel"):
        register_model_class(torch.nn.Linear)  # type: ignore[arg-type]


def test_a_class_that_cannot_be_rebuilt_is_told_at_once():
    class Unknown(hf.LlamaForCausalLM):
        pass

    config = hf.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=2, vocab_size=9
    )
    with pytest.raises(ModelError, match="register_model_class"):
        describe(Unknown(config))
    impostor = type("LlamaForCausalLM", (hf.LlamaForCausalLM,), {"__module__": "elsewhere"})
    with pytest.raises(ModelError, match="another class of that name"):
        describe(impostor(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": "kernels-community/anything"}, "choose from: eager"),
        ({"dtype": "float8"}, "choose from|did you mean"),
        ({"config": {"num_hidden_layers": "many"}}, "cannot build a LlamaForCausalLM from its description"),
    ],
)
def test_descriptions_that_make_no_model(change, message, miniature):
    description = describe(miniature("llama").model)
    with pytest.raises(ModelError, match=message):
        build_skeleton({**description, **change})


def test_tensors_must_fit(miniature):
    model = miniature("llama").model
    tensors = tensors_of(model)
    lacking = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    with pytest.raises(ModelError, match=r"missing: model\.norm\.weight"):
        fill(build_skeleton(describe(model)), lacking, tied={})
    with pytest.raises(ModelError, match="unknown: x"):
        fill(build_skeleton(describe(model)), {**tensors, "x": torch.ones(1)}, tied={})
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' is \(3,\), the config says \(32,\)"):
        fill(build_skeleton(describe(model)), {**tensors, "model.norm.weight": torch.ones(3)}, tied={})


def test_a_quantised_model_is_refused(miniature):
    model = miniature("llama").model
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ModelError, match="quantised"):
        describe(model)
