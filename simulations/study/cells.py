"""What was asked to cells: every combination of the axes' values, times data and seeds, and the references."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from fedpeat.core import ConfigError, content_hash
from simulations.baselines import whole_model_settings
from simulations.building import built
from simulations.compare.grid import Cell, Grid, folder_name, label_of, make_grid
from simulations.report.wording import NOTHING
from simulations.settings import conf_folder, settings_hash
from simulations.study.axes import AXES, Asked, Unfrozen
from simulations.study.depth import kept_of, middle_of
from simulations.study.nodes import NONE, Choice, emulator_of, trained_part, why_not

SETUP, WHOLE, FULL = "setup", "whole", "full"
"""Roles of a cell: one of the combinations; the whole model with the run's PEFT; the whole model, all its weights."""

PEFT_NAMES = {"lora": "LoRA", "lora_sb": "LoRA-SB", "full": "full"}
ALWAYS = ("selection", "kept")
SILENT = (NONE, "0", NOTHING)


@dataclass(frozen=True)
class Cells:
    """All cells of a study.

    Attributes:
        grid: The cells; setups come before references.
        roles: Each cell's role, by its name.
        axes: The values of each axis that is shown, in the order given.
        notes: What was left out and why, in sentences.
    """

    grid: Grid
    roles: Mapping[str, str]
    axes: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]


class _Setup(NamedTuple):
    selection: Choice
    kept: str
    compression: Choice
    distillation: Choice
    unfreeze: Unfrozen

    @property
    def texts(self) -> dict[str, str]:
        return {name: str(getattr(value, "text", value)) for name, value in zip(AXES, self, strict=True)}


def make_cells(asked: Asked) -> Cells:
    """Return the cells that were asked for, all their settings composed and checked, every emulator's builder too.

    Raises:
        FedPeatError: If an override is misspelt, a builder refuses its keywords, a middle has fewer blocks than are to
            be kept, or no combination is possible.
    """
    bases = make_grid(asked.run)
    shown = {name: values for name, values in asked.axes.items() if name in ALWAYS or len(values) > 1}
    found: list[tuple[str, Cell]] = []
    reasons: dict[str, set[str]] = {}
    setups = [_Setup(*chosen) for chosen in itertools.product(*(getattr(asked, name) for name in AXES))]
    for setup, bases_alike in itertools.product(setups, _by_variant(bases)):
        for base in bases_alike:
            cell = _setup_cell(asked, setup, base, shown, reasons)
            found += [(SETUP, cell)] if cell else []
    if not found:
        raise ConfigError("no combination is possible", "; ".join(reasons), "choose other values")
    _refuse_equal([cell for _, cell in found])
    if asked.reference:
        found += [made for base in bases.cells for made in _references(asked, base, shown)]
    cells = tuple(cell for _, cell in found)
    roles = {cell.name: role for role, cell in found}
    grid = Grid({**shown, **bases.swept}, bases.seeds, cells, "")
    left_out = [_left_out(reason, labels) for reason, labels in reasons.items()]
    return Cells(grid, roles, shown, (*_fixed(asked, shown), *left_out))


def _by_variant(bases: Grid) -> list[list[Cell]]:
    """Return the cells of each combination of the other swept keys."""
    size = len(bases.seeds)
    return [list(bases.cells[at : at + size]) for at in range(0, len(bases.cells), size)]


def _setup_cell(
    asked: Asked, setup: _Setup, base: Cell, shown: Mapping[str, Any], reasons: dict[str, set[str]]
) -> Cell | None:
    middle = middle_of(base.settings)
    kept = kept_of(setup.kept, middle)
    node = emulator_of(setup.selection, kept, setup.compression, setup.distillation)
    unfreeze = setup.unfreeze
    values = {name: text for name, text in setup.texts.items() if name in shown} | dict(base.values)
    reason = why_not(node, kept=kept, middle=middle, unfreeze=unfreeze.parts, policy=unfreeze.policy)
    if reason:
        reasons.setdefault(reason, set()).add(title_of(values))
        return None
    built(node)  # a builder checks its keywords
    client = {**base.settings["client"], "unfreeze": list(unfreeze.parts) or None, "unfreeze_policy": unfreeze.policy}
    settings = {**_conditions(asked, base.settings), "emulator": node, "client": client}
    settings["baselines"] = {**settings["baselines"], "extraction": asked.extraction}
    return _cell(values, base, settings, shares=_shares(node, settings))


