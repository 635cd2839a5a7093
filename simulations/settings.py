"""Config text to plain settings: checked, resolved once, hashed."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedpeat.core import ConfigError, content_hash, nearest, shorten

PACKAGED = Path(__file__).parent / "conf"
CHECKOUT = Path(__file__).parent.parent / "conf"

NOT_PART_OF_THE_RESULT = ("engine", "tracker", "cache", "export", "report", "checkpoints")
"""Settings that change how a run is executed, not what it computes: they are not in its hash."""


OPEN_MAPPINGS = (
    "client.optimizer_options",
    "control.local_steps",
    "control.kept_blocks",
    "control.emulators",
    "control.emulator",
    "control.memory_mib",
    "control.rank",
    "data.partitioner_options",
    "devices.shares",
    "devices.named",
    "devices.radio.weights",
    "peft.options",
    "strategy.options",
)
"""Keys that take any mapping. Their default in YAML is null: Hydra would let nobody add to an empty mapping."""


def conf_folder() -> Path:
    """Return the config folder: inside the installed package, or the checkout's."""
    return PACKAGED if PACKAGED.is_dir() else CHECKOUT


def to_settings(config: DictConfig) -> dict[str, Any]:
    """Return plain, resolved settings.

    Raises:
        ConfigError: If a value is missing (`???`) or an interpolation cannot be resolved.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{missing[0]} must be given", "it has no default", f"add {missing[0]}=VALUE")
    try:
        settings = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError("cannot resolve the config", str(error).splitlines()[0], "see --cfg job") from error
    if not isinstance(settings, dict):
        raise ConfigError("a config must be a mapping", type(settings).__name__, "see conf/config.yaml")
    settings.pop("experiment", None)
    for path in OPEN_MAPPINGS:
        *above, last = path.split(".")
        node: Any = settings
        for key in above:
            node = node.get(key, {})
        if last in node and node[last] is None:
            node[last] = {}
    return {str(key): value for key, value in settings.items()}


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Return the hash of what decides a run's result.

    >>> settings_hash({"seed": 1, "engine": {"workers": 1}}) == settings_hash({"seed": 1, "engine": {"workers": 2}})
    True
    """
    return content_hash({key: value for key, value in settings.items() if key not in NOT_PART_OF_THE_RESULT})


def load_settings(overrides: Sequence[str] = (), *, config_name: str = "config") -> dict[str, Any]:
    """Return the settings that the command line would use: `load_settings(["rounds=2", "model=hf", ...])`.

    Raises:
        ConfigError: If a key or option is unknown, or a value is missing.
    """
    return to_settings(composed(overrides, config_name=config_name))


def composed(overrides: Sequence[str] = (), *, config_name: str = "config") -> DictConfig:
    """Return the composed config, with mistakes explained.

    Raises:
        ConfigError: If a key or option is unknown.
    """
    callers = get_gh_backup()  # whoever calls us may be a Hydra application itself
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            check_overrides(overrides, config_name=config_name)
            return compose(config_name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError("cannot compose the config", _first_line(error), "see fedpeat simulate --help") from error
    finally:
        restore_gh_from_backup(callers)


def check_overrides(overrides: Sequence[str], *, config_name: str = "config") -> None:
    """Check each override's syntax, group option and key, one after the other; Hydra must be initialised.

    Raises:
        ConfigError: With the nearest known key or option.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(
            "cannot read an override", _first_line(error), "write key=value, and quote values with spaces or commas"
        ) from error
    groups = _groups()
    choices = [item for item in parsed if item.key_or_group in groups and not item.is_delete()]
    for item in choices:
        for option in _values(item):
            if option != "null" and option not in groups[item.key_or_group]:
                raise ConfigError(
                    f"{item.key_or_group}={option}", "no such option", nearest(option, groups[item.key_or_group])
                )
    keys = _known_keys(choices, config_name)
    for item in parsed:
        name = item.key_or_group
        if item in choices or item.is_delete() or item.is_add() or item.is_force_add() or name.startswith("hydra"):
            continue
        if name not in keys:
            raise ConfigError(f"{name}={item.value()}", "no such key", nearest(name, keys))
        inner = [key for key in keys if key.startswith(f"{name}.")]
        if inner and not isinstance(item.value(), dict):
            raise ConfigError(
                f"{name}={item.value()}", f"{name} holds several keys", f"set one of them: {shorten(sorted(inner))}"
            )


def _groups() -> dict[str, list[str]]:
    folder = conf_folder()
    return {
        group.name: sorted(option.stem for option in group.glob("*.yaml"))
        for group in sorted(folder.iterdir())
        if group.is_dir()
    }


def _values(item: Override) -> Iterable[str]:
    if item.is_sweep_override():
        return [str(value) for value in item.sweep_string_iterator()]
    return ["null" if item.value() is None else str(item.value())]


def _known_keys(choices: Sequence[Override], config_name: str) -> set[str]:
    """Return all dotted keys of the config with these options chosen."""
    chosen = [f"{item.key_or_group}={next(iter(_values(item)))}" for item in choices]
    try:
        config = compose(config_name, overrides=chosen)
    except HydraException as error:
        raise ConfigError(f"cannot choose {', '.join(chosen)}", _first_line(error), "see --help") from error
    return set(dotted(OmegaConf.to_container(config, resolve=False)))


def dotted(tree: Any, prefix: str = "") -> Iterable[str]:
    """Yield all keys of a nested config, `a` and `a.b`."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        name = f"{prefix}{key}"
        yield name
        yield from dotted(value, f"{name}.")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
