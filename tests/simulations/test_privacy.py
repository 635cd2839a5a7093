import copy
import math

import pytest
import yaml

from fedpeat.control import FixedControl
from fedpeat.core import ConfigError, RoundReport
from fedpeat.privacy import delta_noise
from simulations.privacy import privacy_of
from simulations.report import in_words, summarise
from simulations.report.html import write_report
from simulations.settings import conf_folder
from strategies.general import fed_avg
from strategies.lora import fed_sa_lora

NAMES = tuple(f"c{index}" for index in range(20))
PRIVATE = yaml.safe_load((conf_folder() / "privacy" / "client_level.yaml").read_text(encoding="utf-8"))


def control(per_round=20, **more):
    return FixedControl(NAMES, per_round=per_round, local_steps=1, rounds=10, seed=1, **more)


@pytest.fixture
def chosen(settings):
    """Settings with privacy on, and single keys of it changed; those of the run by group."""

    def make(groups=None, adaptive=None, **keys):
        made = {**settings(**(groups or {})), "rounds": 10, "privacy": {**copy.deepcopy(PRIVATE), **keys}}
        made["privacy"]["adaptive"].update(adaptive or {})
        return made

    return make


def test_without_it_nothing_changes(settings):
    recipe, plain = fed_avg(), control()
    found = privacy_of({**settings(), "privacy": {"kind": None}}, recipe, plain)
    assert found.recipe is recipe
    assert found.control is plain
    assert found.epsilon is found.facts is None


@pytest.mark.parametrize(
    ("per_round", "sampling", "said", "neighbours"),
    [
        (20, "fixed", "all", "one client more or less"),
        (20, "poisson", "all", "one client more or less"),
        (5, "poisson", "poisson", "one client more or less"),
        (5, "fixed", "fixed", "one client replaced by another"),
    ],
)
def test_the_accountant_follows_the_sampling(per_round, sampling, said, neighbours, chosen):
    found = privacy_of(chosen(), fed_avg(), control(per_round, sampling=sampling))
    assert (found.facts["sampling"], found.facts["neighbours"]) == (said, neighbours)
    assert found.facts["share"] == per_round / 20
    spent = [found.epsilon(rounds) for rounds in (0, 1, 10)]
    assert spent[0] == 0 < spent[1] < spent[2] < math.inf
    if said == "all":
        assert spent[1] == pytest.approx(4.3772, abs=1e-3)  # the Gaussian mechanism's


def test_noise_that_an_epsilon_asks_for_lasts_to_the_end(chosen):
    found = privacy_of(chosen(epsilon=3.0), fed_avg(), control())
    assert 2.9 < found.epsilon(10) <= 3.0
    assert found.facts["noise_multiplier"] > 3


def test_who_is_sampled_is_secret_unless_noise_is_to_be_repeated(chosen):
    first, second = (privacy_of(chosen(), fed_avg(), control(5)).control for _ in range(2))
    assert len({first.seed, second.seed, 1}) == 3
    found = privacy_of(chosen(noise_seed=3), fed_avg(), control(5))
    assert found.control.seed == 1
    assert found.facts["repeatable"]


def test_an_adapting_bound_shares_the_noise_with_the_count(chosen, monkeypatch):
    got = {}
    monkeypatch.setattr("simulations.privacy.private", lambda recipe, **given: got.update(given) or recipe)
    found = privacy_of(chosen(adaptive={"quantile": 0.5}, noise_multiplier=0.9), fed_avg(), control())
    assert (got["clipping"].bit_noise, got["expected"]) == (1.0, 20)
    assert got["noise_multiplier"] == delta_noise(0.9, 1.0) > 0.9
    assert found.facts["noise_multiplier"] == 0.9
    assert found.epsilon(1) == privacy_of(chosen(noise_multiplier=0.9), fed_avg(), control()).epsilon(1)
    assert (got["clipping"].bit_noise, got["noise_multiplier"]) == (0.0, 0.9)
    with pytest.raises(ConfigError, match=r"bit_noise=0\.25.*above half"):
        privacy_of(chosen(adaptive={"quantile": 0.5}), fed_avg(), control(5, sampling="poisson"))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"noise_multiplier": -1.0}, r"privacy\.noise_multiplier=-1\.0; it must be 0 or more"),
        ({"noise_multiplier": math.nan}, r"privacy\.noise_multiplier=nan"),
        ({"epsilon": 0}, r"privacy\.epsilon=0; it must be null, or above 0"),
        ({"epsilon": math.inf}, r"privacy\.epsilon=inf"),
        ({"delta": 0.05}, r"privacy\.delta=0\.05; it must be above 0, below 1 / 20 clients"),
        ({"delta": 0.0}, r"privacy\.delta=0\.0"),
        ({"clip_norm": 0.0}, r"privacy\.clip_norm=0\.0"),
        ({"clip_on": "wire"}, "choose server or client"),
        ({"groups": {"server": {"train": "emulator"}}}, r"set server\.train=off"),
        ({"groups": {"clients": {"pool": True}}}, r"set clients\.pool=false"),
        ({"groups": {"client": {"unfreeze": ["norm"], "unfreeze_policy": "local"}}}, "map_back or discard"),
    ],
)
def test_what_does_not_go_together_is_told(keys, told, chosen):
    with pytest.raises(ConfigError, match=told):
        privacy_of(chosen(**keys), fed_avg(), control())


def test_a_strategy_that_keeps_tensors_with_its_clients_is_told(chosen):
    with pytest.raises(ConfigError, match="strategy=fed_sa_lora"):
        privacy_of(chosen(), fed_sa_lora(), control())


FACTS = {
    "delta": 1e-5,
    "noise_multiplier": 1.5,
    "clip_norm": 0.3,
    "adaptive": True,
    "neighbours": "one client more or less",
    "repeatable": False,
}


def summary_of(reports, **more):
    plain = {"config_hash": "", "versions": {}, "status": "finished", "bundle_bytes": 0}
    return summarise(reports, privacy={**FACTS, **more}, **plain)


def test_epsilon_stands_in_the_summary_in_words_and_on_the_page(make_reports, tmp_path):
    reports = [
        RoundReport(**{**vars(report), "metrics": {**report.metrics, "epsilon": 2.5 * report.round}})
        for report in make_reports()
    ]
    summary = summary_of(reports)
    last = 2.5 * reports[-1].round
    assert summary["privacy"] == {"epsilon": last, **FACTS}
    said = f"differentially private for one client more or less: epsilon {last:.1f} at delta 1e-05"
    assert f"{said}." in in_words(summary)
    assert f"{said}, if nobody knows the noise's seed." in in_words(summary_of(reports, repeatable=True))
    page = write_report(tmp_path, reports, summary, settings={}).read_text(encoding="utf-8")
    assert "delta 1e-05, one client more or less; noise multiplier 1.50, clip norm 0.300 at first" in page


def test_no_noise_and_no_round_are_said(make_reports):
    reports = make_reports()
    summary = summary_of([*reports[:-1], RoundReport(**{**vars(reports[-1]), "metrics": {"epsilon": math.nan}})])
    assert summary["privacy"]["epsilon"] is None
    assert "no noise was added: nothing is private" in in_words(summary)
    assert summary_of(reports[:1])["privacy"]["epsilon"] == 0
    assert "privacy" not in summarise(reports, config_hash="", versions={}, status="finished", bundle_bytes=0)
