"""The table of a study in words: the same for a terminal, a page, Markdown and LaTeX."""

from collections.abc import Callable, Sequence

from simulations.compare.table import Column, Told, common_places, precise, with_error
from simulations.report.wording import NOTHING, count, duration, number, printable, size
from simulations.study.axes import AXES
from simulations.study.cells import SETUP
from simulations.study.results import Setup, Study
from simulations.study.words import sentences

SPARE = (
    *("seeds", "curious client", "step", "bundle", "parameters", "before tuning", "transfer gap", "emulated"),
    *("memory", "behind the best"),
)
"""Columns that a narrow terminal can do without, the first ones first; the page has them all."""

VERDICTS = {"best": "best", "worse": "yes, worse", "within noise": "no", "reference": NOTHING}


def told_of(study: Study) -> Told:
    """Return what all outputs of a study tell."""
    return Told("study", sentences(study), columns(study), (*study.setups, *study.references))


def columns(study: Study) -> list[Column]:
    """Return the columns that have something to tell."""
    every = (*study.setups, *study.references)
    found = [Column(printable(key), _value_of(key), left=True) for key in _keys(study)]
    found.append(Column(f"plug-in {study.metric_words}", _result(every)))
    if len(study.setups) > 1:
        places = common_places([setup.behind for setup in study.setups if setup.behind])
        found.append(Column("behind the best", lambda setup: _behind(setup, places)))
        found.append(Column("beyond noise", _verdict, left=True))
    found += [
        Column("emulated", _measure(study.setups, "emulated")),
        Column("before tuning", _before),
        Column("privacy margin", _measure(study.setups, "privacy_margin", signed=True)),
    ]
    optional = {"transfer gap": ("transfer_gap", True), "curious client": ("extraction", False)}
    for heading, (name, signed) in optional.items():
        if any(setup.interval(name) for setup in every):
            found.append(Column(heading, _measure(every, name, signed=signed)))
    found += [
        Column("parameters", _cost("emulator_parameters", "middle_parameters", _count)),
        Column("bundle", _cost("bundle_bytes", "full_bytes", size)),
        Column("memory", _cost("client_memory_bytes", "full_memory_bytes", size)),
        Column("step", _cost("step_seconds", "full_step_seconds", duration)),
    ]
    if any(len(setup.measures.get("plug_in", {})) != len(setup.placed) for setup in every):
        found.append(Column("seeds", _seeds))
    return found


def _keys(study: Study) -> list[str]:
    """Return the keys that are shown: the axes first, then what else is swept."""
    every = list(study.comparison.keys)
    return [key for key in AXES if key in every] + [key for key in every if key not in AXES]


def _value_of(key: str) -> Callable[[Setup], str]:
    return lambda setup: printable(setup.values[key])


def _result(every: Sequence[Setup]) -> Callable[[Setup], str]:
    places = common_places([setup.result for setup in every if setup.result])

    def words(setup: Setup) -> str:
        if setup.result is not None:
            return with_error(setup.result, places=places)
        if setup.diverged:
            several = f" in {setup.diverged} of {len(setup.placed)}" if len(setup.placed) > 1 else ""
            return f"diverged{several}"
        statuses = {placed.run.status for placed in setup.placed}
        known = ("failed", "interrupted")
        return next((status for status in known if status in statuses), "not run" if "missing" in statuses else NOTHING)

    return words


def _measure(every: Sequence[Setup], name: str, *, signed: bool = False) -> Callable[[Setup], str]:
    places = common_places([found for setup in every if (found := setup.interval(name))])

    def words(setup: Setup) -> str:
        found = setup.interval(name)
        hidden = setup.role != SETUP and name != "transfer_gap"  # of a reference, emulated and full are one
        return NOTHING if found is None or hidden else with_error(found, signed=signed, places=places)

    return words


def _before(setup: Setup) -> str:
    return precise(setup.mean("emulator_zero_shot")) if setup.role == SETUP else NOTHING


def _count(value: float | None) -> str:
    """Return a count of parameters.

    >>> [_count(value) for value in (512, 791_552, 135e6, None)]
    ['512', '792 k', '135 M', '—']
    """
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value is not None and value >= unit:
            return f"{number(value / unit)} {name}"
    return count(value)


def _behind(setup: Setup, places: int | None) -> str:
    return NOTHING if setup.behind is None else with_error(setup.behind, signed=True, places=places)


def _verdict(setup: Setup) -> str:
    if setup.verdict == "unknown" and setup.behind is not None:
        return f"unknown ({setup.behind.seeds} seed)"
    return VERDICTS.get(setup.verdict, NOTHING)


def _cost(own: str, full: str, shown: Callable[[float | None], str]) -> Callable[[Setup], str]:
    def words(setup: Setup) -> str:
        value, whole = setup.mean(own), setup.mean(full)
        if value is None or not whole or setup.role != SETUP:
            return NOTHING if not whole and not value else shown(value)
        return f"{shown(value)} ({100 * value / whole:.0f} %)"

    return words


def _seeds(setup: Setup) -> str:
    done, planned = len(setup.measures.get("plug_in", {})), len(setup.placed)
    return str(done) if done == planned else f"{done} of {planned}"
