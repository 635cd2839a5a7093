"""`fedpeat report`, and the end of `fedpeat compare`: outputs from what is on the disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fedpeat.core import ConfigError, StorageError, nearest, read_json
from simulations.compare.collect import Run, find_runs, read_run
from simulations.compare.differences import default_of, varying
from simulations.compare.outputs import write_outputs
from simulations.compare.request import Request, read_request
from simulations.compare.variants import Comparison, Placed, compare
from simulations.compare.watch import show
from simulations.report import summarise, write_report
from simulations.settings import load_settings

PLAN, CELLS = "plan.json", "cells"
OWN_KEYS = ("baseline", "target", "metric")

HELP = """fedpeat report: write the report of a run, or the comparison of several, from what is on the disk.

usage: fedpeat report FOLDER [baseline=VALUE] [metric=NAME] [target=NUMBER]

  fedpeat report outputs/2025-01-31/12-00-00     one run: its report.html and figures anew
  fedpeat report multirun/2025-01-31/12-00-00    all runs below: finds what varies between them, and compares
  fedpeat report outputs/compare/...             what 'fedpeat compare' or 'fedpeat study' wrote, finished or not

  baseline=VALUE   value of the first varying key that others are compared with; default: the usual one
  metric=NAME      perplexity (the default), loss or accuracy of the plug-in model on held-out text, or choice_accuracy
  target=NUMBER    value to reach, for rounds and bytes to it; default: the baseline's mean at the end
"""


def report(arguments: Sequence[str], *, console: Console | None = None) -> int:
    """Write the outputs of the folder that `arguments` name; return the exit code.

    Raises:
        FedPeatError: For a mistake in what was asked, or a folder without runs.
    """
    if {"--help", "-h"} & set(arguments):
        print(HELP, end="")
        return 0
    console = console or Console(highlight=False)
    places = [word for word in arguments if "=" not in word and not word.startswith("-")]
    if len(places) != 1:
        found = f"{len(places)} folders are given" if places else "none is given"
        raise ConfigError("fedpeat report needs one folder", found, "fedpeat report FOLDER; see fedpeat report --help")
    folder = Path(places[0]).expanduser().absolute()
    options = [word for word in arguments if word != places[0]]
    for word in options:
        if word.partition("=")[0] not in OWN_KEYS:
            raise ConfigError(f"{word}", "not for fedpeat report", nearest(word.partition("=")[0], OWN_KEYS))
    request = read_request(options, known=(), own=OWN_KEYS)
    if (folder / PLAN).is_file():
        given = {word.partition("=")[0] for word in options}
        write_planned(folder, request=request, given=given, console=console)
        return 0
    runs = find_runs(folder) if folder.is_dir() else []
    if not runs:
        found = "it holds no run" if folder.is_dir() else "there is no such folder"
        raise StorageError(f"cannot report on {folder}", found, "name a run's folder, or one above several runs")
    if len(runs) == 1:
        _write_one(runs[0], console)
    else:
        _write(_found(runs, folder, request), folder, console)
    return 0


def write_planned(
    folder: Path, *, request: Request | None = None, given: set[str] | None = None, console: Console
) -> tuple[Comparison, Path]:
    """Write and show the outputs of a folder of `fedpeat compare`; what was `given` in `request` replaces its plan.

    Raises:
        StorageError: If the plan is damaged, or the folder cannot be written.
        ConfigError: If there is no such baseline.
    """
    plan = read_json(folder / PLAN)
    if plan.get("kind") == "study":
        from simulations.study.again import write_study

        given = given or set()
        return write_study(
            folder, metric=request.metric if request and "metric" in given else None, given=given, console=console
        )
    try:
        placed = [
            Placed(dict(cell["values"]), int(cell["seed"]), read_run(folder / CELLS / cell["name"]))
            for cell in plan["cells"]
        ]
        chosen: dict[str, Any] = {key: plan[key] for key in ("metric", "baseline", "target")}
        title = str(plan["title"])
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"cannot read {folder / PLAN}", f"{error!r}", "run fedpeat compare there again") from error
    chosen |= {key: getattr(request, key) for key in given or ()}
    _check_baseline(placed, chosen["baseline"] or None)
    chosen["baseline"] = chosen["baseline"] or None
    return _write(compare(placed, title=title, **chosen), folder, console)


def _write(comparison: Comparison, folder: Path, console: Console) -> tuple[Comparison, Path]:
    path = write_outputs(comparison, folder)
    show(comparison, console=console)
    console.print(Text(str(path)), soft_wrap=True)
    return comparison, path


def _check_baseline(placed: Sequence[Placed], baseline: str | None) -> None:
    if baseline is None:
        return
    known = [next(iter(one.values.values()), "") for one in placed]
    if baseline not in known:
        key = next(iter(placed[0].values), "what varies")
        raise ConfigError(f"baseline={baseline}", f"it is not among the values of {key}", nearest(baseline, known))


def _found(runs: Sequence[Run], folder: Path, request: Request) -> Comparison:
    """Return the comparison of runs that nobody planned together."""
    read = [run for run in runs if run.settings]
    if not read:
        raise StorageError(f"cannot compare what is in {folder}", "no run has a config.yaml", "name another folder")
    words = varying(read)
    newest: dict[tuple[str, ...], Placed] = {}
    for at, run in enumerate(read):
        values = {key: several[at] for key, several in words.items()}
        place = (*values.values(), str(run.seed))
        if place in newest and _age(newest[place].run) > _age(run):
            continue
        newest[place] = Placed(values, run.seed, run)
    placed = list(newest.values())
    first = next(iter(words), "")
    usual = default_of(first, load_settings()) if first and request.baseline is None else ""
    baseline = usual if usual in words.get(first, ()) else request.baseline
    _check_baseline(placed, request.baseline)
    notes = []
    if len(placed) < len(runs):
        notes.append(f"{len(runs) - len(placed)} runs are left out: of equal settings and seed the newest counts.")
    return compare(
        placed,
        title=folder.name,
        metric=request.metric,
        baseline=baseline,
        target=request.target,
        notes=notes,
    )


def _age(run: Run) -> float:
    path = run.folder / "summary.json"
    return path.stat().st_mtime if path.is_file() else 0.0


def _write_one(run: Run, console: Console) -> None:
    """Write one run's report anew; a run that was killed gets the summary that it could not write."""
    summary = run.summary or summarise(
        run.reports,
        config_hash=_line(run.folder / "config.sha"),
        versions={},
        status="interrupted",
        bundle_bytes=0,
        rounds_planned=run.settings.get("rounds"),
    )
    clients = run.folder / "clients.json"
    path = write_report(
        run.folder,
        run.reports,
        summary,
        settings=run.settings,
        clients=read_json(clients) if clients.is_file() else [],
    )
    console.print(Text(str(path)), soft_wrap=True)


def _line(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
