"""A run that was killed, wherever, ends in the same bytes as one that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from fedpeat.client import app as client
from fedpeat.core import ConfigError, EngineError, StorageError
from simulations.keeping import settings_to_resume
from simulations.run import simulate
from simulations.settings import conf_folder

STRATEGIES = sorted(path.stem for path in (conf_folder() / "strategy").glob("*.yaml"))
NEEDS = {
    "fed_sb": ["peft=lora_sb"],
    "fl_trust": ["server.train=emulator", "data.server_share=0.2"],
    "flower": ["strategy.name=FedAvgM", "strategy.options={server_momentum:0.5}"],
    "krum": ["strategy.byzantine=0"],
    "multi_krum": ["strategy.byzantine=0"],
    "bulyan": ["strategy.byzantine=0"],
    "trimmed_mean": ["strategy.share=0.34"],
}
KINDS = ("fed_adam", "scaffold", "fed_ex_lora", "flower")
"""With state of the server, of clients, with folds, of Flower; all others take too long for every day."""
KEPT_BY_CLIENTS = {
    "optimiser's moments": ["client.optimizer_state=keep"],
    "error feedback": ["codec=top_k", "codec.share=0.2"],
    "control variates and three of five": ["strategy=scaffold"],
    "re-alignment": ["realign.every=1", "realign.steps=1", "realign.batch_size=2", "data.server_share=0.2"],
    "ranks and a sample": ["strategy=het_lora", "control.rank={ann: 2}", "clients.per_round=2"],
}


class Killed(BaseException):
    """As a SIGKILL would: nothing catches it on its way out."""


@pytest.fixture
def killed(monkeypatch, settings_of, tiny, tmp_path):
    """A run that is killed when its clients have worked `times` times, then goes on: `killed(times, *overrides)`."""

    def run(times, *overrides, before=False):
        settings, done, work = settings_of(tuple(tiny(*overrides))), [], client.work

        def mortal(*arguments, **keywords):
            done.append(1)
            if len(done) == times and before:
                raise Killed
            result = work(*arguments, **keywords)
            if len(done) == times:
                raise Killed
            return result

        monkeypatch.setattr(client, "work", mortal)
        with pytest.raises(Killed):
            simulate(settings, tmp_path)
        monkeypatch.setattr(client, "work", work)
        client.forget_models()
        return simulate(settings_to_resume(tmp_path, []), tmp_path, resume=True)

    return run


def test_there_is_one_test_a_strategy():
    assert set(NEEDS) <= set(STRATEGIES)
    assert len(STRATEGIES) >= 29


@pytest.mark.parametrize(
    "strategy", [pytest.param(name, marks=[] if name in KINDS else pytest.mark.slow) for name in STRATEGIES]
)
def test_every_strategy_goes_on_as_if_nothing_had_happened(strategy, run, killed, open_run, tmp_path):
    """Killed in the second client of round 2, which has written what it keeps: of three rounds, one is done again."""
    overrides = [f"strategy={strategy}", *NEEDS.get(strategy, []), "rounds=3"]
    summary = killed(5, *overrides)
    whole, again = run(*overrides), open_run(tmp_path)
    assert summary["resumed_after_rounds"] == [1]
    assert summary["status"] == "finished"
    assert again.state == whole.state
    assert again.losses == whole.losses
    assert [line["round"] for line in again.rounds] == [0, 1, 2, 3]


@pytest.mark.parametrize("what", KEPT_BY_CLIENTS)
@pytest.mark.parametrize("before", [pytest.param(True, marks=pytest.mark.slow), False])
def test_what_clients_keep_is_not_counted_twice(what, before, run, killed, open_run, tmp_path):
    overrides = [*KEPT_BY_CLIENTS[what], "rounds=3"]
    killed(6 if "sample" not in what else 4, *overrides, before=before)
    assert open_run(tmp_path).state == run(*overrides).state


def test_a_run_that_ended_can_be_lengthened(run, settings_of, tiny, open_run, tmp_path):
    simulate(settings_of(tuple(tiny("rounds=1"))), tmp_path)
    simulate(settings_to_resume(tmp_path, ["rounds=3"]), tmp_path, resume=True)
    assert open_run(tmp_path).state == run("rounds=3").state


def test_baselines_are_made_up_for(settings_of, tiny, run, open_run, tmp_path):
    """Killed in the baseline on the whole model, which has a folder and checkpoints of its own."""
    overrides = ("rounds=2", "baselines.whole_model=true")
    whole = run(*overrides)
    settings = settings_of(tuple(tiny(*overrides)))
    simulate(settings, tmp_path)
    for path in (tmp_path / "baselines" / "whole_model" / "checkpoint").iterdir():
        if "2" in path.name:
            path.unlink()
    summary = simulate(settings_to_resume(tmp_path, []), tmp_path, resume=True)
    assert summary["baselines"]["whole_model"] == whole.summary["baselines"]["whole_model"]


def test_another_model_or_text_is_refused(settings_of, tiny, notes, tmp_path):
    text = tmp_path / "notes.jsonl"
    text.write_bytes(notes.read_bytes())
    settings = settings_of(tuple(tiny("rounds=1", f"data.path={text}")))
    simulate(settings, tmp_path / "run")
    text.write_bytes(b"".join(text.read_bytes().splitlines(keepends=True)[1:]))
    with pytest.raises(StorageError, match=r"began with.*data"):
        simulate(settings, tmp_path / "run", resume=True)


def test_one_process_at_a_time(settings_of, tiny, tmp_path):
    from fedpeat.core import locked

    with locked(tmp_path), pytest.raises(EngineError, match="another command"):
        simulate(settings_of(tuple(tiny())), tmp_path)


def test_a_folder_with_a_run_says_how_to_go_on(settings_of, tiny, tmp_path):
    simulate(settings_of(tuple(tiny("rounds=1"))), tmp_path)
    with pytest.raises(ConfigError, match=f"resume={tmp_path}"):
        simulate(settings_of(tuple(tiny("rounds=1"))), tmp_path)


def test_the_command_line_goes_on(command, settings_of, tiny, run, open_run, tmp_path):
    folder = tmp_path / "run"
    code, _, _ = command(*tiny("rounds=1", f"hydra.run.dir={folder}"))
    assert code == 0
    code, out, err = command(f"resume={folder}", "rounds=3")
    assert code == 0, err
    assert "going on after round 1" in out + err
    assert open_run(folder).state == run("rounds=3").state
    code, _, err = command(f"resume={folder}", "strategy=fed_adam")
    assert code == 2
    assert "of a run that is resumed" in err


def start(*arguments):
    """The command line as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "simulations.cli", "simulate", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def finished_rounds(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def killed_until_done(folder, first, again, kills):
    """Kill the process group `kills` times, each a while after two further rounds were done; then let it end."""
    for number in range(kills):
        process = start(*(again if number else first))
        goal = finished_rounds(folder) + 2
        while finished_rounds(folder) < goal:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.002)
        time.sleep((0.0, 0.013, 0.037, 0.002)[number % 4])
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start(*again).wait() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "strategy"),
    [
        ("serial", "fed_avg"),
        ("serial", "fed_adam"),
        ("serial", "scaffold"),
        ("ray", "fed_avg"),
        ("ray", "fed_adam"),
        ("ray", "scaffold"),
    ],
)
def test_killed_at_random_points(engine, strategy, tiny, run, open_run, tmp_path):
    folder = tmp_path / "run"
    engines = [f"engine={engine}", *(["engine.workers=2"] if engine == "ray" else [])]
    overrides, kills = (f"strategy={strategy}", "rounds=6", "evaluate_every=3"), 1 if engine == "ray" else 2
    first = tiny(*overrides, *engines, f"hydra.run.dir={folder}")
    killed_until_done(folder, first, [f"resume={folder}"], kills=kills)
    found = open_run(folder)
    assert found.state == run(*overrides).state
    assert len(found.summary["resumed_after_rounds"]) == kills
    assert yaml.safe_load((folder / "config.yaml").read_text())["engine"]["_target_"].endswith(engine)


