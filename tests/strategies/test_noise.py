import numpy as np
import pytest
import torch
from scipy.stats import kstest

from strategies.noise import bits_of, normal, repeatable, secret


@pytest.mark.parametrize("bits", [secret, repeatable(3)], ids=["secret", "repeatable"])
def test_it_is_standard_normal(bits):
    values = normal(bits, (100_001,))
    assert values.dtype == torch.float64
    # Chance fails this once in a million runs.
    assert kstest(values.numpy(), "norm").pvalue > 1e-6
    # Sine and cosine of one angle are no copies of each other.
    pairs = values[:100_000].reshape(2, -1).numpy()
    assert abs(np.corrcoef(pairs)[0, 1]) < 6 / np.sqrt(pairs.shape[1])


def test_many_are_as_few_at_a_time():
    values = normal(repeatable(1), (2**18 + 5,))
    bits = repeatable(1)
    assert torch.equal(values, torch.cat([normal(bits, (2**18,)), normal(bits, (5,))]))
    assert abs(float(values[-5:].abs().max())) < 8.6


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0)])
def test_it_has_the_shape_asked_for(shape):
    assert normal(secret, shape).shape == shape


def test_extreme_bits_stay_finite():
    for bits in (0, 2**64 - 1):
        values = normal(lambda count, bits=bits: np.full(count, bits, dtype=np.uint64), (4,))
        assert bool(values.isfinite().all())


def test_a_seed_repeats_itself_and_its_absence_does_not():
    def drawn(*key):
        return normal(bits_of(*key), (8,))

    assert torch.equal(drawn(1, 2), drawn(1, 2))
    for other in ((1, 3), (2, 2), (None, 2)):
        assert not torch.equal(drawn(1, 2), drawn(*other))
    assert not torch.equal(drawn(None, 1), drawn(None, 1))


def test_all_of_a_seed_counts():
    """A generator that used 32 bits of it could be searched through."""
    assert not torch.equal(normal(repeatable(1), (8,)), normal(repeatable(1 + 2**32), (8,)))
