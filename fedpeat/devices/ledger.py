"""The ledger of a run: a row for each client and round, made of its reports, and so whole whenever they are."""

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedpeat.core import RoundReport, StorageError, write_bytes

FILE = "ledger.parquet"
UNAVAILABLE, LATE, DROPPED, COUNTED = "unavailable", "late", "dropped", "counted"


class Column(NamedTuple):
    """A column of the ledger.

    Attributes:
        name: As in the file.
        kind: `int64`, `float64`, `string` or `bool`.
        meaning: One sentence, with the unit.
    """

    name: str
    kind: str
    meaning: str


COLUMNS: tuple[Column, ...] = (
    Column("round", "int64", "Counted from 1."),
    Column("client", "string", "Its name."),
    Column(
        "status",
        "string",
        "`counted`, or why its work did not count: `unavailable` (not asked), `late`, `dropped`, `memory`, `surplus`,"
        " `error`, `timeout`, `refused`, `died`.",
    ),
    Column("available", "bool", "Whether it could be asked."),
    Column("late", "bool", "Whether it would have been later than `devices.deadline_seconds`."),
    Column("dropped", "bool", "Whether it dropped out in mid-round."),
    Column("emulator", "string", "Key of its emulator."),
    Column("rank", "int64", "Its PEFT rank; null for the run's own."),
    Column("profile", "string", "Its device profile; null with `devices=none`."),
    Column("local_steps", "int64", "Optimiser steps asked for."),
    Column("bytes_down", "int64", "Tensor payload really sent to it, bytes; 0 if it was not asked in truth."),
    Column("bytes_up", "int64", "Tensor payload that really came from it, bytes."),
    Column("refresh_bytes", "int64", "Of `bytes_down`, changes of the emulator that it lacked, bytes."),
    Column("bundle_bytes", "int64", "What it had to fetch of the emulated model first, bytes; 0 once it holds it."),
    Column("modelled_down_seconds", "float64", "Time to receive bundle and tensors, s of simulated time."),
    Column("modelled_compute_seconds", "float64", "Time to train, s of simulated time."),
    Column("modelled_up_seconds", "float64", "Time to send its update, s of simulated time."),
    Column("modelled_seconds", "float64", "The three together; of one that is late or drops out, what it would take."),
    Column("measured_train_seconds", "float64", "Wall time of its local steps on the machine that ran them, s."),
    Column("measured_seconds", "float64", "Wall time of its whole visit there, s."),
    Column("modelled_memory_mib", "float64", "Memory of its training, MiB."),
    Column("memory_limit_mib", "float64", "Memory that its profile has for training, MiB."),
    Column("measured_peak_mib", "float64", "Peak of resident memory of the process that ran it so far, MiB."),
    Column("measured_gpu_mib", "float64", "Peak of GPU memory of that process so far, MiB; null without a GPU."),
    Column("joules", "float64", "Energy of receiving, training and sending, to where it ended, J."),
    Column("downlink_mbit", "float64", "Rate at which it received, Mbit/s."),
    Column("uplink_mbit", "float64", "Rate at which it sent, Mbit/s."),
    Column("clock_before_seconds", "float64", "Simulated time at the start of the round, s."),
    Column("clock_after_seconds", "float64", "Simulated time at the end of the round, s."),
)
"""What is modelled is null with `devices=none`; what is measured, for clients whose work did not count."""

_MEASURED = {
    "measured_train_seconds": "train_seconds",
    "measured_seconds": "client_seconds",
    "measured_peak_mib": "peak_rss_mib",
    "measured_gpu_mib": "peak_gpu_mib",
}
CLOCK = "simulated_seconds"
"""Metric of a round's report: the virtual clock after it, s."""


