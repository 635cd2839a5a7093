import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.core import ModelError
from fedpeat.models import canonical_name, local_name
from fedpeat.models.names import block_index

PREFIXES = ["", "base_model.model.", "module.", "base_model.model.model.layers_wrapper."]


@given(
    st.sampled_from(["model.layers", "transformer.h", "h", "model.decoder.layers", "a.b-c"]),
    st.sampled_from(PREFIXES),
    st.sets(st.integers(0, 200), min_size=1, max_size=12),
    st.data(),
)
def test_names_come_back(path, prefix, indices, data):
    sources = sorted(indices)
    position = data.draw(st.integers(0, len(sources) - 1))
    name = f"{prefix}{path}.{position}.mlp.experts.{data.draw(st.integers(0, 9))}.weight"
    canonical = canonical_name(name, path=path, sources=sources)
    assert block_index(canonical, path=path) == sources[position]
    assert local_name(canonical, path=path, sources=sources) == name


def test_only_the_outermost_list_counts():
    name = "layers.1.mlp.layers.0.weight"
    assert canonical_name(name, path="layers", sources=(4, 7)) == "layers.7.mlp.layers.0.weight"
    assert canonical_name("my_layers.1.weight", path="layers", sources=(4, 7)) == "my_layers.1.weight"


def test_names_outside_the_blocks_stay():
    for name in ("lm_head.weight", "model.layers_norm.weight", "model.embed_tokens.weight"):
        assert canonical_name(name, path="model.layers", sources=(5,)) == name
        assert local_name(name, path="model.layers", sources=(5,)) == name


def test_a_position_or_block_that_is_not_there():
    with pytest.raises(ModelError, match="the model has 2 blocks"):
        canonical_name("h.2.weight", path="h", sources=(0, 9))
    with pytest.raises(ModelError, match="this model holds blocks 0, 9"):
        local_name("h.2.weight", path="h", sources=(0, 9))


def test_a_block_standing_twice_is_found_at_its_first_position():
    assert local_name("h.4.weight", path="h", sources=(0, 4, 4, 5)) == "h.1.weight"
    assert canonical_name("h.2.weight", path="h", sources=(0, 4, 4, 5)) == "h.4.weight"
