import pytest
import torch

from strategies.reducers import _PIECE, WeightedSum

SIZES = {"a number": (), "nothing": (0,), "a matrix": (3, 5), "one piece": (_PIECE,), "pieces and a rest": (3, _PIECE)}


def random(shape, seed, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SIZES.values(), ids=list(SIZES))
def test_a_sum_is_what_one_addition_after_the_other_gives(shape):
    total, wanted = WeightedSum(), torch.zeros(shape, dtype=torch.float64)
    for seed, weight in enumerate((3.0, 0.1, 0.0, 1e9)):
        tensor = random(shape, seed, 10.0**seed)
        before = tensor.clone()
        total.add({"w": tensor}, weight)
        wanted += tensor.double() * weight
        assert torch.equal(tensor, before)
    # Products with 0.1 may be rounded once less where the machine adds and multiplies in one step.
    torch.testing.assert_close(total.sums["w"], wanted, rtol=1e-14, atol=0)
    assert total.mean()["w"].shape == shape


@pytest.mark.parametrize("shape", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("weight", [1.0, 7.0, 0.3, 12345.0, 1e-3])
def test_one_update_alone_comes_back_to_the_bit(shape, weight):
    tensor = random(shape, 1)
    twice = WeightedSum()
    for parts in (({"w": tensor}, weight), ({"w": tensor}, weight)):
        once = WeightedSum()
        once.add(*parts)
        twice.add(*parts)
        assert torch.equal(once.mean()["w"], tensor)
    assert torch.equal(twice.mean()["w"], tensor)


@pytest.mark.parametrize("shape", [(4, 6), (300, 400)])
def test_the_order_in_memory_does_not_matter(shape):
    tensor, other = random(shape, 1), random(shape, 2)
    turned = tensor.T.contiguous().T
    for first, second in ((turned, other), (other, turned), (turned, turned)):
        total, wanted = WeightedSum(), WeightedSum()
        total.add({"w": first}, 2)
        total.add({"w": second}, 3)
        wanted.add({"w": first.contiguous()}, 2)
        wanted.add({"w": second.contiguous()}, 3)
        assert torch.equal(total.mean()["w"], wanted.mean()["w"])