def _conditions(asked: Asked, settings: Mapping[str, Any]) -> dict[str, Any]:
    pool = {"pool": True} if not asked.federated else {}
    return {**settings, "clients": {**settings["clients"], **pool}}


def _shares(node: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return a name for the distillation that cells share: it goes on in the cache, so one cell alone may work on it.

    All that it may depend on is in it; the run's seed too, by which text is dealt and batches are drawn.
    """
    trained = trained_part(node)
    if trained is None:
        return ""
    groups = {key: settings[key] for key in ("model", "data", "clients", "seed")}
    threads = {key: settings["evaluation"][key] for key in ("batch_size", "threads")}
    return content_hash({"trained": trained, **groups, **threads, "device": settings["client"]["device"]})


def _cell(values: Mapping[str, str], base: Cell, settings: Mapping[str, Any], *, shares: str = "") -> Cell:
    title, identity = title_of(values), settings_hash(settings)
    return Cell(folder_name(title, base.seed, identity), values, base.seed, settings, identity, title, shares)


def title_of(values: Mapping[str, str]) -> str:
    """Return what a setup is called: what is left as it is goes without saying.

    >>> title_of({"selection": "uniform", "kept": "2", "compression": "none", "distillation": "200"})
    'uniform, kept 2, 200 steps'
    >>> title_of({"selection": "whole model, LoRA", "kept": "—", "data": "text"})
    'whole model, LoRA, text'
    """
    own = {name: text for name, text in values.items() if name in AXES and (name == "kept" or text not in SILENT)}
    named = {"kept": "kept {}", "distillation": "{} steps"}
    parts = [named.get(name, "{}").format(text) for name, text in own.items() if text != NOTHING]
    others = {name: text for name, text in values.items() if name not in AXES}
    return ", ".join([*parts, *([label_of(others)] if others else [])])


def _references(asked: Asked, base: Cell, shown: Mapping[str, Any]) -> Iterator[tuple[str, Cell]]:
    """Yield the whole model with the run's PEFT on every block, and with all weights of its blocks."""
    whole = whole_model_settings(base.settings)
    own = {key: base.settings[key] for key in ("evaluate_every", "evaluation")}
    settings = _conditions(asked, {**whole, **own})
    kind = str(settings["peft"]["kind"])
    name = PEFT_NAMES.get(kind, str(settings["peft"].get("type", kind)))
    yield WHOLE, _cell(_reference_values(f"whole model, {name}", base, shown), base, settings)
    if kind != "full":
        rate = asked.full_learning_rate or _full_learning_rate()
        peft: Any = OmegaConf.to_container(OmegaConf.load(conf_folder() / "peft" / "full.yaml"))
        client = {**settings["client"], "learning_rate": rate}
        control = {**settings["control"], "rank": {}}
        full = {**settings, "peft": peft, "client": client, "control": control}
        yield FULL, _cell(_reference_values("whole model, full", base, shown), base, full)


def _reference_values(name: str, base: Cell, shown: Mapping[str, Any]) -> dict[str, str]:
    return {**dict.fromkeys(shown, NOTHING), "selection": name, **base.values}


def _full_learning_rate() -> float:
    """Return the learning rate of `experiment=fed_ft`: LoRA's own would be far too high for all weights."""
    overlay: Any = OmegaConf.load(conf_folder() / "experiment" / "fed_ft.yaml")
    return float(overlay.client.learning_rate)


def _refuse_equal(cells: list[Cell]) -> None:
    """Refuse values that come to the same, such as 4 and 0.5 of 8 blocks."""
    seen: dict[tuple[int, str], Cell] = {}
    for cell in cells:
        same = seen.setdefault((cell.seed, cell.hash), cell)
        differs = cell.values["kept"] != same.values["kept"]
        if same is not cell and differs:
            asked = f"kept={same.values['kept']},{cell.values['kept']}"
            raise ConfigError(asked, "both come to the same number of blocks", "leave one of them out")


def _fixed(asked: Asked, shown: Mapping[str, Any]) -> Iterator[str]:
    """Yield what all setups have in common and no table shows."""
    common = [f"{name} {values[0]}" for name, values in asked.axes.items() if name not in shown]
    told = [words for words in common if words.split()[1] not in SILENT]
    told += [] if asked.federated else ["one client with all data"]
    if told:
        yield f"All setups: {', '.join(told)}."


def _left_out(reason: str, labels: set[str]) -> str:
    several = f"{len(labels)} combinations are" if len(labels) > 1 else "1 combination is"
    return f"{several} left out: {reason}."
