import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedpeat.models import SUBLAYERS, find_blocks, linear_layers, sublayers

EXPECTED = {
    "gpt2": {"attention": ["attn.c_attn", "attn.c_proj"], "mlp": ["mlp.c_fc", "mlp.c_proj"], "norm": ["ln_1", "ln_2"]},
    "opt": {
        "attention": [f"self_attn.{one}" for one in ("k_proj", "out_proj", "q_proj", "v_proj")],
        "mlp": ["fc1", "fc2"],
        "norm": ["final_layer_norm", "self_attn_layer_norm"],
    },
    "bloom": {
        "attention": ["self_attention.dense", "self_attention.query_key_value"],
        "mlp": ["mlp.dense_4h_to_h", "mlp.dense_h_to_4h"],
        "norm": ["input_layernorm", "post_attention_layernorm"],
    },
    "qwen3": {
        "attention": [f"self_attn.{one}_proj" for one in "koqv"],
        "mlp": ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"],
        "norm": ["input_layernorm", "post_attention_layernorm", "self_attn.k_norm", "self_attn.q_norm"],
    },
    "gpt_neox": {
        "attention": ["attention.dense", "attention.query_key_value"],
        "mlp": ["mlp.dense_4h_to_h", "mlp.dense_h_to_4h"],
        "norm": ["input_layernorm", "post_attention_layernorm"],
    },
    "mixtral": {
        "attention": [f"self_attn.{one}_proj" for one in "koqv"],
        "mlp": ["mlp.experts", "mlp.gate"],
        "norm": ["input_layernorm", "post_attention_layernorm"],
    },
    "odd": {"attention": [], "mlp": ["back.0", "mix"], "norm": []},
}


def a_block(miniature, name):
    model = miniature(name).model
    return find_blocks(model).of(model)[1]


@pytest.mark.parametrize("name", list(EXPECTED))
def test_every_parameter_belongs_to_one_sublayer(name, miniature):
    found = sublayers(a_block(miniature, name))
    modules = {
        kind: sorted({path.rpartition(".")[0] for path, own in found.items() if own == kind}) for kind in SUBLAYERS
    }
    assert modules == EXPECTED[name]


def test_all_families_have_linear_layers_and_no_parameter_is_left_out(family, miniature):
    block = a_block(miniature, family)
    assert list(sublayers(block)) == [name for name, _ in block.named_parameters()]
    layers = linear_layers(block)
    assert len(layers) >= 2
    assert all(isinstance(layer, nn.Linear | Conv1D) for layer in layers.values())
    assert all(sublayers(block)[f"{path}.weight"] in {"attention", "mlp"} for path in layers)


class OddAttention(nn.Module):
    """Attention under a name that says nothing."""

    def __init__(self):
        super().__init__()
        self.mix, self.scale_norm = nn.Linear(2, 2, bias=False), nn.LayerNorm(2, bias=False)


def test_a_class_says_what_a_name_does_not():
    block = nn.ModuleDict({"mixer": OddAttention(), "rest": nn.Linear(2, 2, bias=False)})
    assert sublayers(block) == {
        "mixer.mix.weight": "attention",
        "mixer.scale_norm.weight": "norm",
        "rest.weight": "mlp",
    }


def test_the_blocks_own_class_says_nothing():
    class AttentionBlock(OddAttention):
        pass

    assert sublayers(AttentionBlock())["mix.weight"] == "mlp"
