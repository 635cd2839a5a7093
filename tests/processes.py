"""Processes that tests start, wait for and end."""

import contextlib
import socket
import time

import psutil

PATIENCE = 600  # seconds for a process, on a busy machine


def end(process):
    """End a process and all that it started, by their numbers."""
    with contextlib.suppress(psutil.NoSuchProcess):
        whole = psutil.Process(process.pid)
        for one in [*whole.children(recursive=True), whole]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def wait_for(found, *, what=lambda: "it takes too long", process=None):
    """Wait until `found()`; `what()` is said if that takes too long, or `process` ends before."""
    deadline = time.monotonic() + PATIENCE
    while not found():
        assert process is None or process.poll() is None, what()
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


def free_port():
    """A port of this machine on which nothing listens now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def listens(port):
    """Whether something listens at a port of this machine."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
