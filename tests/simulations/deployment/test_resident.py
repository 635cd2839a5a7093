"""A client's worker comes back when it dies, and does not for ever."""

import contextlib
import subprocess
import sys
import threading

import pytest

from fedpeat.core import EngineError
from simulations.deployment import processes, resident
from simulations.deployment.processes import stay
from tests.processes import wait_for

LISTENS = """
import sys
from pathlib import Path
from simulations.deployment.local_socket import alone, listening
from simulations.deployment.tether import end_with_parent
end_with_parent()
with alone(Path(sys.argv[1])) as place, listening(place) as listener:
    while True:
        listener.accept()[0].close()
"""


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(resident, "PAUSE_SECONDS", 0.01)


@pytest.fixture
def beside():
    """Flower's program, pretended: it stays until it is ended."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


@pytest.fixture
def workers(tmp_path):
    """What starts a worker that executes some code; `workers.started` are those that were."""

    class Workers:
        def __init__(self):
            self.started = []

        def __call__(self, code):
            def start():
                command = [sys.executable, "-c", code, str(tmp_path)]
                self.started.append(subprocess.Popen(command, stdin=subprocess.PIPE))
                return self.started[-1]

            return start

    return Workers()


@pytest.fixture
def log(tmp_path):
    return tmp_path / "client.log"


def test_the_command_that_watches_over_it_has_nothing_heavy():
    """It stays in memory as long as the client does."""
    heavy = ("torch", "transformers", "peft", "flwr", "hydra", "numpy")
    code = f"""
import sys
import simulations.cli, simulations.deployment.command
print(*set({heavy}) & set(sys.modules))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


def test_a_worker_that_was_killed_is_started_anew_and_the_last_is_ended(workers, beside, tmp_path, log):
    with resident.resident(workers(LISTENS), tmp_path, beside, log=log) as listens:
        wait_for(listens)
        workers.started[0].kill()
        wait_for(lambda: len(workers.started) == 2)
        wait_for(listens)
        assert workers.started[1].poll() is None
    assert [process.poll() is None for process in workers.started] == [False, False]
    assert beside.poll() is None
    said = log.read_text()
    assert "SIGKILL" in said
    assert "started anew" in said


def test_a_worker_that_dies_again_and_again_is_given_up(workers, beside, tmp_path, log):
    code = "import sys; sys.exit(7)"
    log.write_text("ImportError: no torch\n")
    with (
        pytest.raises(EngineError, match=r"died 3 times within 60 s; exit code 7"),
        resident.resident(workers(code), tmp_path, beside, log=log) as listens,
    ):
        stay(beside, listens, lambda: pytest.fail("it is not ready"), "client ann", log)
    assert len(workers.started) == resident.DEATHS
    assert "given up" in log.read_text()


def test_deaths_now_and_then_are_no_reason(workers, beside, tmp_path, log, monkeypatch):
    monkeypatch.setattr(resident, "WITHIN_SECONDS", 0.0)
    with resident.resident(workers("pass"), tmp_path, beside, log=log):
        wait_for(lambda: len(workers.started) > resident.DEATHS + 1)
    assert beside.poll() is None
    assert all(process.poll() is not None for process in workers.started)


def test_errors_of_others_stay_what_they_are(workers, beside, tmp_path, log):
    def refused():
        raise EngineError("the server refuses", "an unknown key", "register it")

    with (
        pytest.raises(EngineError, match="unknown key"),
        resident.resident(workers(LISTENS), tmp_path, beside, log=log),
    ):
        refused()
    assert workers.started[0].poll() is not None


def test_a_client_that_is_ended_ends_its_worker(workers, beside, tmp_path, log):
    """Also in the moments in which the worker is being started."""
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        stack.enter_context(resident.resident(workers(LISTENS), tmp_path, beside, log=log))
        processes.end(beside)
    assert workers.started[0].poll() is not None
    assert threading.active_count() == before
