import json
from types import SimpleNamespace

import numpy as np
import pytest

from fedpeat.control import read_fit
from fedpeat.control.fit import fit
from fedpeat.core import ConfigError, StorageError
from simulations import fit_command
from simulations.control_command import control
from simulations.fit_command import control_fit, split_arguments
from simulations.fitting import FIT, HELD_OUT, Levels, fit_settings, levels_in, planned, trial_in
from simulations.settings import settings_hash
from tests.simulations.fit_fakes import CLIENTS, run

GIVEN = ("strategy=flex_lora", "rounds=3", "client.local_steps=2", "control.menu.kept_blocks=[1]")
MENU = ("control.menu.ranks=[2,8]", "control.menu.steps=[1,2,4]")
FAKES = "tests.simulations.fit_fakes:"


@pytest.fixture(scope="module")
def settings():
    return fit_settings([*GIVEN, *MENU])


@pytest.fixture(scope="module")
def levels(settings):
    return levels_in(settings, len(CLIENTS))


@pytest.fixture(autouse=True)
def _four_clients(monkeypatch):
    monkeypatch.setattr(fit_command, "prepare_data", lambda _: SimpleNamespace(clients=list(CLIENTS)))


def test_levels_are_those_of_the_menu_and_of_the_crowd(settings, levels):
    assert levels == Levels((1, 4), (2, 8), (1, 2, 4), (1, 2, 4))
    bare = fit_settings(["emulator=ffn_channels", "control.menu.kept_blocks=null"])
    assert levels_in(bare, 8) == Levels((None,), (None,), (5, 10, 20), (2, 4, 8))


def test_no_plan_is_made_twice_and_held_out_ones_are_unseen(settings, levels):
    plans = planned(settings, levels, runs=42, held_out=10)
    assert [sum(plan.part == part for plan in plans) for part in (FIT, HELD_OUT)] == [42, 10]
    assert len({plan.name for plan in plans}) == len({settings_hash(plan.settings) for plan in plans}) == 52
    steady = [plan for plan in plans if not plan.random]
    assert len(steady) == 28 + 5
    same = {settings_hash({**plan.settings, "seed": 0}) for plan in steady}
    assert len(same) == 33  # none of the held-out ones is among the others, whatever the seed
    seeds = [{plan.settings["seed"] % 5 for plan in plans if plan.part == part} for part in (FIT, HELD_OUT)]
    assert seeds == [{0, 1, 2}, {3, 4}]  # or further ones apart, where a run would be made twice
    assert all(plan.settings["evaluate_every"] == 1 for plan in plans)
    # Any first part holds both kinds.
    assert 1 <= sum(plan.part == HELD_OUT for plan in plans[:12]) <= 3


def test_the_same_settings_give_the_same_runs(settings, levels):
    assert planned(settings, levels, runs=9, held_out=4) == planned(settings, levels, runs=9, held_out=4)


def test_few_levels_are_repeated_with_other_seeds(settings):
    plans = planned(settings, Levels((4,), (8,), (2,), (1, 2)), runs=9, held_out=2)
    assert len(plans) == 11
    assert len({plan.name for plan in plans}) == 11


def measured(folder, plans):
    for plan in plans:
        place = folder / plan.name
        place.mkdir()
        (place / "config.sha").write_text(settings_hash(plan.settings) + "\n")
        run(plan.settings, place)
        yield trial_in(place, 8)


def test_the_runs_excite_every_parameter(settings, levels, tmp_path):
    found = fit(list(measured(tmp_path, planned(settings, levels, runs=42, held_out=0))), unit_steps=2)
    assert found.residual < 1e-6
    for name, true in {"pace": 0.5, "steps": 0.5, "rank": 0.3, "gap": 0.1, "apart": 0.01, "least": 2.7}.items():
        assert getattr(found.curves, name) == pytest.approx(true, rel=1e-2), name
        assert np.isfinite(found.deviations[name])


def test_a_run_is_read_by_hand(settings, levels, tmp_path):
    plan = next(plan for plan in planned(settings, levels, runs=9, held_out=0) if plan.random)
    (trial,) = measured(tmp_path, [plan])
    assert trial.losses[0] == 3.0
    assert trial.share.shape == (3, 4)
    reports = [json.loads(line) for line in (tmp_path / plan.name / "metrics.jsonl").read_text().splitlines()]
    for place, (client, rows) in enumerate(CLIENTS.items()):
        for number in range(3):
            facts = reports[number + 1]["devices"][client]
            there = facts["status"] == "counted"
            assert trial.share[number, place] == (rows / 1000 if there else 0)
            if there:
                kept = {"default": 0.5, "kept_1": 0.125}[facts["emulator"]]
                found = [values[number, place] for values in (trial.kept, trial.rank, trial.steps)]
                assert found == [kept, facts["rank"] / 8, facts["local_steps"]]
    assert trial.seconds.tolist() == [0, 2, 4, 6]


def test_what_cannot_be_read_is_told(settings, levels, tmp_path):
    plan = planned(settings, levels, runs=1, held_out=0)[0]
    list(measured(tmp_path, [plan]))
    path = tmp_path / plan.name / "metrics.jsonl"
    path.write_text(path.read_text().replace('"plug_in"', '"else"'))
    with pytest.raises(StorageError, match="plug_in"):
        trial_in(tmp_path / plan.name, 8)


def test_from_words_to_curves_and_on_where_it_stopped(tmp_path):
    told = []
    words = ["fit", f"folder={tmp_path}", "runs=20", "held_out=6", *GIVEN, *MENU]
    assert control_fit(words[1:], run=FAKES + "broken", say=told.append) == 1
    failed = sum("ZeroDivisionError" in line for line in told)
    assert failed > 0
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/summary.json")}
    assert len(kept) == 26 - failed
    assert control_fit(words[1:], run=FAKES + "run", say=told.append) == 0
    assert f"26 runs, {26 - failed} finished before" in told
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    found = read_fit(tmp_path / "curves.json")
    assert found.curves.pace == pytest.approx(0.5, rel=1e-2)
    assert found.curves.start == pytest.approx(3.0)
    assert found.facts["runs"] == 20
    assert found.facts["fitted_to"]["strategy"] == "flex_lora"
    assert found.facts["held_out"]["spearman_final"] == pytest.approx(1)
    assert found.facts["held_out"]["passed"]
    assert "rank correlation 1.00" in told[-1]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    # Once more there is nothing to run, and the same comes out.
    assert control_fit(words[1:], run=FAKES + "nothing_of_that_name", say=told.append) == 0
    assert read_fit(tmp_path / "curves.json") == found


def test_help_and_mistakes(capsys, tmp_path):
    assert control(["fit", "--help"]) == 0
    assert "held_out=10" in capsys.readouterr().out
    for words, says in (
        (["runs=20"], "folder=FOLDER"),
        (["folder=f", "runs=many"], "1 or more"),
        (["folder=f", "control=fixed"], "control=random"),
        (["folder=f", "realign.every=2"], "re-aligned"),
        (["folder=f", "rouns=2"], "did you mean"),
    ):
        with pytest.raises(ConfigError, match=says):
            control(["fit", *words])
    assert split_arguments(["folder=f", "held_out=0"])[1] == {"runs": 42, "held_out": 0, "jobs": 1}
