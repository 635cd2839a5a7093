"""What a person asked of a study: its axes, its switches, and overrides of a run."""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedpeat.core import ConfigError, nearest
from simulations.compare.request import OWN_KEYS, Request, parse_word, read_request, shown, values_of
from simulations.study.nodes import DISTILLED, NONE, STAGES, Choice, builders, check_key, selections
from simulations.unfreezing import POLICIES

AXES = ("selection", "kept", "compression", "distillation", "unfreeze")
SWITCHES = {"reference": True, "federated": True, "extraction": False}
OTHERS = ("policy", "full_learning_rate")
COMMON = tuple(key for key in OWN_KEYS if key not in {"baseline", "target"})
OWN = (*AXES, *OTHERS, *SWITCHES, *COMMON)
SUBLAYERS = ("attention", "mlp", "norm")
TAKEN = {
    "emulator": "set its parts: selection=, kept=, compression=, distillation=, or such as low_rank.share=0.25",
    "client.unfreeze": "use unfreeze=attention,mlp",
    "client.unfreeze_policy": "use policy=map_back,discard",
    "clients.pool": "use federated=false",
    "baselines.extraction": "use extraction=true",
    "baselines.whole_model": "reference=true tunes the whole model once for all cells of a seed",
}
"""Keys of a run that a study sets itself, and what to give instead."""


@dataclass(frozen=True)
class Unfrozen:
    """One value of the axis `unfreeze`: as shown, the parts that train, and what becomes of what they learn."""

    text: str
    parts: tuple[str, ...] = ()
    policy: str = "map_back"


@dataclass(frozen=True)
class Asked:
    """A study, as asked for.

    Attributes:
        run: Overrides of a run, seeds, metric, jobs, folder.
        selection: Ways to select blocks.
        kept: Numbers or shares of kept blocks, as text.
        compression: Ways to compress them.
        distillation: Steps of training them.
        unfreeze: What of them devices train.
        reference: Whether to tune the whole model, too.
        federated: Whether many clients tune; else one with all data.
        extraction: Whether to run the extraction probe.
        full_learning_rate: Of the reference that tunes all weights; None for the one of `experiment=fed_ft`.
    """

    run: Request
    selection: tuple[Choice, ...]
    kept: tuple[str, ...]
    compression: tuple[Choice, ...]
    distillation: tuple[Choice, ...]
    unfreeze: tuple[Unfrozen, ...]
    reference: bool = True
    federated: bool = True
    extraction: bool = False
    full_learning_rate: float | None = None

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The values of each axis, as shown."""
        choices = {name: getattr(self, name) for name in AXES}
        return {name: tuple(getattr(each, "text", each) for each in found) for name, found in choices.items()}


def read_study(arguments: Sequence[str], *, known: Iterable[str]) -> Asked:
    """Return the study that `arguments` ask for.

    Args:
        arguments: `key=value` words and flags, as typed.
        known: Top-level keys and groups of a run's config, for suggestions.

    Raises:
        ConfigError: If a word cannot be read, or a value is unknown or out of range.
    """
    names = {word: word.partition("=")[0].strip().lstrip("+~") for word in arguments if not word.startswith("-")}
    of_builders = [word for word, name in names.items() if "." in name and name.split(".")[0] in builders()]
    _refuse_taken(names)
    run = read_request([word for word in arguments if word not in of_builders], known=known, own=OWN)
    typed = {name: word for word, name in names.items() if name in OWN}
    settings = _settings(of_builders)

    def read(axis: str, default: str, valid: Callable[[str], Any], options: Sequence[str] = ()) -> tuple[Any, ...]:
        return _unique(axis, [valid(text) for text in _texts(typed.get(axis, f"{axis}={default}"), options)])

    if "selection" not in typed or "kept" not in typed:
        lacking = "selection" if "selection" not in typed else "kept"
        raise ConfigError(f"{lacking} must be given", "a study has no default for it", "selection=uniform,cka kept=2,4")
    selection = read("selection", "", _selection, selections())
    compression = read("compression", NONE, _compression, [NONE, *STAGES])
    distillation = read("distillation", "0", _distillation)
    policies = read("policy", "map_back", _policy, POLICIES)
    _refuse_unused(settings, [*selection, *compression, *distillation])
    return Asked(
        run=replace(run, words=tuple(word for word in arguments if not word.startswith("-"))),
        selection=_tuned(selection, settings),
        kept=read("kept", "", _kept),
        compression=_tuned(compression, settings),
        distillation=_tuned(distillation, settings),
        unfreeze=_unfrozen(read("unfreeze", NONE, _unfreeze, [NONE, *SUBLAYERS]), policies),
        full_learning_rate=_rate(typed.get("full_learning_rate")),
        **{switch: _switch(typed.get(switch), default) for switch, default in SWITCHES.items()},
    )


def _refuse_taken(names: Mapping[str, str]) -> None:
    for word, name in names.items():
        for taken, remedy in TAKEN.items():
            if name == taken or name.startswith(f"{taken}."):
                raise ConfigError(f"{word}", f"fedpeat study sets {taken} itself", remedy)


def _texts(word: str, options: Sequence[str]) -> list[str]:
    item = parse_word(word)
    # As typed: 1.0 is a share, and 1 a number.
    return values_of(item, options) if item.is_sweep_override() else [word.partition("=")[2].strip("'\" ")]


def _unique(axis: str, found: Sequence[Any]) -> tuple[Any, ...]:
    texts = [getattr(each, "text", each) for each in found]
    twice = next((text for text in texts if texts.count(text) > 1), None)
    if twice is not None:
        raise ConfigError(f"{axis}={','.join(map(str, texts))}", f"{twice} is given twice", "give each value once")
    return tuple(found)


def _joined(text: str) -> list[str]:
    """Return what is joined by `+`, or listed.

    >>> _joined("low_rank+int8"), _joined("[attention, mlp]"), _joined("null")
    (['low_rank', 'int8'], ['attention', 'mlp'], [])
    """
    parts = [part.strip() for part in re.split(r"[+,]", text.strip("[] "))]
    return [part for part in parts if part not in {"", NONE, "null"}]


def _selection(text: str) -> Choice:
    if text not in selections():
        raise ConfigError(f"selection={text}", "no such selection of blocks", nearest(text, selections()))
    return Choice(text, (text,))


def _compression(text: str) -> Choice:
    parts = _joined(text)
    for part in parts:
        if part not in STAGES:
            raise ConfigError(f"compression={text}", f"{part!r} does not compress", nearest(part, [NONE, *STAGES]))
    stages = [STAGES[part] for part in parts]
    if len(set(parts)) < len(parts) or stages.count("store") > 1:
        raise ConfigError(
            f"compression={text}", "one of them does the other's work", "join different stages: low_rank+int8"
        )
    names = tuple(name for name in STAGES if name in parts)
    return Choice("+".join(names) or NONE, names)


def _distillation(text: str) -> Choice:
    number = "0" if text in {NONE, "null"} else text
    if not re.fullmatch(r"\d+", number):
        raise ConfigError(f"distillation={text}", "steps are whole numbers from 0", "distillation=0,200")
    return Choice(str(int(number)), (DISTILLED,) if int(number) else ())


def _kept(text: str) -> str:
    whole, share = re.fullmatch(r"\d+", text), re.fullmatch(r"0?\.\d+|1\.0*", text)
    if not whole and not (share and float(text) > 0):
        raise ConfigError(
            f"kept={text}", "it is a number of blocks, or a share above 0 and at most 1.0", "kept=2,4,0.5"
        )
    return str(int(text)) if whole else f"{float(text):g}" if float(text) < 1 else "1.0"


def _unfreeze(text: str) -> Choice:
    parts = _joined(text)
    for part in parts:
        if part not in SUBLAYERS:
            raise ConfigError(f"unfreeze={text}", f"{part!r} is no part of a block", nearest(part, [NONE, *SUBLAYERS]))
    names = tuple(name for name in SUBLAYERS if name in parts)
    return Choice("+".join(names) or NONE, names)


def _policy(text: str) -> str:
    if text not in POLICIES:
        raise ConfigError(f"policy={text}", "no such policy", nearest(text, POLICIES))
    return text


def _unfrozen(parts: Sequence[Choice], policies: Sequence[str]) -> tuple[Unfrozen, ...]:
    """Return each value with each policy; where nothing trains, there is nothing to have one for."""
    found: list[Unfrozen] = []
    for choice in parts:
        for policy in policies if choice.names else ():
            text = f"{choice.text} ({policy})" if len(policies) > 1 else choice.text
            found.append(Unfrozen(text, choice.names, policy))
        found += [] if choice.names else [Unfrozen(NONE)]
    return tuple(found)


def _settings(words: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Return the values that `option.key=value` gives each keyword of a builder."""
    found: dict[str, dict[str, list[Any]]] = {}
    for word in words:
        item = parse_word(word)
        name, _, key = item.key_or_group.partition(".")
        check_key(name, key)
        if key in found.setdefault(name, {}):
            raise ConfigError(f"{name}.{key} is given more than once", "", f"give its values at once: {name}.{key}=A,B")
        texts = values_of(item, ()) if item.is_sweep_override() else []
        found[name][key] = [parse_word(f"key={text}").value() for text in texts] or [item.value()]
    return found


