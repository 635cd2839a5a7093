"""Settings to a controller that looks at the devices: what there is to decide, measured before round 1."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedpeat.control import (
    CapabilityControl,
    Curves,
    GreedyControl,
    Menu,
    Objective,
    Pair,
    Policy,
    Problem,
    RandomControl,
    SabppoControl,
    read_fit,
    read_policy,
)
from fedpeat.core import ConfigError, DevicePlan, RoundPlan, nearest
from fedpeat.data import FederatedData
from fedpeat.devices import Fleet
from fedpeat.peft import Tuned
from simulations.devices import work_of
from simulations.federation import Controller, Federation, Observer, strategy_for
from simulations.ladder import MIB
from strategies import start

Settings = Mapping[str, Any]
FIXED, RANDOM, CAPABILITY, GREEDY, SABPPO = "fixed", "random", "capability", "greedy", "sabppo"
KINDS = (FIXED, RANDOM, CAPABILITY, GREEDY, SABPPO)
OWN = ("local_steps", "kept_blocks", "emulator", "memory_mib", "rank")
"""What `control=fixed` gives single clients, which another controller decides."""


def with_controller(
    settings: Settings,
    federation: Federation,
    data: FederatedData,
    kept: Mapping[str, float | None],
    at_rank: Callable[[str, int | None], Tuned],
    observer: Observer,
) -> Federation:
    """Return the federation with the controller that `settings["control"]` describe; itself with `control=fixed`.

    Args:
        settings: The run's.
        federation: The run without it.
        data: Who holds how much.
        kept: Share of the middle that each emulator keeps, by key; None where there is no middle.
        at_rank: From an emulator and a rank to what a client trains.
        observer: Told what is being done.

    Raises:
        ConfigError: If something does not go with it.
    """
    kind = settings["control"].get("kind", FIXED)
    if kind == FIXED:
        return federation
    check_controller(settings, federation)
    menu = menu_of(settings, federation)
    spec, rows = federation.job["spec"], federation.evaluator.rows
    observer.message("measuring what devices need with each emulator and rank")
    work = {pair: work_of(at_rank(*pair), rows, spec) for pair in menu.pairs}
    fleet = replace(fleet_in(federation), work={**fleet_in(federation).work, **work})
    federation = replace(federation, fleet=fleet)
    problem = problem_of(federation, menu, data, kept, sizes_of_pairs(federation, menu, observer))
    return replace(federation, controller=controller_of(settings, federation, problem))


def fleet_in(federation: Federation) -> Fleet:
    """Return the devices of a federation.

    Raises:
        ConfigError: If they are not modelled.
    """
    if federation.fleet is None:
        raise ConfigError(
            "this control looks at the devices", "devices=none: there is no model of them", "choose devices=mixed"
        )
    return federation.fleet


def check_controller(settings: Settings, federation: Federation) -> None:
    """Check what goes with a controller that looks at devices.

    Raises:
        ConfigError: If something does not.
    """
    control = settings["control"]
    asked = f"control={control['kind']}"
    if control["kind"] not in KINDS:
        raise ConfigError(asked, "no such controller", nearest(str(control["kind"]), KINDS))
    fleet_in(federation)
    for key in OWN:
        if control[key]:
            raise ConfigError(f"{asked} does not go with control.{key}", "it decides that itself", "leave it out")
    others = {
        "round.over_select": settings["round"]["over_select"],
        "privacy.kind": settings["privacy"]["kind"],
        "clients.pool": settings["clients"]["pool"],
    }
    for key, value in others.items():
        if value:
            raise ConfigError(f"{asked} does not go with {key}={value}", "it decides who takes part", f"leave {key}")
    if control["kind"] in {GREEDY, SABPPO} and settings["clients"]["per_round"] is not None:
        raise ConfigError(f"{asked} decides how many take part", "clients.per_round is given", "leave it out")


def menu_of(settings: Settings, federation: Federation) -> Menu:
    """Return what can be decided.

    Raises:
        ConfigError: If ranks cannot be mixed, or a level is out of range.
    """
    asked, peft = settings["control"]["menu"], settings["peft"]
    steps, own = settings["client"]["local_steps"], peft.get("rank")
    mixes = federation.recipe.mixes_ranks and peft["kind"] == "lora"
    ranks = asked["ranks"] or (sorted({max(1, own // 4), max(1, own // 2), own}) if mixes else [None])
    if asked["ranks"] and not (mixes and all(1 <= int(rank) <= own for rank in asked["ranks"])):
        raise ConfigError(
            f"control.menu.ranks={ranks} must be LoRA ranks from 1 to peft.rank that the strategy can mix",
            f"strategy={federation.recipe.name}, peft={peft['kind']}, peft.rank={own}",
            "choose strategy=het_lora or flex_lora, or leave control.menu.ranks empty",
        )
    radio = fleet_in(federation).radio is not None
    return Menu(
        pairs=tuple(Pair(key, rank) for key in federation.bundles for rank in ranks),
        steps=tuple(asked["steps"] or sorted({max(1, steps // 2), steps, 2 * steps})),
        shares=tuple(float(share) for share in asked["shares"] or ((0.5, 1.0, 2.0) if radio else (1.0,))),
        refresh=federation.realignment is not None,
    )


def problem_of(
    federation: Federation,
    menu: Menu,
    data: FederatedData,
    kept: Mapping[str, float | None],
    sent: list[tuple[int, int]],
) -> Problem:
    """Return what a controller knows of a run once.

    Args:
        federation: The run, with what each pair needs in its fleet's `work`.
        menu: What can be decided.
        data: Who holds how much.
        kept: Share of the middle that each emulator keeps, by key; None where there is no middle.
        sent: Tensor payload with each pair, bytes down and up.
    """
    fleet, clients = fleet_in(federation), tuple(federation.control.clients)
    own = [fleet.profiles[client] for client in clients]
    rows = {client.name: client.rows for client in data.clients}
    held = np.array([rows[client] for client in clients], dtype=float)
    work = [fleet.work_for(_device(clients[0], pair)) for pair in menu.pairs]
    shares = [kept[key] for key in menu.emulators]
    return Problem(
        clients=clients,
        menu=menu,
        rounds=federation.rounds,
        flops=np.array([one.flops for one in own], dtype=float),
        memory_bytes=np.array([one.memory_mib * MIB for one in own], dtype=float),
        watt=np.array([(one.receive_watt, one.compute_watt, one.transmit_watt, one.radiated_watt) for one in own]),
        data_share=held / held.sum(),
        step_flops=np.array([one.step_flops for one in work], dtype=float),
        needs_bytes=np.array([one.memory_bytes for one in work], dtype=float),
        bytes_down=np.array([down for down, _ in sent], dtype=float),
        bytes_up=np.array([up for _, up in sent], dtype=float),
        kept=np.array([1.0 if share is None else share for share in shares]),
        bundle_bytes=np.array([federation.bundle_bytes[key] for key in menu.emulators], dtype=float),
        # Not known before the first re-alignment: what is sent of it is small beside a bundle.
        refresh_bytes=np.zeros(len(menu.emulators)),
        radio=fleet.radio,
    )


def sizes_of_pairs(federation: Federation, menu: Menu, observer: Observer) -> list[tuple[int, int]]:
    """Return the tensor payload of a message with each pair, bytes down and up, as it is before round 1."""
    strategy = strategy_for(federation, [0], observer, server=False)
    client, found = federation.control.clients[0], []
    for pair in menu.pairs:
        strategy.begin(RoundPlan(1, 0, 1, (_device(client, pair),)), start(federation.recipe, federation.initial))
        found += strategy.sizes()
    return found


def _device(client: str, pair: Pair) -> DevicePlan:
    return DevicePlan(client=client, local_steps=1, emulator=pair.emulator, rank=pair.rank)


def controller_of(settings: Settings, federation: Federation, problem: Problem) -> Controller:
    """Return the controller of a kind."""
    control, steps = settings["control"], settings["client"]["local_steps"]
    if control["kind"] == GREEDY:
        return GreedyControl(
            problem, Objective(**control["objective"]), curves_of(control["curves"], federation), steps
        )
    if control["kind"] == SABPPO:
        return SabppoControl(problem, policy_of(control["policy"]), steps)
    kind = RandomControl if control["kind"] == RANDOM else CapabilityControl
    return kind(problem, federation.control.per_round, steps, federation.seed)


def policy_of(folder: str | None) -> Policy:
    """Return the policy in a folder.

    Raises:
        ConfigError: If none is named, or it cannot be used.
    """
    if not folder:
        found = "control.policy is not given, and none comes with the package"
        raise ConfigError("control=sabppo needs a policy", found, "train one: fedpeat control train")
    return read_policy(Path(folder).expanduser())


def curves_of(path: str | None, federation: Federation) -> Curves:
    """Return the response curves in a file, or else those in the package, from the run's own loss before training on.

    Args:
        path: Of the file, `control.curves`; None for the fit in the package.
        federation: Whose plug-in model is the full model before round 1.

    Raises:
        ConfigError: If the file cannot be read.
    """
    return read_fit(path).curves.starting_at(federation.zero_shot["full_zero_shot"].loss)
