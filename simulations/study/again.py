"""The end of `fedpeat study`, and `fedpeat report` on its folder: outputs from what is on the disk."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from fedpeat.core import ConfigError, StorageError, read_json
from simulations.compare.again import CELLS, PLAN
from simulations.compare.collect import read_run
from simulations.compare.variants import Comparison, Placed
from simulations.compare.watch import show
from simulations.study.outputs import write_outputs
from simulations.study.results import Study, study_of
from simulations.study.table import SPARE, told_of
from simulations.study.words import notes

KIND = "study"
"""What a plan says it is one of."""


def read_planned(folder: Path, *, metric: str | None = None) -> Study:
    """Return what a folder of `fedpeat study` shows.

    Args:
        folder: With a plan, and cells.
        metric: To compare by; None for the plan's own.

    Raises:
        StorageError: If the plan is damaged.
    """
    plan = read_json(folder / PLAN)
    try:
        cells = plan["cells"]
        placed = [
            Placed(dict(cell["values"]), int(cell["seed"]), read_run(folder / CELLS / cell["name"])) for cell in cells
        ]
        study = study_of(
            placed,
            [plan["roles"][cell["name"]] for cell in cells],
            [str(cell["label"]) for cell in cells],
            title=str(plan["title"]),
            metric=metric or plan["metric"],
            axes=plan["axes"],
        )
        left_out = tuple(map(str, plan["notes"]))
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"cannot read {folder / PLAN}", f"{error!r}", "run fedpeat study there again") from error
    return replace(study, comparison=replace(study.comparison, notes=(*left_out, *notes(study))))


def write_study(
    folder: Path, *, metric: str | None = None, given: Collection[str] = (), console: Console
) -> tuple[Comparison, Path]:
    """Write and show the outputs of a folder of `fedpeat study`.

    Args:
        folder: With a plan, and cells.
        metric: To compare by; None for the plan's own.
        given: The options that were given, of `fedpeat report`.
        console: Where to write.

    Raises:
        StorageError: If the plan is damaged, or the folder cannot be written.
        ConfigError: If an option is not for a study.
    """
    wrong = sorted(set(given) - {"metric"})
    if wrong:
        found = "a study compares with its best, and has no target"
        raise ConfigError(f"{wrong[0]} was given for a study", found, "leave it out; metric=NAME can be given")
    study = read_planned(folder, metric=metric)
    path = write_outputs(study, folder)
    show(study.comparison, told=told_of(study), spare=SPARE, console=console)
    console.print(Text(str(path)), soft_wrap=True)
    return study.comparison, path
