"""A run's log is whole JSON lines, of bounded number, whatever happens to it or to its disk."""

import json
import math
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from fedpeat.core import ClientFailure, DevicePlan, EngineError, RoundPlan
from simulations.run_log import FAILURES_A_ROUND, LONGEST, RunLog


@pytest.fixture
def told():
    return []


@pytest.fixture
def log(tmp_path, told):
    return RunLog(tmp_path, told.append, clock=lambda: "now")


def lines(log):
    return [json.loads(line) for line in log.path.read_text().splitlines()]


def plan(number, names):
    return RoundPlan(number, 0, 100, tuple(DevicePlan(name, 10) for name in names))


SUMMARY = {"status": "finished", "rounds": 2, "rounds_planned": 2, "seconds": {"total": 9.5}, "bytes": {"down": 1}}


def test_a_line_an_event_in_their_order(log, make_reports):
    reports = make_reports(2, clients=("ann", "bob"), failures={2: [("bob", "refused", "too large")]})
    log.run_started(config="abc", rounds=2)
    log.message("preparing data")
    log.bundle_delivered("f00", 2, 4096)
    log.round_finished(reports[0])
    for report in reports[1:]:
        log.round_started(plan(report.round, ("ann", "bob")))
        log.client_done("ann", {"train_loss": 1.0})
        for failure in report.failures:
            log.client_failed(failure)
        log.round_finished(report)
    log.run_ended(SUMMARY, None)
    found = lines(log)
    assert [line["event"] for line in found] == [
        *("run started", "message", "bundle delivered", "round finished", "round started", "round finished"),
        *("round started", "update refused", "round finished", "run finished"),
    ]
    assert {line["time"] for line in found} == {"now"}
    assert [line["level"] for line in found].count("warning") == 1
    assert found[0] == {"time": "now", "level": "info", "event": "run started", "config": "abc", "rounds": 2}
    assert (found[2]["bundle"], found[2]["clients"], found[2]["bytes"]) == ("f00", 2, 4096)
    refused = {"event": "update refused", "round": 2, "client": "bob", "kind": "refused", "text": "too large"}
    assert found[7] == {"time": "now", "level": "warning", **refused}
    last, report = found[8], reports[2]
    assert (last["round"], last["clients"], last["failed"]) == (2, 2, 1)
    assert (last["bytes_down"], last["bytes_up"]) == (report.bytes_down, report.bytes_up)
    assert last["seconds"] == report.seconds["total"]
    assert last["loss"] == {name: result.loss for name, result in report.evaluations.items()}
    assert (found[9]["rounds"], found[9]["seconds"], found[9]["bytes"]) == (2, 9.5, {"down": 1})


@pytest.mark.parametrize(("status", "level"), [("finished", "info"), ("interrupted", "warning"), ("failed", "error")])
def test_how_a_run_ends_and_why(log, status, level):
    error = EngineError("too few replies", "1 of 3", "lower round.min_replies") if status == "failed" else None
    log.run_ended({**SUMMARY, "status": status}, error)
    (line,) = lines(log)
    assert (line["event"], line["level"]) == (f"run {status}", level)
    assert line.get("error") == ((status == "failed" and "EngineError") or None)
    assert line.get("remedy") == ((status == "failed" and "lower round.min_replies") or None)


def test_any_other_error_is_told_too(log):
    log.run_ended({**SUMMARY, "status": "failed"}, ValueError("odd"))
    assert (lines(log)[0]["error"], lines(log)[0]["text"]) == ("ValueError", "odd")


def test_the_time_is_utc(tmp_path, told):
    log = RunLog(tmp_path, told.append)
    log.message("x")
    assert datetime.fromisoformat(lines(log)[0]["time"]).utcoffset() == timedelta(0)


def test_ten_thousand_clients_are_few_lines(log, make_reports):
    names = [f"c{number}" for number in range(10_000)]
    for number in (1, 2):
        log.round_started(plan(number, names))
        for name in names:
            log.client_done(name, {})
            log.client_failed(ClientFailure(name, number, "error", "x" * 500))
        log.round_finished(make_reports(2, clients=names[:3])[number])
    found = lines(log)
    assert len(found) == 2 * (FAILURES_A_ROUND + 2)
    assert [line["client"] for line in found if line["event"] == "client failed"][FAILURES_A_ROUND] == "c0"
    assert log.path.stat().st_size < 2 * 100_000


def test_long_work_is_a_line_not_one_for_each_step(log):
    for text in ("distilling", "pruning", "pruning"):
        for done in range(101):
            log.working(text, done / 100)
    log.working("unknown", None)
    log.working("unknown", None)
    assert [line["text"] for line in lines(log)] == ["distilling", "pruning", "pruning", "unknown"]


def test_what_is_odd_stays_one_line_of_json(log, hostile_names):
    for name in hostile_names:
        log.client_failed(ClientFailure(name, 1, "error", name))
    log.message("a\nb\u2028c" + "x" * 10_000)
    log.run_ended({**SUMMARY, "seconds": {"total": math.nan}}, None)
    for raw in log.path.read_bytes().splitlines():
        json.loads(raw, parse_constant=pytest.fail)
    found = [json.loads(line) for line in log.path.read_bytes().split(b"\n")[:-1]]
    assert [line["client"] for line in found[:-2]] == list(hostile_names)
    assert len(found[-2]["text"]) == LONGEST
    assert found[-1]["seconds"] is None


@pytest.mark.parametrize("torn", [b'{"event": "ro', b"x" * 9000, b'{"a": 1}\n{"b"', b""])
def test_a_torn_line_goes_when_the_run_goes_on(log, tmp_path, told, torn):
    log.message("before")
    with log.path.open("ab") as file:
        file.write(torn)
    again = RunLog(tmp_path, told.append)
    again.resumed(3)
    whole = [] if b"\n" not in torn else [{"a": 1}]
    found = lines(again)
    assert (found[0]["text"], found[1:-1]) == ("before", whole)
    assert (found[-1]["event"], found[-1]["round"]) == ("run resumed", 3)
    assert told == []


def test_a_full_disk_is_told_once_and_ends_nothing(log, told, monkeypatch):
    log.message("before")
    open_file = Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def fileno(self):
            return self.file.fileno()

        def write(self, line):
            return self.file.write(line[:5])

    monkeypatch.setattr(Path, "open", lambda *given, **more: Full(open_file(*given, **more)))
    log.message("lost")
    log.message("lost too")
    monkeypatch.undo()
    log.message("after")
    assert [line["text"] for line in lines(log)] == ["before", "after"]
    (said,) = told
    assert "No space left" in said
    assert str(log.path) in said


def test_a_folder_that_is_gone_ends_nothing(tmp_path, told):
    log = RunLog(tmp_path / "gone", told.append)
    log.message("x")
    assert len(told) == 1
