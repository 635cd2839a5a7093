"""Runs whose devices are modelled: who counts, what the ledger says, and the clock."""

import subprocess
import sys

import pytest

from fedpeat.client import app as client
from fedpeat.core import ConfigError, EngineError
from fedpeat.devices import COLUMNS, read_ledger
from simulations.keeping import settings_to_resume
from simulations.run import simulate

MEASURED = {column.name for column in COLUMNS if column.name.startswith("measured")}
CHANGING = ["devices=cell", "devices.availability=0.7", "devices.dropout=0.2", "rounds=4", "seed=10"]


def plain(folder):
    """The ledger's rows without what depends on the machine."""
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in read_ledger(folder)]


def test_without_a_model_there_is_what_was_measured(run):
    ran = run()
    rows = read_ledger(ran.folder)
    assert [(row["round"], row["client"]) for row in rows] == [(n, c) for n in (1, 2) for c in ("ann", "bob", "eve")]
    for row in rows:
        metrics = ran.rounds[row["round"]]["clients"][row["client"]]
        assert row["bytes_down"] == metrics["bytes_down"] > 0
        assert row["bytes_up"] == metrics["bytes_up"] > 0
        assert row["measured_train_seconds"] == metrics["train_seconds"] > 0
        assert row["measured_peak_mib"] == metrics["peak_rss_mib"] > 0
        assert row["bundle_bytes"] == (ran.summary["bytes"]["bundle"] if row["round"] == 1 else 0)
        assert (row["status"], row["available"], row["local_steps"]) == ("counted", True, 2)
        assert row["modelled_seconds"] is row["joules"] is row["clock_after_seconds"] is row["profile"] is None
    assert "devices" not in ran.summary


def test_a_model_that_leaves_nobody_out_changes_no_bit(run):
    ran, without = run("devices=mixed"), run()
    assert ran.state == without.state
    assert [line["clients"].keys() for line in ran.rounds] == [line["clients"].keys() for line in without.rounds]


def test_the_ledger_says_what_the_reports_say(run):
    ran = run("devices=mixed")
    rows = read_ledger(ran.folder)
    for line in ran.rounds[1:]:
        own = [row for row in rows if row["round"] == line["round"]]
        assert sum(row["bytes_down"] for row in own) == line["bytes_down"]
        assert sum(row["bytes_up"] for row in own) == line["bytes_up"]
        took = max(row["modelled_seconds"] for row in own)
        assert own[0]["clock_after_seconds"] == pytest.approx(own[0]["clock_before_seconds"] + took)
        assert line["metrics"]["simulated_seconds"] == own[0]["clock_after_seconds"]
    for row in rows:
        rate = 8 * (row["bytes_down"] + row["bundle_bytes"]) / (1e6 * row["downlink_mbit"])
        assert row["modelled_down_seconds"] == pytest.approx(rate)
        assert row["modelled_up_seconds"] == pytest.approx(8 * row["bytes_up"] / (1e6 * row["uplink_mbit"]))
        assert row["modelled_memory_mib"] > 0
        assert row["joules"] > 0
    assert rows[0]["clock_before_seconds"] == 0
    assert ran.summary["devices"]["seconds"] == rows[-1]["clock_after_seconds"]
    assert ran.summary["devices"]["status"] == {"counted": 6}


