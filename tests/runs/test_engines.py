"""Engines change who computes, never what: and however their processes end, a run ends in order.

Ray keeps state in a process and finds clusters through files: every run here is a process of its own, with a folder
for Ray's files of its own, so that it neither sees nor disturbs another cluster on this machine.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from simulations.keeping import settings_to_resume
from simulations.run import simulate
from tests.processes import PATIENCE, end, free_port, listens, wait_for

pytestmark = pytest.mark.slow

RAY = ("engine=ray", "engine.memory_mib=100")
# A shell starts what it puts in the background with Ctrl-C ignored, and what the tests start would inherit that.
FEDPEAT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from simulations.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def ray_folder():
    """Short: Ray's sockets are in it, and the name of a socket has at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def start(tiny, tmp_path_factory, ray_folder):
    """Start a run: `start(*overrides)` gives its process and folder. What is left of it ends with the test."""

    @contextlib.contextmanager
    def begin(*overrides):
        folder = tmp_path_factory.mktemp("engine") / "out"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        command = [sys.executable, "-c", FEDPEAT, "simulate", *tiny(*overrides), f"hydra.run.dir={folder}"]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder.parent,
            env={**environment, "RAY_TMPDIR": str(ray_folder)},
            start_new_session=True,
        )
        try:
            yield process, folder
        finally:
            end(process)

    return begin


@pytest.fixture(scope="module")
def launch(start, open_run):
    """A whole run in a process of its own."""

    def wait(*overrides):
        with start(*overrides) as (process, folder):
            out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, out + err
        return open_run(folder)

    return wait


CHOSEN = ("peft.dropout=0.1", "control.kept_blocks={bob: 1}", "control.local_steps={eve: 4}", "clients.per_round=2")
CHOSEN += ("rounds=3", "server.train=full", "data.server_share=0.5", "client.optimizer_state=keep")


@pytest.fixture(scope="module")
def serial(launch):
    return launch(*CHOSEN, "engine=serial")


def outcome(ran):
    lines = [
        {name: line[name] for name in ("round", "evaluations", "bytes_down", "bytes_up", "failures")}
        | {"losses": {name: metrics["train_loss"] for name, metrics in line["clients"].items()}}
        for line in ran.rounds
    ]
    return ran.digest, lines


def processes(ran):
    return {metrics["process"] for line in ran.rounds for metrics in line["clients"].values() if "process" in metrics}


def test_a_process_of_its_own_computes_what_this_one_does(serial, run):
    assert outcome(run(*CHOSEN)) == outcome(serial)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_compute_what_one_process_does(workers, serial, launch):
    ran = launch(*CHOSEN, *RAY, f"engine.workers={workers}")
    assert outcome(ran) == outcome(serial)
    assert ran.summary["config_hash"] == serial.summary["config_hash"]
    assert 1 <= len(processes(ran)) <= workers
    assert not processes(ran) & processes(serial)


def test_workers_are_sent_what_re_alignment_changes(launch):
    chosen = ("rounds=3", "data.server_share=0.3", "realign.every=1", "realign.steps=4", "client.learning_rate=0.01")
    serial, ray = launch(*chosen, "engine=serial"), launch(*chosen, *RAY, "engine.workers=2")
    assert any(name.endswith("realign_B") for name in serial.tensors)
    assert outcome(ray) == outcome(serial)


@contextlib.contextmanager
def node(told, *words):
    """A Ray node that somebody started by hand, with one CPU."""
    command = [Path(sys.executable).parent / "ray", "start", "--block", "--num-cpus=1", *words]
    command += ["--object-store-memory=100000000", "--disable-usage-stats"]
    with told.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_for(lambda: "Ray runtime started" in told.read_text(), what=told.read_text, process=process)
        yield
    finally:
        end(process)


@pytest.fixture
def cluster():
    """A Ray cluster of two nodes, as if on two machines: its address."""
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        told = Path(folder) / "told"
        head = ["--head", f"--port={address.rpartition(':')[2]}", "--node-ip-address=127.0.0.1"]
        head += ["--include-dashboard=false", f"--temp-dir={folder}"]
        with (
            node(told.with_suffix(".head"), *head),
            node(told.with_suffix(".second"), f"--address={address}", "--node-ip-address=127.0.0.2"),
        ):
            yield address


def test_two_machines_compute_what_one_process_does(cluster, serial, launch):
    """Each node has one CPU, and a worker takes one: so two workers are on both nodes."""
    ran = launch(*CHOSEN, "engine=ray", "engine.workers=2", f"engine.address={cluster}")
    assert outcome(ran) == outcome(serial)
    assert len(processes(ran)) == 2
    assert listens(int(cluster.rpartition(":")[2])), "a run must leave the cluster as it found it"


def test_no_cluster_at_an_address_is_told(start):
    address = f"127.0.0.1:{free_port()}"
    with start(*RAY, f"engine.address={address}") as (process, _):
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert address in err
    assert "engine.address" in err
    assert "Traceback" not in err


def test_what_another_cluster_left_behind_does_not_matter(serial, launch, ray_folder):
    """`ray start` writes down where its cluster is; a killed one leaves the note, and nobody answers there."""
    note = ray_folder / "ray" / "ray_current_cluster"
    note.parent.mkdir(exist_ok=True)
    note.write_text("127.0.0.1:1")
    try:
        assert outcome(launch(*CHOSEN, *RAY, "engine.workers=1")) == outcome(serial)
    finally:
        note.unlink(missing_ok=True)


LONG = ("rounds=500", "evaluate_every=500", "client.local_steps=5")


def rounds_in(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_a_worker_that_is_killed_ends_the_run_with_advice_and_it_goes_on(start, open_run, run):
    with start(*LONG, *RAY, "engine.workers=1") as (process, folder):
        wait_for(lambda: rounds_in(folder) > 2 or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        (worker,) = {int(metrics["process"]) for metrics in open_history(folder)[1]["clients"].values()}
        os.kill(worker, signal.SIGKILL)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, out + err
    assert "worker process died" in err
    assert "Traceback" not in err
    ran = open_run(folder)
    assert ran.summary["status"] == "failed"
    done = ran.summary["rounds"]
    assert 1 < done < 500
    simulate(settings_to_resume(folder, ["engine=serial", f"rounds={done + 2}"]), folder, resume=True)
    assert open_run(folder).state == run(*LONG[1:], f"rounds={done + 2}").state


def open_history(folder):
    from fedpeat.server import read_history

    return [report.to_json() for report in read_history(folder)]


@pytest.mark.parametrize("engine", [("engine=serial",), (*RAY, "engine.workers=1")], ids=["serial", "ray"])
def test_ctrl_c_ends_a_run_in_order(engine, start, open_run):
    with start(*LONG, *engine, "report=true") as (process, folder):
        wait_for(lambda: rounds_in(folder) > 1 or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, out + err
    assert "Traceback" not in err
    ran = open_run(folder)
    assert ran.summary["status"] == "interrupted"
    assert 0 < ran.summary["rounds"] == ran.rounds[-1]["round"] < 500
    assert set(ran.tensors)
    assert (folder / "report.html").exists()
