"""The runs that response curves are fitted to: which plans they follow, and what is read of them."""

import itertools
import random
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedpeat.control.fit import Trial
from fedpeat.core import ConfigError, StorageError, read_json, seed_for
from fedpeat.devices import CLOCK
from fedpeat.server import read_history
from simulations.building import built
from simulations.compare.workers import Task
from simulations.control import RANDOM
from simulations.ladder import keeping
from simulations.settings import load_settings, settings_hash

Settings = Mapping[str, Any]
FIT, HELD_OUT = "fit", "held-out"
SEEDS = {FIT: 3, HELD_OUT: 2}
"""Seeds of runs, one after the other; those of held-out runs follow on those of the others."""


class Levels(NamedTuple):
    """What plans are made of.

    Attributes:
        kept: Numbers of blocks that emulators keep; None where an emulator keeps no number of them.
        ranks: PEFT ranks; None for the run's own.
        steps: Local steps.
        asked: How many take part.
    """

    kept: tuple[int | None, ...]
    ranks: tuple[int | None, ...]
    steps: tuple[int, ...]
    asked: tuple[int, ...]


class Planned(NamedTuple):
    """A run to measure.

    Attributes:
        name: Of its folder.
        part: `fit` or `held-out`.
        settings: Plain and resolved.
        random: Whether its plan changes from round to round.
    """

    name: str
    part: str
    settings: dict[str, Any]
    random: bool

    def task(self, folder: Path) -> Task:
        """Return the work of it, below a folder."""
        return Task(self.name, self.settings, folder / self.name, settings_hash(self.settings))


def fit_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the settings that all runs have in common.

    Args:
        overrides: As for `fedpeat simulate`; `control=random devices=cell` unless they say otherwise.

    Raises:
        ConfigError: If a setting cannot be had, another controller is chosen, or the emulator is re-aligned.
    """
    given = {override.partition("=")[0] for override in overrides}
    first = [f"{key}={value}" for key, value in (("control", RANDOM), ("devices", "cell")) if key not in given]
    settings = load_settings([*first, *overrides])
    if settings["control"].get("kind") != RANDOM:
        raise ConfigError("fedpeat control fit makes plans by control=random", "another is chosen", "leave it out")
    if settings["realign"]["every"]:
        found = "a run's history does not tell when the emulator was re-aligned"
        raise ConfigError("fedpeat control fit does not go with realign.every", found, "leave it out")
    settings |= {"evaluate_every": 1, "export": False, "report": False, "checkpoints": 1}
    settings["evaluation"]["costs"] = False
    return settings


def levels_in(settings: Settings, clients: int) -> Levels:
    """Return the levels of each choice: those of the run's menu, and a quarter, half and all of the clients.

    Raises:
        ConfigError: If the emulator keeps no number of blocks but others are asked for.
    """
    menu, emulator, peft = settings["control"]["menu"], settings["emulator"], settings["peft"]
    kept = tuple(sorted({*_kept_in(emulator), *(menu["kept_blocks"] or ())})) or (None,)
    steps, own = settings["client"]["local_steps"], peft.get("rank")
    mixes = built(settings["strategy"]).mixes_ranks and peft["kind"] == "lora"
    ranks = menu["ranks"] or (sorted({max(1, own // 4), max(1, own // 2), own}) if mixes else [None])
    return Levels(
        kept=kept,
        ranks=tuple(ranks),
        steps=tuple(menu["steps"] or sorted({max(1, steps // 2), steps, 2 * steps})),
        asked=tuple(sorted({max(1, clients // 4), max(1, clients // 2), clients})),
    )


def _kept_in(emulator: Mapping[str, Any]) -> tuple[int, ...]:
    stages = emulator.get("stages", {}).values()
    return tuple(node["kept_blocks"] for node in (emulator, *stages) if "kept_blocks" in node)[:1]


def planned(settings: Settings, levels: Levels, *, runs: int, held_out: int) -> list[Planned]:
    """Return the runs to make, held-out ones among the others so that any first part of them is of use.

    Two thirds of those to fit follow one plan throughout, drawn without repetition from all combinations of levels as
    long as there are any; the others switch in every round, between everything or between fewer steps, with any number
    of clients. Held-out ones are half and half, of combinations that no other run has, and with seeds of their own.

    Args:
        settings: What all have in common; its seed is the first.
        levels: Of each choice.
        runs: To fit.
        held_out: To judge by.
    """
    draw = random.Random(seed_for(settings["seed"], "fit"))
    every = list(itertools.product(*levels))
    draw.shuffle(every)
    apart = min(held_out // 2, len(every) // 4)
    fixed = runs - runs // 3
    others = every[apart:]
    combinations = {HELD_OUT: every[:apart], FIT: [others[place % len(others)] for place in range(fixed)]}
    found: dict[str, list[Planned]] = {}
    made: set[str] = set()
    for part, count in ((FIT, runs), (HELD_OUT, held_out)):
        first = settings["seed"] + (SEEDS[FIT] if part == HELD_OUT else 0)
        own = [_steady(settings, chosen) for chosen in combinations[part]]
        own += [_switching(settings, levels, draw) for _ in range(count - len(own))]
        draw.shuffle(own)
        found[part] = [_named(one, part, place, first + place % SEEDS[part], made) for place, one in enumerate(own)]
    return _interleaved(found[FIT], found[HELD_OUT])


def _steady(settings: Settings, chosen: tuple[Any, ...]) -> tuple[dict[str, Any], str]:
    """Return the settings of a run that follows one plan, and what it is called."""
    kept, rank, steps, asked = chosen
    own = _with_menu(settings, {"kept_blocks": [], "ranks": [rank] if rank else None, "steps": [steps]}, asked)
    if kept is not None:
        own["emulator"] = keeping(own["emulator"], kept)
    facts = {"kept": kept, "rank": rank, "steps": steps, "asked": asked}
    return own, "-".join(f"{key}{value}" for key, value in facts.items() if value is not None)


def _switching(settings: Settings, levels: Levels, draw: random.Random) -> tuple[dict[str, Any], str]:
    """Return the settings of a run whose plan changes in every round, and what it is called."""
    asked, width = draw.randint(1, levels.asked[-1]), draw.randint(1, len(levels.steps))
    first = draw.randint(0, len(levels.steps) - width)
    steps = levels.steps[first : first + width]
    menu = {"steps": list(steps), "ranks": list(levels.ranks) if levels.ranks[0] else None}
    return _with_menu(settings, menu, asked), f"switching-steps{'_'.join(map(str, steps))}-asked{asked}"


def _with_menu(settings: Settings, menu: Mapping[str, Any], asked: int) -> dict[str, Any]:
    own = deepcopy(dict(settings))
    own["control"]["menu"] |= {**menu, "shares": [1.0]}
    own["clients"]["per_round"] = asked
    return own


def _named(one: tuple[dict[str, Any], str], part: str, place: int, seed: int, made: set[str]) -> Planned:
    """Return a run with a seed, or with the next one apart from all others' if that run is made already; note it."""
    settings, called = one
    while settings_hash({**settings, "seed": seed}) in made:
        seed += sum(SEEDS.values())
    settings = {**settings, "seed": seed}
    made.add(settings_hash(settings))
    return Planned(f"{part}-{place:03d}-{called}-seed{seed}", part, settings, "switching" in called)


