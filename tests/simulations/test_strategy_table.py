"""What strategies cost, counted by hand for two LoRA layers of 6 x 5 and 4 x 7 of rank 3, and a head of 3 x 2."""

from types import SimpleNamespace

import pytest
import torch

from fedpeat.core import Layout, LoraPair
from simulations.settings import conf_folder
from simulations.strategy_table import HEADINGS, Row, recipes, table_cells, traffic
from strategies.drift import scaffold
from strategies.folding import fed_ex_lora, flora
from strategies.general import fed_avg, q_fed_avg
from strategies.lora import fed_sa_lora, fed_sb, ffa_lora, ro_lora
from strategies.robust import fl_trust
from tests.federations import make_layout, make_state

A, B, HEAD = 3 * (5 + 7), 3 * (6 + 4), 6
DENSE = 6 * 5 + 4 * 7


def tuned(layout=None):
    """What `traffic` looks at of a tuned model."""
    layout = layout or make_layout(rank=3, head=True)
    return SimpleNamespace(initial=make_state(layout, zero_b=True).tensors, layout=layout)


@pytest.mark.parametrize(
    ("recipe", "down", "up"),
    [
        (fed_avg(), A + B + HEAD, A + B + HEAD),
        (q_fed_avg(), A + B + HEAD, A + B + HEAD),
        (fl_trust(), A + B + HEAD, A + B + HEAD),
        (ffa_lora(), B + HEAD, B + HEAD),
        (fed_sa_lora(), A + HEAD, A + HEAD),
        (ro_lora(), A + B + HEAD, B + HEAD),  # of the last round counted, an odd one
        (scaffold(), 2 * (A + B + HEAD), 2 * (A + B + HEAD)),
        (fed_ex_lora(), A + B + HEAD + DENSE, A + B + HEAD),
        (flora(), A + B + HEAD + DENSE, A + B + HEAD),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_bytes_are_those_counted_by_hand(recipe, down, up):
    assert traffic(recipe, tuned()) == (4.0 * down, 4.0 * up)


def test_square_cores_are_all_that_travels_of_them():
    pair = LoraPair("m", "m.lora_A.basis", "m.lora_B.weight", 1.0, (6, 5), r="m.lora_A.core")
    model = SimpleNamespace(initial={"m.lora_A.core": torch.zeros(3, 3)}, layout=Layout((pair,), (), 3))
    assert traffic(fed_sb(), model) == (36.0, 36.0)


def test_every_option_of_the_strategy_group_is_a_row():
    found = dict(recipes(conf_folder()))
    assert set(found) == {path.stem for path in (conf_folder() / "strategy").glob("*.yaml")}
    assert {name for name, recipe in found.items() if recipe.name != name} <= {"flower"}


def test_a_row_says_what_its_recipe_states():
    cells = dict(zip(HEADINGS, table_cells(Row("scaffold", scaffold(), 2.0, 1.994)), strict=True))
    assert cells["strategy"] == "`scaffold`"
    assert cells["bytes down / up"] == "2.00 / 1.99"
    assert cells["client keeps"] == "control variate"
    assert (cells["mixed ranks"], cells["weighted sum only"], cells["server takes part"]) == ("no", "yes", "yes")
    cells = dict(zip(HEADINGS, table_cells(Row("flora", flora(), 2.0, 1.0)), strict=True))
    assert (cells["mixed ranks"], cells["client keeps"], cells["exact on LoRA"]) == ("yes", "—", "yes")
