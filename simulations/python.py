"""A run from Python: a plain mapping of settings in, its summary out.

`settings_from` takes the keys of the command line, and functions of your own in place of options; `simulate` runs what
it returns. No config files, no working folder is changed.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_method
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedpeat.core import ConfigError, nearest
from simulations.run import simulate
from simulations.settings import composed, conf_folder, dotted, to_settings

__all__ = ["settings_from", "simulate"]


def settings_from(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run, as `simulate` takes them; what is not given has its default.

    Args:
        given: Options by group (`{"model": "hf", "strategy": "fed_adam"}`) and values by key, dotted or nested, in any
            order (`{"peft.rank": 4}`, `{"peft": {"rank": 4}}`). In place of the option of a group that is built
            (strategy, emulator, codec, engine, tracker) a function that builds one; its keywords are then the group's
            keys. It is kept by its name, so it must be defined at the top of a module.

    Raises:
        ConfigError: If a group's option or a key is unknown, or a value that is needed is missing.

    >>> settings = settings_from({"experiment": "smoke", "peft.rank": 4, "client": {"learning_rate": 0.01}})
    >>> settings["rounds"], settings["peft"]["rank"], settings["client"]["learning_rate"]
    (2, 4, 0.01)
    """
    groups = {path.name for path in conf_folder().iterdir() if path.is_dir()}
    options = {key: value for key, value in given.items() if key in groups and isinstance(value, str)}
    builders = {key: value for key, value in given.items() if key in groups and callable(value)}
    config = composed([f"{group}={option}" for group, option in options.items()])
    keys = set(dotted(OmegaConf.to_container(config, resolve=False)))
    own: dict[str, dict[str, Any]] = {group: {} for group in builders}
    rest = {key: value for key, value in given.items() if key not in options and key not in builders}
    for key, value in _flat(rest, keys):
        group, _, name = key.partition(".")
        if group in builders:
            own[group][name] = value
        elif key not in keys:
            raise ConfigError(f"{key}={value!r}", "no such key", nearest(key, keys))
        else:
            _set(config, key, value, keys)
    settings = to_settings(config)
    for group, builder in builders.items():
        settings[group] = _node(group, builder, own[group], settings.get(group))
    return settings


def _set(config: Any, key: str, value: Any, keys: set[str]) -> None:
    inner = sorted(known for known in keys if known.startswith(f"{key}."))
    if inner:
        raise ConfigError(f"{key}={value!r}", f"{key} holds several keys", f"set one of them, {inner[0]} say")
    try:
        OmegaConf.update(config, key, _plain(value), merge=False)
    except OmegaConfBaseException as error:
        found = str(error).splitlines()[0]
        raise ConfigError(f"cannot set {key}", found, "use numbers, text, lists and mappings") from error


def _flat(given: Mapping[str, Any], keys: set[str], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield values by dotted key; a mapping is a value where its key holds no others."""
    for key, value in given.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping) and any(known.startswith(f"{name}.") for known in keys):
            yield from _flat(value, keys, f"{name}.")
        else:
            yield name, value


def _plain(value: Any) -> Any:
    """Return a value for a config: paths as text, any sequence as a list."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return {str(key): _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _node(group: str, builder: Callable[..., Any], given: Mapping[str, Any], option: Any) -> dict[str, Any]:
    """Return what stands in the settings for a builder: its name and its keywords, those with defaults too."""
    if not isinstance(option, Mapping) or "_target_" not in option:
        raise ConfigError(f"cannot use a function as {group}", "it has options alone", f"name one of conf/{group}/")
    keywords = {
        name: parameter.default
        for name, parameter in inspect.signature(builder).parameters.items()
        if parameter.kind in {parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD}
    }
    for key in given:
        if key not in keywords:
            raise ConfigError(f"{group}.{key}", f"{_name(builder)} has no such keyword", nearest(key, keywords))
    keywords |= given
    missing = sorted(key for key, value in keywords.items() if value is inspect.Parameter.empty)
    if missing:
        raise ConfigError(f"{group}.{missing[0]} must be given", "it has no default", f"add {group}.{missing[0]}")
    return {"_target_": _checked_name(builder), **{key: _plain(value) for key, value in keywords.items()}}


def _name(builder: Callable[..., Any]) -> str:
    return f"{getattr(builder, '__module__', '?')}.{getattr(builder, '__qualname__', type(builder).__name__)}"


def _checked_name(builder: Callable[..., Any]) -> str:
    """Return the name under which a function is found again.

    Raises:
        ConfigError: If it is not.
    """
    name = _name(builder)
    try:
        found = get_method(name)
    except (ImportError, ValueError, AttributeError):
        found = None
    if found is not builder:
        asked = f"cannot use {name} in a run"
        raise ConfigError(asked, "a run finds its builders by name", "define it by def, at the top of a module")
    return name