def test_a_full_disk_ends_a_run_that_can_go_on(settings_of, tiny, run, open_run, monkeypatch, tmp_path):
    from safetensors import torch as storage

    settings, save = settings_of(tuple(tiny("rounds=3"))), storage.save_file

    def full(tensors, path, **keywords):
        if "round-000002" in str(path):
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save(tensors, path, **keywords)

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(StorageError, match="the disk is full"):
        simulate(settings, tmp_path)
    assert open_run(tmp_path).summary["status"] == "failed"
    monkeypatch.setattr(storage, "save_file", save)
    simulate(settings_to_resume(tmp_path, []), tmp_path, resume=True)
    assert open_run(tmp_path).state == run("rounds=3").state
    assert [line["round"] for line in open_run(tmp_path).rounds] == [0, 1, 2, 3]


def test_a_client_whose_disk_was_emptied_is_named(run, tiny, settings_of, tmp_path):
    settings = settings_of(tuple(tiny("strategy=scaffold", "rounds=2")))
    simulate(settings, tmp_path)
    shutil.rmtree(tmp_path / "clients")
    simulate(settings_to_resume(tmp_path, ["rounds=3"]), tmp_path, resume=True)
    *_, last = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert {name: metrics["state_lost"] for name, metrics in last["clients"].items()} == dict.fromkeys(
        ("ann", "bob", "eve"), 1.0
    )
    assert "state_lost" not in run("strategy=scaffold", "rounds=2").rounds[-1]["clients"]["ann"]


def test_more_may_be_asked_than_are_waited_for(run):
    """One after the other, the first in the order of the draw are the fastest; who was not waited for failed nobody."""
    ran = run("clients.per_round=1", "round.over_select=1.5", "rounds=4")
    assert [len(line["clients"]) for line in ran.rounds[1:]] == [1] * 4
    assert [line["metrics"]["surplus"] for line in ran.rounds[1:]] == [2.0] * 4
    assert [line["failures"] for line in ran.rounds] == [[]] * 5
    assert len({name for line in ran.rounds for name in line["clients"]}) > 1
