"""A process of its own for each measurement, so that none starts with another's memory, threads or caches."""

import gc
import logging
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# A fork inherits the imports, which take seconds, and nothing else is done before; elsewhere each process imports anew.
_CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")

ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class MeasurementFailed(RuntimeError):
    """A measurement's process ended without a result."""


def fresh(work: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Return what a module-level function returns, called in a process of its own.

    Raises:
        MeasurementFailed: With the other process's traceback.
    """
    here, there = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_answer, args=(there, work, arguments, keywords))
    process.start()
    there.close()
    try:
        done, value = here.recv()
    except EOFError:
        process.join()
        done, value = False, f"the process ended with exit code {process.exitcode}"
    finally:
        here.close()
    process.join()
    if not done:
        raise MeasurementFailed(f"{work.__module__}.{work.__qualname__}: {value}")
    return value


def _answer(there: Connection, work: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    try:
        there.send((True, work(*arguments, **keywords)))
    except BaseException:
        there.send((False, traceback.format_exc()))
    finally:
        there.close()
        sys.stdout.flush()
        sys.stderr.flush()


class Companion:
    """A process that waits, without taking CPU, until it is asked to do some work.

    Args:
        prepare: A module-level function; what it returns does the work when called.
    """

    def __init__(self, prepare: Callable[..., Callable[..., Any]], *arguments: Any) -> None:
        self._here, there = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(there, prepare, arguments), daemon=True)
        self._process.start()
        there.close()

    def ask(self, *arguments: Any) -> None:
        """Start the work; `answer` waits for it."""
        self._here.send(arguments)

    def answer(self) -> Any:
        """Return the work's result.

        Raises:
            MeasurementFailed: If it failed.
        """
        done, value = self._here.recv()
        if not done:
            raise MeasurementFailed(value)
        return value

    def stop(self) -> None:
        """End the process."""
        self._here.close()
        self._process.join(10)


def _serve(there: Connection, prepare: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]) -> None:
    work = None
    while True:
        try:
            asked = there.recv()
        except EOFError:
            return
        try:
            work = work or prepare(*arguments)
            there.send((True, work(*asked)))
        except BaseException:
            there.send((False, traceback.format_exc()))


def memory(process: int | str = "self") -> dict[str, float]:
    """Return a process's memory by kind, MiB: `rss`, `pss`, `private` (Linux only).

    `pss` counts a page that n processes share as 1/n of a page.
    """
    kinds = {"Rss:": "rss", "Pss:": "pss", "Private_Clean:": "private", "Private_Dirty:": "private"}
    found = dict.fromkeys(kinds.values(), 0.0)
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        name, *rest = line.split()
        if name in kinds:
            found[kinds[name]] += int(rest[0]) / 1024
    return found


def start_peak() -> float:
    """Forget this process's peak of resident memory so far, and return what is resident now, MiB (Linux only)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmHWM")


def peak() -> float:
    """Return the peak of resident memory since `start_peak`, MiB (Linux only)."""
    return _status("VmHWM")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def quiet() -> None:
    """Set the environment of all measurements, before the imports: one thread, nothing that calls out, no chatter."""
    from simulations import QUIET

    os.environ.update({**QUIET, **dict.fromkeys(ONE_THREAD, "1"), "HF_HUB_OFFLINE": "1"})
    logging.getLogger("flwr").setLevel(logging.ERROR)
