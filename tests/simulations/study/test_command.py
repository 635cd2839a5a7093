import json

import pytest

from fedpeat.core import ConfigError
from simulations.cli import USAGE
from simulations.compare.again import report
from simulations.study.command import study

RUN = "tests.simulations.compare.fakes:run"
WORDS = ("emulator", "selection=uniform,cka", "kept=2", "seeds=2", "rounds=2", "client.device=cpu", "jobs=2")


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    """Figures have their own tests."""
    monkeypatch.setattr("simulations.study.figures.draw", lambda _: {})


def told(terminal):
    return terminal.file.getvalue()


def read(path):
    return json.loads(path.read_text())


def test_a_study_is_run_and_told(tmp_path, terminal):
    assert study([*WORDS, f"folder={tmp_path}"], run=RUN, console=terminal) == 0
    plain = read(tmp_path / "study.json")
    assert {each["label"] for each in plain["setups"]} == {"uniform, kept 2", "cka, kept 2"}
    assert [each["label"] for each in plain["references"]] == ["whole model, LoRA", "whole model, full"]
    assert {path.name.rsplit("-", 1)[0] for path in (tmp_path / "cells").iterdir()} == {
        f"{name}-seed{seed}"
        for name in ("uniform-kept_2", "cka-kept_2", "whole_model-LoRA", "whole_model-full")
        for seed in (0, 1)
    }
    text = told(terminal)
    assert "4 variants x 2 seeds" in text
    assert "uniform, kept 2, seed 1: perplexity" in text
    assert str(tmp_path / "study.html") in text
    settings = (tmp_path / plain["runs"][0]["folder"] / "config.yaml").read_text()
    assert "fedpeat.emulators." in settings


def test_what_is_finished_is_not_run_again(tmp_path, terminal):
    words = [*WORDS, "reference=false", f"folder={tmp_path}"]
    study(words, run=RUN, console=terminal)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/summary.json")}
    broken = sorted(times)[0]
    broken.write_text("torn")
    more = [word.replace("kept=2", "kept=2,3").replace("uniform,cka", "cka,uniform") for word in words]
    assert study([*more, "compression=none"], run=RUN, console=terminal) == 0
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/summary.json")}
    assert len(after) == 8
    assert {path for path in times if after[path] != times[path]} == {broken}
    assert "3 finished before" in told(terminal)


def test_an_axis_that_is_added_keeps_the_runs_without_it(tmp_path, terminal):
    study([*WORDS, "reference=false", f"folder={tmp_path}"], run=RUN, console=terminal)
    words = [*WORDS, "reference=false", "unfreeze=none,norm", "policy=discard", f"folder={tmp_path}"]
    assert study(words, run=RUN, console=terminal) == 0
    assert "4 finished before" in told(terminal)
    assert read(tmp_path / "study.json")["axes"]["unfreeze"] == ["none", "norm"]


def test_report_writes_a_study_anew(tmp_path, terminal):
    study([*WORDS, f"folder={tmp_path}"], run=RUN, console=terminal)
    (tmp_path / "study.html").unlink()
    assert report([str(tmp_path), "metric=loss"], console=terminal) == 0
    assert read(tmp_path / "study.json")["metric"] == "loss"
    assert (tmp_path / "study.html").is_file()
    with pytest.raises(ConfigError, match="a study compares with its best"):
        report([str(tmp_path), "baseline=cka"], console=terminal)


def test_a_failed_cell_is_told_and_the_others_are_compared(tmp_path, terminal):
    words = [*WORDS, "+tracker.wish=fine,die", "reference=false", "jobs=1", f"folder={tmp_path}"]
    words.remove("jobs=2")
    assert study(words, run=RUN, console=terminal) == 1
    statuses = {each["tracker.wish"]: each["status"] for each in read(tmp_path / "study.json")["runs"]}
    assert statuses == {"fine": "finished", "die": "failed"}
    assert "failed: uniform, kept 2, die, seeds 0 and 1" in told(terminal)


def test_what_is_left_out_is_told(tmp_path, terminal):
    words = [*WORDS, "unfreeze=none,norm", "reference=false", f"folder={tmp_path}"]
    assert study(words, run=RUN, console=terminal) == 0
    note = "1 combination is left out: a block that stands at several places"
    assert note in told(terminal)
    assert read(tmp_path / "study.json")["notes"][0].startswith(note)
    assert len(read(tmp_path / "study.json")["setups"]) == 3


def test_a_dry_run_tells_and_writes_nothing(tmp_path, terminal):
    folder = tmp_path / "new"
    assert study([*WORDS, f"folder={folder}", "--dry-run"], run=RUN, console=terminal) == 0
    assert not folder.exists()
    text = told(terminal)
    assert text.count("to run") >= 8
    assert "whole model, LoRA" in text
    assert "measured in" in text


@pytest.mark.parametrize(
    ("words", "told_of"),
    [
        ([], "choose from: emulator"),
        (["emulater", "kept=2"], "did you mean 'emulator'"),
        (["emulator", "selection=uniform", "kept=99"], "the middle has 8 blocks"),
        (["emulator", "selection=uniform", "kept=2", "client.lerning_rate=1"], "client.learning_rate"),
    ],
)
def test_mistakes_stop_before_anything_is_written(words, told_of, tmp_path, monkeypatch, terminal):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        study(words, run=RUN, console=terminal)
    assert told_of in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_help_is_told_and_listed(capsys):
    assert study(["emulator", "--help"]) == study(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "kept=N,0.5" in shown
    assert "block_influence" in shown
    assert "fedpeat study emulator" in USAGE
