import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedpeat.emulators.training.regression import Moments, reduced_rank


def drawn(seed, tokens, width, *, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, width, generator=generator, dtype=torch.float64) + shift
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    return inputs, inputs @ mixing + 0.5 * noise + 1.0


def fitted(inputs, targets, *, rank, damping, parts=1):
    moments = Moments(inputs.shape[1], inputs.device)
    for part, wanted in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
        moments.add(part, wanted)
    return reduced_rank(moments, rank=rank, damping=damping)


def slow_twin(inputs, targets, rank, damping):
    """Least squares with the ridge as further rows, its fitted values cut to `rank` by an SVD."""
    centred, wanted = inputs - inputs.mean(0), targets - targets.mean(0)
    width = inputs.shape[1]
    ridge = damping * centred.square().sum(0).mean()
    augmented = torch.cat([centred, ridge.sqrt() * torch.eye(width, dtype=torch.float64)])
    right = torch.cat([wanted, torch.zeros(width, width, dtype=torch.float64)])
    whole = torch.linalg.lstsq(augmented, right, driver="gelsd").solution
    directions = torch.linalg.svd(augmented @ whole, full_matrices=False)[2][:rank]
    return whole @ directions.T @ directions, targets.mean(0)


@given(
    seed=st.integers(0, 10**6),
    width=st.integers(1, 8),
    tokens=st.integers(1, 40),
    rank=st.integers(1, 8),
    damping=st.sampled_from([0.0, 1e-3, 0.5]),
    shift=st.sampled_from([0.0, 30.0]),
)
def test_it_is_its_slow_twin(seed, width, tokens, rank, damping, shift):
    inputs, targets = drawn(seed, tokens, width, shift=shift)
    rank = min(rank, width)
    # Moments square the condition of the inputs; between directions of one strength the cut is a matter of rounding.
    scales = torch.linalg.svdvals(inputs - inputs.mean(0))[: min(tokens - 1, width)]
    assume(scales.numel() == 0 or scales[-1] > 0.05)
    strengths = torch.linalg.svdvals((inputs - inputs.mean(0)) @ slow_twin(inputs, targets, width, damping)[0])
    assume(rank >= len(strengths) or strengths[rank] < 1e-6 or strengths[rank - 1] - strengths[rank] > 1e-3)
    fit = fitted(inputs, targets, rank=rank, damping=damping, parts=min(3, tokens))
    slope, centre = slow_twin(inputs, targets, rank, damping)
    predicted = inputs @ fit.down.T @ fit.up.T + fit.bias
    torch.testing.assert_close(predicted, (inputs - inputs.mean(0)) @ slope + centre, atol=1e-5, rtol=1e-5)
    assert (fit.down.shape, fit.up.shape) == ((rank, width), (width, rank))


@given(seed=st.integers(0, 10**6), rank=st.integers(1, 5))
def test_no_other_map_of_that_rank_is_better(seed, rank):
    inputs, targets = drawn(seed, 30, 5)
    fit = fitted(inputs, targets, rank=rank, damping=0.1)
    centred = inputs - inputs.mean(0)
    ridge = 0.1 * centred.square().sum(0).mean()

    def cost(down, up):
        error = centred @ down.T @ up.T - (targets - targets.mean(0))
        return error.square().sum() + ridge * (up @ down).square().sum()

    generator = torch.Generator().manual_seed(seed)
    best = cost(fit.down, fit.up)
    for size in (1e-3, 1e-1):
        down = fit.down + size * torch.randn(fit.down.shape, generator=generator, dtype=torch.float64)
        up = fit.up + size * torch.randn(fit.up.shape, generator=generator, dtype=torch.float64)
        assert cost(down, up) >= best


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_what_it_explains_grows_with_the_rank(seed):
    inputs, targets = drawn(seed, 30, 5)
    shares = [fitted(inputs, targets, rank=rank, damping=0.0).explained for rank in range(1, 6)]
    # Between ranks of a weak direction there is rounding.
    assert all(more >= less - 1e-9 for less, more in itertools.pairwise(shares))
    whole = fitted(inputs, targets, rank=5, damping=0.0)
    error = (targets - inputs @ whole.down.T @ whole.up.T - whole.bias).square().sum()
    assert shares[-1] == pytest.approx(1 - float(error / (targets - targets.mean(0)).square().sum()))


def test_inputs_that_do_not_vary_get_the_mean():
    inputs, targets = torch.full((4, 3), 7.0, dtype=torch.float64), torch.arange(12.0, dtype=torch.float64).view(4, 3)
    fit = fitted(inputs, targets, rank=2, damping=1e-3)
    torch.testing.assert_close(inputs @ fit.down.T @ fit.up.T + fit.bias, targets.mean(0).expand(4, 3))


def test_targets_that_do_not_vary_are_explained():
    inputs, _ = drawn(0, 9, 3)
    fit = fitted(inputs, torch.zeros(9, 3, dtype=torch.float64), rank=2, damping=0.0)
    assert fit.explained == pytest.approx(1.0)
    assert not (fit.up @ fit.down).any()


def test_both_factors_are_of_one_size():
    inputs, targets = drawn(3, 30, 5)
    fit = fitted(inputs, 1e-6 * targets, rank=3, damping=0.0)
    torch.testing.assert_close(fit.down.norm(dim=1), fit.up.norm(dim=0))
