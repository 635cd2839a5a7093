from dataclasses import replace

import pytest
import torch
import yaml

from fedpeat.core import ConfigError, GlobalState, RoundReport, RunState, StorageError
from fedpeat.server import read_history
from simulations.keeping import CHANGEABLE, Keeper, check_made_of, settings_to_resume
from simulations.settings import load_settings

STATE = RunState(0, GlobalState({"w": torch.ones(2)}), {}, 0, 0)


def report(number):
    return RoundReport(number, {}, (), {}, 0, 0, {"total": 1.0}, {})


def kept(folder, rounds):
    keeper = Keeper(folder, 2)
    for number in range(rounds + 1):
        keeper.keep(report(number), replace(STATE, round=number))
    return keeper


def test_a_run_goes_on_after_its_last_checkpoint(tmp_path):
    kept(tmp_path, 3)
    reports, state = Keeper(tmp_path, 2).resume(pytest.fail)
    assert [report.round for report in reports] == [0, 1, 2, 3]
    assert (state.round, state.resumed) == (3, (3,))
    assert Keeper(tmp_path, 2).resume(pytest.fail)[1].resumed == (3,)


def test_a_report_without_its_checkpoint_is_dropped(tmp_path):
    kept(tmp_path, 2)._history.append(report(3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 4, "cli')
    reports, state = Keeper(tmp_path, 2).resume(pytest.fail)
    assert state.round == 2
    assert [report.round for report in reports] == [report.round for report in read_history(tmp_path)] == [0, 1, 2]


def test_a_checkpoint_that_is_damaged_costs_one_round(tmp_path):
    kept(tmp_path, 3)
    newest = max((tmp_path / "checkpoint").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    told = []
    reports, state = Keeper(tmp_path, 2).resume(told.append)
    assert state.round == reports[-1].round == 2
    assert state.repeated == 1
    assert len(told) == 1


def test_rounds_that_were_done_once_more_stay_counted(tmp_path):
    kept(tmp_path, 3)
    for _ in range(2):
        max((tmp_path / "checkpoint").iterdir()).write_bytes(b"damaged")
        keeper = Keeper(tmp_path, 2)
        _, state = keeper.resume(lambda _: None)
        keeper.keep(report(3), replace(state, round=3))
    assert Keeper(tmp_path, 2).resume(pytest.fail)[1].repeated == 2


def test_before_the_first_checkpoint_there_is_nothing_to_go_on_from(tmp_path):
    Keeper(tmp_path, 2)._history.append(report(0))
    keeper = Keeper(tmp_path, 2)
    assert keeper.resume(pytest.fail) is None
    assert read_history(tmp_path) == []


def test_a_history_that_was_lost_is_told(tmp_path):
    kept(tmp_path, 2)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(StorageError, match="of round 2, the last report of round none"):
        Keeper(tmp_path, 2).resume(pytest.fail)


def test_without_a_folder_nothing_is_kept():
    keeper = Keeper(None, 2)
    keeper.keep(report(0), STATE)
    assert keeper.resume(pytest.fail) is None


def test_the_settings_are_those_of_the_run(tmp_path):
    settings = load_settings(["rounds=4", "peft.rank=3", "strategy=fed_adam"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert settings_to_resume(tmp_path, []) == settings
    changed = settings_to_resume(tmp_path, ["rounds=9", "engine=ray", "engine.workers=2"])
    assert changed["rounds"] == 9
    assert changed["engine"]["workers"] == 2
    same = set(settings) - {"rounds", "engine"}
    assert {key: changed[key] for key in same} == {key: settings[key] for key in same}


@pytest.mark.parametrize("override", ["strategy=fed_adam", "client.learning_rate=1", "ronds=3"])
def test_what_made_the_run_cannot_be_changed(override, tmp_path):
    (tmp_path / "config.yaml").write_text("rounds: 2")
    with pytest.raises(ConfigError, match="of a run that is resumed") as told:
        settings_to_resume(tmp_path, [override])
    assert all(key in told.value.found for key in CHANGEABLE)


@pytest.mark.parametrize(("epsilon", "refused"), [(8.0, True), (None, False)])
def test_noise_that_was_chosen_for_some_rounds_cannot_be_stretched(epsilon, refused, tmp_path):
    settings = load_settings(["privacy=client_level", "rounds=4"])
    settings["privacy"]["epsilon"] = epsilon
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    if refused:
        with pytest.raises(ConfigError, match=r"privacy\.epsilon=8"):
            settings_to_resume(tmp_path, ["rounds=9"])
    assert settings_to_resume(tmp_path, ["rounds=9"] if not refused else [])["rounds"] == (4 if refused else 9)


@pytest.mark.parametrize("text", [None, "{", "- 1"])
def test_a_folder_without_a_run_is_told(text, tmp_path):
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="cannot resume"):
        settings_to_resume(tmp_path, [])


def test_other_data_or_models_are_refused(tmp_path):
    check_made_of(tmp_path, {"data": "a", "bundle default": "b"})
    check_made_of(tmp_path, {"data": "a", "bundle default": "b"})
    with pytest.raises(StorageError, match=r"(?s)began with.*data"):
        check_made_of(tmp_path, {"data": "c", "bundle default": "b"})
