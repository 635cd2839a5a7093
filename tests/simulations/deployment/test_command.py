"""What the command makes of what Flower's programs say; the programs themselves run in `tests/deployment`."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest
from rich.console import Console

from fedpeat.core import ClientFailure, ConfigError, EngineError, Evaluation, RoundReport
from fedpeat.server import History
from simulations.deployment import command, operating, processes
from simulations.deployment.command import deploy
from simulations.deployment.layout import Deployment, check_names, read_deployment

SUMMARY = "summary.json"


@pytest.fixture
def deployment(tmp_path):
    plain = {"names": ["ann", "bob"], "hosts": ["example.org"], "port": 8000, "insecure": False}
    (tmp_path / "deployment.json").write_text(json.dumps(plain))
    return read_deployment(tmp_path)


@pytest.fixture
def flower(monkeypatch, deployment):
    """Flower, pretended: a run writes `summary`, says `lines`, and has `status` in the end."""

    def pretend(*, lines=(), summary=None, status="finished:completed", details=""):
        def start(given, place):
            if summary is not None:
                (place / SUMMARY).write_text(json.dumps({"status": summary}))
            code = f"print({chr(10).join(lines)!r})"
            return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

        monkeypatch.setattr(processes, "is_up", lambda _: True)
        monkeypatch.setattr(operating, "start_run", start)
        monkeypatch.setattr(operating, "run_status", lambda *_: (status, details))
        return deployment

    return pretend


STARTED = "\x1b[32mSuccessfully started run 77 in federation x\x1b[0m"


def test_a_run_that_finished_is_0_and_its_progress_is_shown(flower, capsys):
    lines = [STARTED, "\x1b[92mINFO \x1b[0m:      noise", "[0:01] round 1/2  plug-in 114 [not a style]"]
    made = flower(lines=lines, summary="finished")
    assert deploy(["run", str(made.folder)]) == 0
    shown = capsys.readouterr().out
    assert "round 1/2  plug-in 114 [not a style]" in shown
    assert "noise" not in shown
    assert json.loads((made.latest_run() / "run.json").read_text()) == {"run": "77"}


@pytest.mark.parametrize(
    ("summary", "status"),
    [
        ("failed", "finished:failed"),
        (None, "finished:failed"),
        ("finished", "finished:failed"),
        ("failed", "finished:completed"),
        (None, "finished:completed"),
        ("finished", "finished:stopped"),
    ],
)
def test_anything_else_is_an_error(flower, summary, status):
    details = "ServerApp failed with exception: too few clients"
    made = flower(lines=[STARTED], summary=summary, status=status, details=details)
    with pytest.raises(EngineError, match="the federation failed; too few clients"):
        deploy(["run", str(made.folder)])


def test_a_run_that_was_stopped_is_130(flower):
    assert deploy(["run", str(flower(lines=[STARTED], summary="interrupted").folder)]) == 130


def test_a_run_that_never_started_is_an_error(flower):
    with pytest.raises(EngineError, match="did not start"):
        deploy(["run", str(flower(lines=["the app is broken"]).folder)])


def test_a_run_needs_a_server(deployment, monkeypatch):
    monkeypatch.setattr(processes, "is_up", lambda _: False)
    with pytest.raises(EngineError, match="the server must run"):
        deploy(["run", str(deployment.folder)])
    assert deployment.latest_run() is None


def test_what_a_program_left_behind_ends_with_it():
    child = "import time; time.sleep(600)"
    code = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    with process.stdout as said:
        left = psutil.Process(int(said.readline()))
        process.wait()
        assert left.is_running()
        processes.end(process)
        gone, _ = psutil.wait_procs([left], timeout=60)
    assert gone or left.status() == psutil.STATUS_ZOMBIE


def test_a_run_that_loses_its_server_says_how_to_go_on(flower, monkeypatch):
    made, up = flower(lines=[STARTED]), iter([True, False])
    monkeypatch.setattr(processes, "is_up", lambda _: next(up))
    with pytest.raises(EngineError, match=r"lost its server; .* resume=\d{4}-"):
        deploy(["run", str(made.folder)])


@pytest.fixture
def _heeds_ctrl_c():
    """A process in a script's background starts with interruptions ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heeds_ctrl_c")
def test_ctrl_c_asks_the_run_to_end_and_a_second_one_leaves():
    asked = []
    with command._ctrl_c(lambda: asked.append(1)):
        signal.raise_signal(signal.SIGINT)
        assert asked == [1]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert asked == [1]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_stop_of_nothing_and_of_what_has_ended(flower, capsys):
    made = flower(summary="finished", lines=[STARTED])
    with pytest.raises(ConfigError, match="no run"):
        deploy(["stop", str(made.folder)])
    deploy(["run", str(made.folder)])
    assert deploy(["stop", str(made.folder)]) == 0
    assert "has ended already" in capsys.readouterr().out
    assert not (made.latest_run() / "stop").exists()


def test_stop_asks_and_waits(flower, monkeypatch, capsys):
    made = flower()
    place = made.runs / "2026-01-01-00-00-00"
    place.mkdir(parents=True)
    (place / "run.json").write_text('{"run": "77"}')
    states = iter(["running", "running", "finished:completed"])
    monkeypatch.setattr(operating, "run_status", lambda *_: (next(states), ""))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert deploy(["stop", str(made.folder)]) == 0
    assert (place / "stop").exists()
    assert next(states, None) is None


