from types import SimpleNamespace

import pytest
import torch
import yaml

from fedpeat.core import ConfigError, Layout, LoraPair
from fedpeat.data import Rows
from simulations import conditions
from simulations.building import built
from simulations.conditions import attackers_of, check_recipe, codec_of, personal_of
from simulations.settings import conf_folder
from strategies.folding import flora
from strategies.general import fed_avg
from strategies.lora import fed_sa_lora, fed_sb, ffa_lora
from strategies.robust import fl_trust
from tests.federations import make_layout

CORED = Layout((LoraPair("m", "m.lora_A.basis", "m.lora_B.weight", 1.0, (6, 5), r="m.lora_A.core"),), (), 3)
LORA, PLAIN = make_layout(), Layout(others=("w",))
NAMES = [f"client-{number}" for number in range(10)]


def test_a_rule_on_factors_needs_factors_that_travel(settings):
    check_recipe(settings(), ffa_lora(), LORA)
    with pytest.raises(ConfigError, match=r"strategy=ffa_lora works on LoRA's factors; peft=full has none.*peft=lora"):
        check_recipe(settings(peft={"kind": "full"}), ffa_lora(), PLAIN)
    with pytest.raises(ConfigError, match="peft=lora_sb has none that travel"):
        check_recipe(settings(peft={"kind": "lora_sb"}), ffa_lora(), CORED)


def test_a_rule_on_square_cores_needs_these(settings):
    check_recipe(settings(peft={"kind": "lora_sb"}), fed_sb(), CORED)
    for layout in (LORA, PLAIN):
        with pytest.raises(ConfigError, match="choose peft=lora_sb"):
            check_recipe(settings(), fed_sb(), layout)


def test_a_rule_on_any_tensors_takes_any(settings):
    for layout in (LORA, PLAIN, CORED, Layout()):
        check_recipe(settings(), fed_avg(), layout)


def test_momentum_is_not_kept_where_factors_change_their_basis(settings):
    keep = settings(client={"optimizer_state": "keep"})
    with pytest.raises(ConfigError, match=r"keep does not go with strategy=flora.*optimizer_state=reset"):
        check_recipe(keep, flora(), LORA)
    check_recipe(keep, fed_avg(), LORA)
    check_recipe(settings(), flora(), LORA)


@pytest.mark.parametrize("train", ["off", False, None])
def test_a_rule_that_measures_by_the_server_needs_the_server(train, settings):
    with pytest.raises(ConfigError, match=r"set server\.train=emulator"):
        check_recipe(settings(server={"train": train}), fl_trust(), LORA)
    check_recipe(settings(server={"train": train}), fed_avg(), LORA)


@pytest.mark.parametrize("train", ["emulator", "full"])
def test_it_may_train_either_model(train, settings):
    check_recipe(settings(server={"train": train}), fl_trust(), LORA)


def codec_settings(settings, name):
    path = conf_folder() / "codec" / f"{name}.yaml"
    return {**settings(), "codec": yaml.safe_load(path.read_text(encoding="utf-8"))}


def test_a_codec_with_a_memory_needs_one_basis(settings):
    for name in ("top_k", "top_k_int8"):
        chosen = codec_settings(settings, name)
        assert codec_of(chosen, fed_avg()).name == name
        with pytest.raises(ConfigError, match=f"codec={name} does not go with strategy=flora"):
            codec_of(chosen, flora())
    for name in ("none", "bf16", "int8", "drive"):
        assert codec_of(codec_settings(settings, name), flora()).name == name


def attack(settings, names=NAMES, **keys):
    chosen = {"kind": "scale", "factor": -10.0, "share": 0.3, "clients": None}
    return attackers_of(settings(attack={**chosen, **keys}), names)


def test_without_an_attack_nobody_attacks(settings):
    assert attackers_of(settings(), NAMES) == {}


def test_a_share_of_the_clients_attacks_chosen_by_the_seed(settings):
    chosen = attack(settings)
    assert len(chosen) == 3
    assert set(chosen) <= set(NAMES)
    assert all(what == {"kind": "scale", "factor": -10.0} for what in chosen.values())
    assert chosen == attack(settings) == attack(settings, names=NAMES[::-1])
    seeds = {tuple(attackers_of({**settings(attack=_ATTACK), "seed": seed}, NAMES)) for seed in range(5)}
    assert len(seeds) > 1
    assert len(attack(settings, share=1.0)) == 10
    assert len(attack(settings, share=0.26)) == 3  # rounded


_ATTACK = {"kind": "scale", "factor": 1.0, "share": 0.3, "clients": None}


def test_named_clients_attack_and_no_others(settings):
    assert list(attack(settings, clients=["client-7", "client-2"], share=0.0)) == ["client-2", "client-7"]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"clients": ["client-77"]}, "did you mean 'client-7'"),
        ({"share": 1.5}, "between 0 and 1"),
        ({"share": -0.1}, "between 0 and 1"),
        ({"share": float("nan")}, "between 0 and 1"),
        ({"share": 0.04}, "makes no attackers; there are 10 clients"),
        ({"kind": "sclae"}, "did you mean 'scale'"),
    ],
)
def test_attackers_that_cannot_be_are_told(keys, told, settings):
    with pytest.raises(ConfigError, match=told):
        attack(settings, **keys)


@pytest.fixture
def held(monkeypatch):
    """Test rows of clients: `held(ann=3)` gives data in which each row's tokens say whose and which it is."""

    def make(**counts):
        rows = {name: torch.arange(n)[:, None] + 10 * place for place, (name, n) in enumerate(counts.items())}
        monkeypatch.setattr(conditions, "open_rows", lambda _folder, name, part: _rows(rows[name], part))
        clients = [SimpleNamespace(name=name) for name in counts]
        return SimpleNamespace(folder="data", clients=clients, remote=False)

    return make


def _rows(ids, part):
    assert part == "test"
    return Rows(ids, ids)


def test_only_what_clients_keep_is_scored_by_each_ones_own_model(held):
    data = held(ann=3, bob=2)
    assert personal_of(fed_avg(), data, folder="clients", max_rows=None) is None
    personal = personal_of(fed_sa_lora(), data, folder="clients", max_rows=None)
    assert personal.folder == "clients"
    assert {name: rows.input_ids[:, 0].tolist() for name, rows in personal.rows.items()} == {
        "ann": [0, 1, 2],
        "bob": [10, 11],
    }


def test_clients_without_test_rows_have_no_model_to_score(held):
    personal = personal_of(fed_sa_lora(), held(ann=3, bob=0, eve=1), folder="clients", max_rows=None)
    assert set(personal.rows) == {"ann", "eve"}
    assert personal_of(fed_sa_lora(), held(ann=0), folder="clients", max_rows=None) is None


def test_of_many_rows_some_are_taken_from_all_over(held):
    personal = personal_of(fed_sa_lora(), held(ann=6, bob=1, eve=6), folder="clients", max_rows=3)
    assert {name: rows.input_ids[:, 0].tolist() for name, rows in personal.rows.items()} == {
        "ann": [0],
        "bob": [10],
        "eve": [25],
    }


def test_errors_of_ours_come_out_of_builders_as_they_are():
    with pytest.raises(ConfigError, match=r"codec\.share=2"):
        built({"_target_": "fedpeat.codecs.top_k", "share": 2})
    with pytest.raises(ConfigError, match=r"cannot build fedpeat\.codecs\.top_k"):
        built({"_target_": "fedpeat.codecs.top_k", "shaer": 0.5})
    assert built({"_target_": "fedpeat.codecs.top_k", "share": 0.25}).description["share"] == 0.25
