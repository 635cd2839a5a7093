"""A study as files: the page, tables for scripts and papers, figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpeat.core import write_json, write_text
from simulations.compare.outputs import below, csv_of, encodable, plain_interval, write_readable
from simulations.study.results import Setup, Study
from simulations.study.table import told_of


def write_outputs(study: Study, folder: Path) -> Path:
    """Write `study.{html,csv,json,md,tex}` and `figures/*.png`; return the page's path.

    Raises:
        StorageError: If the folder cannot be written.
    """
    from simulations.study import figures  # matplotlib takes half a second to import

    told = told_of(study)
    write_text(folder / f"{told.stem}.csv", csv_of(rows(study, folder)))
    write_json(folder / f"{told.stem}.json", encodable(to_json(study, folder)))
    return write_readable(study.comparison, told, figures.draw(study), folder)


def rows(study: Study, folder: Path) -> list[dict[str, Any]]:
    """Return each run as plain numbers and text, the best setups' first."""
    every = (*study.setups, *study.references)
    names = list(dict.fromkeys(name for setup in every for name in setup.measures))
    return [_row(setup, at, names, folder) for setup in every for at in range(len(setup.placed))]


def _row(setup: Setup, at: int, names: list[str], folder: Path) -> dict[str, Any]:
    placed = setup.placed[at]
    run = placed.run
    return {
        "folder": below(run.folder, folder),
        "role": setup.role,
        **placed.values,
        "seed": placed.seed,
        "status": run.status,
        "reason": run.reason,
        **{name: setup.measures.get(name, {}).get(placed.seed) for name in names},
        "config_hash": run.summary.get("config_hash"),
    }


def to_json(study: Study, folder: Path) -> dict[str, Any]:
    """Return everything, at full precision."""
    told = told_of(study)
    return {
        "title": study.comparison.title,
        "metric": study.comparison.metric,
        "lower_is_better": study.lower_is_better,
        "axes": {name: list(values) for name, values in study.axes.items()},
        "sentences": list(told.sentences),
        "notes": list(study.comparison.notes),
        "setups": [_setup(setup) for setup in study.setups],
        "references": [_setup(setup) for setup in study.references],
        "runs": rows(study, folder),
    }


def _setup(setup: Setup) -> Mapping[str, Any]:
    return {
        "values": dict(setup.values),
        "label": setup.label,
        "role": setup.role,
        "seeds": sorted(setup.measures.get("plug_in", {})),
        "verdict": setup.verdict,
        "behind_the_best": plain_interval(setup.behind),
        "diverged": setup.diverged,
        "measures": {name: plain_interval(setup.interval(name)) for name in setup.measures},
    }
