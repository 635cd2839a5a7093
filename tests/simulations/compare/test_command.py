import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from fedpeat.core import ConfigError, EngineError, StorageError, locked
from simulations.compare.again import report
from simulations.compare.command import compare, default_jobs, prepared
from simulations.compare.watch import Watch
from simulations.compare.workers import Outcome, Task

RUN = "tests.simulations.compare.fakes:run"
GRID = ("peft.rank=4,8", "seeds=2", "rounds=2", "client.device=cpu")


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    """Figures have their own tests; drawing them takes most of a comparison's time here."""
    monkeypatch.setattr("simulations.compare.figures.draw", lambda _: {})


def told(terminal):
    return terminal.file.getvalue()


def read(path):
    return json.loads(path.read_text())


def test_a_grid_is_run_and_compared(tmp_path, terminal):
    assert compare([*GRID, f"folder={tmp_path}"], run=RUN, console=terminal) == 0
    plain = read(tmp_path / "comparison.json")
    assert [each["values"] for each in plain["variants"]] == [{"peft.rank": "8"}, {"peft.rank": "4"}]
    assert plain["variants"][0]["verdict"] == "better"
    assert plain["variants"][0]["rounds_to_target"] == 2
    assert plain["baseline"] == "4"
    assert {path.name.rsplit("-", 1)[0] for path in (tmp_path / "cells").iterdir()} == {
        *("rank_4-seed0", "rank_4-seed1", "rank_8-seed0", "rank_8-seed1"),
    }
    text = told(terminal)
    assert "2 variants x 2 seeds" in text
    assert "4/4" in text
    assert "rank 8, seed 1: perplexity" in text
    assert "rank 8 is best" in text
    assert str(tmp_path / "comparison.html") in text


def test_what_is_finished_is_not_run_again(tmp_path, terminal):
    compare([*GRID, f"folder={tmp_path}"], run=RUN, console=terminal)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/summary.json")}
    broken = sorted(times)[0]
    broken.write_text("torn")
    words = ["peft.rank=4,8,16", *GRID[1:], f"folder={tmp_path}"]
    assert compare(words, run=RUN, console=terminal) == 0
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/summary.json")}
    assert len(after) == 6
    assert {path for path in times if after[path] != times[path]} == {broken}
    assert "3 finished before" in told(terminal)
    assert len(read(tmp_path / "comparison.json")["variants"]) == 3


def test_cells_of_a_smaller_grid_are_found_again(tmp_path, terminal):
    compare(["peft.rank=4", *GRID[1:], f"folder={tmp_path}"], run=RUN, console=terminal)
    assert compare([*GRID, f"folder={tmp_path}"], run=RUN, console=terminal) == 0
    assert len(list(tmp_path.glob("cells/*"))) == 4
    assert "2 finished before" in told(terminal)
    assert [each["seeds"] for each in read(tmp_path / "comparison.json")["variants"]] == [[0, 1], [0, 1]]


def test_engines_are_compared_by_runs_of_their_own(tmp_path):
    words = ["engine=serial,ray", "seeds=1", f"folder={tmp_path}"]
    tasks = prepared(words).todo
    assert len({task.hash for task in tasks}) == 1
    assert len({task.folder for task in tasks}) == 2


def test_other_settings_are_other_cells(tmp_path, terminal):
    for rounds in (2, 3):
        compare(["peft.rank=4", "seeds=1", f"rounds={rounds}", f"folder={tmp_path}"], run=RUN, console=terminal)
    assert len(list(tmp_path.glob("cells/*"))) == 2
    assert len(read(tmp_path / "comparison.json")["runs"]) == 1


def test_a_failed_cell_is_told_and_the_others_are_compared(tmp_path, terminal):
    words = ["+tracker.wish=fine,die", "seeds=1", "peft.rank=4", f"folder={tmp_path}", "jobs=1"]
    assert compare(words, run=RUN, console=terminal) == 1
    plain = read(tmp_path / "comparison.json")
    assert [each["status"] for each in plain["runs"]] == ["finished", "failed"]
    assert "exit code 7" in plain["runs"][1]["reason"]
    assert "failed: die, seed 0: the worker process ended" in told(terminal)
    assert compare(words, run="tests.simulations.compare.fakes:finish_anyhow", console=terminal) == 0


