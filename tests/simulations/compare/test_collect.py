import json

import pytest

from fedpeat.core import write_json, write_text
from simulations.compare.collect import find_runs, read_run, rounds_done
from simulations.compare.differences import varying
from simulations.compare.workers import FAILURE

LORA = {"kind": "lora", "rank": 8}
FULL = {"kind": "full", "train_head": False}
AVERAGE = {"_target_": "strategies.recipes.fed_avg", "rate": 1.0}


def run_of(settings, tmp_path):
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    write_text(folder / "config.yaml", json.dumps(settings))
    return read_run(folder)


@pytest.fixture
def varies(tmp_path):
    return lambda *several: varying([run_of(settings, tmp_path) for settings in several])


def test_only_what_differs_is_found(varies):
    found = varies({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 5, "c": 2}, "d": 3})
    assert found == {"a.b": ["1", "5"]}


def test_seeds_and_how_a_run_is_executed_are_no_difference(varies):
    base = {"seed": 0, "engine": {"_target_": "x.serial"}, "cache": None, "export": True, "report": True, "rounds": 2}
    other = {**base, "seed": 1, "cache": "/x", "export": False, "report": False, "engine": {"_target_": "x.ray"}}
    assert varies(base, {**other, "rounds": 3}) == {"rounds": ["2", "3"]}


def test_engines_are_compared_where_nothing_else_differs(varies):
    found = varies({"engine": {"_target_": "x.serial"}}, {"engine": {"_target_": "x.ray", "workers": 2}})
    assert found == {"engine": ["serial", "ray"]}
    assert varies({"rounds": 1}, {"rounds": 1}) == {}


def test_a_group_is_called_by_its_option(varies):
    assert varies({"peft": LORA}, {"peft": FULL}) == {"peft": ["lora", "full"]}
    other = {"_target_": "strategies.recipes.fed_adam", "beta": 0.9}
    assert varies({"strategy": AVERAGE}, {"strategy": other}) == {"strategy": ["fed_avg", "fed_adam"]}


def test_options_of_one_name_are_told_apart(varies):
    found = varies({"peft": LORA}, {"peft": {**LORA, "rank": 4}}, {"peft": FULL})
    assert found == {"peft": ["lora (rank 8)", "lora (rank 4)", "full"]}


def test_the_same_option_with_another_value_is_a_key(varies):
    assert varies({"peft": LORA}, {"peft": {**LORA, "rank": 4}}) == {"peft.rank": ["8", "4"]}


def test_keys_of_open_mappings_may_be_missing(varies):
    found = varies({"control": {"kept": {}}}, {"control": {"kept": {"sympy": 2}}})
    assert found == {"control.kept.sympy": ["not set", "2"]}


def test_a_mapping_against_a_value_is_shown_whole(varies):
    assert varies({"a": {"b": [1, 2]}}, {"a": None}) == {"a": ["{b: [1, 2]}", "null"]}


def test_runs_are_found_in_natural_order_and_not_inside_runs(write_run, tmp_path):
    for name in ("10", "9", "9/baselines/whole_model", "deep/er/1", ".hidden/1"):
        write_run(tmp_path / name, {"seed": 0})
    found = [run.folder.relative_to(tmp_path).as_posix() for run in find_runs(tmp_path)]
    assert found == ["9", "10", "deep/er/1"]
    assert len(find_runs(tmp_path / "9")) == 1


def test_a_killed_run_is_interrupted_and_a_failed_one_says_why(write_run, tmp_path):
    killed = write_run(tmp_path / "killed", {"seed": 0})
    (killed / "summary.json").unlink()
    assert find_runs(tmp_path)[0].status == "interrupted"
    assert len(read_run(killed).reports) == 3
    write_json(killed / FAILURE, {"kind": "died", "reason": "boom"})
    assert (read_run(killed).status, read_run(killed).reason) == ("failed", "boom")
    assert read_run(tmp_path / "nowhere").status == "missing"


def test_damaged_files_do_not_stop_the_others(write_run, tmp_path):
    folder = write_run(tmp_path / "run", {"seed": 3})
    (folder / "metrics.jsonl").write_text("{}\n{}\n")
    found = read_run(folder)
    assert (found.status, found.seed, found.reports) == ("failed", 3, ())
    assert "damaged" in found.reason
    (folder / "config.yaml").write_text("a: [1")
    (folder / "summary.json").write_text("[1]")
    assert read_run(folder).settings == {}
    assert find_runs(tmp_path)[0].status == "failed"


def test_finished_rounds_are_lines_of_the_history(write_run, tmp_path):
    folder = write_run(tmp_path / "run", {}, losses=[3.0, 2.0, 1.0])
    assert rounds_done(folder) == 4
    assert rounds_done(tmp_path / "nowhere") == 0
