"""Settings to a controller that looks at the devices: what there is to decide, measured before round 1."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedpeat.control import (
    CapabilityControl,
    Curves,
    GreedyControl,
    Menu,
    Pair,
    Policy,
    Problem,
    RandomControl,
    SabppoControl,
    packaged_policy,
    read_fit,
    read_policy,
)
from fedpeat.core import ConfigError, DevicePlan, RoundPlan
from fedpeat.data import FederatedData
from fedpeat.devices import MBIT, Fleet, distance_km, path_loss_db
from fedpeat.peft import Tuned
from simulations.control_settings import FIXED, GREEDY, NO_DEVICES, RANDOM, SABPPO, kind_of, objective_of
from simulations.devices import work_of
from simulations.federation import Controller, Federation, Observer, strategy_for
from simulations.ladder import MIB
from strategies import start

Settings = Mapping[str, Any]


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
    if kind_of(settings) == FIXED:
        return federation
    menu = menu_of(settings, federation)
    if len({pair.rank for pair in menu.pairs}) > 1 and settings["strategy"].get("keep_rest") is False:
        observer.message("small ranks average away what they do not hold: strategy.keep_rest=true keeps it")
    spec, rows = federation.job["spec"], federation.evaluator.rows
    observer.message("measuring what devices need with each emulator and rank")
    work = {pair: work_of(at_rank(*pair), rows, spec) for pair in menu.pairs}
    fleet = replace(fleet_in(federation), work={**fleet_in(federation).work, **work})
    federation = replace(federation, fleet=fleet)
    problem = problem_of(federation, menu, data, kept, sizes_of_pairs(federation, menu, observer))
    return replace(federation, controller=controller_of(settings, federation, problem))


def check_files(settings: Settings) -> None:
    """Check the files that a run's controller is made of, before a model is loaded.

    Raises:
        ConfigError: If one is missing, or cannot be used.
        StorageError: If its policy cannot be read.
    """
    control = settings["control"]
    if kind_of(settings) == SABPPO:
        policy_of(control["policy"])
    if kind_of(settings) == GREEDY:
        read_fit(control["curves"])


def fleet_in(federation: Federation) -> Fleet:
    """Return the devices of a federation.

    Raises:
        ConfigError: If they are not modelled.
    """
    if federation.fleet is None:
        raise ConfigError(*NO_DEVICES)
    return federation.fleet


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
    fleet, clients, realignment = fleet_in(federation), tuple(federation.control.clients), federation.realignment
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
        # One emulator alone is re-aligned; where there are several, the menu has no refresh.
        refresh_bytes=np.full(len(menu.emulators), realignment.payload_bytes if realignment else 0, dtype=float),
        radio=fleet.radio,
        deadline_seconds=fleet.deadline_seconds,
        links=mean_links(fleet, clients),
    )


def mean_links(fleet: Fleet, clients: Sequence[str]) -> np.ndarray:
    """Return what the links are like before they fade: gains, `(clients, 1)`, or rates, bit/s, `(clients, 2)`."""
    if fleet.radio is None:
        own = [fleet.profiles[client] for client in clients]
        return np.array([(MBIT * one.downlink_mbit, MBIT * one.uplink_mbit) for one in own], dtype=float)
    away = [distance_km(fleet.radio, client, seed=fleet.seed) for client in clients]
    return np.array([[10 ** (-path_loss_db(distance) / 10)] for distance in away])


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
        return GreedyControl(problem, objective_of(settings), curves_of(control["curves"], federation), steps)
    if control["kind"] == SABPPO:
        policy = policy_of(control["policy"])
        return SabppoControl(problem, replace(policy, curves=starting(policy.curves, federation)), steps)
    kind = RandomControl if control["kind"] == RANDOM else CapabilityControl
    return kind(problem, federation.control.per_round, steps, federation.seed)


def policy_of(folder: str | None) -> Policy:
    """Return the policy in a folder, or the one that comes with the package.

    Raises:
        ConfigError: If it cannot be used.
    """
    return read_policy(Path(folder).expanduser()) if folder else packaged_policy()


def curves_of(path: str | None, federation: Federation) -> Curves:
    """Return the response curves in a file, or else those in the package, from the run's own loss before training on.

    Args:
        path: Of the file, `control.curves`; None for the fit in the package.
        federation: Whose plug-in model is the full model before round 1.

    Raises:
        ConfigError: If the file cannot be read.
    """
    return starting(read_fit(path).curves, federation)


def starting(curves: Curves, federation: Federation) -> Curves:
    """Return curves that begin at the loss which the run measures before round 1."""
    return curves.starting_at(federation.zero_shot["full_zero_shot"].loss)
