import pytest
import torch

from fedpeat.core import ModelError, digest
from fedpeat.models import Parts, assemble, describe, find_blocks, make_split, plug_in, source_of, take_apart


def test_parts_by_canonical_name(miniature):
    model = miniature("gpt2").model
    parts = take_apart(model, make_split(4, first=1, last=1))
    assert {name.split(".")[2] for name in parts.adapter} == {"0", "3"}
    assert {name.split(".")[2] for name in parts.middle} == {"1", "2"}
    rest = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    assert set(parts.rest) == rest | {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert parts.rest["lm_head.weight"].data_ptr() == parts.rest["transformer.wte.weight"].data_ptr()


def test_lists_beside_the_blocks_go_with_them(miniature):
    model = miniature("odd").model
    stack = find_blocks(model)
    assert source_of("tower.gains.2", stack) == 2
    assert source_of("tower.experts.2.weight", stack) is None
    assert "tower.gains.1" in take_apart(model, make_split(4, first=1, last=1)).middle


def test_plug_in_changes_just_what_it_is_given(miniature):
    model = miniature("llama").model
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    plug_in(model, {"model.layers.2.mlp.up_proj.weight": torch.ones(48, 32)})
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert changed == ["model.layers.2.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.4.mlp.up_proj.weight", (48, 32), r"the model has no model\.layers\.4\.mlp\.up_proj\.weight"),
        ("model.layers.2.mlp.up_proj.weight", (32, 48), r"is \(32, 48\), the model's is \(48, 32\)"),
    ],
)
def test_plug_in_is_all_or_nothing(name, shape, message, miniature):
    model = miniature("llama").model
    before = digest(dict(model.named_parameters()))
    with pytest.raises(ModelError, match=message):
        plug_in(model, {"model.norm.weight": torch.zeros(32), name: torch.ones(shape)})
    assert digest(dict(model.named_parameters())) == before


def test_a_split_of_another_model(miniature):
    with pytest.raises(ModelError, match=r"split 2\+2 of 5; model\.layers has 4"):
        take_apart(miniature("llama").model, make_split(5))


def test_parts_that_lack_something(miniature):
    model = miniature("llama").model
    parts = take_apart(model, make_split(4, first=1, last=1))
    with pytest.raises(ModelError, match="missing"):
        assemble(describe(model), Parts(parts.adapter, {}, parts.rest))
