import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpeat.codecs import drive
from fedpeat.codecs.rotation import hadamard, rotate, rotate_back
from fedpeat.core import UpdateRefused
from tests.oracles import codecs as slow

for_all = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**63 - 1)
few = settings(for_all, max_examples=20)  # the twin's matrices are dense


@few
@given(st.integers(0, 300), st.integers(1, 1000), seeds)
def test_integers_are_sent_as_by_the_slow_twin(send, count, largest, seed):
    # Sums of integers are exact in any order, so that even signs of zeros must agree.
    values = np.random.default_rng(seed).integers(-largest, largest, size=count, endpoint=True)
    delta = {"layer.weight": torch.from_numpy(values).float()}
    decoded, encoded, _ = send(drive(), delta, seed=seed)
    _, signs, scale, expected = slow.drive(values, seed, "layer.weight")
    assert encoded["layer.weight"].tolist() == np.packbits(signs, bitorder="little").tolist()
    assert encoded["layer.weight|scale"].item() == pytest.approx(scale, rel=1e-6)
    assert decoded["layer.weight"].numpy() == pytest.approx(expected, rel=1e-5, abs=1e-6 * (1 + scale))


@few
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=30), seeds)
def test_numbers_are_sent_as_by_the_slow_twin(send, values, seed):
    _, encoded, _ = send(drive(), {"w": torch.tensor(values, dtype=torch.float32)}, seed=seed)
    rotated, signs, scale, _ = slow.drive(values, seed, "w")
    # Where a sum is 0 but for rounding, its sign is anyone's.
    sure = np.abs(rotated) > 1e-12 * np.abs(slow.settled(values)).astype(float).sum()
    sent = np.unpackbits(encoded["w"].numpy(), bitorder="little").astype(bool)
    assert (sent == signs)[sure].all()
    assert encoded["w|scale"].item() == pytest.approx(scale, rel=1e-6)


@few
@given(st.integers(7, 11), seeds)
def test_the_inverse_of_the_rotation_is_exact(power, seed):
    # Integers: no rounding at all.
    vector = torch.from_numpy(np.random.default_rng(seed).integers(-1000, 1000, 2**power)).double()
    assert torch.equal(rotate_back(rotate(vector, seed), seed), vector)
    assert torch.equal(rotate(rotate_back(vector, seed), seed), vector)
    assert float(rotate(vector, seed).norm()) == pytest.approx(float(vector.norm()), rel=1e-12)


def test_the_transform_leaves_its_argument_alone():
    vector = torch.arange(8.0)
    assert hadamard(hadamard(vector)).tolist() == [8.0 * x for x in range(8)]
    assert vector.tolist() == list(range(8))


@for_all
@given(
    # Entries below TINY are sent as 0.
    st.lists(st.floats(-(2.0**50), 2.0**50, width=32).filter(lambda x: abs(x) > 1e-15), min_size=1, max_size=12),
    seeds,
)
def test_what_is_decoded_has_the_delta_as_its_shadow(send, values, seed):
    # <x, decoded> = |x|^2 holds for every rotation with the unbiased scale, and with no other.
    delta = torch.tensor(values, dtype=torch.float32)
    decoded = send(drive(), {"w": delta}, seed=seed)[0]["w"].double()
    square = float(delta.double().square().sum())
    assert float(delta.double() @ decoded) == pytest.approx(square, rel=1e-5)


@pytest.mark.parametrize("count", [100, 1000])
def test_the_mean_over_seeds_is_the_delta(send, count):
    # A few entries dominate: with one Hadamard matrix only, this fails.
    delta = torch.tensor([(-1.0) ** place / (1 + place) for place in range(count)])
    decoded = torch.stack([send(drive(), {"w": delta}, seed=seed)[0]["w"] for seed in range(500)]).double()
    deviations = (decoded.mean(0) - delta) / (decoded.std(0) / math.sqrt(len(decoded))).clamp(min=1e-7)
    assert deviations.abs().max() < 5
    assert deviations.square().mean() < 1.3


def test_the_error_is_that_of_the_paper(send):
    delta = torch.from_numpy(np.random.default_rng(0).normal(size=4096)).float()
    decoded = torch.stack([send(drive(), {"w": delta}, seed=seed)[0]["w"] for seed in range(20)])
    error = (decoded - delta).square().sum(1) / delta.square().sum()
    assert error.mean() == pytest.approx(math.pi / 2 - 1, abs=0.02)


def test_each_seed_and_each_tensor_has_its_own_rotation(send):
    values = torch.randn(300, generator=torch.Generator().manual_seed(0))
    decoded, encoded, _ = send(drive(), {"a": values, "b": values}, seed=1)
    assert not torch.equal(encoded["a"], encoded["b"])
    assert not torch.equal(send(drive(), {"a": values}, seed=2)[1]["a"], encoded["a"])
    assert encoded["|seed"].tolist() == [1]
    assert not torch.equal(decoded["a"], decoded["b"])


def test_a_negative_scale_is_refused(send):
    _, encoded, _ = send(drive(), {"w": torch.randn(100)})
    encoded["w|scale"] *= -1
    with pytest.raises(UpdateRefused, match="negative"):
        drive().decode(encoded, {"w": torch.Size([100])})


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1])
def test_any_seed_from_the_wire_decodes(send, seed):
    _, encoded, _ = send(drive(), {"w": torch.randn(100)})
    encoded["|seed"] = torch.tensor([seed])
    assert torch.isfinite(drive().decode(encoded, {"w": torch.Size([100])})["w"]).all()


def test_without_a_seed_it_is_refused(send):
    _, encoded, _ = send(drive(), {"w": torch.randn(100)})
    del encoded["|seed"]
    with pytest.raises(UpdateRefused, match="seed"):
        drive().decode(encoded, {"w": torch.Size([100])})


def test_a_huge_scale_decodes_to_finite_numbers(send):
    _, encoded, _ = send(drive(), {"w": torch.randn(100)})
    encoded["w|scale"] = torch.tensor([torch.finfo(torch.float32).max])
    assert torch.isfinite(drive().decode(encoded, {"w": torch.Size([100])})["w"]).all()
