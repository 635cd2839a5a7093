"""Folders to rows: each run below a folder, what it found, and where its settings differ from the others'."""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedpeat.core import Evaluation, RoundReport, StorageError, read_json
from fedpeat.server import read_history
from simulations.compare.statistics import Point
from simulations.compare.workers import FAILURE

MODELS = ("personal", "plug_in")
"""Models by which a run is judged: each client's own where a method makes such, else the shared one."""


@dataclass(frozen=True)
class Run:
    """A run's folder, read.

    Attributes:
        folder: Where it is.
        settings: As resolved; empty where they cannot be read.
        status: finished, failed, interrupted, or missing (never begun).
        reason: Why it failed, in words.
        summary: As in `summary.json`; empty where there is none.
        reports: Of its rounds, oldest first.
    """

    folder: Path
    settings: Mapping[str, Any]
    status: str
    reason: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)
    reports: Sequence[RoundReport] = ()

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.settings.get("seed", 0))

    @property
    def model(self) -> str:
        """The model that the run is judged by."""
        seen = {name for report in self.reports for name in report.evaluations}
        found = self.summary.get("metrics", {})
        seen |= {name for name, result in found.items() if result["loss"] is not None}
        return next((model for model in MODELS if model in seen), "plug_in")

    def curve(self, metric: str) -> list[Point]:
        """Return the values of a metric, round after round, not finite ones too."""
        found, moved = [], 0
        model = self.model if any(self.model in report.evaluations for report in self.reports) else "plug_in"
        for report in self.reports:
            moved += report.bytes_down + report.bytes_up
            # Before the first round nobody has a model of their own yet.
            name = model if model in report.evaluations or report.round else "plug_in"
            if name in report.evaluations and getattr(report.evaluations[name], metric) is not None:
                found.append(Point(report.round, moved, value_of(report.evaluations[name], metric)))
        return found

    def final(self, metric: str) -> float | None:
        """Return a metric as it was at the end, NaN where training diverged; None where it was not evaluated."""
        if self.summary.get("evaluated_round") is None:
            return None
        found = self.summary["metrics"][self.model]
        if metric not in found:  # the data has no choices, or this model is not asked to choose
            return None
        value = found[metric]
        return math.nan if value is None else float(value)

    @property
    def aggregation_error(self) -> float | None:
        """How far aggregates were from the exact ones, mean over rounds; None where that was not measured."""
        found = [
            report.metrics["aggregation_error"] for report in self.reports if "aggregation_error" in report.metrics
        ]
        return sum(found) / len(found) if found else None


def value_of(result: Evaluation, metric: str) -> float:
    """Return a metric of an evaluation; NaN where its loss is not finite."""
    return getattr(result, metric) if math.isfinite(result.loss) else math.nan


def read_run(folder: Path) -> Run:
    """Read a run's folder, whatever state it is in."""
    settings = _settings(folder / "config.yaml")
    summary = _object(folder / "summary.json")
    failure = _object(folder / FAILURE)
    try:
        reports: Sequence[RoundReport] = read_history(folder)
    except StorageError as error:
        reports = ()
        failure = failure or ({"reason": str(error)} if (folder / "metrics.jsonl").exists() else {})
    status = "failed" if failure else summary.get("status", "interrupted" if folder.is_dir() else "missing")
    return Run(folder, settings, str(status), str(failure.get("reason", "")), summary, reports)


def find_runs(folder: Path) -> list[Run]:
    """Return all runs at or below a folder, in natural order of their paths (2 before 10)."""
    found = sorted(_run_folders(folder), key=lambda path: _natural(str(path)))
    return [read_run(path) for path in found]


def _run_folders(folder: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(folder):
        if "summary.json" in files or ("config.yaml" in files and {"config.sha", FAILURE} & set(files)):
            folders.clear()  # what a run holds are no runs
            yield Path(path)
        else:
            folders[:] = [name for name in folders if not name.startswith(".")]


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def _object(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except StorageError:
        return {}
    return value if isinstance(value, dict) else {}


def _settings(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def rounds_done(folder: Path) -> int:
    """Return how many lines a running cell's history has, to show how far it is."""
    try:
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def as_key(value: object) -> str:
    """Return a value's identity: equal for equal JSON-like values, whatever the order of keys."""
    return json.dumps(value, sort_keys=True, default=str)
