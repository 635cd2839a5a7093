import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.core import EXTRA, FOLD, Layout, LoraPair, at_rank, product, rank_in, with_prefix, without_prefix

PLAIN = LoraPair("m.0", "m.0.lora_A.weight", "m.0.lora_B.weight", 2.0, (5, 4))
OTHER = LoraPair("m.1", "m.1.lora_A.weight", "m.1.lora_B.weight", 0.5, (3, 6))
CORED = LoraPair("m.2", "m.2.lora_A.basis", "m.2.lora_B.weight", 0.5, (3, 6), r="m.2.lora_A.core")
LAYOUT = Layout((PLAIN, OTHER), ("head.weight",), 3)


def whole_numbers(rank=3):
    """Factors of both pairs and a head, whose products are exact."""
    generator = torch.Generator().manual_seed(rank)
    shapes = {"head.weight": (2, 2)}
    for pair in LAYOUT.pairs:
        shapes |= {pair.a: (rank, pair.shape[1]), pair.b: (pair.shape[0], rank)}
    return {name: torch.randint(-9, 9, shape, generator=generator).float() for name, shape in shapes.items()}


def test_each_part_has_its_names():
    assert LAYOUT.names(["A"]) == {PLAIN.a, OTHER.a}
    assert LAYOUT.names(("B", "other")) == {PLAIN.b, OTHER.b, "head.weight"}
    assert LAYOUT.names(["A", "B", "R", "other"]) == set(whole_numbers())
    assert LAYOUT.names(["R"]) == LAYOUT.names([]) == frozenset()
    assert [LAYOUT.part_of(name) for name in (PLAIN.a, OTHER.b, "head.weight")] == ["A", "B", "other"]


def test_only_the_core_of_a_square_layer_travels():
    layout = Layout((CORED,), ("head.weight",), 2)
    assert layout.names(["R"]) == {"m.2.lora_A.core"}
    assert layout.names(["A", "B"]) == frozenset()
    assert layout.part_of("m.2.lora_A.core") == "R"
    assert layout.names(["R", "other"]) == {"m.2.lora_A.core", "head.weight"}


def test_without_lora_everything_is_other():
    layout = Layout(others=("x", "y"))
    assert layout.names(["A", "B", "R"]) == frozenset()
    assert layout.names(["other"]) == {"x", "y"}
    assert layout.rank == 0


def test_a_product_has_the_shape_and_scaling_of_its_layer():
    tensors = whole_numbers()
    for pair in LAYOUT.pairs:
        found = product(pair, tensors)
        assert found.shape == pair.shape
        byhand = [
            [
                pair.scaling * sum(float(tensors[pair.b][i, k] * tensors[pair.a][k, j]) for k in range(3))
                for j in range(pair.shape[1])
            ]
            for i in range(pair.shape[0])
        ]
        assert found.tolist() == byhand


@given(st.integers(1, 5), st.data())
def test_a_cut_keeps_the_first_rows_of_a_and_columns_of_b(rank, data):
    tensors = whole_numbers(rank)
    kept = data.draw(st.integers(1, rank))
    cut = at_rank(tensors, LAYOUT, kept)
    assert list(cut) == list(tensors)
    for pair in LAYOUT.pairs:
        assert torch.equal(cut[pair.a], tensors[pair.a][:kept])
        assert torch.equal(cut[pair.b], tensors[pair.b][:, :kept])
        parts = [pair.scaling * torch.outer(tensors[pair.b][:, k], tensors[pair.a][k]) for k in range(rank)]
        assert torch.equal(product(pair, cut), torch.stack(parts[:kept]).sum(0))
        assert rank_in(cut, pair) == kept
    assert cut["head.weight"] is tensors["head.weight"]


def test_no_rank_of_its_own_is_no_cut():
    tensors = whole_numbers()
    whole = at_rank(tensors, LAYOUT, None)
    assert whole == tensors
    assert whole is not tensors


def test_one_half_alone_is_cut_too_and_tells_its_rank():
    tensors = whole_numbers()
    for name in (PLAIN.a, PLAIN.b):
        half = at_rank({name: tensors[name]}, LAYOUT, 2)
        assert list(half) == [name]
        assert rank_in(half, PLAIN) == 2
    with pytest.raises(KeyError):
        rank_in({}, PLAIN)


def test_square_cores_are_never_cut():
    core = {"m.2.lora_A.core": torch.eye(3)}
    assert at_rank(core, Layout((CORED,), (), 3), 1) == core


def test_prefixes_come_off_as_they_went_on():
    tensors = whole_numbers()
    both = {**tensors, **with_prefix(FOLD, {"m.0": torch.ones(1)}), **with_prefix(EXTRA, tensors)}
    assert len(both) == 2 * len(tensors) + 1
    assert without_prefix(EXTRA, both) == tensors
    assert without_prefix(FOLD, both) == {"m.0": torch.ones(1)}
    assert without_prefix("nothing|", both) == {}
    # Only the first one goes: what is left is again a name.
    assert list(without_prefix("a|", {"a|a|x": torch.ones(1)})) == ["a|x"]
