"""`fedpeat compare`: from words on the command line to a folder of cells and what they show."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedpeat.core import locked, write_json
from simulations.compare.again import CELLS, PLAN, write_planned
from simulations.compare.estimate import estimate
from simulations.compare.grid import Cell, Grid, known_names, make_grid
from simulations.compare.outputs import encodable
from simulations.compare.request import Request, read_request
from simulations.compare.variants import Comparison
from simulations.compare.watch import Watch, fit
from simulations.compare.workers import RUN, Task, Workers, is_finished
from simulations.report.wording import NOTHING, duration, size

FAILED, INTERRUPTED = 1, 130

HELP = """fedpeat compare: run variants of a federation, each with several seeds, and say which is better.

usage: fedpeat compare key=A,B[,...] [seeds=N] [key=value ...] [--dry-run]

  fedpeat compare strategy=fed_avg,fed_adam seeds=5                  two strategies, five seeds each
  fedpeat compare peft.rank=4,8,16 clients.per_round=2,4 rounds=20   every combination
  fedpeat compare 'peft.targets=[q_proj,v_proj],null'                a [list] is one value
  fedpeat compare peft.rank=4,8 --dry-run                            what would run, and about how long

Any key or group of 'fedpeat simulate --help' can be given; one that is given several values is swept.
Keys of its own:

  seeds=3          seeds of each variant: a number (0, 1, 2) or a list, seeds=[4,7]
  baseline=VALUE   value of the first swept key that others are compared with; default: its first
  metric=NAME      perplexity (the default), loss or accuracy of the plug-in model on held-out text, or choice_accuracy
  target=NUMBER    value to reach, for rounds and bytes to it; default: the baseline's mean at the end
  jobs=N           cells at once; default: cores / threads of a cell, and 1 with engine=ray or on a GPU
  folder=FOLDER    where everything goes; default: outputs/compare/<date>/<time>

