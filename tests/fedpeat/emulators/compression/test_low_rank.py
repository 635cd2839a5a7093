import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.core import ConfigError
from fedpeat.emulators import BuildContext, chain, full_view, low_rank, make_emulator, uniform
from fedpeat.emulators.compression import LowRank
from fedpeat.emulators.compression.calibration import input_moments
from fedpeat.emulators.compression.layers import matrix_of
from fedpeat.emulators.compression.low_rank import factors, rank_for
from fedpeat.models import linear_layers, make_split

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("outputs", "inputs"), [(12, 20), (20, 12), (7, 7)])
def test_at_full_rank_a_matrix_comes_back(outputs, inputs, matrices):
    matrix = matrices(outputs, inputs)
    up, down = factors(matrix, min(outputs, inputs))
    torch.testing.assert_close(up @ down, matrix, atol=1e-5, rtol=0)
    moments = torch.eye(inputs) + 0.5
    up, down = factors(matrix, min(outputs, inputs), moments)
    torch.testing.assert_close((up @ down).float(), matrix, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_the_error_is_that_of_the_singular_values_left_out(rank, matrices):
    matrix = matrices(12, 20)
    up, down = factors(matrix, rank)
    assert (up.shape, down.shape) == ((12, rank), (rank, 20))
    tail = torch.linalg.svdvals(matrix.double())[rank:]
    assert float((matrix - up @ down).norm()) == pytest.approx(float(tail.norm()), rel=1e-4)


def test_both_factors_are_of_one_size(matrices):
    up, down = factors(matrices(12, 20), 5)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))


def test_a_calibrated_product_is_the_best_on_its_inputs(matrices):
    matrix, inputs = matrices(12, 20), matrices(200, 20, seed=1) * torch.logspace(0, -2, 20)
    moments = inputs.T @ inputs
    plain, calibrated = (torch.matmul(*factors(matrix, 4, given)) for given in (None, moments))

    def error(product):
        return float(((matrix - product.float()) @ inputs.T).norm())

    assert error(calibrated) < 0.8 * error(plain)
    # No other product of that rank is better by more than the damping's part.
    best = torch.linalg.svdvals(matrix.double() @ torch.linalg.cholesky(moments.double()))[4:]
    assert error(calibrated) == pytest.approx(float(best.norm()), rel=0.05)


def test_inputs_of_nothing_but_zeros_calibrate_nothing(matrices):
    matrix = matrices(6, 8)
    torch.testing.assert_close(
        torch.matmul(*factors(matrix, 3, torch.zeros(8, 8))).float(), torch.matmul(*factors(matrix, 3))
    )


@given(st.floats(1e-6, 1.0), st.integers(1, 300), st.integers(1, 300))
def test_a_rank_makes_a_matrix_smaller_or_is_none(share, outputs, inputs):
    rank = rank_for(share, outputs, inputs)
    if rank is None:
        assert max(1, int(share * outputs * inputs / (outputs + inputs))) * (outputs + inputs) >= outputs * inputs
    else:
        assert 1 <= rank <= min(outputs, inputs)
        assert rank * (outputs + inputs) < outputs * inputs
        assert rank == 1 or rank * (outputs + inputs) <= share * outputs * inputs * (1 + 1e-9)