def mostly_slow(first, *others):
    return [first, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


@pytest.mark.parametrize("codec", mostly_slow("top_k", "int8", "int4", "drive", "bf16"))
def test_what_is_sent_up_is_known_beforehand(codec, run):
    for row in read_ledger(run(f"codec={codec}", "devices=mixed", "rounds=1").folder):
        assert row["modelled_up_seconds"] == pytest.approx(8 * row["bytes_up"] / (1e6 * row["uplink_mbit"]))


@pytest.mark.parametrize("strategy", mostly_slow("scaffold", "fed_sa_lora", "ffa_lora", "fed_ex_lora", "het_lora"))
def test_so_it_is_whatever_a_strategy_sends(strategy, run):
    also = ["control.rank={ann: 2}"] if strategy == "het_lora" else []
    for row in read_ledger(run(f"strategy={strategy}", "devices=mixed", *also).folder):
        down = row["bytes_down"] + row["bundle_bytes"]
        assert row["modelled_down_seconds"] == pytest.approx(8 * down / (1e6 * row["downlink_mbit"]))
        assert row["modelled_up_seconds"] == pytest.approx(8 * row["bytes_up"] / (1e6 * row["uplink_mbit"]))


def test_who_is_not_there_is_not_asked_and_who_drops_out_does_not_count(run):
    ran = run(*CHANGING)
    rows = read_ledger(ran.folder)
    assert {"counted", "unavailable", "dropped"} <= {row["status"] for row in rows}
    assert len(rows) == 4 * 3
    for row in rows:
        line = ran.rounds[row["round"]]
        failed = {failure["client"]: failure["kind"] for failure in line["failures"]}
        assert (row["client"] in line["clients"]) == (row["status"] == "counted")
        assert failed.get(row["client"]) == ("dropped" if row["dropped"] else None)
        assert row["available"] == (row["status"] != "unavailable")
        assert (row["bytes_down"] > 0) == (row["status"] == "counted")
    clocks = [row["clock_after_seconds"] for row in rows]
    assert clocks == sorted(clocks)


def test_killed_and_resumed_it_is_the_same_ledger(run, settings_of, tiny, open_run, monkeypatch, tmp_path):
    whole, work, done = run(*CHANGING), client.work, []

    def mortal(*arguments, **keywords):
        done.append(1)
        if len(done) == 4:
            raise KeyboardInterrupt
        return work(*arguments, **keywords)

    monkeypatch.setattr(client, "work", mortal)
    settings = settings_of(tuple(tiny(*CHANGING)))
    assert simulate(settings, tmp_path)["status"] == "interrupted"
    assert len(plain(tmp_path)) < len(plain(whole.folder))
    monkeypatch.setattr(client, "work", work)
    simulate(settings_to_resume(tmp_path, []), tmp_path, resume=True)
    assert plain(tmp_path) == plain(whole.folder)
    assert open_run(tmp_path).state == whole.state


@pytest.mark.slow
def test_it_is_the_same_ledger_on_ray(run, tiny, open_run, tmp_path):
    ray = ("engine=ray", "engine.workers=2", "engine.memory_mib=100", f"hydra.run.dir={tmp_path / 'out'}")
    command = [sys.executable, "-m", "simulations.cli", "simulate", *tiny(*CHANGING, *ray)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert plain(tmp_path / "out") == plain(run(*CHANGING).folder)
    assert open_run(tmp_path / "out").state == run(*CHANGING).state


SLOW = [
    "devices=mixed",
    "devices.profiles.phone.uplink_mbit=0.001",
    "devices.named={ann: phone, bob: laptop, eve: tablet}",
]


def test_who_would_be_late_is_not_trained(run):
    ran = run(*SLOW, "devices.deadline_seconds=5")
    assert [list(line["clients"]) for line in ran.rounds[1:]] == [["bob", "eve"]] * 2
    assert [failure["kind"] for line in ran.rounds for failure in line["failures"]] == ["late", "late"]
    assert "devices.deadline_seconds=5" in ran.rounds[1]["failures"][0]["reason"]
    assert [line["metrics"]["simulated_seconds"] for line in ran.rounds[1:]] == [5, 10]
    late = [row for row in read_ledger(ran.folder) if row["client"] == "ann"]
    assert all(row["late"] and row["modelled_seconds"] > 5 and row["measured_seconds"] is None for row in late)


def test_if_nobody_is_in_time_the_run_ends_with_the_reason(run):
    with pytest.raises(EngineError, match=r"it would take .* devices\.deadline_seconds=1e-09"):
        run("devices=mixed", "devices.deadline_seconds=1e-9")


def test_the_slowest_are_not_waited_for_in_simulated_time(run):
    ran = run(*SLOW, "clients.per_round=2", "round.over_select=0.5")
    assert [sorted(line["clients"]) for line in ran.rounds[1:]] == [["bob", "eve"]] * 2
    assert [line["metrics"]["surplus"] for line in ran.rounds[1:]] == [1.0, 1.0]
    assert [row["status"] for row in read_ledger(ran.folder) if row["client"] == "ann"] == ["surplus"] * 2


def test_memory_may_be_enforced(run):
    small = ["devices=mixed", "devices.profiles.phone.memory_mib=0.001", "devices.named={ann: phone}"]
    shares = "devices.shares={laptop: 1}"
    assert list(run(*small, shares).rounds[1]["clients"]) == ["ann", "bob", "eve"]
    ran = run(*small, shares, "devices.enforce_memory=true", "rounds=1")
    assert list(ran.rounds[1]["clients"]) == ["bob", "eve"]
    assert ran.rounds[1]["failures"][0]["kind"] == "memory"


def test_a_trace_decides_who_is_there_and_how_fast(run, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("round,client,available,down_mbit,up_mbit\n1,ann,0,,\n2,bob,1,3.5,\n")
    ran = run("devices=mixed", f"devices.trace={trace}", anew=True)
    rows = {(row["round"], row["client"]): row for row in read_ledger(ran.folder)}
    assert rows[1, "ann"]["status"] == "unavailable"
    assert rows[2, "ann"]["bundle_bytes"] > 0 == rows[2, "bob"]["bundle_bytes"]
    assert rows[2, "bob"]["downlink_mbit"] == 3.5
    trace.write_text("round,client\n1,anne\n")
    with pytest.raises(ConfigError, match=r"'anne'; no such client; did you mean 'ann'"):
        run("devices=mixed", f"devices.trace={trace}", anew=True)


def test_a_round_that_nobody_can_be_asked_in_is_empty(run, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("round,client,available\n1,ann,0\n1,bob,0\n1,eve,0\n")
    ran = run("devices=mixed", f"devices.trace={trace}", "devices.deadline_seconds=600", anew=True)
    assert ran.rounds[1]["clients"] == {}
    assert ran.rounds[1]["metrics"]["simulated_seconds"] == 600
    assert list(ran.rounds[2]["clients"]) == ["ann", "bob", "eve"]


def test_profiles_come_from_a_file_too(run, tmp_path):
    described = "flops: 1e9\n  memory_mib: 100\n  downlink_mbit: 1\n  uplink_mbit: 1\n"
    watts = "  compute_watt: 1\n  transmit_watt: 1\n  receive_watt: 1\n"
    (tmp_path / "own.yaml").write_text(f"watch:\n  {described}{watts}")
    ran = run("devices=mixed", f"devices.file={tmp_path}/own.yaml", "devices.shares={watch: 1}", "rounds=1")
    assert {row["profile"] for row in read_ledger(ran.folder)} == {"watch"}
    (tmp_path / "own.yaml").write_text(f"watch:\n  {described}")
    with pytest.raises(ConfigError, match="'watch'; it lacks compute_watt, transmit_watt, receive_watt"):
        run("devices=mixed", f"devices.file={tmp_path}/own.yaml", anew=True)


def test_absence_does_not_go_with_differential_privacy(run):
    with pytest.raises(ConfigError, match=r"privacy=client_level does not go with devices\.dropout=0\.1"):
        run("privacy=client_level", "devices=mixed", "devices.dropout=0.1")


def test_the_whole_models_baseline_is_not_modelled(run):
    ran = run("devices=mixed", "baselines.whole_model=true", "devices.deadline_seconds=60", "rounds=1")
    assert "loss" in ran.summary["baselines"]["whole_model"]


def test_the_page_shows_simulated_time(run):
    ran = run("devices=mixed", "report=true", "rounds=1")
    page = (ran.folder / "report.html").read_text()
    assert "<h2>Simulated time</h2>" in page
    assert (ran.folder / "figures" / "simulated_time.png").exists()
    assert "<h2>Simulated time</h2>" not in (run("report=true", "rounds=1").folder / "report.html").read_text()
