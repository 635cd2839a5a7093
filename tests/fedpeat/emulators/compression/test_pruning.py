import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.core import ConfigError
from fedpeat.emulators import magnitude_pruning
from fedpeat.emulators.compression.layers import matrix_of
from fedpeat.emulators.compression.pruning import without_smallest
from fedpeat.models import linear_layers

pytestmark = pytest.mark.usefixtures("one_thread")


# Small whole numbers: most of them tie.
@given(st.lists(st.integers(-3, 3), min_size=6, max_size=6), st.integers(0, 6))
def test_the_smallest_become_zero_and_no_others(entries, count):
    expected = [float(entry) for entry in entries]
    for index in sorted(range(6), key=lambda index: (abs(entries[index]), index))[:count]:
        expected[index] = 0.0
    matrix = torch.tensor(entries, dtype=torch.float32).reshape(2, 3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert without_smallest(matrix.to(dtype), count).flatten().tolist() == expected


@pytest.mark.parametrize("stored", ["dense", "sparse"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.99])
def test_each_matrix_loses_its_share(share, stored, emulate):
    made = emulate("gpt2", magnitude_pruning(share=share, stored=stored))
    for path, layer in linear_layers(made.loaded.model.transformer.h[1]).items():
        new = made.blocks.blocks[0].module.get_submodule(path)
        was, now = matrix_of(layer), matrix_of(new)
        gone = int(share * was.numel())
        assert int((now == 0).sum()) == gone
        assert torch.equal(now[now != 0], was[now != 0])
        assert float(was[now == 0].abs().max()) <= float(was[now != 0].abs().min())
        assert torch.equal(new.bias, layer.bias)


def test_sparse_computes_what_dense_does(emulate, make_ids):
    dense, sparse = (emulate("qwen3", magnitude_pruning(stored=stored)) for stored in ("dense", "sparse"))
    assert torch.equal(dense.view.model(make_ids()).logits, sparse.view.model(make_ids()).logits)
    notes = [made.blocks.notes[0] for made in (dense, sparse)]
    assert notes[0]["error"] == notes[1]["error"] > 0.1
    assert notes[0]["bytes_after"] == notes[0]["bytes_before"]
    assert notes[0]["parameters_after"] == notes[0]["parameters_before"]
    # Half the weights of 4 bytes, and a bit for each.
    weights = sum(layer.weight.numel() for layer in linear_layers(dense.blocks.blocks[0].module).values()) * 2
    assert notes[1]["bytes_before"] - notes[1]["bytes_after"] == weights * 4 - (weights * 2 + weights // 8)
    assert notes[1]["parameters_before"] - notes[1]["parameters_after"] == weights // 2


def test_dense_changes_values_alone(emulate):
    made = emulate("llama", magnitude_pruning(share=0.25, stored="dense"))
    block = made.blocks.blocks[0]
    assert block.changes[0]["kind"] == "pruned"
    assert block.changes[0]["modules"]["self_attn.q_proj"] == {"kept": 768}
    names = [name for name, _ in made.loaded.model.model.layers[1].named_parameters()]
    assert [name for name, _ in block.module.named_parameters()] == names


def test_a_mask_that_does_not_pay(emulate):
    message = r"share=0\.02 and stored=sparse; to say where the zeros are .* set emulator\.stored=dense"
    with pytest.raises(ConfigError, match=message):
        emulate("llama", magnitude_pruning(share=0.02))
    emulate("llama", magnitude_pruning(share=0.02, stored="dense"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"share": 1.0}, "a share is a number above 0 and below 1"),
        ({"share": 0.0}, "emulator=pruned with share=0.0"),
        ({"stored": "sprase"}, r"stored='sprase'; no such form; did you mean 'sparse'\?"),
    ],
)
def test_arguments_that_make_no_sense(wrong, message):
    with pytest.raises(ConfigError, match=message):
        magnitude_pruning(**wrong)


def test_it_tells_its_settings():
    assert magnitude_pruning(share=0.4).describe() == {"name": "pruned", "share": 0.4, "stored": "sparse"}
