"""A client's worker, kept running beside Flower's program: started anew when it dies, given up if it dies too often."""

import contextlib
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from fedpeat.core import EngineError
from simulations.deployment.local_socket import listens
from simulations.deployment.processes import end, last_words

DEATHS, WITHIN_SECONDS = 3, 60.0
"""So many deaths of a worker in so short a time are no accident any more."""

PAUSE_SECONDS = 0.5
"""Until a worker that died is started anew."""


@contextlib.contextmanager
def resident(
    start: Callable[[], subprocess.Popen[bytes]], folder: Path, beside: subprocess.Popen[bytes], *, log: Path
) -> Iterator[Callable[[], bool]]:
    """Keep a client's worker running; yield whether it listens.

    Args:
        start: Starts one.
        folder: The client's.
        beside: Flower's program, which ends when the worker is given up.
        log: Where all of them write what they say.

    Raises:
        EngineError: In place of the error that comes of it, if the worker died too often.
    """
    keeper = _Keeper(start, beside, log)
    try:
        yield lambda: listens(folder)
    except EngineError as error:
        if keeper.found is None:
            raise
        asked = f"the client's worker died {DEATHS} times within {WITHIN_SECONDS:.0f} s"
        raise EngineError(asked, keeper.found, f"see {log}") from error
    finally:
        keeper.stop()


class _Keeper:
    """A thread that waits for a worker's death."""

    def __init__(
        self, start: Callable[[], subprocess.Popen[bytes]], beside: subprocess.Popen[bytes], log: Path
    ) -> None:
        self.found: str | None = None
        self._start = start
        self._beside = beside
        self._log = log
        self._stopped = threading.Event()
        self._deaths: deque[float] = deque(maxlen=DEATHS)
        self._process = start()
        self._thread = threading.Thread(target=self._keep, name="worker's keeper")
        self._thread.start()

    def stop(self) -> None:
        """End the worker, and do not start it again."""
        self._stopped.set()
        self._thread.join()

    def _keep(self) -> None:
        while self._outlived():
            cause = cause_of(self._process.returncode)
            self._deaths.append(time.monotonic())
            if len(self._deaths) == DEATHS and self._deaths[-1] - self._deaths[0] < WITHIN_SECONDS:
                self._give_up(f"{cause}; {last_words(self._log)}")
                return
            _tell(self._log, f"the worker died ({cause}), and is started anew")
            try:
                self._process = self._start()
            except OSError as error:
                self._give_up(f"cannot start one: {error}")
                return

    def _outlived(self) -> bool:
        """Wait for the worker's death; return whether it is to be started anew."""
        while self._process.poll() is None and not self._stopped.wait(0.1):
            pass
        end(self._process)
        return not self._stopped.wait(PAUSE_SECONDS)

    def _give_up(self, found: str) -> None:
        self.found = found
        _tell(self._log, f"the worker died ({found}), and is given up")
        self._beside.terminate()


def cause_of(code: int) -> str:
    """Return in words how a program ended.

    >>> cause_of(1), cause_of(-15)
    ('exit code 1', 'SIGTERM')
    """
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
    return f"{name} (out of memory?)" if code == -signal.SIGKILL else name


def _tell(log: Path, text: str) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%H:%M:%S')} {text}\n")