def ledger_rows(reports: Iterable[RoundReport]) -> Iterator[dict[str, Any]]:
    """Yield a row for each client and round, in the order of rounds and names; a missing number is None."""
    before: float | None = None
    for report in reports:
        after = report.metrics.get(CLOCK)
        clocks = {"clock_before_seconds": before, "clock_after_seconds": after}
        if after is not None and before is None:
            clocks["clock_before_seconds"] = 0.0
        before = after
        for client in sorted(report.devices):
            facts, measured = report.devices[client], report.clients.get(client, {})
            row: dict[str, Any] = dict.fromkeys(column.name for column in COLUMNS)
            row |= {"bytes_down": 0, "refresh_bytes": 0, "bundle_bytes": 0}
            row |= {name: value for name, value in facts.items() if name in row}
            status = facts["status"]
            row |= clocks | {
                "round": report.round,
                "client": client,
                "available": status != UNAVAILABLE,
                "late": status == LATE,
                "dropped": status == DROPPED,
                "bytes_up": int(measured.get("bytes_up", 0)),
                **{name: _number(measured.get(metric)) for name, metric in _MEASURED.items()},
            }
            yield row


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def write_ledger(folder: str | Path, reports: Iterable[RoundReport]) -> Path | None:
    """Write `ledger.parquet` into a run's folder, atomically; return its path, None if there is no row.

    Written as a whole from the run's history, in which rounds that are done again replace what was there.

    Raises:
        StorageError: If it cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {column.name: [] for column in COLUMNS}
    for row in ledger_rows(reports):
        for name, values in columns.items():
            values.append(row[name])
    if not columns["round"]:
        return None
    schema = pa.schema([(column.name, getattr(pa, _ARROW.get(column.kind, column.kind))()) for column in COLUMNS])
    stream = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), stream)
    path = Path(folder) / FILE
    write_bytes(path, stream.getvalue())
    return path


_ARROW = {"bool": "bool_"}


def read_ledger(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a `ledger.parquet` (or of that in a run's folder).

    Raises:
        StorageError: If it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        return pq.read_table(io.BytesIO(path.read_bytes())).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {path}", str(error), "name a run's folder or its ledger.parquet") from error


class Milestone(NamedTuple):
    """When a quality was reached.

    Attributes:
        share: Of the way from the first perplexity to the best one, in loss, 0 to 1.
        perplexity: The plug-in model's, at most which it then had.
        round: The first such round.
        simulated_seconds: The virtual clock after it, s; None without one.
        seconds: Wall time up to it, s: of the rounds alone, as measured.
    """

    share: float
    perplexity: float
    round: int
    simulated_seconds: float | None
    seconds: float


SHARES = (0.5, 0.8, 0.9, 0.95, 1.0)


def milestones(reports: Sequence[RoundReport], shares: Sequence[float] = SHARES) -> list[Milestone]:
    """Return when the plug-in model had come these shares of the way to its best; nothing if it never got better."""
    seen, seconds = [], 0.0
    for report in reports:
        seconds += report.seconds.get("total", 0.0)
        loss = report.evaluations["plug_in"].loss if "plug_in" in report.evaluations else math.nan
        if math.isfinite(loss):
            seen.append((report, loss, seconds))
    if not seen or min(loss for _, loss, _ in seen) >= seen[0][1]:
        return []
    first, best = seen[0][1], min(loss for _, loss, _ in seen)
    found = []
    for share in shares:
        # At the end of the way no rounding may come between.
        wanted = best if share >= 1 else first - share * (first - best)
        report, _, spent = next(one for one in seen if one[1] <= wanted)
        perplexity = report.evaluations["plug_in"].perplexity
        clock = report.metrics.get(CLOCK)
        found.append(Milestone(share, perplexity, report.round, clock, spent))
    return found


def totals(reports: Sequence[RoundReport]) -> Mapping[str, Any]:
    """Return what a run took its devices: `seconds` on the virtual clock, `joules`, and rows by `status`."""
    rows = [facts for report in reports for facts in report.devices.values()]
    statuses = sorted({facts["status"] for facts in rows})
    return {
        "seconds": next((report.metrics[CLOCK] for report in reversed(reports) if CLOCK in report.metrics), None),
        "joules": sum(facts.get("joules") or 0.0 for facts in rows),
        "bundle_bytes": sum(facts.get("bundle_bytes") or 0 for facts in rows),
        "status": {status: sum(facts["status"] == status for facts in rows) for status in statuses},
    }
