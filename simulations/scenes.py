"""A run's settings to a scene: its devices and menu as they are measured, with curves in place of training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedpeat.control import Objective
from fedpeat.control.world import Scene
from fedpeat.core import ConfigError
from fedpeat.data import FederatedData
from simulations.compose import compose
from simulations.control import curves_of, fleet_in
from simulations.control_settings import GREEDY, SABPPO
from simulations.corpus import cache_folder, prepare_data
from simulations.federation import Federation
from simulations.progress import Progress
from simulations.settings import load_settings


def scene_of(overrides: Sequence[str], folder: Path) -> tuple[Scene, dict[str, Any]]:
    """Return the scene of a run that is not run, and its settings.

    Args:
        overrides: As for `fedpeat simulate`; `control=sabppo devices=mixed` unless they say otherwise.
        folder: Where notes are written.

    Raises:
        ConfigError: If a setting cannot be had.
    """
    settings = load_settings([*_unless_chosen(overrides), *overrides])
    if settings["control"].get("kind") != SABPPO:
        raise ConfigError("fedpeat control is for sabppo", "another control is chosen", "leave control= out")
    # Composed for a controller that needs no policy: the same menu, devices and measurements.
    settings["control"]["kind"] = GREEDY
    settings["evaluation"]["costs"] = False
    data: FederatedData = prepare_data(settings)
    with Progress() as progress:
        composed = compose(settings, data, folder=folder, cache=cache_folder(settings), workers=1, observer=progress)
    return scene_in(settings, composed.federation), settings


def scene_in(settings: dict[str, Any], federation: Federation) -> Scene:
    """Return the scene of a composed run.

    Raises:
        ConfigError: If its devices follow a trace, or no controller looks at them.
    """
    fleet, controller = fleet_in(federation), federation.controller
    if controller is None or fleet.trace:
        found = "no controller looks at devices" if controller is None else "devices.trace is given"
        raise ConfigError("cannot play this run by response curves", found, "leave devices.trace out")
    problem = controller.problem
    links = problem.links if problem.links is not None else np.zeros((len(problem.clients), 2))
    gains, down, up = (links[:, 0], None, None) if fleet.radio else (None, links[:, 0], links[:, 1])
    control = settings["control"]
    return Scene(
        problem=problem,
        objective=Objective(**control["objective"]),
        curves=curves_of(control["curves"], federation),
        gains=gains,
        down_bits=down,
        up_bits=up,
        fading=bool(fleet.radio and fleet.radio.rayleigh),
        availability=fleet.availability,
        dropout=fleet.dropout,
    )


def _unless_chosen(overrides: Sequence[str]) -> list[str]:
    """Return the control and the devices that are played where neither overrides nor their experiment choose any."""
    given = {override.partition("=")[0] for override in overrides}
    chosen = load_settings([override for override in overrides if override.startswith("experiment=")])
    plain = {"control": chosen["control"].get("kind") is None, "devices": chosen["devices"]["kind"] is None}
    wanted = {"control": SABPPO, "devices": "mixed"}
    return [f"{key}={value}" for key, value in wanted.items() if plain[key] and key not in given]
