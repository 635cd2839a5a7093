"""Machines that tests play: `fedpeat deploy` as programs of their own, kept running as systemd would keep them."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from simulations.deployment.layout import RUN
from tests.deployment.links import Link, Network
from tests.processes import PATIENCE, end, wait_for

COMMAND = "import sys; from simulations.cli import main; main(['deploy', *sys.argv[1:]])"
RESTART_SECONDS = 5.0


def environment(folder: Path) -> dict[str, str]:
    """The environment of a person whose home is empty: `folder` is any machine's."""
    return {**os.environ, "HOME": str(folder.parent / "home"), "FLWR_HOME": ""}


def started(*words, log: Path, cwd: Path, inside=()) -> subprocess.Popen[bytes]:
    """Start `fedpeat deploy`; what it says goes into `log`."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [*inside, sys.executable, "-c", COMMAND, *map(str, words)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=environment(cwd),
        )


def asked(*words, cwd: Path, inside=()) -> tuple[int, str]:
    """Run `fedpeat deploy`; return its exit code and what it said."""
    done = subprocess.run(
        [*inside, sys.executable, "-c", COMMAND, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=cwd,
        env=environment(cwd),
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


class Unit:
    """A program that is started again whenever it ends, as systemd does it.

    Args:
        words: Of `fedpeat deploy`.
        log: Where it says what it says; anew with each start.
        inside: What runs it on its machine.
    """

    def __init__(self, *words, log: Path, inside=()) -> None:
        self._words, self._inside, self.log = words, inside, log
        self._off = threading.Event()
        self.starts = self._marked = 0
        self._start()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _start(self) -> None:
        self.starts += 1
        self.process = started(*self._words, log=self.log, cwd=self.log.parent, inside=self._inside)

    def _watch(self) -> None:
        while not self._off.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.2)
                if not self._off.wait(RESTART_SECONDS):
                    self._start()

    def is_ready(self, starts: int = 1) -> bool:
        """Whether it is, after this many starts at least."""
        return self.starts >= starts and self.process.poll() is None and "ready: " in self.log.read_text()

    def wait(self, starts: int = 1) -> None:
        """Wait until it is ready."""
        wait_for(lambda: self.is_ready(starts), what=self.log.read_text)

    def mark(self) -> None:
        """Remember how often it was started until now."""
        self._marked = self.starts

    def was_started_again(self) -> bool:
        """Whether it was, after it was marked."""
        return self.starts > self._marked

    def wait_again(self) -> None:
        """Wait until it is ready after one more start than there were when it was marked."""
        self.wait(self._marked + 1)

    def kill(self) -> None:
        """Kill it and all that it started, at once; it will be started again."""
        self.mark()
        end(self.process)

    def start_anew(self) -> None:
        """End it in order; it will be started again."""
        self.mark()
        self.process.terminate()

    def turn_off(self) -> None:
        """End it for good, or until `turn_on`."""
        self._off.set()
        self._thread.join()
        end(self.process)

    def turn_on(self) -> None:
        """Start it again."""
        self._off.clear()
        self._start()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()


def children(process: subprocess.Popen[bytes], word: str) -> list[psutil.Process]:
    """Return what a program has started whose command line holds `word`."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [one] if any(word in part for part in one.cmdline()) else []
    return found


def is_busy(client: Unit) -> bool:
    """Whether a client has a message now."""
    return bool(children(client.process, "flwr-clientapp"))


@contextlib.contextmanager
def halted(unit: Unit, word: str = "simulations.deployment.worker"):
    """Let a client's worker stand still, or whatever else has `word` in its command, as if it were far too slow."""
    found = children(unit.process, word)
    assert found
    for one in found:
        one.suspend()
    try:
        yield
    finally:
        for one in found:
            one.resume()


class Disk:
    """A small disk of a machine's own, that can be filled up and freed."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True, check=False
        )
        self.is_there = done.returncode == 0

    def fill(self):
        with contextlib.suppress(OSError), (self.folder / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def free(self):
        (self.folder / "ballast").unlink(missing_ok=True)

    def remove(self):
        if self.is_there:
            subprocess.run(["umount", "-l", str(self.folder)], capture_output=True, check=False)


class Federation:
    """A server and its clients, each on a machine of its own.

    Args:
        folder: With a folder for each machine.
        deployment: The deployment's folder, on the server.
        network: Between them.
        texts: Each client's data, by name.
    """

    def __init__(self, folder: Path, deployment: Path, network: Network, texts: dict[str, Path]) -> None:
        self.folder, self.deployment, self.network, self.texts = folder, deployment, network, texts
        self.clients: dict[str, Unit] = {}
        self.start_seconds = 0.0
        self.server: Unit
        self.link: Link

    @property
    def names(self) -> tuple[str, ...]:
        """The clients' names."""
        return tuple(self.texts)

    def site(self, name: str) -> Path:
        """The folder of a client, on its machine."""
        return self.folder / name / "site"

    def start(self) -> None:
        """Start all, and wait until they are ready."""
        begin = time.monotonic()
        server, inside = self.folder / "server" / "out.log", self.network.inside
        self.server = Unit("server", self.deployment, log=server, inside=inside("server"))
        self.server.wait()
        for name, text in self.texts.items():
            log = self.folder / name / "out.log"
            self.clients[name] = Unit("client", self.site(name), f"data.path={text}", log=log, inside=inside(name))
        for client in self.clients.values():
            client.wait()
        self.start_seconds = time.monotonic() - begin

    def end(self) -> None:
        """End all."""
        for unit in (*self.clients.values(), *([self.server] if hasattr(self, "server") else [])):
            unit.turn_off()

    def ask(self, *words) -> tuple[int, str]:
        """Carry out an operator's command, on the server's machine."""
        name, *others = words
        return asked(name, self.deployment, *others, cwd=self.deployment.parent, inside=self.network.inside("server"))

    @contextlib.contextmanager
    def running(self, *words):
        """Start a federation; yield its process and its log."""
        log = self.deployment.parent / "run.log"
        inside = self.network.inside("server")
        process = started("run", self.deployment, *words, log=log, cwd=log.parent, inside=inside)
        try:
            yield process, log
        finally:
            end(process)

    def runs(self) -> list[Path]:
        """The folders of all runs, the newest last."""
        return sorted(path for path in (self.deployment / "runs").glob("*") if path.is_dir())

    def has(self, name: str, number: int) -> bool:
        """Whether a client has all of its message of a round of the newest run, and has not answered it."""
        with contextlib.suppress(FileNotFoundError):
            run = json.loads((self.runs()[-1] / RUN).read_text())["run"]
            said = (self.site(name) / "client.log").read_text(errors="replace")
            _, began, after = said.rpartition(f"[RUN {run}, ROUND {number}]")
            return bool(began) and "Received successfully" in after
        return False

    def activations(self) -> int:
        """How often the server has let a client in, since its log began."""
        return (self.deployment / "server.log").read_text(errors="replace").count("[Fleet.ActivateNode] Activated")
