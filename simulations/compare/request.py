"""What a person asked for on the command line: the keys of `compare` itself, and overrides of a run."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import HydraException

from fedpeat.core import ConfigError, nearest

METRICS = {"perplexity": True, "loss": True, "accuracy": False, "choice_accuracy": False}
"""Metrics that variants can be compared by, and whether lower is better."""

OWN_KEYS = ("seeds", "baseline", "target", "metric", "jobs", "folder")
FLAGS = ("--dry-run", "--help", "-h")
DEFAULT_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Request:
    """A comparison, as asked for.

    Attributes:
        overrides: Overrides of a run, parsed; some of them sweep.
        seeds: Seeds of each variant.
        baseline: Value of the first swept key that others are compared with; None for its first.
        target: Value of the metric to reach; None for the baseline's own.
        metric: One of METRICS.
        jobs: Cells that run at once; None for as many as the cores allow.
        folder: Where everything goes; None for a new one.
        dry_run: Whether only to tell what would run.
        words: The overrides as typed.
    """

    overrides: tuple[Override, ...] = ()
    seeds: tuple[int, ...] = DEFAULT_SEEDS
    baseline: str | None = None
    target: float | None = None
    metric: str = "perplexity"
    jobs: int | None = None
    folder: Path | None = None
    dry_run: bool = False
    words: tuple[str, ...] = field(default=())


def read_request(arguments: Sequence[str], *, known: Iterable[str], own: Sequence[str] = OWN_KEYS) -> Request:
    """Return what `arguments` ask for.

    Args:
        arguments: `key=value` words and flags, as typed.
        known: Top-level keys and groups of a run's config, for suggestions.
        own: The keys of ours that are allowed.

    Raises:
        ConfigError: If a word cannot be read, or a value of ours is out of range.
    """
    words = [word for word in arguments if not word.startswith("-")]
    for flag in arguments:
        if flag.startswith("-") and flag not in FLAGS:
            raise ConfigError(f"there is no flag {flag}", "", nearest(flag, FLAGS[:2]))
    typed = {key: text for key, text in (_parts(word) for word in words) if key in own}
    parsed = [parse_word(word) for word in words if _parts(word)[0] not in own]
    _refuse_twice([_parts(word)[0] for word in words])
    _check_names(parsed, known=known, own=own)
    seed = next((item for item in parsed if item.key_or_group == "seed"), None)
    overrides = tuple(item for item in parsed if item is not seed)
    if seed is not None and "seeds" in typed:
        raise ConfigError("seed and seeds are both given", "", "give seeds=N or seeds=[4,7] alone")
    return Request(
        overrides=overrides,
        seeds=_seeds(typed.get("seeds"), seed),
        baseline=shown(parse_word(f"baseline={typed['baseline']}").value()) if typed.get("baseline") else None,
        target=_number(typed, "target", float),
        metric=_metric(typed.get("metric", "perplexity")),
        jobs=_number(typed, "jobs", int),
        folder=Path(typed["folder"]).expanduser() if typed.get("folder") else None,
        dry_run="--dry-run" in arguments,
        words=tuple(words),
    )


def _parts(word: str) -> tuple[str, str]:
    key, _, text = word.partition("=")
    return key.strip(), text.strip()


def parse_word(word: str) -> Override:
    """Return an override as Hydra reads it.

    Raises:
        ConfigError: If it cannot be read.
    """
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        found = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ConfigError(
            f"cannot read {word!r}", found, "write key=value, and quote values with spaces or commas"
        ) from error


def _refuse_twice(keys: Sequence[str]) -> None:
    names = [key.lstrip("+") for key in keys]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{name} is given more than once", "", f"give all its values at once: {name}=A,B")


def _check_names(parsed: Sequence[Override], *, known: Iterable[str], own: Sequence[str]) -> None:
    """Refuse what belongs to another command, and misspelt keys of ours, which a run's config cannot suggest."""
    known = set(known)
    for item in parsed:
        name = item.key_or_group
        if name.split(".")[0] == "hydra":
            raise ConfigError(f"{name} cannot be set here", "this command runs cells itself", "use folder=FOLDER")
        adds = item.is_add() or item.is_force_add() or item.is_delete()
        if not {".", "/"} & set(name) and name not in known and not adds:
            raise ConfigError(f"{item.input_line}", "no such key or group", nearest(name, {*known, *own}))


def _seeds(text: str | None, seed: Override | None) -> tuple[int, ...]:
    """Return the seeds of `seeds=3`, `seeds=[4,7]`, `seeds=4,7`, or a run's own `seed=...`."""
    if text is None and seed is None:
        return DEFAULT_SEEDS
    item = seed or parse_word(f"seeds={text}")
    found: Any = item.value()
    if item.is_sweep_override():
        found = [parse_word(f"seed={value}").value() for value in values_of(item, ())]
    elif _is_whole(found):
        found = list(range(found)) if seed is None else [found]
    if not isinstance(found, list) or not found or not all(_is_whole(value) and value >= 0 for value in found):
        raise ConfigError(f"{item.input_line}", "seeds are whole numbers from 0", "seeds=3 for 0, 1, 2, or seeds=[4,7]")
    return tuple(dict.fromkeys(found))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(typed: dict[str, str], key: str, kind: type) -> Any:
    text = typed.get(key)
    if text in {None, "", "null"}:
        return None
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value <= 0:
        wanted = "a whole number above 0" if kind is int else "a number above 0"
        raise ConfigError(f"{key}={text}", f"it must be {wanted}", f"leave {key} out for its default")
    return value


def _metric(name: str) -> str:
    if name not in METRICS:
        raise ConfigError(f"metric={name}", "no such metric to compare by", nearest(name, METRICS))
    return name


def values_of(item: Override, options: Sequence[str]) -> list[str]:
    """Return the values that an override gives its key one after the other, each as text that Hydra reads again.

    Args:
        item: A sweeping override.
        options: The group's options, for `glob(...)`.

    Raises:
        ConfigError: If the values cannot be counted, or are none.
    """
    inner = item.value()
    if isinstance(inner, IntervalSweep):
        raise ConfigError(f"{item.input_line}", "an interval has no end of values", "list values: key=A,B,C")
    found = inner.filter(list(options)) if isinstance(inner, Glob) else list(item.sweep_string_iterator())
    if not found:
        raise ConfigError(f"{item.input_line}", "it matches nothing", f"choose from: {', '.join(options)}")
    return [str(value) for value in found]


def shown(value: object) -> str:
    """Return a value of a setting as a person writes it.

    >>> [shown(value) for value in (None, True, 0.001, "a b", ["q_proj", 2], {"alpha": 0.5})]
    ['null', 'true', '0.001', 'a b', '[q_proj, 2]', '{alpha: 0.5}']
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.15g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(shown, value)) + "]"
    return str(value)