The same command with the folder of an earlier one goes on where that one stopped: finished cells are kept.
The folder gets comparison.html, .csv, .json, .md, .tex and figures/; cells/ holds the runs.
Exit code: 0 all cells finished, 1 some failed (the rest is compared), 2 a mistake in what was asked, 130 Ctrl-C.
"""


@dataclass(frozen=True)
class Work:
    """A comparison, or a study, that is ready to run."""

    request: Request
    grid: Grid
    folder: Path
    todo: tuple[Task, ...]
    done: tuple[Task, ...]
    jobs: int
    threads: int
    run: str

    @property
    def labels(self) -> dict[str, str]:
        """What each cell's variant is called, by the cell's name."""
        return {cell.name: cell.label for cell in self.grid.cells}


def compare(arguments: Sequence[str], *, run: str = RUN, console: Console | None = None) -> int:
    """Run a comparison; return the exit code.

    Args:
        arguments: As typed.
        run: `module:function` of what runs a cell.
        console: Where to write; standard output by default.

    Raises:
        FedPeatError: For a mistake in what was asked, or a folder that cannot be used; nothing has run then.
    """
    if {"--help", "-h"} & set(arguments):
        print(HELP, end="")
        return 0
    console = console or Console(highlight=False)
    work = prepared(arguments, run)
    plan = {"baseline": work.grid.baseline, "target": work.request.target}
    return carried_out(work, plan=plan, write=lambda folder: write_planned(folder, console=console), console=console)


def carried_out(
    work: Work, *, plan: Mapping[str, object], write: Callable[[Path], tuple[Comparison, Path]], console: Console
) -> int:
    """Run what is to do, or with --dry-run tell of it; return the exit code.

    Args:
        work: What there is to do.
        plan: What `write` needs beside the runs and what every plan holds.
        write: Writes the outputs of a folder, and returns what it found there.
        console: Where to write.

    Raises:
        FedPeatError: For a folder that cannot be used; nothing has run then.
    """
    if work.request.dry_run:
        _tell(work, console)
        return 0
    with locked(work.folder) as lock:
        write_json(work.folder / PLAN, encodable(_plan(work, plan)))
        interrupted = False
        try:
            _run(work, lock, console)
        except KeyboardInterrupt:
            console.print("interrupted: writing what there is; the same command with this folder=... goes on")
            interrupted = True
        comparison, _ = write(work.folder)
    if interrupted:
        return INTERRUPTED
    return 0 if all(placed.run.status == "finished" for placed in comparison.runs) else FAILED


def prepared(arguments: Sequence[str], run: str = RUN) -> Work:
    """Return what `arguments` ask for, checked: the cells, which of them are done, and how many run at once.

    Raises:
        ConfigError: For any mistake in an override.
    """
    request = read_request(arguments, known=known_names())
    return work_of(request, make_grid(request), run=run, place="outputs/compare")


def work_of(request: Request, grid: Grid, *, run: str, place: str) -> Work:
    """Return what there is to do in a folder, by default a new one below `place`."""
    folder = (request.folder or Path(time.strftime(f"{place}/%Y-%m-%d/%H-%M-%S"))).absolute()
    tasks = [Task(cell.name, cell.settings, at, cell.hash, cell.shares) for cell, at in _places(grid, folder)]
    done = tuple(task for task in tasks if is_finished(task))
    todo = tuple(task for task in tasks if task not in done)
    threads = max(max(task.settings[part]["threads"] for part in ("client", "evaluation")) for task in tasks)
    jobs = min(request.jobs or default_jobs(tasks, threads), max(len(todo), 1))
    return Work(request, grid, folder, todo, done, jobs, threads, run)


def _places(grid: Grid, folder: Path) -> Iterator[tuple[Cell, Path]]:
    """Yield each cell and its folder; a finished run of equal settings may stand under the name of another grid."""
    hashes = [cell.hash for cell in grid.cells]
    for cell in grid.cells:
        own = folder / CELLS / cell.name
        others = sorted((folder / CELLS).glob(f"*seed{cell.seed}-{cell.hash[:8]}"))
        # Cells that differ only in how they are executed share a hash: each needs a run of its own.
        kept = [] if own.exists() or hashes.count(cell.hash) > 1 else others
        found = (place for place in kept if is_finished(Task(cell.name, cell.settings, place, cell.hash)))
        yield cell, next(found, own)


def default_jobs(tasks: Sequence[Task], threads: int) -> int:
    """Return how many cells fit the machine: as many as its cores take; one where a cell takes all of it."""
    import torch

    engines = {str(task.settings["engine"]["_target_"]).rsplit(".", 1)[-1] for task in tasks}
    devices = {task.settings["client"]["device"] for task in tasks}
    if engines != {"serial"} or (devices != {"cpu"} and torch.cuda.is_available()):
        return 1
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return max(1, cores // threads)


def _plan(work: Work, also: Mapping[str, object]) -> dict[str, object]:
    """Return what the outputs need beside the runs, so that they can be written again."""
    places = {task.name: task.folder for task in (*work.todo, *work.done)}
    cells = [
        {"name": places[cell.name].name, "values": dict(cell.values), "seed": cell.seed, "label": cell.label}
        for cell in work.grid.cells
    ]
    common = {"title": work.folder.name, "words": list(work.request.words), "metric": work.request.metric}
    return {**common, **also, "cells": cells}


def _run(work: Work, lock: int, console: Console) -> None:
    """Run what is to do; tell of each cell as it ends."""
    labels = {cell.name: f"{cell.label}, seed {cell.seed}" for cell in work.grid.cells}
    with Watch(work.todo, labels=labels, metric=work.request.metric, console=console) as watch:
        watch.message(_in_words(work))
        if not work.todo:
            return
        with Workers(jobs=work.jobs, threads=work.threads, run=work.run, inherited=[lock]) as workers:
            for outcome in workers.outcomes(work.todo):
                if outcome is None:
                    watch.tick(workers.running.values())
                else:
                    watch.ended_with(outcome)


def _in_words(work: Work) -> str:
    cells, seeds = len(work.grid.cells), len(work.grid.seeds)
    several = "s" if cells != seeds else ""
    kept = f", {len(work.done)} finished before" if work.done else ""
    plural = "" if seeds == 1 else "s"
    return f"{cells // seeds} variant{several} x {seeds} seed{plural}{kept}; {work.jobs} at once; {work.folder}"


def _tell(work: Work, console: Console) -> None:
    """Print the cells, and what they are estimated to take."""
    labels = work.labels
    console.print(Text(_in_words(work)), soft_wrap=True)
    found = None
    if work.todo:
        with console.status("measuring a few steps") if console.is_terminal else contextlib.nullcontext():
            found = estimate(work.todo, labels, done=work.done, threads=work.threads, run=work.run)
    table = Table(header_style="bold", pad_edge=False)
    for heading in ("variant", "seed", "", "time", "bytes"):
        table.add_column(heading, justify="right" if heading in {"seed", "time", "bytes"} else "left")
    finished = {task.name for task in work.done}
    for cell in work.grid.cells:
        cost = found.costs.get(cell.name) if found else None
        told = (f"~ {duration(cost.seconds)}", f"~ {size(cost.bytes)}") if cost else (NOTHING, NOTHING)
        state = "finished" if cell.name in finished else "to run"
        words = (labels[cell.name], str(cell.seed), state, *told)
        table.add_row(*(Text(fit(word, console)) for word in words))
    console.print(table)
    if found is not None:
        whole = found.total([task.name for task in work.todo], work.jobs)
        if whole is not None:
            told = f"about {duration(whole.seconds)} with {work.jobs} at once, {size(whole.bytes)} down and up"
            console.print(Text(f"all {len(work.todo)} cells to run: {told}", style="bold"), soft_wrap=True)
        console.print(Text(found.how), soft_wrap=True)
