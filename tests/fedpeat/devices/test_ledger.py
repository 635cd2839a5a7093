import math

import pytest

from fedpeat.core import Evaluation, RoundReport, StorageError
from fedpeat.devices import COLUMNS, ledger_rows, milestones, read_ledger, totals, write_ledger


def report(number, *, devices=None, clients=None, clock=None, perplexity=None, seconds=2.0):
    evaluations = {} if perplexity is None else {"plug_in": Evaluation(math.log(perplexity), 0.1, 9)}
    metrics = {} if clock is None else {"simulated_seconds": clock}
    return RoundReport(number, clients or {}, (), evaluations, 0, 0, {"total": seconds}, metrics, devices or {})


ANN = {"train_seconds": 0.5, "client_seconds": 0.75, "peak_rss_mib": 300.0, "bytes_up": 12.0}
REPORTS = [
    report(0),
    report(
        1,
        devices={
            "bob": {"status": "late", "emulator": "default", "local_steps": 3, "bytes_down": 0, "joules": 2.0},
            "ann": {"status": "counted", "holds": True, "bytes_down": 40, "bundle_bytes": 99, "joules": 1.5},
        },
        clients={"ann": ANN, "server": {"bytes_up": 0.0}},
        clock=60.0,
    ),
    report(2, devices={"ann": {"status": "unavailable"}}, clock=75.0),
]


def test_a_row_for_each_client_and_round():
    ann, bob, absent = ledger_rows(REPORTS)
    assert set(ann) == {column.name for column in COLUMNS}
    assert [(row["round"], row["client"]) for row in (ann, bob, absent)] == [(1, "ann"), (1, "bob"), (2, "ann")]
    assert [row["status"] for row in (ann, bob, absent)] == ["counted", "late", "unavailable"]
    assert [(row["available"], row["late"], row["dropped"]) for row in (ann, bob, absent)] == [
        (True, False, False),
        (True, True, False),
        (False, False, False),
    ]
    assert (ann["bytes_down"], ann["bytes_up"], ann["bundle_bytes"]) == (40, 12, 99)
    assert (bob["bytes_down"], bob["bytes_up"], bob["bundle_bytes"]) == (0, 0, 0)
    assert (ann["measured_train_seconds"], ann["measured_seconds"], ann["measured_peak_mib"]) == (0.5, 0.75, 300)
    assert bob["measured_seconds"] is ann["measured_gpu_mib"] is absent["joules"] is None
    assert [(row["clock_before_seconds"], row["clock_after_seconds"]) for row in (ann, bob, absent)] == [
        (0, 60),
        (0, 60),
        (60, 75),
    ]


def test_a_ledger_comes_back_as_it_was_written(tmp_path):
    path = write_ledger(tmp_path, REPORTS)
    assert path == tmp_path / "ledger.parquet"
    assert read_ledger(path) == read_ledger(tmp_path) == list(ledger_rows(REPORTS))
    first = path.read_bytes()
    write_ledger(tmp_path, REPORTS)
    assert path.read_bytes() == first
    write_ledger(tmp_path, REPORTS[:2])
    assert len(read_ledger(tmp_path)) == 2


def test_without_rows_there_is_no_ledger(tmp_path):
    assert write_ledger(tmp_path, REPORTS[:1]) is None
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match="ledger"):
        read_ledger(tmp_path)
    (tmp_path / "ledger.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(StorageError, match="ledger"):
        read_ledger(tmp_path)


def test_milestones_by_hand():
    # In loss, from log 16 to log 1: half of the way is perplexity 4, four fifths 1.74.
    seen = [(0, 16.0), (1, 8.0), (2, 3.9), (3, 1.0), (4, 2.0)]
    reports = [report(number, perplexity=value, clock=100.0 * number) for number, value in seen]
    half, most, all_of_it = milestones(reports, (0.5, 0.8, 1.0))
    assert (half.round, half.simulated_seconds, half.seconds) == (2, 200, 6)
    assert half.perplexity == pytest.approx(3.9)
    assert (most.round, all_of_it.round, all_of_it.simulated_seconds) == (3, 3, 300)
    assert milestones([report(1, perplexity=4.0), report(2, perplexity=2.0)])[0].simulated_seconds is None


def test_what_never_got_better_has_no_milestones():
    assert milestones([]) == []
    assert milestones([report(0, perplexity=4.0), report(1, perplexity=5.0), report(2)]) == []


def test_totals_by_hand():
    assert totals(REPORTS) == {
        "seconds": 75.0,
        "joules": 3.5,
        "bundle_bytes": 99,
        "status": {"counted": 1, "late": 1, "unavailable": 1},
    }
