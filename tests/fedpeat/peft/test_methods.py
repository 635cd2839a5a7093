import pytest

from fedpeat.core import PeftError
from fedpeat.peft.methods import build_config
from fedpeat.peft.targets import modules_in_blocks


@pytest.fixture
def config(view):
    def build(name, options=None, family="llama"):
        seen = view(family)
        modules = modules_in_blocks(seen.model, path=seen.path, positions=seen.adapter_positions)
        return build_config(name, options or {}, model=seen.model, modules=modules)

    return build


def test_hf_defaults_of_the_family_are_narrowed_to_the_adapter(config):
    assert config("LORA").target_modules == {
        f"model.layers.{position}.self_attn.{name}" for position in (0, 1, 3) for name in ("q_proj", "v_proj")
    }
    assert "model.norm" not in config("LN_TUNING").target_modules


def test_a_family_that_hf_has_no_defaults_for_gets_all_linear_layers(config):
    assert len(config("LORA", family="odd").target_modules) == 3 * 2


def test_ia3_knows_its_feedforward_layers(config):
    assert config("IA3").feedforward_modules == {f"model.layers.{position}.mlp.down_proj" for position in (0, 1, 3)}
    chosen = config("IA3", {"target_modules": ["k_proj", "up_proj"], "feedforward_modules": ["up_proj"]})
    assert chosen.feedforward_modules == {f"model.layers.{position}.mlp.up_proj" for position in (0, 1, 3)}
    assert config("IA3", {"target_modules": ["k_proj"], "feedforward_modules": []}).feedforward_modules == set()
    with pytest.raises(PeftError, match="up_proj"):
        config("IA3", {"target_modules": ["k_proj"], "feedforward_modules": ["up_proj"]})


def test_names_are_read_in_any_case(config):
    assert config("ia3").peft_type == "IA3"


def test_prompts_are_for_causal_models_and_have_no_targets(config):
    chosen = config("P_TUNING", {"num_virtual_tokens": 4})
    assert chosen.task_type == "CAUSAL_LM"
    with pytest.raises(PeftError, match="target_modules"):
        config("P_TUNING", {"target_modules": ["q_proj"]})


def test_a_wrong_combination_is_told_in_hf_words(config):
    with pytest.raises(PeftError, match="cannot configure LoraConfig"):
        config("LORA", {"use_dora": True, "megatron_config": {"a": 1}})