def _refuse_unused(settings: Mapping[str, Any], chosen: Sequence[Choice]) -> None:
    used = {name for choice in chosen for name in choice.names}
    for name, keys in settings.items():
        if name not in used:
            axis = "distillation" if name == DISTILLED else "compression" if name in STAGES else "selection"
            raise ConfigError(f"{name}.{next(iter(keys))} is set", f"no cell uses {name}", f"name it in {axis}=")


def _tuned(choices: Sequence[Choice], settings: Mapping[str, Mapping[str, list[Any]]]) -> tuple[Choice, ...]:
    """Return each value with the keywords of its builders; with several values of a keyword, one for each."""
    found = []
    for choice in choices:
        keys = [(name, key) for name in choice.names for key in settings.get(name, {})]
        for values in itertools.product(*(settings[name][key] for name, key in keys)):
            given: dict[str, dict[str, Any]] = {}
            told = []
            for (name, key), value in zip(keys, values, strict=True):
                given.setdefault(name, {})[key] = value
                told += [f"{key} {shown(value)}"] if len(settings[name][key]) > 1 else []
            found.append(
                replace(choice, text=f"{choice.text} ({', '.join(told)})" if told else choice.text, settings=given)
            )
    return tuple(found)


def _switch(word: str | None, default: bool) -> bool:
    value = default if word is None else parse_word(word).value()
    if not isinstance(value, bool):
        raise ConfigError(f"{word}", "it is true or false", "leave it out for its default")
    return value


def _rate(word: str | None) -> float | None:
    value = None if word is None else parse_word(word).value()
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e9):
        raise ConfigError(f"{word}", "it must be a number above 0", "leave it out for that of experiment=fed_ft")
    return value
