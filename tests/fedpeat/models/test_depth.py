import pytest
import torch
import transformers as hf

from fedpeat.core import ModelError
from fedpeat.models import build_skeleton, describe, find_blocks, keep_blocks
from fedpeat.models.depth import _index_attributes, _renumber_config

LLAMA = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 99, "pad_token_id": 2}


def shallow(model, sources):
    skeleton = build_skeleton(describe(model))
    keep_blocks(skeleton, find_blocks(skeleton), sources)
    return skeleton


def test_layer_types_follow_the_kept_blocks(miniature):
    full = miniature("gemma2", blocks=6).model
    kinds = full.config.layer_types
    model = shallow(full, (0, 2, 3, 5))
    assert model.config.num_hidden_layers == 4
    assert model.config.layer_types == [kinds[0], kinds[2], kinds[3], kinds[5]]
    assert [layer.self_attn.layer_type for layer in model.model.layers] == model.config.layer_types
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [6, 6, None, None]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    assert full.config.layer_types == kinds
    assert model.model.config is model.config
    assert model.model.layers[3].self_attn.config is model.config


def test_what_was_made_from_the_index_stays(miniature):
    model = shallow(miniature("gpt2", blocks=6).model, (0, 4, 5))
    # GPT-2 may divide attention by its depth: a factor, fixed at construction, that is not an index.
    assert [layer.attn.scaling for layer in model.transformer.h] == [8**-0.5 / depth for depth in (1, 5, 6)]
    assert [layer.attn.layer_idx for layer in model.transformer.h] == [0, 1, 2]


def test_a_class_of_ones_own(miniature):
    model = shallow(miniature("odd", blocks=5).model, (0, 3, 4))
    assert [rung.place for rung in model.tower.rungs] == [0, 1, 2]
    assert [rung.reach for rung in model.tower.rungs] == [64, 3, 64]
    assert model.tower.n_rungs == 5, "no name that tells a depth"
    assert (model.config.num_hidden_layers, len(model.tower.gains), len(model.tower.experts)) == (3, 3, 9)


def test_per_block_lists_beside_the_config():
    class Remembering(hf.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model.num_layers = config.num_hidden_layers
            self.model.windows = tuple(range(10, 10 + config.num_hidden_layers))
            self.model.sizes = [1, 2]

    model = Remembering(hf.LlamaConfig(num_hidden_layers=4, **LLAMA))
    keep_blocks(model, find_blocks(model), (1, 3))
    assert (model.model.num_layers, model.model.windows, model.model.sizes) == (2, (11, 13), [1, 2])


def test_rules_that_count_blocks_are_pinned():
    rule = {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 2}
    sizes = {"mamba_d_state": 4, "mamba_dt_rank": 2, "num_key_value_heads": 1, "use_mamba_kernels": False}
    model = hf.JambaForCausalLM(hf.JambaConfig(num_hidden_layers=6, **rule, **sizes, **LLAMA))
    kinds = model.config.layers_block_type
    keep_blocks(model, find_blocks(model), (0, 1, 4, 5))
    assert model.config.layers_block_type == [kinds[0], kinds[1], kinds[4], kinds[5]]
    assert model.config.layers_block_type != hf.JambaConfig(num_hidden_layers=4, **rule).layers_block_type
    assert model.config.to_dict()["model_type"] == "jamba"


def test_overrides_of_single_layers_move_along():
    config = hf.LlamaConfig(
        num_hidden_layers=4,
        per_layer_config={0: {"intermediate_size": 3}, 2: {"intermediate_size": 5}},
        intermediate_size=9,
    )
    _renumber_config(config, 4, (0, 2, 3))
    assert [layer.intermediate_size for layer in config.per_layer_config] == [3, 5, 9]


def test_lists_of_that_length_by_chance_stay():
    config = hf.LlamaConfig(num_hidden_layers=2, eos_token_id=[2, 3], architectures=["A", "B"])
    _renumber_config(config, 2, (1,))
    assert (config.eos_token_id, config.architectures, config.num_hidden_layers) == ([2, 3], ["A", "B"], 1)


def index_attributes(values, name):
    blocks = torch.nn.ModuleList([torch.nn.Linear(1, 1) for _ in values])
    for module, value in zip(blocks, values, strict=True):
        setattr(module, name, value)
    return {key[1]: found[:2] for key, found in _index_attributes(blocks).items() if key[1] == name}


@pytest.mark.parametrize(
    ("values", "name", "found"),
    [
        ((0, 1, 2), "layer_idx", (1, 0)),
        ((1, 2, 3), "layer_number", (1, 1)),
        ((0, 2, 4), "layer_idx", (2, 0)),
        ((0, 1, 2), "anything", (1, 0)),
        ((1, 2, 3), "anything", (1, 1)),
        ((0, 1), "anything", (1, 0)),
        ((1, 2), "heads", None),
        ((5, 6, 7), "heads", None),
        ((4, 4, 4), "layer_idx", None),
        ((0, 1, 3), "layer_idx", None),
        ((False, True), "is_moe", None),
        ((2, 4, 6), "width", None),
    ],
)
def test_an_index_is_known_by_its_values(values, name, found):
    assert index_attributes(values, name).get(name) == found


def test_a_block_may_stand_twice(miniature):
    model = shallow(miniature("llama", blocks=4).model, (0, 2, 2, 3))
    layers = model.model.layers
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]
    assert layers[1] is not layers[2]
    assert layers[2].self_attn.config is model.config


def test_all_blocks_is_no_change(miniature):
    model = miniature("llama").model
    layers = list(model.model.layers)
    keep_blocks(model, find_blocks(model), range(4))
    assert list(model.model.layers) == layers


@pytest.mark.parametrize("sources", [(), (4,), (-1, 0)])
def test_blocks_that_are_not_there(sources, miniature):
    model = miniature("llama").model
    with pytest.raises(ModelError, match="it has blocks 0 to 3"):
        keep_blocks(model, find_blocks(model), sources)


def test_blocks_that_lean_on_one_another(miniature):
    model = miniature("llama").model
    model.config.num_kv_shared_layers = 2
    with pytest.raises(ModelError, match="reuse keys and values of earlier ones"):
        keep_blocks(model, find_blocks(model), (0, 3))
