import math

import pytest

from fedpeat.client.schedules import SCHEDULES, factor
from fedpeat.core import ConfigError
from tests.oracles import training as oracle


def test_a_rise_then_cosine_to_zero():
    found = [factor("cosine", step, warmup_steps=4, total_steps=12) for step in range(14)]
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4:] == pytest.approx([(1 + math.cos(math.pi * min(1, done / 8))) / 2 for done in range(10)])
    assert found[12] == 0.0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 5, 20])
def test_equals_the_closed_form(schedule, warmup):
    for step in range(30):
        wanted = oracle.rate_at(step, peak=1.0, schedule=schedule, warmup=warmup, total=15)
        assert factor(schedule, step, warmup_steps=warmup, total_steps=15) == pytest.approx(wanted)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_never_out_of_range(schedule):
    found = [factor(schedule, step, warmup_steps=3, total_steps=9) for step in range(40)]
    assert all(0 <= value <= 1 for value in found)
    assert max(found) == 1


def test_a_misspelt_one_is_told():
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        factor("cosin", 0, warmup_steps=0, total_steps=1)
