import dataclasses

import pytest

from fedpeat.core import ConfigError
from strategies import Facts
from strategies.general import fed_avg
from strategies.recipe import EXACT, in_range


def test_an_unknown_weighting_or_degree_is_told():
    with pytest.raises(ConfigError, match="did you mean 'rows'"):
        dataclasses.replace(fed_avg(), weight_by="row")
    with pytest.raises(ConfigError, match="did you mean 'approximate'"):
        dataclasses.replace(fed_avg(), facts=Facts(exact="approximately"))
    for degree in EXACT:
        assert dataclasses.replace(fed_avg(), facts=Facts(exact=degree)).facts.exact == degree


@pytest.mark.parametrize("value", [0, 1, 0.5])
def test_bounds_are_allowed(value):
    assert in_range("rule", "key", value, 0, 1) == value


@pytest.mark.parametrize("value", [-1e-9, 1.1, float("nan"), float("inf")])
def test_what_lies_outside_is_told(value):
    with pytest.raises(ConfigError, match=r"strategy.key=.* with strategy=rule; it must be between 0 and 1"):
        in_range("rule", "key", value, 0, 1)
    with pytest.raises(ConfigError, match="it must be 2 or more"):
        in_range("rule", "key", 1, 2)
