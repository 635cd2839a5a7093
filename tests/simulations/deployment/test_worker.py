"""A resident worker: nothing that comes or goes wrong keeps it from the next message, and it outlives nobody."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simulations.deployment import frames, worker
from simulations.deployment.local_socket import alone, connect, listening
from simulations.deployment.worker import run_by_run, serve
from tests.messages import asked, content, context
from tests.processes import wait_for


def echo(message, _):
    return Message(message.content, reply_to=message)


@pytest.fixture
def working(tmp_path):
    """Have a worker answer in a thread: `working(answer)`."""
    with contextlib.ExitStack() as stack:

        def start(answer=echo):
            listener = stack.enter_context(listening(stack.enter_context(alone(tmp_path))))
            thread = threading.Thread(target=serve, args=(listener, answer))
            thread.start()
            stack.callback(thread.join)
            stack.callback(listener.shutdown, 2)

        yield start


def served(folder):
    """Whether a message is answered."""
    with connect(folder, 10) as there:
        frames.send_request(there, asked(content({"a": b"abc"})), context())
        return frames.receive_reply(there).content["arrays"]["a"].data == b"abc"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.lists(st.binary(max_size=100), max_size=5))
def test_garbage_does_not_keep_it_from_the_next(tmp_path_factory, garbage):
    folder = tmp_path_factory.mktemp("site")
    with alone(folder) as place, listening(place) as listener:
        thread = threading.Thread(target=serve, args=(listener, echo))
        thread.start()
        try:
            for data in garbage:
                with connect(folder, 10) as there, contextlib.suppress(OSError):
                    there.sendall(data)
            assert served(folder)
        finally:
            listener.shutdown(2)
            thread.join()


def test_one_that_says_nothing_is_dropped(working, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 0.1)
    working()
    with connect(tmp_path, 0):
        assert served(tmp_path)
    assert "no message" in caplog.text


def test_one_that_does_not_wait_for_its_reply_is_no_matter(working, tmp_path, caplog):
    """Its process was ended by Flower while the worker trained."""
    began, gone = threading.Event(), threading.Event()

    def answer(message, its):
        if not gone.is_set():
            began.set()
            gone.wait(60)
        return Message(content({"a": message.content["arrays"]["a"].data}), reply_to=message)

    working(answer)
    with connect(tmp_path, 0) as there:
        frames.send_request(there, asked(content({"a": bytes(10**7)})), context())
        assert began.wait(60)
    gone.set()
    assert served(tmp_path)
    assert "nobody waits" in caplog.text


def test_what_a_handler_raises_is_answered_without_its_words(working, tmp_path, caplog):
    def answer(message, _):
        raise RuntimeError(f"cannot read {tmp_path}")

    working(answer)
    with connect(tmp_path, 0) as there:
        frames.send_request(there, asked(), context())
        reply = frames.receive_reply(there)
    assert "RuntimeError" in reply.error.reason
    assert str(tmp_path) not in reply.error.reason
    assert "cannot read" in caplog.text


def test_a_reply_that_cannot_be_sent_is_told(working, tmp_path):
    def answer(message, _):
        vast = ArrayRecord({"a": Array("uint8", (2**40,), "raw", b"")})
        return Message(RecordDict({"arrays": vast}), reply_to=message)

    working(answer)
    with connect(tmp_path, 0) as there:
        frames.send_request(there, asked(), context())
        assert "cannot be sent" in frames.receive_reply(there).error.reason


def test_what_is_kept_of_a_run_is_forgotten_when_another_begins():
    forgotten = []
    answer = run_by_run(echo, lambda: forgotten.append(1))
    counts = []
    for run in (1, 1, 2, 2, 1):
        answer(asked(), context(run=run))
        counts.append(len(forgotten))
    assert counts == [1, 1, 2, 2, 3]


@pytest.fixture
def light(tmp_path):
    """Start the program with a light client in the real one's place: `light()` gives the process."""
    code = f"""
import sys, types
client = types.ModuleType("fedpeat.client.app")
client.app, client.forget_models = None, lambda: None
package = types.ModuleType("fedpeat.client")
package.app = client
sys.modules |= {{"fedpeat.client": package, "fedpeat.client.app": client}}
sys.argv = ["worker", {str(tmp_path)!r}]
from simulations.deployment.worker import main
main()
"""
    started = []

    def start():
        started.append(
            subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield start
    for process in started:
        with process:  # its pipes are closed, and it is waited for
            process.kill()


def up(folder, process):
    wait_for((folder / "worker" / "socket").exists, process=process)


def test_it_ends_when_its_parent_does_or_is_told_to(light, tmp_path):
    process = light()
    up(tmp_path, process)
    process.stdin.close()
    assert process.wait(60) == -signal.SIGTERM
    process = light()
    connect(tmp_path, 60).close()
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM


def test_it_ends_when_its_parent_is_killed():
    """By SIGKILL, which the parent cannot hand on."""
    code = """
import subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-c", "from simulations.deployment.tether import *; end_with_parent(); threading.Event().wait()"],
    stdin=subprocess.PIPE,
)
print(child.pid, flush=True)
child.wait()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.kill()
    wait_for(lambda: not alive(child))


def alive(process):
    """Whether a process runs; one that ended and that nobody has asked after does not."""
    with contextlib.suppress(OSError), Path(f"/proc/{process}/stat").open() as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_second_one_says_why_it_ends(light, tmp_path):
    first = light()
    up(tmp_path, first)
    second = light()
    assert second.wait(60) == 1
    assert "another worker serves" in second.stderr.read()
    assert first.poll() is None
