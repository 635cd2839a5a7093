"""How long will a comparison take, and how much will it move? Told from finished cells, or from one measured step."""

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fedpeat.core import StorageError, read_json
from simulations.compare.collect import Run, read_run
from simulations.compare.workers import RUN, Task, Workers

LIMIT_SECONDS = 10.0
"""How long measuring may take, once the worker process has its imports behind it."""

IMPORT_SECONDS = 60.0
"""How long those may take."""

PROBE_STEPS = 2


@dataclass(frozen=True)
class Cost:
    """What one run takes: seconds and bytes both ways."""

    seconds: float
    bytes: float


@dataclass(frozen=True)
class Estimate:
    """Costs by a cell's name, and how they were found, in words. Cells that nothing is known of are missing."""

    costs: Mapping[str, Cost]
    how: str

    def total(self, names: Sequence[str], jobs: int) -> Cost | None:
        """Return what these cells take together, `jobs` at a time; None where one is unknown."""
        if not names or any(name not in self.costs for name in names):
            return None
        seconds = [self.costs[name].seconds for name in names]
        return Cost(max(sum(seconds) / jobs, *seconds), sum(self.costs[name].bytes for name in names))


def estimate(
    tasks: Sequence[Task], groups: Mapping[str, str], *, done: Sequence[Task], threads: int, run: str = RUN
) -> Estimate:
    """Return what cells will take.

    Args:
        tasks: The cells to run.
        groups: Each cell's variant, by its name; cells of a variant differ in their seed alone.
        done: Finished cells of the same comparison: if there are any, they tell.
        threads: Threads that a cell's libraries may use.
        run: `module:function` of what runs a cell.
    """
    if done:
        return _from_finished(tasks, groups, done)
    begin = time.monotonic()
    firsts = list({groups[task.name]: task for task in reversed(tasks)}.items())[::-1]
    measured = _measure(firsts, threads=threads, run=run)
    if not measured:
        return Estimate(
            {},
            f"no estimate: {PROBE_STEPS} steps, with loading and evaluation, did not end within {LIMIT_SECONDS:.0f} s",
        )
    how = (
        f"estimated from {PROBE_STEPS} training steps and one evaluation, measured in {time.monotonic() - begin:.0f} s"
    )
    first = next(iter(measured.values()))
    unknown = len(firsts) - len(measured)
    if unknown:
        how += f"; {unknown} of {len(firsts)} variants were not measured and taken as the first"
    if any(value for name, value in tasks[0].settings["baselines"].items() if name != "federated"):
        how += "; without the runs of baselines.*"
    return Estimate(
        {task.name: _extrapolated(task.settings, *measured.get(groups[task.name], first)) for task in tasks}, how
    )


def _from_finished(tasks: Sequence[Task], groups: Mapping[str, str], done: Sequence[Task]) -> Estimate:
    found: dict[str, list[Cost]] = {}
    for task in done:
        summary = read_run(task.folder).summary
        moved = summary["bytes"]["down"] + summary["bytes"]["up"]
        found.setdefault(groups[task.name], []).append(Cost(summary["seconds"]["total"], moved))
    every = [cost for costs in found.values() for cost in costs]
    costs = {}
    for task in tasks:
        same = found.get(groups[task.name], every)
        costs[task.name] = Cost(fmean(cost.seconds for cost in same), fmean(cost.bytes for cost in same))
    return Estimate(costs, f"estimated from the {len(done)} cells that are finished in this folder")


def _measure(firsts: Sequence[tuple[str, Task]], *, threads: int, run: str) -> dict[str, tuple[Run, int]]:
    """Run a few steps of each variant in a throw-away folder, as many variants as time allows."""
    measured: dict[str, tuple[Run, int]] = {}
    deadline, waiting = time.monotonic() + IMPORT_SECONDS, True
    with tempfile.TemporaryDirectory(prefix="fedpeat-", ignore_cleanup_errors=True) as name:
        probes = [
            Task(str(at), _probe(task.settings), Path(name) / str(at), task.hash) for at, (_, task) in enumerate(firsts)
        ]
        try:
            with Workers(jobs=1, threads=threads, run=run, grace_seconds=1.0) as workers:
                for outcome in workers.outcomes(probes):
                    if outcome is not None and outcome.status == "finished":
                        group = firsts[int(outcome.task.name)][0]
                        measured[group] = read_run(outcome.task.folder), _clients(outcome.task.folder)
                    if waiting and workers.are_ready:
                        deadline, waiting = time.monotonic() + LIMIT_SECONDS, False
                    if time.monotonic() > deadline:
                        raise TimeoutError
        except TimeoutError:
            pass
    return {group: (found, clients) for group, (found, clients) in measured.items() if len(found.reports) > 1}


def _probe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the shortest run that shows a variant's costs."""
    return {
        **settings,
        "rounds": 1,
        "clients": {**settings["clients"], "per_round": 1},
        "client": {**settings["client"], "local_steps": PROBE_STEPS},
        "server": {**settings["server"], "train": "off"},
        "control": {**settings["control"], "local_steps": {}},
        "privacy": {"kind": None},
        "baselines": dict.fromkeys(settings["baselines"], False) | {"federated": True},
    }


def _clients(folder: Path) -> int:
    try:
        return len(read_json(folder / "clients.json"))
    except StorageError:
        return 0


def _extrapolated(settings: Mapping[str, Any], probe: Run, clients: int) -> Cost:
    """Return a whole run's cost from a probe's parts."""
    first, last = probe.reports[0], probe.reports[-1]
    visit = next(iter(last.clients.values()), {})
    step = visit.get("train_seconds", 0.0) / PROBE_STEPS
    rounds, every = settings["rounds"], max(1, settings["evaluate_every"])
    per_round = min(settings["clients"]["per_round"] or clients, clients) or 1
    steps = per_round * settings["client"]["local_steps"]
    if settings["server"]["train"] not in {"off", False, None}:
        steps += settings["server"]["local_steps"] or settings["client"]["local_steps"]
    evaluations = 1 + math.ceil(rounds / every)
    once = probe.summary["seconds"]["total"] - step * PROBE_STEPS - first.seconds["evaluate"] - last.seconds["evaluate"]
    seconds = max(once, 0.0) + rounds * steps * step + evaluations * last.seconds["evaluate"]
    visits = 1 if settings["clients"]["pool"] else per_round
    return Cost(seconds, rounds * visits * (last.bytes_down + last.bytes_up))
