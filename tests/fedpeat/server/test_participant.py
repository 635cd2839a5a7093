import pytest

from fedpeat.server import margins


def test_margins_need_both_parts():
    assert margins({"emulator_tuned": 3.5, "plug_in": 3.25, "full_zero_shot": 4.0}) == {"privacy_margin": 0.25}
    assert margins({"plug_in": 3.25}) == {}
    assert margins({"emulator_tuned": 3.0, "plug_in": 3.25})["privacy_margin"] == pytest.approx(-0.25)
