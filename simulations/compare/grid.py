"""Overrides to cells: every combination of the values that are swept, times the seeds."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from fedpeat.core import ConfigError, nearest
from simulations.compare.request import Request, shown, values_of
from simulations.settings import composed, conf_folder, settings_hash, to_settings

NAME_LENGTH = 80
"""Longest readable part of a cell's folder name."""


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        name: Of its folder.
        values: The value of each swept key, as shown.
        seed: Its seed.
        settings: Plain and resolved.
        hash: Of what decides its result.
        title: What its variant is called, if not as its values say.
        shares: What it works out once with others (see `simulations.compare.workers.Task`).
    """

    name: str
    values: Mapping[str, str]
    seed: int
    settings: Mapping[str, Any]
    hash: str
    title: str = ""
    shares: str = ""

    @property
    def label(self) -> str:
        """What its variant is called."""
        return self.title or label_of(self.values)


@dataclass(frozen=True)
class Grid:
    """All cells of a comparison.

    Attributes:
        swept: The values of each swept key, as shown, in the order given.
        seeds: Seeds of each variant.
        cells: Variant after variant, each with all its seeds.
        baseline: The value of the first swept key that others are compared with; empty if nothing is swept.
    """

    swept: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    baseline: str


@cache
def option_names() -> dict[str, list[str]]:
    """Return the options of each config group."""
    folders = (path for path in sorted(conf_folder().iterdir()) if path.is_dir())
    return {folder.name: sorted(option.stem for option in folder.glob("*.yaml")) for folder in folders}


@cache
def known_names() -> set[str]:
    """Return the top-level keys and groups of a run's config."""
    return {str(key) for key in composed()} | set(option_names())


def make_grid(request: Request, *, compose: Callable[[Sequence[str]], DictConfig] = composed) -> Grid:
    """Return the cells that `request` asks for, all their settings composed and checked.

    Args:
        request: As asked.
        compose: From overrides to a config.

    Raises:
        ConfigError: If an override of any cell is misspelt, or there is no such baseline.
    """
    options = option_names()
    swept = {
        item.get_key_element(): values_of(item, options.get(item.key_or_group, ()))
        for item in request.overrides
        if item.is_sweep_override()
    }
    names = {key: key.lstrip("+") for key in swept}
    labels = {names[key]: tuple(shown(_value(text)) for text in texts) for key, texts in swept.items()}
    for key, several in labels.items():
        twice = [value for value in several if several.count(value) > 1]
        if twice:
            raise ConfigError(f"{key}={','.join(several)}", f"{twice[0]} is given twice", "give each value once")
    cells = [
        cell
        for chosen in itertools.product(*swept.values())
        for cell in _variant(request, dict(zip(swept, chosen, strict=True)), compose)
    ]
    return Grid(labels, request.seeds, tuple(cells), _baseline(request.baseline, labels))


def _variant(request: Request, chosen: Mapping[str, str], compose: Callable[[Sequence[str]], DictConfig]) -> list[Cell]:
    """Return the cells of one combination; it is composed once for all seeds, then resolved with each."""
    config = compose(_overrides(request.overrides, chosen))
    values = {key.lstrip("+"): shown(_value(text)) for key, text in chosen.items()}
    cells = []
    for seed in request.seeds:
        OmegaConf.update(config, "seed", seed)
        settings = {**to_settings(config), "export": False, "report": False}
        identity = settings_hash(settings)
        name = folder_name(label_of(values) if values else "", seed, identity)
        cells.append(Cell(name, values, seed, settings, identity))
    return cells


def _overrides(items: Sequence[Override], chosen: Mapping[str, str]) -> list[str]:
    """Return the overrides of one combination; clients run in the cell's own process unless an engine is asked for."""
    lines = []
    for item in items:
        key = item.get_key_element()
        lines.append(f"{key}={chosen[key]}" if key in chosen else str(item.input_line))
    if not any(item.key_or_group.split(".")[0] == "engine" for item in items):
        lines.append("engine=serial")
    return lines


def _value(text: str) -> Any:
    return OverridesParser.create().parse_override(f"key={text}").value()


def _baseline(wanted: str | None, labels: Mapping[str, tuple[str, ...]]) -> str:
    if not labels:
        if wanted is not None:
            raise ConfigError(f"baseline={wanted}", "no key has several values", "give one: strategy=fed_avg,fed_adam")
        return ""
    key, several = next(iter(labels.items()))
    if wanted is None:
        return several[0]
    if wanted not in several:
        raise ConfigError(f"baseline={wanted}", f"it is not among the values of {key}", nearest(wanted, several))
    return wanted


def label_of(values: Mapping[str, str]) -> str:
    """Return what a variant is called in figures and lines.

    >>> label_of({"strategy": "fed_avg", "peft.rank": "8"}), label_of({})
    ('fed_avg, rank 8', 'all runs')
    >>> label_of({"client.batch_size": "2", "server.batch_size": "4"})
    'client.batch_size 2, server.batch_size 4'
    """
    short = {key: key.rsplit(".", 1)[-1] for key in values}
    parts = []
    for key, value in values.items():
        name = short[key] if list(short.values()).count(short[key]) == 1 else key
        speaks = re.match(r"[A-Za-z]", value) and value not in {"null", "true", "false"}
        parts.append(value if speaks else f"{name} {value}")
    return ", ".join(parts) or "all runs"


def folder_name(label: str, seed: int, identity: str) -> str:
    """Return a name that a person, a shell and any file system can live with.

    >>> folder_name("fed_avg, rank 8", 0, "5f3a9c21d0")
    'fed_avg-rank_8-seed0-5f3a9c21'
    """
    words = label.split(", ") if label else []
    readable = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", word).strip("_.") for word in words)[:NAME_LENGTH]
    return "-".join([*([readable] if readable else []), f"seed{seed}", identity[:8]])
