import json
import math
import os
import subprocess
import sys

import pytest

from fedpeat.core import ClientFailure, Evaluation, RoundReport, StorageError
from fedpeat.server.history import FILE, History, read_history
from fedpeat.server.history import __file__ as history_file


def report(number, *, loss=3.5, client="sympy"):
    return RoundReport(
        round=number,
        clients={client: {"weight": 1.0, "train_loss": loss, "bytes_up": 4096.0}},
        failures=(ClientFailure("pandas", number, "error", 'said "no"\nand left'),),
        evaluations={"plug_in": Evaluation(loss, 0.25, 1000)},
        bytes_down=8192,
        bytes_up=4096,
        seconds={"total": 2.0, "train": 1.5},
        metrics={"update_norm": 0.5},
    )


def test_reports_come_back_equal(tmp_path):
    history = History(tmp_path / "run")
    written = [report(number) for number in range(4)]
    for one in written:
        history.append(one)
    assert read_history(tmp_path / "run") == written
    assert read_history(tmp_path / "run" / FILE) == written
    assert len(history.path.read_bytes().splitlines()) == 4


@pytest.mark.parametrize("name", ["哈姆雷特", 'a"b\\c\nd\r\x1b[31m', "\udc80 broken", "\u2028", "", "<b>&"])
def test_any_client_name_survives(tmp_path, name):
    history = History(tmp_path)
    history.append(report(0, client=name))
    history.append(report(1, client=name))
    assert [list(one.clients) for one in read_history(tmp_path)] == [[name], [name]]


def test_lines_are_strict_json_and_not_finite_numbers_are_nan_again(tmp_path):
    one = report(1, loss=math.nan)
    History(tmp_path).append(one)
    json.loads((tmp_path / FILE).read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    back = read_history(tmp_path)[0]
    assert math.isnan(back.evaluations["plug_in"].loss)
    assert math.isnan(back.clients["sympy"]["train_loss"])
    assert back.clients["sympy"]["weight"] == 1.0


@pytest.mark.parametrize("torn", [b'{"round": 2, "cli', b'{"round"', b"\0\0\0\0", b'{"round": 2}\n', b"\xff\n", b"2\n"])
def test_a_torn_last_line_is_dropped_and_the_next_run_appends_after_whole_lines(tmp_path, torn):
    history = History(tmp_path)
    history.append(report(0))
    history.append(report(1))
    with history.path.open("ab") as file:
        file.write(torn)
    assert [one.round for one in read_history(tmp_path)] == [0, 1]
    History(tmp_path).append(report(2))
    assert [one.round for one in read_history(tmp_path)] == [0, 1, 2]


def test_every_cut_of_the_file_reads_as_the_whole_lines_before_it(tmp_path):
    history = History(tmp_path)
    history.append(report(0))
    first = history.path.stat().st_size
    history.append(report(1))
    content = history.path.read_bytes()
    for cut in (*range(0, len(content), 7), first - 1, first, first + 1, len(content) - 1):
        history.path.write_bytes(content[:cut])
        assert len(read_history(tmp_path)) == (1 if cut >= first else 0)


def test_damage_inside_is_an_error_that_names_the_line(tmp_path):
    history = History(tmp_path)
    for number in range(3):
        history.append(report(number))
    lines = history.path.read_bytes().splitlines(keepends=True)
    history.path.write_bytes(lines[0] + b"{broken\n" + lines[2])
    with pytest.raises(StorageError, match="line 2 is damaged"):
        read_history(tmp_path)
    with pytest.raises(StorageError, match="line 2 is damaged"):
        History(tmp_path)


def test_a_missing_file_is_an_error_and_a_new_history_is_empty(tmp_path):
    with pytest.raises(StorageError, match="cannot read"):
        read_history(tmp_path / "nowhere")
    History(tmp_path)
    assert read_history(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot write.*hydra\.run\.dir"):
        History(tmp_path / "file" / "run")


def test_a_write_that_fails_leaves_the_lines_before_it_whole(tmp_path, monkeypatch):
    history = History(tmp_path)
    history.append(report(0))

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            history.append(report(1))
    history.append(report(1))
    assert [one.round for one in read_history(tmp_path)] == [0, 1]


def test_rewind_drops_the_later_rounds(tmp_path):
    history = History(tmp_path)
    for number in range(5):
        history.append(report(number))
    history.rewind(2)
    history.append(report(3, loss=1.0))
    assert [one.round for one in read_history(tmp_path)] == [0, 1, 2, 3]
    assert read_history(tmp_path)[-1].evaluations["plug_in"].loss == 1.0


def test_lines_survive_a_kill(tmp_path):
    script = (
        "import importlib.util, sys, time\n"
        "spec = importlib.util.spec_from_file_location('history', sys.argv[1])\n"  # without all that the room imports
        "history = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(history)\n"
        "kept = history.History(sys.argv[2])\n"
        "for number in range(3):\n"
        "    kept.append(history.RoundReport(number, {}, (), {}, 0, 0, {}, {}))\n"
        "print('written', flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, history_file, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.kill()
    assert [one.round for one in read_history(tmp_path)] == [0, 1, 2]
