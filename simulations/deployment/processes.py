"""Flower's programs: started with our environment, waited for until they are ready, and ended."""

import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedpeat.core import EngineError, read_json
from simulations import QUIET
from simulations.deployment.layout import ClientFolder, Deployment
from simulations.deployment.names import SITE

READY_SECONDS = 120.0
"""How long a program may take until it is ready; on a busy machine its imports alone take tens of seconds."""

END_SECONDS = 20.0
LOG_BYTES = 10 * 2**20
BINARIES = Path(sys.executable).parent
"""Where Flower's programs are, and ours."""


def environment(home: Path) -> dict[str, str]:
    """Return the environment of Flower's programs: nothing calls out, is installed for a run, or is written elsewhere.

    Args:
        home: What Flower takes for its own folder.
    """
    return {
        **os.environ,
        **QUIET,
        "PATH": os.pathsep.join([str(BINARIES), os.environ.get("PATH", "")]),  # they start each other by name
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "200",
    }


def superlink(deployment: Deployment, *, bind: str) -> subprocess.Popen[bytes]:
    """Start the server's program; everything it says goes into `server.log`."""
    trust = (
        ["--insecure"]
        if deployment.insecure
        else [
            f"--ssl-ca-certfile={deployment.ca}",
            f"--ssl-certfile={deployment.certificate}",
            f"--ssl-keyfile={deployment.key}",
            "--enable-supernode-auth",
        ]
    )
    # In memory: with its database on disk Flower locks up under large messages, and keeps no run over a restart.
    command = [sys.executable, "-m", "simulations.deployment.superlink", f"--host={bind}", f"--port={deployment.port}"]
    return _start([*command, *trust, "--disable-runtime-dependency-installation"], deployment.home, deployment.log)


def supernode(client: ClientFolder) -> subprocess.Popen[bytes]:
    """Start a client's program; everything it says goes into `client.log`."""
    site = read_json(client.site)
    insecure = bool(site.get("insecure"))
    trust = (
        ["--insecure"]
        if insecure
        else [f"--root-certificates={client.ca}", f"--auth-supernode-private-key={client.key}"]
    )
    command = [sys.executable, "-m", "simulations.deployment.supernode"]
    command += [f"--superlink={site['superlink']}", f"--port={free_port()}"]
    config = f'{SITE}="{client.site}"'
    return _start([*command, *trust, f"--node-config={config}"], client.home, client.log, stdin=subprocess.PIPE)


def worker(client: ClientFolder) -> subprocess.Popen[bytes]:
    """Start a client's resident worker; everything it says goes into `client.log`."""
    command = [sys.executable, "-m", "simulations.deployment.worker", str(client.folder)]
    return _start(command, client.home, client.log, stdin=subprocess.PIPE)


def _start(
    command: Sequence[str], home: Path, log: Path, *, stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    home.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        # A session of its own: Ctrl-C at our terminal is ours to hand on, once.
        return subprocess.Popen(
            command,
            stdin=stdin,  # a pipe closes with us, even if we are killed
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(home),
            start_new_session=True,
        )


def free_port() -> int:
    """Return a port of this machine on which nothing listens now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def is_up(deployment: Deployment) -> bool:
    """Return whether the server answers, on its own machine."""
    scheme = "http" if deployment.insecure else "https"
    context = None if deployment.insecure else ssl.create_default_context(cafile=str(deployment.ca))
    try:
        with urllib.request.urlopen(f"{scheme}://{deployment.own_address}/health", timeout=5, context=context) as reply:
            return reply.status == 200
    except (OSError, urllib.error.URLError):
        return False


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], *, what: str, log: Path) -> None:
    """Wait until `ready`.

    Raises:
        EngineError: If the process ends before, or takes too long.
    """
    deadline = time.monotonic() + READY_SECONDS
    while not ready():
        if process.poll() is not None:
            raise EngineError(f"{what} did not start", *_explained(last_words(log), log))
        if time.monotonic() > deadline:
            raise EngineError(f"{what} is not ready after {READY_SECONDS:.0f} s", last_words(log), f"see {log}")
        time.sleep(0.2)


def _explained(words: str, log: Path) -> tuple[str, str]:
    """Return why a program did not start, by its last words, and what to do about it."""
    if "Failed to activate SuperNode" not in words:
        return words, f"see {log}"
    # Flower says the same of both.
    return (
        "the server does not know this machine's key, or holds that it is connected already",
        "have key.pub put into keys/ on the server and the server started anew; "
        "if a program with this key has just been killed, try again in a minute",
    )


def shorten_log(log: Path) -> int:
    """Put a log aside that has grown large; return how many bytes the log has then."""
    size = log.stat().st_size if log.exists() else 0
    if size > LOG_BYTES:
        log.replace(log.with_name(f"{log.name}.old"))
        return 0
    return size


def is_connected(client: ClientFolder, since: int) -> bool:
    """Return whether a client's program has said, after `since` bytes of its log, that the server knows it."""
    return "SuperNode ID:" in _after(client.log, since)


def _after(log: Path, since: int) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(since)
        return file.read().decode(errors="replace")


def last_words(log: Path) -> str:
    """Return what a log says at its end of what went wrong, in one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", _after(log, max(0, log.stat().st_size - 8000) if log.exists() else 0))
    lines = [re.sub(r"^(INFO|WARN\w*|ERROR)\s*:\s*", "", line).strip() for line in text.splitlines()]
    told = [line for line in lines if line and "For more information" not in line]
    exits = [number for number, line in enumerate(told) if line.startswith("Exit Code:") and line != "Exit Code: 0"]
    if exits:  # what Flower says of it is in the lines that follow
        return " ".join(told[exits[-1] : exits[-1] + 4])[:300]
    wrong = [line for line in told if re.search(r"[Ee]rror|refused|denied|in use|failed", line)]
    return (wrong or told or ["it said nothing"])[-1][:300]


@contextlib.contextmanager
def ending_with_us(process: subprocess.Popen[bytes]) -> Iterator[threading.Event]:
    """Hand on to a program the wish to end it, and in any case end it; yield what is set once somebody wished so."""
    asked = threading.Event()

    def hand_on(*_: Any) -> None:
        asked.set()
        with contextlib.suppress(ProcessLookupError):
            process.terminate()

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        end(process)


def stay(
    process: subprocess.Popen[bytes], ready: Callable[[], bool], greet: Callable[[], None], what: str, log: Path
) -> int:
    """Keep a program running until somebody ends it; return the exit code.

    Args:
        process: The program.
        ready: Whether it is ready.
        greet: Called once it is.
        what: What it is called in errors.
        log: Where it writes what it says.

    Raises:
        EngineError: If it does not become ready, or ends by itself.
    """
    with ending_with_us(process) as asked:
        try:
            wait_until(ready, process, what=what, log=log)
            greet()
            process.wait()
            raise EngineError(f"{what} ended", last_words(log), f"see {log}")
        except EngineError:
            if asked.is_set():
                return 0
            raise


def end(process: subprocess.Popen[bytes]) -> None:
    """End a program of ours, at first politely."""
    if process.stdin is not None:
        process.stdin.close()
    process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # what it had started and left behind: Flower's apps wait for ever
