"""What Flower's process for a message does: hand it on, and answer in any case."""

import contextlib
import subprocess
import sys
import threading
import time

import pytest
from flwr.app import Message

from simulations.deployment import frames, names, relay
from simulations.deployment.local_socket import PLACE, alone, listening
from simulations.deployment.worker import serve
from tests.messages import all_of, asked, content, context


@contextlib.contextmanager
def working(folder, answer):
    """A worker in a thread."""
    with alone(folder) as place, listening(place) as listener:
        thread = threading.Thread(target=serve, args=(listener, answer))
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(2)
            thread.join()


@contextlib.contextmanager
def that_does(folder, deed):
    """Something in a worker's place that takes a connection, and does one deed with it."""
    with alone(folder) as place, listening(place) as listener:

        def take():
            there, _ = listener.accept()
            with there:
                deed(there)

        thread = threading.Thread(target=take)
        thread.start()
        yield
        thread.join()


def echo(message, _):
    return Message(message.content, reply_to=message)


@pytest.fixture
def ask(tmp_path):
    """Hand a message to the client of a folder, as Flower does."""
    return lambda message: relay.app(message, context(site=str(tmp_path / "site.json")))


def reason(reply):
    assert reply.has_error()
    assert reply.error.code == names.REFUSED
    assert reply.metadata.reply_to_message_id == "an id"
    return reply.error.reason


def test_nothing_heavy_is_imported():
    """Flower pays for it with each message."""
    code = """
import sys
import flwr.app, flwr.clientapp, flwr.supernode.runtime.run_clientapp
before = set(sys.modules)
import simulations.deployment.relay
print(*sorted(set(sys.modules) - before))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = {f"simulations.deployment.{name}" for name in ("frames", "local_socket", "names", "relay")}
    assert set(ran.stdout.split()) == {"simulations", "simulations.deployment", *ours}


def test_it_knows_what_the_client_knows():
    from fedpeat.client import app, site
    from fedpeat.wire import error_reply

    assert set(relay.app._registered_funcs) == set(app.app._registered_funcs)
    assert (names.SITE, names.SITE_FILE, names.FILES) == (site.SITE, site.SITE_FILE, site.FILES)
    assert error_reply("", to=asked()).error.code == names.REFUSED


@pytest.mark.parametrize("kind", ["train", "query.hello", "query.bundle", "query.begin"])
def test_the_reply_is_the_workers(ask, tmp_path, kind):
    replies = []

    def answer(message, its):
        assert its.node_config == {"site": str(tmp_path / "site.json")}
        replies.append(echo(message, its))
        return replies[-1]

    with working(tmp_path, answer):
        reply = ask(asked(content({"a": b"abc"}), kind=kind))
    assert reply.metadata.message_type == kind
    assert all_of(reply) == all_of(replies[0])


def test_no_worker_is_an_answer(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(relay, "WAIT_SECONDS", 0.2)
    said = reason(ask(asked()))
    assert "no worker" in said
    assert str(tmp_path) not in said


def test_a_worker_that_is_just_being_started_is_waited_for(ask, tmp_path):
    replies = []
    thread = threading.Thread(target=lambda: replies.append(ask(asked())))
    thread.start()
    with working(tmp_path, echo):
        thread.join()
    assert not replies[0].has_error()


def half_a_reply(there):
    frames.receive_request(there)
    there.sendall(frames.MAGIC + (100).to_bytes(8, "big") + b"x" * 20)


@pytest.mark.parametrize(
    ("deed", "told"),
    [
        (frames.receive_request, "ended while it had the message"),
        (lambda there: None, "ended while it had the message"),
        (half_a_reply, "ended while it had the message"),
        (lambda there: (frames.receive_request(there), there.sendall(b"garbage!")), "do not understand"),
    ],
)
def test_a_worker_that_dies_or_babbles_is_told(ask, tmp_path, deed, told):
    with that_does(tmp_path, deed):
        said = reason(ask(asked(content({"a": bytes(10**6)}))))
    assert told in said


def test_a_worker_that_is_killed_in_the_middle_is_told_at_once(ask, tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from simulations.deployment.local_socket import alone, listening
from simulations.deployment.worker import serve
with alone(Path({str(tmp_path)!r})) as place, listening(place) as listener:
    serve(listener, lambda message, context: os.kill(os.getpid(), signal.SIGKILL))
"""
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        assert "ended while it had the message" in reason(ask(asked()))
        assert process.wait() == -9


def test_a_socket_that_cannot_be_had_is_told(ask, tmp_path):
    (tmp_path / PLACE).write_text("no folder")
    said = reason(ask(asked()))
    assert "cannot be reached" in said
    assert str(tmp_path) not in said


def test_a_client_without_a_site_is_told():
    assert "deploy client" in reason(relay.app(asked(), context()))


def test_two_at_once_are_served_one_after_the_other(ask, tmp_path):
    within, most, replies = [], [], []

    def answer(message, its):
        within.append(message)
        time.sleep(0.05)
        most.append(len(within))
        within.remove(message)
        return echo(message, its)

    def one(name):
        replies.append((name, ask(asked(content({name: name.encode() * 10**5})))))

    with working(tmp_path, answer):
        threads = [threading.Thread(target=one, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == [1, 1, 1]
    for name, reply in replies:
        assert reply.content["arrays"][name].data == name.encode() * 10**5
