"""Devices of a simulation: settings to a fleet, and the books that a run keeps of them."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedpeat.client import TrainingSpec
from fedpeat.client.needs import needs
from fedpeat.control import Observation, Problem
from fedpeat.core import ConfigError, RoundPlan, RoundReport, Tensors, content_hash, digest, nearest
from fedpeat.data import Rows
from fedpeat.devices import (
    CLOCK,
    Fleet,
    Played,
    Radio,
    Traffic,
    Work,
    assign,
    profiles_of,
    read_trace,
)
from fedpeat.devices.ledger import COUNTED
from fedpeat.peft import Tuned
from simulations.evaluation import rows_at
from strategies.flower import RecipeStrategy
from strategies.traffic import Changes

Settings = Mapping[str, Any]
LINKS = ("fixed", "radio")


def fleet_of(
    settings: Settings, clients: Sequence[str], models: Mapping[str, Tuned], rows: Rows, spec: Mapping[str, Any]
) -> Fleet | None:
    """Return the devices that `settings["devices"]` describe; None without a model of them.

    Args:
        settings: The run's.
        clients: Names of all clients.
        models: What clients train, by emulator.
        rows: Any rows as long as those they train on.
        spec: Keywords of a client's `TrainingSpec`.

    Raises:
        ConfigError: If a value is out of range, or a profile or client does not exist.
        DataError: If the trace cannot be read, or no row has a token to score.
    """
    asked = settings.get("devices") or {}
    if not asked.get("kind"):
        return None
    if asked["link"] not in LINKS:
        raise ConfigError(f"devices.link={asked['link']}", "no such link", nearest(str(asked["link"]), LINKS))
    profiles = profiles_of({**asked["profiles"], **_further(asked["file"])})
    seed = settings["seed"]
    return Fleet(
        profiles=assign(clients, profiles, seed=seed, shares=asked["shares"], named=asked["named"]),
        work={key: work_of(tuned, rows, spec) for key, tuned in models.items()},
        seed=seed,
        radio=Radio(**asked["radio"]) if asked["link"] == "radio" else None,
        availability=asked["availability"],
        dropout=asked["dropout"],
        deadline_seconds=asked["deadline_seconds"],
        enforce_memory=asked["enforce_memory"],
        trace=read_trace(asked["trace"]) if asked["trace"] else {},
    )


def work_of(tuned: Tuned, rows: Rows, spec: Mapping[str, Any]) -> Work:
    """Return what training a model needs: of the run's own rank, without compiling or kept hidden states."""
    scored = (rows.labels[:, 1:] != -100).any(dim=1).nonzero().flatten()
    found = needs(tuned, rows_at(rows, scored), TrainingSpec(**spec))
    return Work(found.step_flops, found.memory_bytes)


def _further(path: str | None) -> dict[str, Any]:
    """Return the profiles in a user's file."""
    if not path:
        return {}
    what, remedy = f"cannot read devices.file={path}", "write {NAME: {flops: ..., ...}} as in conf/devices/profiles"
    try:
        plain = OmegaConf.to_container(OmegaConf.load(Path(path).expanduser()), resolve=True)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(what, str(error).splitlines()[0], remedy) from error
    if not isinstance(plain, dict):
        raise ConfigError(what, "it is not a mapping", remedy)
    return {str(name): numbers for name, numbers in plain.items()}


def made_of_devices(fleet: Fleet | None) -> dict[str, str]:
    """Return the hash of what a fleet has from files, by name; nothing without a fleet."""
    if fleet is None:
        return {}
    profiles = {client: vars(profile) for client, profile in fleet.profiles.items()}
    trace = sorted((place, client, tuple(vars(moment).values())) for (place, client), moment in fleet.trace.items())
    return {"devices": content_hash([profiles, trace])}


def check_private(settings: Settings) -> None:
    """Check that devices do not break the sampling that differential privacy is accounted for.

    Raises:
        ConfigError: If they may.
    """
    asked = settings.get("devices") or {}
    if not asked.get("kind"):
        return
    for key, harmless in (
        ("availability", 1),
        ("dropout", 0),
        ("deadline_seconds", None),
        ("enforce_memory", False),
        ("trace", None),
    ):
        if asked[key] != harmless:
            raise ConfigError(
                f"privacy=client_level does not go with devices.{key}={asked[key]}",
                "who is there decides then who counts, which is not the sampling that is accounted for",
                f"leave devices.{key} out",
            )


