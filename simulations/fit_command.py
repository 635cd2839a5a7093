"""`fedpeat control fit`: response curves from measured runs."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedpeat.control.fit import Fitted, Trial, fit, foretold, spearman
from fedpeat.core import ConfigError, locked, write_json
from simulations.compare.workers import RUN, Task, Workers, is_finished
from simulations.corpus import prepare_data
from simulations.fitting import FIT, HELD_OUT, Planned, fit_settings, levels_in, planned, trial_in
from simulations.fitting_figure import write_figure
from simulations.report.wording import duration

OWN = {"runs": 42, "held_out": 10, "jobs": 1}
AIM = 0.7
"""Rank correlation on held-out plans that is asked of a fit before a policy trained by it may be a default."""

FILE, FIGURE, FOLDER = "curves.json", "curves.png", "runs"

NOW = partial(print, flush=True)

USAGE = """usage: fedpeat control fit folder=FOLDER [runs=42] [held_out=10] [jobs=1] [key=value ...]

Makes real runs with plans that differ, and fits response curves to them:

  folder=FOLDER    where everything goes: runs/ (a folder a run), curves.json and curves.png
  runs=42          runs to fit: two thirds follow one plan throughout, the others switch in every round
  held_out=10      runs of plans that no other run has, to judge the fit by
  jobs=1           runs at once

