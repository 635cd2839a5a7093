"""Cells on long-lived worker processes: failures and deaths are told, the others go on."""

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import yaml

from fedpeat.core import StorageError, read_json, write_json, write_text
from simulations.compare.worker import LOG

RUN = "simulations.run:simulate"
FAILURE = "failure.json"
"""What a failed cell leaves in its folder: `kind` and `reason`."""

TICK_SECONDS = 0.5
GRACE_SECONDS = 15.0

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Task:
    """A cell to run: its settings, its folder (emptied before), and its hash.

    `shares` names what it works out once with others, in a cache: of tasks with the same name, one runs alone until one
    has finished. Empty for nothing of that kind.
    """

    name: str
    settings: Mapping[str, Any]
    folder: Path
    hash: str
    shares: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: `status` is finished, failed or interrupted."""

    task: Task
    status: str
    reason: str = ""
    seconds: float = 0.0


def is_finished(task: Task) -> bool:
    """Tell whether the folder holds the finished run of these settings."""
    path = task.folder / "summary.json"
    if not path.is_file():
        return False
    try:
        summary = read_json(path)
        return summary["status"] == "finished" and summary["config_hash"] == task.hash
    except (StorageError, KeyError, TypeError):
        return False


class Workers:
    """Worker processes for cells. Use it as a context manager: leaving it by an error or Ctrl-C ends them.

    Args:
        jobs: Cells that run at once.
        threads: Threads that a cell's libraries may use.
        run: `module:function` of what runs a cell, called with settings and folder; it returns a summary.
        inherited: File descriptors that workers hold open too.
        grace_seconds: How long interrupted cells may take to write what there is.
    """

    def __init__(
        self,
        *,
        jobs: int,
        threads: int,
        run: str = RUN,
        inherited: Sequence[int] = (),
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        self.jobs, self.run, self.inherited, self.grace_seconds = jobs, run, tuple(inherited), grace_seconds
        self.environment = {
            **os.environ,
            **dict.fromkeys(THREADS, str(threads)),
            "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        }
        self.running: dict[str, Task] = {}
        self._todo: list[Task] = []
        self._made: set[str] = set()
        self._turn = threading.Condition()
        self._done: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._workers: set[_Worker] = set()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        """Start nothing yet: the first cells start workers."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Interrupt the cells that run, if any, wait a little, then kill."""
        if error is None:
            self._wait(self.grace_seconds)
        with self._turn:
            self._stop.set()
            self._turn.notify_all()
        try:
            self._signal(signal.SIGINT)
            self._wait(self.grace_seconds)
        finally:
            self._signal(signal.SIGKILL)
            self._wait(self.grace_seconds)

    @property
    def are_ready(self) -> bool:
        """Whether a worker has its imports behind it."""
        return any(worker.ready for worker in list(self._workers))

    def outcomes(self, tasks: Sequence[Task]) -> Iterator[Outcome | None]:
        """Run all tasks; yield how each ended, in that order, and None at least every half second."""
        self._todo += tasks
        for _ in range(min(self.jobs, len(tasks))):
            thread = threading.Thread(target=self._serve, daemon=True)
            self._threads.append(thread)
            thread.start()
        left = len(tasks)
        while left:
            try:
                outcome = self._done.get(timeout=TICK_SECONDS)
            except queue.Empty:
                yield None
                continue
            left -= 1
            yield outcome

    def _serve(self) -> None:
        """Take one task after the other to a worker; a dead worker is replaced by a new one."""
        worker: _Worker | None = None
        try:
            while (task := self._next()) is not None:
                if worker is None:
                    worker = _Worker(self.run, self.environment, self.inherited)
                    self._workers.add(worker)
                outcome = _attempt(worker, task, self._stop)
                if worker.process.poll() is not None:
                    self._workers.discard(worker)
                    worker = None
                self._ended(outcome)
        finally:
            if worker is not None:
                worker.dismiss()
                self._workers.discard(worker)

    def _next(self) -> Task | None:
        """Return the first task that may run now, and wait for one if need be; None when there is nothing left."""
        with self._turn:
            while self._todo and not self._stop.is_set():
                working = {task.shares for task in self.running.values()} - self._made
                task = next((task for task in self._todo if not task.shares or task.shares not in working), None)
                if task is not None:
                    self._todo.remove(task)
                    self.running[task.name] = task
                    return task
                self._turn.wait()
        return None

    def _ended(self, outcome: Outcome) -> None:
        with self._turn:
            del self.running[outcome.task.name]
            if outcome.status == "finished":
                self._made.add(outcome.task.shares)
            self._turn.notify_all()
        self._done.put(outcome)

    def _signal(self, number: int) -> None:
        for process in [worker.process for worker in list(self._workers)]:
            with contextlib.suppress(ProcessLookupError):
                # A worker is a session of its own: what it started ends with it.
                os.killpg(process.pid, number) if number == signal.SIGKILL else process.send_signal(number)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