class Books:
    """Who holds which bundle and which changes of the emulator, and what the virtual clock shows.

    All follows from the reports. A bundle is held when simulated time says that it came; changes are, when an update
    did that was made with them: until then they are sent again.

    Args:
        fleet: The devices; None without a model of them.
        bundle_bytes: Size of each emulator's bundle, bytes.
        reports: Of the rounds that were done.
    """

    def __init__(self, fleet: Fleet | None, bundle_bytes: Mapping[str, int], reports: Sequence[RoundReport]) -> None:
        self.fleet = fleet
        self._bundle_bytes = bundle_bytes
        self._held: set[tuple[str, str]] = set()
        self._changes: dict[str, str] = {}
        self._clock = 0.0
        for report in reports:
            self._note(report.devices)
            self._clock = report.metrics.get(CLOCK, self._clock)

    def available(self, clients: Sequence[str], round_number: int) -> list[str] | None:
        """Return who can be asked in a round; None where nothing is known of that."""
        return None if self.fleet is None else self.fleet.available(clients, round_number)

    def changes(self, tensors: Tensors) -> Changes:
        """Return an emulator's changes with who has them."""
        version = digest(tensors) if tensors else ""
        return Changes(tensors, version, frozenset(name for name, own in self._changes.items() if own == version))

    def observe(self, problem: Problem, round_number: int, changes: Changes) -> Observation:
        """Return what a controller may know of a round before it.

        Args:
            problem: What it decides.
            round_number: Counted from 1.
            changes: Of the emulator, as they are before it.

        Raises:
            ConfigError: If devices are not modelled.
        """
        if self.fleet is None:
            raise ConfigError("a controller needs modelled devices", "devices=none", "choose devices=mixed or cell")
        there = set(self.fleet.available(problem.clients, round_number))
        gains, down, up = self.fleet.links(problem.clients, round_number)
        emulators = problem.menu.emulators
        holds = [[(client, key) in self._held for key in emulators] for client in problem.clients]
        return Observation(
            round=round_number,
            available=np.array([client in there for client in problem.clients], dtype=bool),
            gains=gains,
            down_bits=down,
            up_bits=up,
            holds=np.array(holds, dtype=bool),
            stale=np.repeat([[bool(changes.to(client))] for client in problem.clients], len(emulators), axis=1),
        )

    def play(self, plan: RoundPlan, strategy: RecipeStrategy, enough: int | None) -> Played | None:
        """Play a round in simulated time and leave those out whose work would not count; None without a fleet."""
        if self.fleet is None:
            return None
        traffic = [
            Traffic(down, up, self._to_fetch(device.client, device.emulator))
            for device, (down, up) in zip(plan.devices, strategy.sizes(), strict=True)
        ]
        played = self.fleet.play(plan, traffic, enough=enough)
        strategy.leave_out(played.plan, played.failures)
        return played

    def _to_fetch(self, client: str, emulator: str) -> int:
        return 0 if (client, emulator) in self._held else self._bundle_bytes.get(emulator, 0)

    def close(
        self, plan: RoundPlan, strategy: RecipeStrategy, played: Played | None, absent: Collection[str] = ()
    ) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
        """Return what became of each device of a round, and the clock after it as a metric; note both.

        Args:
            plan: All that were asked.
            strategy: After the round.
            played: The round in simulated time.
            absent: Who could not be asked.
        """
        counted = strategy.aggregation.clients if strategy.aggregation else {}
        failed = {failure.client: failure.kind for failure in strategy.failures}
        failed |= dict.fromkeys(strategy.surplus, "surplus")
        asked = [device.client for device in plan.devices]
        changes = strategy.changes
        sent = {client: changes.bytes_to(client) if strategy.bytes_down.get(client) else 0 for client in asked}
        devices: dict[str, dict[str, Any]] = {client: {"status": "unavailable"} for client in absent}
        for device in plan.devices:
            client = device.client
            modelled = played.facts[client] if played else {"holds": True}
            devices[client] = {
                **modelled,
                "status": "counted" if client in counted else failed.get(client, "error"),
                "emulator": device.emulator,
                "rank": device.rank,
                "local_steps": device.local_steps,
                "bytes_down": strategy.bytes_down.get(client, 0),
                "bundle_bytes": self._to_fetch(client, device.emulator),
                **({"changes": changes.version, "refresh_bytes": sent[client]} if changes.version else {}),
            }
        self._note(devices)
        if played is None:
            return devices, {}
        self._clock += played.seconds
        return devices, {CLOCK: self._clock}

    def _note(self, devices: Mapping[str, Mapping[str, Any]]) -> None:
        self._held |= {(name, facts["emulator"]) for name, facts in devices.items() if facts.get("holds")}
        for name, facts in devices.items():
            if facts.get("changes") and facts["status"] == COUNTED:
                self._changes[name] = facts["changes"]
            elif facts.get("bytes_down"):  # it was asked in truth, and nobody knows what came of that
                self._changes.pop(name, None)
