import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fedpeat.codecs import TINY, int4, int8
from fedpeat.core import UpdateRefused
from tests.fedpeat.codecs.numbers import LISTS
from tests.oracles import codecs as slow

for_all = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
block_sizes = st.integers(1, 70)
HUGE = torch.finfo(torch.float32).max


@for_all
@given(LISTS, block_sizes)
@example([2.9062930150096706e-42], 64)
@example([TINY, TINY / 2, -TINY * (1 - 2**-24)], 64)
@example([HUGE, -HUGE, 1.0], 2)
@example([127.0, 0.5, 1.5, 2.5, -0.5, -1.5], 64)
def test_int8_sends_the_bits_of_its_slow_twin(send, values, block_size):
    decoded, encoded, _ = send(int8(block_size=block_size), {"w": torch.tensor(values, dtype=torch.float32)})
    codes, scales = slow.block_codes(values, 127, block_size)
    assert encoded["w"].tolist() == codes
    assert encoded["w|scale"].tolist() == [float(scale) for scale in scales]
    assert decoded["w"].tolist() == [float(x) for x in slow.from_block_codes(codes, scales, block_size)]


@for_all
@given(LISTS, block_sizes)
@example([2.9062930150096706e-42], 64)
@example([HUGE, -HUGE, 1.0], 2)
@example([7.0, 0.5, 1.5, 2.5, -0.5], 64)
def test_int4_sends_the_bits_of_its_slow_twin(send, values, block_size):
    decoded, encoded, _ = send(int4(block_size=block_size), {"w": torch.tensor(values, dtype=torch.float32)})
    codes, scales = slow.block_codes(values, 7, block_size)
    assert encoded["w"].tolist() == slow.nibbles(codes)
    assert encoded["w|scale"].tolist() == [float(scale) for scale in scales]
    assert decoded["w"].tolist() == [float(x) for x in slow.from_block_codes(codes, scales, block_size)]


@for_all
@given(LISTS, block_sizes)
@pytest.mark.parametrize("builder", [int8, int4])
def test_the_error_is_at_most_half_a_scale(send, builder, values, block_size):
    delta = {"w": torch.tensor(values, dtype=torch.float32)}
    decoded, encoded, _ = send(builder(block_size=block_size), delta)
    scale = encoded["w|scale"].double().repeat_interleave(block_size)[: len(values)]
    error = (decoded["w"].double() - delta["w"].double()).abs()
    # 1e-4: the quotient is rounded to fp32 before it is rounded to an integer.
    assert (error <= (scale / 2 * (1 + 1e-4)).clamp(min=TINY)).all()


def test_blocks_do_not_disturb_each_other(send):
    delta = {"w": torch.cat((torch.full((64,), 1e-6), torch.full((64,), 1e3)))}
    decoded, _, _ = send(int8(), delta)
    assert torch.allclose(decoded["w"], delta["w"], rtol=1e-6, atol=0)


def test_a_code_that_is_never_sent_is_refused(send):
    for codec, lowest, words in ((int8(), -128, "-127..127"), (int4(), 0, "-7..7")):
        _, encoded, _ = send(codec, {"w": torch.randn(9)})
        encoded["w"][2] = lowest
        with pytest.raises(UpdateRefused, match=words):
            codec.decode(encoded, {"w": torch.Size([9])})


@pytest.mark.parametrize("codec", [int8(), int4()])
def test_a_negative_scale_is_refused(send, codec):
    _, encoded, _ = send(codec, {"w": torch.randn(100)})
    encoded["w|scale"][1] *= -1
    with pytest.raises(UpdateRefused, match="negative"):
        codec.decode(encoded, {"w": torch.Size([100])})


@pytest.mark.parametrize("codec", [int8(), int4()])
def test_a_huge_scale_decodes_to_finite_numbers(send, codec):
    _, encoded, _ = send(codec, {"w": torch.tensor([1.0, -1.0])})
    encoded["w|scale"][0] = HUGE
    assert codec.decode(encoded, {"w": torch.Size([2])})["w"].tolist() == [HUGE, -HUGE]