class _Worker:
    """One process and the way to talk to it."""

    def __init__(self, run: str, environment: Mapping[str, str], inherited: Sequence[int]) -> None:
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from simulations.compare.worker import main; main()", run],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=dict(environment),
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C reaches the parent alone, which passes it on
            pass_fds=inherited,
        )
        self.ready = False
        threading.Thread(target=self._bury, daemon=True).start()

    def _bury(self) -> None:
        """End what a process that is gone has left behind: it would hold our end of the pipe open."""
        self.process.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def ask(self, value: object) -> dict[str, Any] | None:
        """Return the answer to a task; None if the process is gone."""
        if self.process.stdin is None or self.process.stdout is None:
            return None
        try:
            self.process.stdin.write(json.dumps(value) + "\n")
            self.process.stdin.flush()
            while line := self.process.stdout.readline():
                answer = json.loads(line)
                if "ready" not in answer:
                    return answer
                self.ready = True
        except (OSError, ValueError):
            pass
        return None

    def end(self, log: Path) -> str:
        """Wait for a process that is gone; return why in words."""
        code = self.process.wait()
        self.errors.seek(0)
        text = self.errors.read().decode("utf-8", "replace") if not self.ready else _text(log)
        self._close()
        last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
            cause = f"the worker process was killed by {name}"
            cause += ": perhaps for its memory; lower jobs" if name == "SIGKILL" else ""
        else:
            cause = f"the worker process ended with exit code {code}"
        return f"{cause}; last said: {last[:300]}" if last else cause

    def dismiss(self) -> None:
        """Let an idle process end."""
        with contextlib.suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.write("null\n")
                self.process.stdin.close()
        self.process.wait()
        self._close()

    def _close(self) -> None:
        for file in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()


def _attempt(worker: _Worker, task: Task, stop: threading.Event) -> Outcome:
    """Run one task in an empty folder; whatever happens becomes an outcome."""
    begin = time.monotonic()
    try:
        if task.folder.exists():
            shutil.rmtree(task.folder)  # a run adds to the history it finds
        text = yaml.safe_dump(dict(task.settings), sort_keys=False, allow_unicode=True)
        write_text(task.folder / "config.yaml", text)
        write_text(task.folder / "config.sha", task.hash + "\n")
    except (OSError, StorageError) as error:
        return Outcome(task, "failed", str(error))
    answer = worker.ask({"settings": task.settings, "folder": str(task.folder)})
    if answer is None:
        reason = worker.end(task.folder / LOG)
        answer = {"status": "interrupted" if stop.is_set() else "failed", "kind": "died", "reason": reason}
    if answer["status"] == "failed":
        with contextlib.suppress(StorageError):
            write_json(task.folder / FAILURE, {"kind": answer["kind"], "reason": answer["reason"]})
    return Outcome(task, answer["status"], answer["reason"], time.monotonic() - begin)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")[-4000:]
    except OSError:
        return ""