def report(number, clients=(), failures=()):
    metrics = {name: {"bytes_down": 1024.0, "bytes_up": 2048.0} for name in clients}
    return RoundReport(
        round=number,
        clients=metrics,
        failures=tuple(ClientFailure(name, number, "error", "no\x1b[31m space") for name in failures),
        evaluations={"plug_in": Evaluation(2.0, 0.5, 10)},
        bytes_down=1024 * len(clients),
        bytes_up=2048 * len(clients),
        seconds={"total": 8.25},
        metrics={},
    )


def test_status_tells_rounds_clients_bytes_and_failures(deployment, monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "is_up", lambda _: True)
    with (tmp_path / "before.txt").open("w") as file:
        deploy(["status", str(deployment.folder)], console=Console(file=file, width=100))
    assert "no run yet" in (tmp_path / "before.txt").read_text()
    place = deployment.runs / "2026-01-01-00-00-00"
    history = History(place)
    for one in (report(0), report(1, ["ann", "bob"]), report(2, ["ann"], ["bob"])):
        history.append(one)
    sent = {"rows": 79, "had": False, "bytes_down": 3 << 20}
    (place / "delivery.json").write_text(json.dumps({"ann": sent, "bob": {**sent, "had": True}}))
    (place / "run.json").write_text('{"run": "77"}')
    with (tmp_path / "after.txt").open("w") as file:
        deploy(["status", str(deployment.folder)], console=Console(file=file, width=100))
    lines = (tmp_path / "after.txt").read_text().splitlines()

    def cells(first):
        (line,) = (line for line in lines if line.startswith(f"│ {first}"))
        return [cell.strip() for cell in line.strip("│").split("│")]

    assert "example.org:8000 is up; run 2026-01-01-00-00-00: running" in lines[0]
    assert cells("ann") == ["ann", "79", "3.00 MiB", "2", "2.00 KiB", "4.00 KiB", "0"]
    assert cells("bob") == ["bob", "79", "had it", "1", "1.00 KiB", "2.00 KiB", "1"]
    assert cells("    2")[:6] == ["2", "1", "7.39", "1.00 KiB", "2.00 KiB", "8.2"]
    assert cells("    2")[6] == "bob: no\ufffd[31m space"


def test_names_are_plain_words():
    assert check_names(["eve", "ann-1", "B.2"]) == ("B.2", "ann-1", "eve")
    for names in (["a/b"], [".."], ["-a"], ["a b"], ["ü"], ["server"], ["x" * 64], [""]):
        with pytest.raises(ConfigError):
            check_names(names)


def test_last_words_are_those_of_what_went_wrong(tmp_path):
    log = tmp_path / "log"
    assert processes.last_words(log) == "it said nothing"
    log.write_text("\x1b[92mINFO \x1b[0m:      hello\nERROR: address already in use\nINFO: bye\n")
    assert processes.last_words(log) == "address already in use"
    told = (
        "ERROR :     Exit Code: 305\nFailed to connect.\n[code: 2004] no key\n\nFor more information, visit: <x>\nbye\n"
    )
    log.write_text(told)
    assert processes.last_words(log).startswith("Exit Code: 305 Failed to connect. [code: 2004] no key")


def test_a_log_that_has_grown_is_put_aside(tmp_path, monkeypatch):
    log = tmp_path / "log"
    assert processes.shorten_log(log) == 0
    log.write_text("x" * 100)
    assert processes.shorten_log(log) == 100
    monkeypatch.setattr(processes, "LOG_BYTES", 99)
    assert processes.shorten_log(log) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["log.old"]


def test_the_server_listens_everywhere_or_only_here(deployment):
    with pytest.raises(ConfigError, match="bind=10"):
        deploy(["server", str(deployment.folder), "bind=10.0.0.1"])
    with pytest.raises(ConfigError, match="did you mean 'bind'"):
        deploy(["server", str(deployment.folder), "bnd=127.0.0.1"])


def test_programs_call_out_to_nobody_and_stay_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    found = processes.environment(tmp_path)
    assert found["FLWR_TELEMETRY_ENABLED"] == "0"
    assert found["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert found["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert found["FLWR_HOME"] == str(tmp_path)


def script(tmp_path, code):
    log = tmp_path / "log"
    with log.open("ab") as output:
        return subprocess.Popen([sys.executable, "-c", code], stdout=output, stderr=output), log


def test_a_program_that_does_not_become_ready_is_told_by_its_own_words(tmp_path):
    process, log = script(tmp_path, "import sys; sys.exit('error: the port is in use')")
    with pytest.raises(EngineError, match=r"the server did not start; error: the port is in use"):
        processes.stay(process, lambda: False, lambda: None, "the server", log)


def test_a_program_that_ends_by_itself_is_an_error(tmp_path):
    process, log = script(tmp_path, "print('ready', flush=True); raise RuntimeError('gone')")
    greeted = []
    with pytest.raises(EngineError, match="the server ended; RuntimeError: gone"):
        processes.stay(process, lambda: "ready" in log.read_text(), lambda: greeted.append(1), "the server", log)
    assert greeted == [1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_program_that_somebody_ended_is_none(tmp_path, number):
    process, log = script(tmp_path, "import time; print('ready', flush=True); time.sleep(600)")
    before = signal.getsignal(number)
    assert (
        processes.stay(process, lambda: "ready" in log.read_text(), lambda: signal.raise_signal(number), "it", log) == 0
    )
    assert process.poll() is not None
    assert signal.getsignal(number) == before


def test_addresses(tmp_path):
    six = Deployment(tmp_path, ("a",), ("2001:db8::1",), 8000)
    assert six.address == "[2001:db8::1]:8000"
