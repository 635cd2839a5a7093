import pytest
import transformers as hf
from torch import nn

from fedpeat.core import ModelError
from fedpeat.models import BlockStack, find_blocks
from tests.miniatures import OddForCausalLM

PATHS = {
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "bloom": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "falcon": "transformer.h",
    "odd": "tower.rungs",
}


def test_blocks_of_every_family(family, miniature):
    model = miniature(family, blocks=3).model
    stack = find_blocks(model)
    assert (stack.path, stack.count) == (PATHS.get(family, "model.layers"), 3)
    assert len(stack.of(model)) == 3
    assert stack.beside == (("tower.gains",) if family == "odd" else ())


def block(width=4):
    return nn.Sequential(nn.Linear(width, width), nn.GELU())


class Mixture(nn.Module):
    """A block whose experts are the larger list."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([block(16) for _ in range(8)])


class Plain(nn.Module):
    def __init__(self, **lists):
        super().__init__()
        for name, entries in lists.items():
            setattr(self, name, entries)


def test_experts_are_not_blocks():
    assert find_blocks(Plain(trunk=nn.ModuleList([Mixture(), Mixture()]))).path == "trunk"


def test_the_larger_list_wins_where_no_config_tells():
    model = Plain(small=nn.ModuleList([block() for _ in range(9)]), large=nn.Sequential(*(block(64) for _ in range(3))))
    assert find_blocks(model) == BlockStack("large", 3)


def test_a_vision_tower_as_deep_as_the_text_is_not_taken():
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = hf.Gemma3Config(
        text_config={**text, "num_key_value_heads": 1, "vocab_size": 99, "pad_token_id": 0},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
    )
    model = hf.Gemma3ForConditionalGeneration(config)
    assert find_blocks(model).path == "model.language_model.layers"


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(3, 3),
        Plain(layers=nn.ModuleList([block()])),
        Plain(layers=nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])),
        Plain(layers=nn.ModuleList([block(), Plain(inner=nn.Linear(2, 2))])),
        Plain(layers=nn.ModuleList([nn.Sequential(nn.GELU()), nn.Sequential(nn.GELU())])),
    ],
)
def test_a_model_without_blocks(model):
    with pytest.raises(ModelError, match="cannot find the blocks of a"):
        find_blocks(model)


def test_blocks_of_two_classes_need_the_config_to_agree(miniature):
    model = miniature("odd", blocks=3).model
    model.tower.rungs[1].__class__ = type("OtherRung", (type(model.tower.rungs[1]),), {})
    assert find_blocks(model).path == "tower.rungs"
    model.config.rung_total = 4
    with pytest.raises(ModelError):
        find_blocks(model)


def test_a_stack_that_is_not_there(miniature):
    model = miniature("odd").model
    assert isinstance(model, OddForCausalLM)
    with pytest.raises(ModelError, match="that is a Embedding"):
        BlockStack("hear", 4).of(model)
