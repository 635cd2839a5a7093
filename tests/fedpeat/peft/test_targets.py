import pytest
from torch import nn

from fedpeat.core import PeftError
from fedpeat.peft.targets import linear_layers, modules_in_blocks, resolve


@pytest.fixture
def modules():
    blocks = [
        nn.ModuleDict({"mix": nn.ModuleDict({"q": nn.Linear(2, 2), "k": nn.Linear(2, 2)}), "norm": nn.LayerNorm(2)})
        for _ in range(12)
    ]
    return modules_in_blocks(nn.ModuleDict({"h": nn.ModuleList(blocks)}), path="h", positions=[11, 1])


def test_only_the_wanted_blocks_in_order(modules):
    assert linear_layers(modules) == ["h.1.mix.q", "h.1.mix.k", "h.11.mix.q", "h.11.mix.k"]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (None, ["h.1.mix.q", "h.1.mix.k", "h.11.mix.q", "h.11.mix.k"]),
        ("all-linear", ["h.1.mix.q", "h.1.mix.k", "h.11.mix.q", "h.11.mix.k"]),
        (["q"], ["h.1.mix.q", "h.11.mix.q"]),
        (["mix.k", "norm"], ["h.1.mix.k", "h.1.norm", "h.11.mix.k", "h.11.norm"]),
        (["h.1.mix.q"], ["h.1.mix.q"]),
        (r".*\.11\..*\.[qk]", ["h.11.mix.q", "h.11.mix.k"]),
    ],
)
def test_targets_by_ending_list_or_pattern(modules, wanted, found):
    assert resolve(wanted, modules) == found


@pytest.mark.parametrize("wanted", [["x"], ["q", "x"], "q", []])
def test_what_matches_nothing_is_told_with_what_there_is(modules, wanted):
    with pytest.raises(PeftError, match="linear layers there: k, q"):
        resolve(wanted, modules)
