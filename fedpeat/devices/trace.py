"""Who was there in which round, and how fast its link was, from a file."""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeat.core import DataError, nearest

COLUMNS = ("round", "client", "available", "down_mbit", "up_mbit")
_YES, _NO = {"1", "true", "yes"}, {"0", "false", "no"}


@dataclass(frozen=True)
class Moment:
    """A client in a round.

    Attributes:
        available: Whether it can be asked.
        down_mbit: Rate at which it receives, Mbit/s; None: as without a trace.
        up_mbit: Rate at which it sends, likewise.
    """

    available: bool
    down_mbit: float | None = None
    up_mbit: float | None = None


Trace = Mapping[tuple[int, str], Moment]
"""By round and client. What is not in it is as without a trace."""


def read_trace(path: str | Path) -> dict[tuple[int, str], Moment]:
    """Read a trace: a CSV file with a first line of names, or JSON lines.

    Columns (keys): `round`, from 1; `client`; `available`, 1 or 0 (true, false), 1 where it is left out; `down_mbit`
    and `up_mbit`, Mbit/s, left out or empty for the link as without a trace.

    Raises:
        DataError: If the file cannot be read, or a line does not fit; it says which.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the trace {path}", str(error), "set devices.trace to a file in UTF-8") from error
    found: dict[tuple[int, str], Moment] = {}
    for number, plain in _lines(path, text):
        key, moment = _moment(path, number, plain)
        if key in found:
            raise _wrong(path, number, f"round {key[0]} of client {key[1]!r} comes a second time", "leave one out")
        found[key] = moment
    if not found:
        raise DataError(f"cannot use the trace {path}", "there is nothing in it", f"its columns: {', '.join(COLUMNS)}")
    return found


def _lines(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if text.lstrip().startswith("{"):
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                try:
                    plain = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise _wrong(path, number, str(error), "write one JSON object a line") from error
                if not isinstance(plain, dict):
                    raise _wrong(path, number, "it is no JSON object", "write one JSON object a line")
                yield number, plain
        return
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        for plain in reader:
            if None in plain or None in plain.values():
                raise _wrong(path, reader.line_num, "it has more or fewer columns than the first line", "mend it")
            yield reader.line_num, plain
    except csv.Error as error:
        raise _wrong(path, reader.line_num, str(error), "mend it") from error


def _moment(path: Path, number: int, plain: Mapping[str, Any]) -> tuple[tuple[int, str], Moment]:
    for key in plain:
        if key not in COLUMNS:
            raise _wrong(path, number, f"no such column: {key!r}", nearest(str(key), COLUMNS))
    for key in ("round", "client"):
        if plain.get(key) in {None, ""}:
            raise _wrong(path, number, f"it has no {key}", f"its columns: {', '.join(COLUMNS)}")
    try:
        place = int(str(plain["round"]))
    except ValueError:
        place = 0
    if place < 1:
        raise _wrong(path, number, f"round={plain['round']!r}", "rounds are whole numbers from 1")
    available = str(plain.get("available", "1")).strip().lower()
    if available not in _YES | _NO:
        raise _wrong(path, number, f"available={plain['available']!r}", "write 1 or 0")
    rates = [_rate(path, number, key, plain.get(key)) for key in ("down_mbit", "up_mbit")]
    return (place, str(plain["client"])), Moment(available in _YES, *rates)


def _rate(path: Path, number: int, key: str, value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        rate = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        rate = math.nan
    if not 0 < rate < math.inf:
        remedy = "a rate is above 0 Mbit/s; a device without a link has available=0"
        raise _wrong(path, number, f"{key}={value!r}", remedy)
    return rate


def _wrong(path: Path, number: int, found: str, remedy: str) -> DataError:
    return DataError(f"cannot read line {number} of the trace {path}", found, remedy)
