"""The history of a run: one line of JSON for every round, as it happens."""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpeat.core import RoundReport, StorageError

FILE = "metrics.jsonl"


class History:
    """The reports of a run, in `metrics.jsonl` of its folder.

    A line is on the disk when `append` returns. A kill during a write leaves at most one torn last line, which the
    next `History` on that folder removes, so a resumed run goes on where the file was whole.

    Args:
        folder: The run's folder; made where missing.

    Raises:
        StorageError: If the folder cannot be written, or a line other than the last one is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / FILE
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            _, whole = _read(self.path)
            os.truncate(self.path, whole)
        except OSError as error:
            raise _refused(self.path, error) from error

    def append(self, report: RoundReport) -> None:
        """Write one report, flushed to the disk.

        Raises:
            StorageError: If it cannot be written; the lines before it stay whole.
        """
        line = _to_line(report)
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise _refused(self.path, error) from error

    def rewind(self, last_round: int) -> None:
        """Drop the reports after `last_round`: a run resumed from an older checkpoint writes those rounds anew.

        Raises:
            StorageError: If the file cannot be written.
        """
        lines = self.path.read_bytes().splitlines(keepends=True)
        keep = sum(len(line) for line in lines if json.loads(line)["round"] <= last_round)
        try:
            os.truncate(self.path, keep)
        except OSError as error:
            raise _refused(self.path, error) from error


def read_history(path: str | Path) -> list[RoundReport]:
    """Return the reports in a `metrics.jsonl` (or in that of a run's folder), oldest first.

    A torn last line, which a kill during a write leaves, is dropped.

    Raises:
        StorageError: If the file is missing or another line is damaged.
    """
    path = Path(path)
    try:
        return _read(path / FILE if path.is_dir() else path)[0]
    except OSError as error:
        raise StorageError(f"cannot read {path}", str(error), "name a run's folder or its metrics.jsonl") from error


def _to_line(report: RoundReport) -> bytes:
    """JSON knows neither NaN nor infinity: they become null, and NaN again in reading."""
    plain = json.loads(json.dumps(report.to_json()), parse_constant=lambda _: None)
    return json.dumps(plain, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"


def _from_line(line: bytes) -> RoundReport:
    plain = json.loads(line)
    for key in ("seconds", "metrics"):
        plain[key] = _numbers(plain[key])
    plain["clients"] = {name: _numbers(metrics) for name, metrics in plain["clients"].items()}
    return RoundReport.from_json(plain)


def _numbers(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in plain.items()}


def _read(path: Path) -> tuple[list[RoundReport], int]:
    """Return the reports and how many bytes of the file they fill."""
    reports: list[RoundReport] = []
    whole = 0
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                break
            reports.append(_from_line(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):
                break
            remedy = "restore the file, or remove that line"
            raise StorageError(f"cannot read {path}", f"line {number} is damaged: {error}", remedy) from error
        whole += len(line)
    return reports, whole


def _refused(path: Path, error: OSError) -> StorageError:
    remedy = "free some space, or choose another folder with hydra.run.dir=..."
    return StorageError(f"cannot write {path}", str(error), remedy)
