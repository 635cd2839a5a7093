import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.core import ConfigError
from fedpeat.emulators import int4, int8
from fedpeat.emulators.compression.formats import INT4, INT8, SPARSE
from fedpeat.emulators.compression.layers import matrix_of
from fedpeat.models import linear_layers

pytestmark = pytest.mark.usefixtures("one_thread")

# Down to 1e-20 and zero: scales that are subnormal numbers may be flushed to zero, and no weights are that small.
SIZES = st.floats(-1e4, 1e4, width=32).map(lambda value: 0.0 if abs(value) < 1e-20 else value)


@st.composite
def weights(draw, entries=SIZES):
    outputs, inputs = draw(st.integers(1, 4)), draw(st.integers(1, 21))
    values = draw(st.lists(entries, min_size=outputs * inputs, max_size=outputs * inputs))
    return torch.tensor(values, dtype=torch.float32).reshape(outputs, inputs)


def scales_of(stored, settings, width):
    return stored["scale"].float().repeat_interleave(settings["block_size"], dim=1)[:, :width]


def check_layout(layer_format, stored, shape, settings):
    layout = layer_format.layout(shape, settings)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == {
        name: (dtype or torch.float32, size) for name, (dtype, size) in layout.items()
    }


@given(weights(), st.data())
def test_a_weight_is_off_by_half_a_step_at_most(matrix, data):
    settings = {"block_size": data.draw(st.integers(1, matrix.shape[1]))}
    for layer_format, levels in ((INT8, 127), (INT4, 7)):
        stored = layer_format.encode(matrix, settings)
        check_layout(layer_format, stored, tuple(matrix.shape), settings)
        back = layer_format.decode(stored, tuple(matrix.shape), settings, torch.float32)
        scale = scales_of(stored, settings, matrix.shape[1])
        # Beyond half a step, a code that lies between two by less than the rounding of fp32 goes either way.
        assert bool(((back - matrix).abs() <= scale.abs() * (0.5 + 1e-4)).all())
        assert bool((back[matrix == 0] == 0).all())
        assert bool((scale.abs() <= matrix.abs().max() / levels * (1 + 2**-7)).all())


@given(weights(), st.data())
def test_no_scale_is_larger_than_its_block_needs(matrix, data):
    size = data.draw(st.integers(1, matrix.shape[1]))
    scale = INT4.encode(matrix, {"block_size": size})["scale"].float()
    for row, values in enumerate(matrix.tolist()):
        for block, start in enumerate(range(0, len(values), size)):
            part = values[start : start + size]
            above, below = max(0.0, *part, 0.0), -min(0.0, *part, 0.0)
            needed = max(max(above, below) / 8, min(above, below) / 7)
            found = float(scale[row, block])
            assert needed * (1 - 1e-6) <= abs(found) <= needed * (1 + 2**-7)
            assert found <= 0 if above > below else found >= 0


def test_codes_by_hand():
    row = torch.tensor([[8.0, -7.0, 0.4, 3.6, 0.0]])
    stored = INT4.encode(row, {"block_size": 5})
    assert stored["scale"].tolist() == [[-1.0]]
    # -8, 7, 0, -4, 0 and one to fill the byte, 8 added to each, the first in the low bits
    assert stored["codes"].tolist() == [[0 | 15 << 4, 8 | 4 << 4, 8]]
    assert INT4.decode(stored, (1, 5), {"block_size": 5}, torch.float32).tolist() == [[8.0, -7.0, 0.0, 4.0, 0.0]]
    stored = INT8.encode(torch.tensor([[127.0, -3.4, 2.0, 63.5]]), {"block_size": 3})
    assert stored["codes"].tolist() == [[127, -3, 2, 127]]
    assert stored["scale"].tolist() == [[1.0, 0.5]]


@given(weights(st.sampled_from([0.0, 0.0, -1.5, 2.0])))
def test_sparse_is_exact(matrix):
    # As many kept as there are others than zero, or some more.
    least = max(1, int((matrix != 0).sum()))
    for kept in {least, matrix.numel()}:
        stored = SPARSE.encode(matrix, {"kept": kept})
        check_layout(SPARSE, stored, tuple(matrix.shape), {"kept": kept})
        for dtype in (torch.float32, torch.bfloat16):
            back = SPARSE.decode(stored, tuple(matrix.shape), {"kept": kept}, dtype)
            assert back.dtype == dtype
            assert torch.equal(back, matrix.to(dtype))


@pytest.mark.parametrize("layer_format", [INT8, INT4])
def test_in_any_dtype_it_is_the_same_number_rounded_once(layer_format, matrices):
    settings = {"block_size": 8}
    stored = layer_format.encode(matrices(6, 20), settings)
    exact = layer_format.decode(stored, (6, 20), settings, torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(layer_format.decode(stored, (6, 20), settings, dtype), exact.to(dtype))


@pytest.mark.parametrize(
    "builder", [int8(block_size=20), int4(block_size=20), int8(block_size=None), int4(block_size=999)]
)
def test_bytes_are_as_stated(builder, emulate):
    made = emulate("gpt2", builder)
    expected = 0
    for layer in linear_layers(made.loaded.model.transformer.h[1]).values():
        outputs, inputs = matrix_of(layer).shape
        size = min(builder.settings["block_size"] or inputs, inputs)
        codes = inputs if builder.name == "int8" else -(-inputs // 2)
        expected += layer.weight.nbytes - outputs * codes - 2 * outputs * -(-inputs // size)
    note = made.blocks.notes[0]
    assert note["bytes_before"] - note["bytes_after"] == 2 * expected
    assert note["parameters_before"] == note["parameters_after"]


def test_finer_blocks_are_nearer(emulate):
    errors = [emulate("llama", int4(block_size=size)).blocks.notes[0]["error"] for size in (None, 32, 16, 4)]
    assert errors == sorted(errors, reverse=True)
    assert emulate("llama", int8()).blocks.notes[0]["error"] < errors[-1] / 5


@pytest.mark.parametrize("builder", [int8, int4])
@pytest.mark.parametrize("size", [0, -4, 1.5, True, "64"])
def test_block_sizes_that_make_no_sense(builder, size):
    with pytest.raises(ConfigError, match=r"block_size=.*; it is a count of 1 or more; set emulator\.block_size >= 1"):
        builder(block_size=size)


def test_they_tell_their_settings():
    assert int8().describe() == {"name": "int8", "block_size": 64}
    assert int4().describe() == {"name": "int4", "block_size": 32}
    assert int8(block_size=None).describe() == {"name": "int8", "block_size": None}
