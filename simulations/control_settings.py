"""What a controller is asked to be: checked before a model is loaded, so that nothing is measured in vain."""

import math
from collections.abc import Mapping
from typing import Any

from fedpeat.control import Objective
from fedpeat.core import ConfigError, nearest

Settings = Mapping[str, Any]
FIXED, RANDOM, CAPABILITY, GREEDY, SABPPO = "fixed", "random", "capability", "greedy", "sabppo"
KINDS = (FIXED, RANDOM, CAPABILITY, GREEDY, SABPPO)
OWN = ("local_steps", "kept_blocks", "emulator", "memory_mib", "rank")
"""What `control=fixed` gives single clients, which another controller decides."""

NO_DEVICES = ("this control looks at the devices", "devices=none: there is no model of them", "choose devices=mixed")


def kind_of(settings: Settings) -> str:
    """Return which controller a run has."""
    return settings["control"].get("kind", FIXED)


def check_control(settings: Settings) -> None:
    """Check a run's controller by its settings alone.

    Raises:
        ConfigError: If something does not go with it, or a number is out of range.
    """
    kind, control = kind_of(settings), settings["control"]
    if kind == FIXED:
        return
    asked = f"control={kind}"
    if kind not in KINDS:
        raise ConfigError(asked, "no such controller", nearest(str(kind), KINDS))
    if not (settings.get("devices") or {}).get("kind"):
        raise ConfigError(*NO_DEVICES)
    for key in OWN:
        if control[key]:
            raise ConfigError(f"{asked} does not go with control.{key}", "it decides that itself", "leave it out")
    _check_others(settings, asked)
    for key, least in (("kept_blocks", 0), ("ranks", 1), ("steps", 1)):
        _check_levels(key, control["menu"][key], least)
    if kind in {GREEDY, SABPPO}:
        objective_of(settings)


def _check_others(settings: Settings, asked: str) -> None:
    others = {
        "round.over_select": settings["round"]["over_select"],
        "privacy.kind": settings["privacy"]["kind"],
        "clients.pool": settings["clients"]["pool"],
    }
    for key, value in others.items():
        if value:
            raise ConfigError(f"{asked} does not go with {key}={value}", "it decides who takes part", f"leave {key}")
    if settings["control"]["sampling"] != "fixed":
        found = f"control.sampling={settings['control']['sampling']}"
        raise ConfigError(f"{asked} draws no such samples", found, "leave control.sampling out")
    if settings["control"]["kind"] in {GREEDY, SABPPO} and settings["clients"]["per_round"] is not None:
        raise ConfigError(f"{asked} decides how many take part", "clients.per_round is given", "leave it out")


def _check_levels(key: str, levels: Any, least: int) -> None:
    for level in levels or ():
        if type(level) is not int or level < least:
            found = f"{level!r} is no number from {least} on"
            raise ConfigError(f"cannot use control.menu.{key}={list(levels)}", found, "write whole numbers, as [1,2]")


def objective_of(settings: Settings) -> Objective:
    """Return what counts, and how much.

    Raises:
        ConfigError: If a weight or unit is out of range.
    """
    asked = settings["control"]["objective"]
    for key, value in asked.items():
        if key != "quality_of" and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ConfigError(f"control.objective.{key}={value}", "it is a number", "write it as 0.5")
    return Objective(**asked)