All other keys are those of `fedpeat simulate` with control=random devices=cell: model, data, rounds, control.menu.
The same command goes on where an earlier one stopped: finished runs are kept.
Use the fit by control.curves=FOLDER/curves.json.
Exit code: 0 done, 1 a run failed (the rest is fitted), 2 a mistake in what was asked, 130 Ctrl-C.
"""


def control_fit(arguments: Sequence[str], *, run: str = RUN, say: Callable[[str], None] = NOW) -> int:
    """Run `fedpeat control fit`; return its exit code.

    Args:
        arguments: As typed.
        run: `module:function` of what makes a run.
        say: Told what is being done, and what came of it.

    Raises:
        FedPeatError: For a mistake in what was asked, a folder that cannot be used, or too few runs that finished.
    """
    if {"--help", "-h"} & set(arguments):
        print(USAGE, end="")
        return 0
    folder, own, overrides = split_arguments(arguments)
    settings = fit_settings(overrides)
    levels = levels_in(settings, len(prepare_data(settings).clients))
    plans = planned(settings, levels, runs=own["runs"], held_out=own["held_out"])
    with locked(folder) as lock:
        tasks = {plan.name: plan.task(folder / FOLDER) for plan in plans}
        failed = _made(
            [task for task in tasks.values() if not is_finished(task)], len(tasks), own["jobs"], (run, lock), say
        )
        largest = max((rank for rank in levels.ranks if rank), default=None)
        done = [plan for plan in plans if is_finished(tasks[plan.name])]
        trials = {plan.name: trial_in(tasks[plan.name].folder, largest) for plan in done}
        say(written(folder, settings, done, trials))
    return 1 if failed else 0


def split_arguments(arguments: Sequence[str]) -> tuple[Path, dict[str, int], list[str]]:
    """Return the folder, the command's other keys, and what is left for the runs.

    Raises:
        ConfigError: If there is no folder, or a number is none.

    >>> folder, own, rest = split_arguments(["folder=f", "runs=50", "rounds=3"])
    >>> str(folder), own["runs"], rest
    ('f', 50, ['rounds=3'])
    """
    folder, own, rest = None, dict(OWN), []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "folder":
            folder = Path(value).expanduser() if value else None
        elif key not in own:
            rest.append(argument)
        elif value.isdecimal() and (int(value) > 0 or key == "held_out"):
            own[key] = int(value)
        else:
            raise ConfigError(f"cannot use {argument}", "it is a number, 1 or more", f"write {key}={OWN[key]}")
    if folder is None:
        raise ConfigError("fedpeat control fit needs folder=FOLDER", "it is not given", "name a folder")
    return folder, own, rest


def _made(todo: Sequence[Task], count: int, jobs: int, by: tuple[str, int], say: Callable[[str], None]) -> int:
    """Make runs, tell of each; return how many failed."""
    say(f"{count} runs, {count - len(todo)} finished before")
    begin, failed = time.monotonic(), 0
    if not todo:
        return 0
    run, lock = by
    with Workers(jobs=jobs, threads=1, run=run, inherited=[lock]) as workers:
        outcomes = (outcome for outcome in workers.outcomes(todo) if outcome)
        for number, outcome in enumerate(outcomes, 1):
            failed += outcome.status != "finished"
            left = duration((time.monotonic() - begin) / number * (len(todo) - number))
            found = outcome.reason or f"in {duration(outcome.seconds)}"
            say(f"{count - len(todo) + number}/{count}  {outcome.task.name}  {outcome.status} {found}; {left} left")
    return failed


def written(folder: Path, settings: Mapping[str, Any], plans: Sequence[Planned], trials: Mapping[str, Trial]) -> str:
    """Fit curves to runs, write them and their figure, and return what was found, in words.

    Args:
        folder: Where to write.
        settings: What all runs have in common.
        plans: Of the runs.
        trials: What was measured, by the plans' names.

    Raises:
        ConfigError: If there are too few runs.
    """
    by_part = {part: [trials[plan.name] for plan in plans if plan.part == part] for part in (FIT, HELD_OUT)}
    found = fit(by_part[FIT], unit_steps=float(settings["client"]["local_steps"]), seed=settings["seed"])
    judged = judgement(found, by_part[HELD_OUT])
    facts = {
        "fitted_to": fitted_to(settings, by_part[FIT]),
        "runs": len(by_part[FIT]),
        "deviations": found.deviations,
        "residual": found.residual,
        "spread": found.spread,
        "held_out": judged,
    }
    write_json(folder / FILE, {"curves": found.curves.to_json(), **facts})
    ends = {part: [(foretold(found.curves, one)[-1], one.losses[-1]) for one in own] for part, own in by_part.items()}
    write_figure(folder / FIGURE, ends)
    return in_words(found, judged, len(by_part[FIT]), folder / FILE)


def judgement(found: Fitted, trials: Sequence[Trial]) -> dict[str, Any]:
    """Return how well curves foretell runs that they were not fitted to.

    Returns:
        `runs`; rank correlations of foretold and measured loss, as shares of the loss before training: `spearman_final`
        after the last round, `spearman_mean` of the mean of all rounds (which an objective with `quality_of=every`
        counts), `spearman_rounds`: after a round, the mean over rounds; `residual`: root mean square over all rounds,
        nats a token; `passed`: whether the first comes to what is asked.
    """
    pairs = [(foretold(found.curves, one) / one.losses[0], one.losses / one.losses[0]) for one in trials]
    rounds = min((len(one.losses) for one in trials), default=1)
    by_round = [spearman([told[at] for told, _ in pairs], [seen[at] for _, seen in pairs]) for at in range(1, rounds)]
    final = spearman([told[-1] for told, _ in pairs], [seen[-1] for _, seen in pairs])
    mean = spearman([told[1:].mean() for told, _ in pairs], [seen[1:].mean() for _, seen in pairs])
    off = [(foretold(found.curves, one) - one.losses)[1:] for one in trials]
    return {
        "runs": len(trials),
        "spearman_final": final,
        "spearman_mean": mean,
        "spearman_rounds": float(np.mean(by_round)) if by_round else float("nan"),
        "residual": float(np.sqrt(np.mean(np.concatenate(off) ** 2))) if off else float("nan"),
        "passed": final >= AIM,
    }


def fitted_to(settings: Mapping[str, Any], trials: Sequence[Trial]) -> dict[str, Any]:
    """Return what was measured: all that a reader must know to tell whether the fit is of any use elsewhere."""
    client, peft = settings["client"], settings["peft"]
    return {
        "model": settings["model"]["name"],
        "data": settings["data"]["kind"],
        "strategy": settings["strategy"]["_target_"].rpartition(".")[2],
        "emulator": settings["emulator"]["_target_"].rpartition(".")[2],
        "peft": peft["kind"],
        "rank": peft.get("rank"),
        "clients": int(max(one.share.shape[1] for one in trials)),
        "rounds": int(max(len(one.share) for one in trials)),
        "batch_size": client["batch_size"],
        "learning_rate": client["learning_rate"],
        "optimizer": client["optimizer"],
        "max_rows": settings["evaluation"]["max_rows"],
    }


def in_words(found: Fitted, judged: Mapping[str, Any], runs: int, path: Path) -> str:
    """Return what a fit found as lines of text."""
    lines = [f"fitted to {runs} runs: {found.residual:.4f} nats a token off (root mean square), where losses"]
    lines += [f"after a round spread by {found.spread:.4f}", "", f"{'parameter':<12}{'value':>10}{'deviation':>12}"]
    for name, value in asdict(found.curves).items():
        off = found.deviations.get(name)
        lines.append(f"{name:<12}{value:>10.4g}" + (f"{off:>12.2g}" if off is not None else f"{'given':>12}"))
    final, rounds = judged["spearman_final"], judged["spearman_rounds"]
    lines += ["", f"on {judged['runs']} held-out plans: rank correlation {final:.2f} of the final loss"]
    lines += [
        f"({judged['spearman_mean']:.2f} of the mean loss of all rounds; {rounds:.2f} after a round, on average);"
    ]
    lines += [f"{judged['residual']:.4f} nats a token off"]
    lines += [] if judged["passed"] else [f"that is below {AIM}: train no policy by it that others are to use"]
    return "\n".join([*lines, f"use it by control.curves={path}"])