def test_each_layer_becomes_the_product_and_keeps_its_bias(emulate):
    made = emulate("gpt2", low_rank(share=0.4))
    original = made.loaded.model.transformer.h[1]
    block = made.blocks.blocks[0].module
    assert len(linear_layers(original)) == 4
    for path, layer in linear_layers(original).items():
        new = block.get_submodule(path)
        outputs, inputs = layer.weight.T.shape
        rank = int(0.4 * outputs * inputs / (outputs + inputs))
        assert isinstance(new, LowRank)
        up, down = factors(layer.weight.T, rank)
        assert torch.equal(new.up.weight, up)
        assert torch.equal(new.down.weight, down)
        assert torch.equal(new.up.bias, layer.bias)
        assert new.down.bias is None
        torch.testing.assert_close(new.weight, up @ down)
        inputs = torch.randn(2, 3, inputs, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(new(inputs), inputs @ (up @ down).T + layer.bias, atol=1e-4, rtol=1e-4)


def test_only_the_sublayers_asked_for(emulate):
    changed = emulate("llama", low_rank(sublayers=["mlp"])).blocks.blocks[0].changes[0]["modules"]
    assert sorted(changed) == ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
    changed = emulate("llama", low_rank(sublayers=["attention"])).blocks.blocks[0].changes[0]["modules"]
    assert sorted(changed) == [f"self_attn.{one}_proj" for one in "koqv"]


def test_a_layer_that_would_not_become_smaller_stays(emulate):
    made = emulate("llama", low_rank(share=1.0))
    # 32 x 32 at rank 16 has as many parameters as before, 32 x 48 at rank 19 has fewer.
    changed = made.blocks.blocks[0].changes[0]["modules"]
    assert "self_attn.q_proj" not in changed
    assert changed["mlp.up_proj"] == {"rank": 19}
    untouched = emulate("odd", low_rank(share=1.0))
    assert untouched.blocks.blocks[0].changes == ()
    assert untouched.blocks.blocks[0].module is untouched.loaded.model.tower.rungs[1]
    assert untouched.blocks.notes[0]["error"] == 0.0


def outputs_error(made, rows):
    """The squared error of all changed layers' outputs, on the inputs that they get in the full model."""
    view, total = full_view(made.loaded, made.split), 0.0
    for position, block in enumerate(made.blocks.blocks, start=1):
        original = made.loaded.model.model.layers[block.source]
        moments = input_moments(view, [position], linear_layers(original), [rows])
        for path, layer in linear_layers(original).items():
            lost = matrix_of(layer) - matrix_of(block.module.get_submodule(path))
            total += float((lost @ moments[path] @ lost.T).trace())
    return total


def test_calibration_lowers_the_error_on_its_text(emulate):
    plain, calibrated = emulate("llama", low_rank()), emulate("llama", low_rank(calibrated=True))
    rows = {"input_ids": plain.context.rows["input_ids"]}
    assert outputs_error(calibrated, rows) < 0.5 * outputs_error(plain, rows)
    assert calibrated.blocks.notes[0]["error"] > plain.blocks.notes[0]["error"]  # that of the weights
    assert calibrated.blocks.notes[0]["parameters_after"] == plain.blocks.notes[0]["parameters_after"]
    full = plain.loaded.model(**rows).logits
    off = [float((made.view.model(**rows).logits - full).norm()) for made in (plain, calibrated)]
    assert off[1] < 0.5 * off[0]


def test_moments_are_sums_over_real_tokens(emulate, make_ids):
    made = emulate("opt", uniform(kept_blocks=2))
    ids = make_ids(rows=3, tokens=9)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    batches = [{"input_ids": ids[:2], "attention_mask": mask[:2]}, {"input_ids": ids[2:]}]
    found = input_moments(made.view, [1, 2], ["fc1", "fc2"], batches)
    seen = {"fc1": [], "fc2": []}
    for block in made.view.model.model.decoder.layers[1:3]:
        for path, kept in seen.items():
            block.get_submodule(path).register_forward_pre_hook(lambda _, inputs, kept=kept: kept.append(inputs[0]))
    with torch.no_grad():
        for row, length in ((0, 9), (1, 5), (2, 9)):
            made.view.model(input_ids=ids[row : row + 1, :length])
    for path, inputs in seen.items():
        tokens = torch.cat([one.reshape(-1, one.shape[-1]) for one in inputs])
        expected = sum(torch.outer(token, token) for token in tokens)
        torch.testing.assert_close(found[path], expected, atol=1e-3, rtol=1e-4)


def test_calibration_sees_the_blocks_as_the_chain_has_them(emulate):
    both = chain(stages={"thin": uniform(kept_blocks=1), "shrink": low_rank(calibrated=True, rows=4)})
    made = emulate("llama", both)
    thin = emulate("llama", uniform(kept_blocks=1))
    rows = {"input_ids": thin.context.rows["input_ids"]}
    moments = input_moments(thin.view, [1], ["mlp.down_proj"], [rows])["mlp.down_proj"]
    block = made.blocks.blocks[0]
    original = thin.blocks.blocks[0].module.mlp.down_proj
    rank = block.changes[0]["modules"]["mlp.down_proj"]["rank"]
    expected = torch.matmul(*factors(original.weight, rank, moments)).float()
    torch.testing.assert_close(block.module.mlp.down_proj.weight, expected, atol=1e-4, rtol=1e-3)


def test_without_public_text_there_is_nothing_to_calibrate_on(miniature):
    loaded = miniature("llama")
    split = make_split(4, first=1, last=1)
    context = BuildContext(loaded.model, split)
    with pytest.raises(ConfigError, match="low_rank needs public text"):
        make_emulator(loaded, split=split, builder=low_rank(calibrated=True), context=context)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"share": 0}, r"share=0; a share is a number above 0 and at most 1; set emulator\.share"),
        ({"share": 1.5}, "share=1.5"),
        ({"share": float("nan")}, "share=nan"),
        ({"share": True}, "share=True"),
        ({"share": "half"}, "share='half'"),
        ({"rows": 0}, r"rows=0; it is a count of 1 or more; set emulator\.rows >= 1"),
        ({"sublayers": "mlp"}, "it is a list of attention and mlp"),
        ({"sublayers": []}, "it is a list of attention and mlp"),
        ({"sublayers": ["mpl"]}, r"'mpl' has no linear layers of its own; did you mean 'mlp'\?"),
    ],
)
def test_arguments_that_make_no_sense(wrong, message):
    with pytest.raises(ConfigError, match=message):
        low_rank(**wrong)


def test_it_tells_its_settings():
    assert low_rank().describe() == {"name": "low_rank", "share": 0.5, "sublayers": None, "calibrated": False}
    told = low_rank(share=0.2, sublayers=("mlp",), calibrated=True, rows=8).describe()
    assert told == {"name": "low_rank", "share": 0.2, "sublayers": ["mlp"], "calibrated": True, "rows": 8}