def test_mistakes_stop_before_anything_is_written(tmp_path, terminal):
    folder = tmp_path / "new"
    with pytest.raises(ConfigError):
        compare(["peft.rank=4,8", "client.lerning_rate=1", f"folder={folder}"], run=RUN, console=terminal)
    assert not folder.exists()


def test_help_is_told(capsys):
    assert compare(["--help"]) == report(["-h"]) == 0
    shown = capsys.readouterr().out
    assert "seeds=3" in shown
    assert "fedpeat report FOLDER" in shown


def test_a_dry_run_measures_a_few_steps_and_writes_nothing(tmp_path, terminal):
    folder = tmp_path / "new"
    assert compare([*GRID, f"folder={folder}", "--dry-run"], run=RUN, console=terminal) == 0
    assert not folder.exists()
    text = told(terminal)
    assert text.count("to run") >= 4
    assert "measured in" in text
    # Two clients a round, 2 rounds, 4000 bytes a visit down and as many up.
    assert "31.2 KiB" in text
    assert "all 4 cells to run" in text


def test_a_dry_run_knows_finished_cells(tmp_path, terminal):
    compare(["peft.rank=4", *GRID[1:], f"folder={tmp_path}"], run=RUN, console=terminal)
    assert compare([*GRID, f"folder={tmp_path}", "--dry-run"], run="no.such:run", console=terminal) == 0
    text = told(terminal)
    assert "from the 2 cells that are finished in this folder" in text
    assert "~ 5.00 s" in text


