"""The numbers of a run, read from its folder while it is written: cheap to ask for again and again.

Read as plain JSON lines, so that what asks need not load torch.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from simulations.deployment.layout import RUN

HISTORY, SUMMARY, CONFIG, DELIVERY = "metrics.jsonl", "summary.json", "config.yaml", "delivery.json"
SERVER = "server"
"""The name under which the server itself takes part in a round; no client can have it."""

TAIL_BYTES = 1024
"""Of what was read last, how much is looked at again: a line ends with its round's seconds, which no other has."""


@dataclass
class Sums:
    """What the lines of a history add up to, so far.

    Attributes:
        round: The last finished round; None before the first line.
        clients: Clients whose updates counted in that round.
        bytes_down: Tensor payload sent in all rounds, bytes.
        bytes_up: Tensor payload received in all rounds, bytes.
        failures: Client visits that did not count, by client.
        seconds: Wall time of the last round.
        evaluations: The newest evaluation of each model: its numbers by name.
        metrics: Further numbers of the last round.
    """

    round: int | None = None
    clients: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    evaluations: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def add(self, line: Mapping[str, Any]) -> None:
        """Take in one round."""
        self.failures.update([str(failure["client"]) for failure in line["failures"]])
        self.bytes_down += int(line["bytes_down"])
        self.bytes_up += int(line["bytes_up"])
        self.evaluations |= line["evaluations"]
        self.round, self.metrics = int(line["round"]), line["metrics"]
        self.clients = len(line["clients"].keys() - {SERVER})
        self.seconds = number_of(line["seconds"].get("total"))


class Tally:
    """Sums over a run's history that go on where they were: each line is read once, a torn last one when it is whole.

    A history that was cut, as a resumed run's is, is read anew.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._start_anew(None)

    def _start_anew(self, path: Path | None) -> None:
        self._path, self._offset, self._tail, self._sums = path, 0, b"", Sums()

    def read(self, folder: Path) -> Sums:
        """Return the sums over the history in a run's folder; all zero where there is none."""
        path = folder / HISTORY
        if path != self._path:
            self._start_anew(path)
        try:
            with path.open("rb") as file:
                file.seek(self._offset - len(self._tail))
                if file.read(len(self._tail)) != self._tail:
                    self._start_anew(path)
                    file.seek(0)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._take(line)
        except OSError:
            self._start_anew(path)
        return self._sums

    def _take(self, line: bytes) -> None:
        self._offset += len(line)
        self._tail = line[-TAIL_BYTES:]
        try:
            self._sums.add(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # a damaged line: those who resume the run are told of it


def number_of(value: object) -> float:
    """Return a number from JSON, which has null for NaN.

    >>> number_of(2), number_of(None)
    (2.0, nan)
    """
    return float(value) if isinstance(value, int | float) else float("nan")


def state_of(folder: Path) -> str:
    """Return what has become of a run: `finished`, `interrupted`, `failed`, `running`, or `not started`.

    A run that is resumed has the summary of the last time: the newer of that and its start counts.
    """
    started, ended = (_changed(folder / name) for name in (RUN, SUMMARY))
    if ended and ended >= started:
        return str(_plain(folder / SUMMARY).get("status", "failed"))
    return "running" if started else "not started"


def rounds_of(folder: Path) -> int | None:
    """Return how many rounds a run was asked for; None where that cannot be read."""
    try:
        settings = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        return int(settings["rounds"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def delivered_of(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield each client and the bytes of bundles that it was sent."""
    for name, known in _plain(folder / DELIVERY).items():
        yield name, int(known.get("bytes_down", 0))


def _changed(path: Path) -> int:
    """Return when a file was written, ns; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _plain(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
