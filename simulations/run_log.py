"""The log of a run: one JSON object a line, of what happens and when, for programs that watch many runs.

`metrics.jsonl` has a round's numbers; here is the order of events, with failures and messages between them.
"""

import json
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedpeat.core import ClientFailure, FedPeatError, RoundPlan, RoundReport

LOG = "log.jsonl"

FAILURES_A_ROUND = 100
"""Failed clients of a round that get a line each: where all fail, the first hundred tell why."""

LONGEST = 2000
"""Characters of a text in a line."""

LEVEL_OF = {"finished": "info", "interrupted": "warning"}
"""Of how a run can end; any other way is an error."""


def now() -> str:
    """Return the time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class RunLog:
    """A run's `log.jsonl`, told as an observer is; a line is in the file when a method returns.

    Lines are added to those of a run that is resumed. That a line cannot be written is told once and ends no run: where
    the disk is full, history and checkpoint will say so.

    Args:
        folder: The run's, which exists.
        tell: Told if the log cannot be written.
        clock: The time, in words.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None], clock: Callable[[], str] = now) -> None:
        self.path = folder / LOG
        self._tell, self._clock = tell, clock
        self._failures, self._at_work = 0, ""
        self._torn = True  # by whoever wrote here last and was killed, for all we know
        self._told = False

    def write(self, event: str, facts: Mapping[str, object], *, level: str = "info") -> None:
        """Add a line: the time, the event and its level, and what else is known."""
        line = {"time": self._clock(), "level": level, "event": event, **facts}
        text = json.dumps(_plain(line), ensure_ascii=False, allow_nan=False)
        try:
            self._append(text.encode("utf-8", "backslashreplace") + b"\n")
        except OSError as error:
            self._torn = True
            if not self._told:
                self._told = True
                self._tell(f"cannot write {self.path} ({error.strerror or error}); the run goes on without it")

    def _append(self, line: bytes) -> None:
        """Write a line at once, behind the last whole one."""
        with self.path.open("a+b", buffering=0) as file:
            if self._torn:
                _cut_torn_line(file.fileno())
                self._torn = False
            if file.write(line) != len(line):
                raise OSError(28, os.strerror(28))

    def run_started(self, **facts: object) -> None:
        """Log that a run starts, or starts again."""
        self.write("run started", facts)

    def run_ended(self, summary: Mapping[str, Any], error: BaseException | None) -> None:
        """Log how a run ended: `finished`, `interrupted` or `failed`, and why."""
        status = str(summary["status"])
        facts = {key: summary[key] for key in ("rounds", "rounds_planned", "clients_failed", "bytes") if key in summary}
        facts["seconds"] = summary.get("seconds", {}).get("total")
        if error is not None:
            facts |= {"error": type(error).__name__, "text": str(error)}
        if isinstance(error, FedPeatError):
            facts |= {"asked": error.asked, "found": error.found, "remedy": error.remedy}
        self.write(f"run {status}", facts, level=LEVEL_OF.get(status, "error"))

    def resumed(self, done: int) -> None:
        """Log that the run goes on after its round `done`."""
        self.write("run resumed", {"round": done})

    def bundle_delivered(self, version: str, clients: int, sent: int) -> None:
        """Log that the clients of an emulator have its bundle."""
        self.write("bundle delivered", {"bundle": version, "clients": clients, "bytes": sent})

    def round_started(self, plan: RoundPlan) -> None:
        """Log that clients are at work."""
        self._failures = 0
        self.write("round started", {"round": plan.round, "clients": len(plan.devices)})

    def client_done(self, name: str, metrics: Mapping[str, float]) -> None:
        """Log nothing: `metrics.jsonl` has a row for each."""

    def client_failed(self, failure: ClientFailure) -> None:
        """Log that a client's work did not count, and why; of very many in a round, the first."""
        self._failures += 1
        facts = {"round": failure.round, "client": failure.client, "kind": failure.kind, "text": failure.reason}
        if self._failures <= FAILURES_A_ROUND:
            self.write("update refused" if failure.kind == "refused" else "client failed", facts, level="warning")

    def round_finished(self, report: RoundReport) -> None:
        """Log what came of a round."""
        facts = {
            "round": report.round,
            "clients": len(report.clients),
            "failed": len(report.failures),
            "bytes_down": report.bytes_down,
            "bytes_up": report.bytes_up,
            "seconds": report.seconds.get("total"),
        }
        losses = {model: found.loss for model, found in report.evaluations.items()}
        self.write("round finished", {**facts, **({"loss": losses} if losses else {})})

    def message(self, text: str) -> None:
        """Log anything else that a person was told."""
        self.write("message", {"text": text})

    def working(self, text: str, share: float | None) -> None:
        """Log that something long began; not how far it is."""
        if text != self._at_work:
            self.write("working", {"text": text})
        self._at_work = "" if share is not None and share >= 1 else text


def _plain(value: Any) -> Any:
    """Return a value for JSON: no NaN, no infinity, no endless text."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, str):
        return value if len(value) <= LONGEST else value[: LONGEST - 1] + "\u2026"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _cut_torn_line(handle: int) -> None:
    """Cut what stands behind the last whole line of a file."""
    size = whole = os.fstat(handle).st_size
    while whole:
        start = max(0, whole - 4096)
        found = os.pread(handle, whole - start, start).rfind(b"\n")
        whole = start if found < 0 else start + found + 1
        if found >= 0:
            break
    if whole < size:
        os.ftruncate(handle, whole)