def test_a_dry_run_that_cannot_measure_says_so(tmp_path, terminal):
    words = [*GRID, "+tracker.wish=bug", f"folder={tmp_path / 'new'}", "--dry-run"]
    assert compare(words, run=RUN, console=terminal) == 0
    assert "no estimate" in told(terminal)


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, wherever tests run
from simulations.compare.command import compare
sys.exit(compare(sys.argv[2:], run=sys.argv[1]))
"""


def start(tmp_path, *words):
    command = [sys.executable, "-c", SCRIPT, RUN, *words, "peft.rank=4", "seeds=1", f"folder={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("cells/*/begun")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_ctrl_c_writes_what_there_is_and_the_next_command_goes_on(tmp_path, terminal):
    words = ["+tracker.wish=fine,slow", "jobs=1"]
    process = start(tmp_path, *words)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "1 of 2 runs finished, 1 interrupted" in output
    assert "Traceback" not in output
    assert [each["status"] for each in read(tmp_path / "comparison.json")["runs"]] == ["finished", "interrupted"]
    # The next one, with a cell that is not slow any more.
    again = [*words, "peft.rank=4", "seeds=1", f"folder={tmp_path}"]
    assert compare(again, run="tests.simulations.compare.fakes:finish_anyhow", console=terminal) == 0
    assert "1 finished before" in told(terminal)


@pytest.mark.slow
def test_no_orphan_outlives_a_killed_command(tmp_path, terminal):
    words = ["+tracker.wish=slow", "jobs=1"]
    process = start(tmp_path, *words)
    process.kill()
    process.communicate()
    # The lock is free once the orphan has ended.
    again = [*words, "peft.rank=4", "seeds=1", f"folder={tmp_path}"]
    assert compare(again, run="tests.simulations.compare.fakes:finish_anyhow", console=terminal) == 0


def test_two_comparisons_cannot_share_a_folder(tmp_path):
    with locked(tmp_path), pytest.raises(EngineError, match="another command"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError), locked(tmp_path / "file"):
        pass


def cell(engine="serial", device="cpu"):
    settings = {"engine": {"_target_": f"simulations.engines.{engine}"}, "client": {"device": device}}
    return Task("x", settings, None, "")


def test_jobs_follow_cores_and_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert default_jobs([cell()], 1) == 8
    assert default_jobs([cell()], 3) == 2
    assert default_jobs([cell()], 99) == 1
    assert default_jobs([cell(), cell("ray")], 1) == 1


def test_a_gpu_is_not_shared_unasked(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert default_jobs([cell(device="auto")], 1) == 1
    assert default_jobs([cell(device="cpu")], 1) == 8


def test_threads_are_the_most_that_a_cell_uses(tmp_path):
    words = ["client.threads=1,2", "evaluation.threads=3", "seeds=1", f"folder={tmp_path}"]
    work = prepared(words)
    assert work.threads == 3
    assert prepared([*words, "jobs=7"]).jobs == 2  # no more than there are cells


def test_report_writes_a_comparison_anew(tmp_path, terminal):
    compare([*GRID, f"folder={tmp_path}"], run=RUN, console=terminal)
    (tmp_path / "comparison.html").unlink()
    assert report([str(tmp_path), "baseline=8", "metric=loss", "target=3.9"], console=terminal) == 0
    plain = read(tmp_path / "comparison.json")
    assert (plain["baseline"], plain["metric"], plain["target"]) == ("8", "loss", 3.9)
    assert (tmp_path / "comparison.html").is_file()
    assert plain["variants"][1]["verdict"] == "worse"


def test_report_finds_what_varies_below_a_folder(write_run, tmp_path, terminal):
    for at, (rank, seed) in enumerate([(4, 0), (8, 0), (4, 1), (8, 1), (8, 1)]):
        settings = {"peft": {"kind": "lora", "rank": rank}, "seed": seed, "rounds": 2}
        write_run(tmp_path / str(at), settings, losses=[3.6, 3.5 - rank / 50 + seed / 100])
    os.utime(tmp_path / "3" / "summary.json", (1, 1))
    assert report([str(tmp_path)], console=terminal) == 0
    plain = read(tmp_path / "comparison.json")
    assert plain["keys"] == ["peft.rank"]
    assert plain["baseline"] == "8"  # the config's own, though that of the first run is 4
    assert [each["seeds"] for each in plain["variants"]] == [[0, 1], [0, 1]]
    assert {each["folder"] for each in plain["runs"]} == {"0", "1", "2", "4"}
    assert "1 runs are left out" in plain["notes"][0]


def test_report_of_one_run_is_its_page(write_run, tmp_path, terminal):
    folder = write_run(tmp_path / "one", {"seed": 0, "rounds": 2})
    assert report([str(tmp_path)], console=terminal) == 0
    assert (folder / "report.html").is_file()
    (folder / "summary.json").unlink()
    (folder / "report.html").unlink()
    assert report([str(folder)], console=terminal) == 0
    assert "interrupted" in (folder / "report.html").read_text()
    assert not (tmp_path / "comparison.html").exists()


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ([], ConfigError, "none is given"),
        (["a", "b"], ConfigError, "2 folders"),
        (["."], StorageError, "holds no run"),
        (["nowhere"], StorageError, "no such folder"),
        ([".", "basline=3"], ConfigError, "did you mean 'baseline'"),
        ([".", "metric=los"], ConfigError, "did you mean 'loss'"),
        ([".", "--dry"], ConfigError, "no flag|not for"),
    ],
)
def test_mistakes_in_report_are_told(words, error, message, tmp_path, monkeypatch, terminal):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        report(words, console=terminal)


def test_a_baseline_that_is_not_there_is_told(write_run, tmp_path, terminal):
    for rank in (4, 8):
        write_run(tmp_path / str(rank), {"peft": {"rank": rank}, "seed": 0})
    with pytest.raises(ConfigError, match="choose from: 4, 8"):
        report([str(tmp_path), "baseline=5"], console=terminal)


def test_a_damaged_plan_is_told(tmp_path, terminal):
    (tmp_path / "plan.json").write_text('{"cells": [{}]}')
    with pytest.raises(StorageError, match=r"plan\.json"):
        report([str(tmp_path)], console=terminal)


def test_the_bar_moves_with_the_rounds_of_running_cells(tmp_path):
    tasks = [Task(name, {"rounds": 3}, tmp_path / name, "") for name in "ab"]
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    with Watch(tasks, labels={"a": "[b]x", "b": "y"}, metric="loss", console=console) as watch:
        tasks[0].folder.mkdir()
        (tasks[0].folder / "metrics.jsonl").write_text("{}\n{}\n")
        watch.tick(tasks)
        assert watch.bar.tasks[0].completed == 2
        watch.ended_with(Outcome(tasks[0], "failed", "no such [rank]"))
        assert watch.bar.tasks[0].completed == 4
        assert watch.bar.tasks[0].total == 8
    assert "1/2 [b]x: failed; no such [rank]" in told(console)
    assert "1/2, 1 failed" in told(console)
