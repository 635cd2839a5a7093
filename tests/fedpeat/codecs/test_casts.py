import pytest
import torch
from hypothesis import HealthCheck, example, given, settings

from fedpeat.codecs import TINY, bf16, fp16, none
from tests.fedpeat.codecs.numbers import LISTS
from tests.oracles import codecs as slow

for_all = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
SMALL = [1e-5, -3e-8, 2.9e-8, 6e-8, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 65504, 65519.99, -65520, 1e-30, 2.9e-42, -0.0]


@for_all
@given(LISTS)
@example(SMALL)
@example([3.4028234663852886e38, -3.39e38, 3.3895314e38])
@pytest.mark.parametrize(("codec", "bits"), [(bf16(), slow.bf16_bits), (fp16(), slow.fp16_bits)])
def test_bits_are_those_of_the_slow_twin(send, codec, bits, values):
    _, encoded, _ = send(codec, {"w": torch.tensor(values, dtype=torch.float32)})
    assert encoded["w"].view(torch.uint16).tolist() == bits(values)


@for_all
@given(LISTS)
@example(SMALL)
def test_errors_are_within_their_bounds(send, values):
    delta = {"w": torch.tensor(values, dtype=torch.float32)}
    exact = delta["w"].double()
    error = (send(bf16(), delta)[0]["w"].double() - exact).abs()
    assert (error <= (exact.abs() / 256).clamp(min=TINY)).all()
    within = exact.clamp(-65504, 65504)
    error = (send(fp16(), delta)[0]["w"].double() - within).abs()
    assert (error <= (within.abs() / 2048).clamp(min=2**-25)).all()


def test_what_exceeds_the_range_is_clamped(send):
    delta = {"w": torch.tensor([1e6, -1e6, 65519.0])}
    assert send(fp16(), delta)[0]["w"].tolist() == [65504.0, -65504.0, 65504.0]
    largest = torch.finfo(torch.bfloat16).max
    delta = {"w": torch.tensor([3.4e38, -3.4e38])}
    assert send(bf16(), delta)[0]["w"].tolist() == [largest, -largest]


def test_none_hands_on_the_very_tensors(make_delta, send):
    delta = make_delta()
    decoded, encoded, _ = send(none(), delta)
    assert all(encoded[name] is decoded[name] is delta[name] for name in delta)
    assert encoded is not delta
    assert decoded is not encoded
