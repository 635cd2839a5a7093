import pytest

from fedpeat.core import ConfigError
from strategies import fed_avg


def test_an_unknown_weighting_is_told():
    with pytest.raises(ConfigError, match="did you mean 'tokens'"):
        fed_avg(weight_by="token")