def _interleaved(many: Sequence[Planned], few: Sequence[Planned]) -> list[Planned]:
    """Return all in one order, each kind evenly spread."""
    places = [((place + 0.5) / len(group), one) for group in (many, few) for place, one in enumerate(group)]
    return [one for _, one in sorted(places, key=lambda pair: pair[0])]


def trial_in(folder: Path, largest: int | None) -> Trial:
    """Return what a finished run's folder tells of it.

    Args:
        folder: Of the run.
        largest: The rank that counts as all; None where there is one rank alone.

    Raises:
        StorageError: If it has no plug-in loss of each round, or a file is missing or damaged.
    """
    try:
        reports = read_history(folder)
        rows = {one["client"]: float(one["rows"]) for one in read_json(folder / "clients.json")}
        summary = read_json(folder / "summary.json")
        sizes = summary.get("emulators") or {"default": summary["emulator"]}
        kept = {key: 1.0 if size["kept_share"] is None else float(size["kept_share"]) for key, size in sizes.items()}
        losses = [report.evaluations["plug_in"].loss for report in reports]
        devices = [[_work(report.devices.get(client), kept, largest) for client in rows] for report in reports[1:]]
    except (KeyError, TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
        raise StorageError(f"cannot read the run in {folder}", found, "remove the folder: it is run anew") from error
    work = np.array(devices, dtype=float).reshape(len(devices), len(rows), 4)
    held = np.array(list(rows.values()))
    return Trial(
        name=folder.name,
        losses=np.array(losses),
        share=work[..., 0] * held / held.sum(),
        kept=work[..., 1],
        rank=work[..., 2],
        steps=work[..., 3],
        seconds=np.array([report.metrics.get(CLOCK, 0.0) for report in reports]),
    )


def _work(
    facts: Mapping[str, Any] | None, kept: Mapping[str, float], largest: int | None
) -> tuple[float, float, float, float]:
    """Return whether a device counted, the shares of the middle and of the rank that it had, and its steps."""
    if not facts or facts["status"] != "counted":
        return 0.0, 1.0, 1.0, 1.0
    rank = facts["rank"] / largest if largest and facts["rank"] else 1.0
    return 1.0, kept[facts["emulator"]], rank, float(facts["local_steps"])
