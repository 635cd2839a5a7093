"""The conditions of a trial: how deltas are sent, who attacks, and what goes with which recipe."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedpeat.client.attack import check_kind
from fedpeat.codecs import Codec
from fedpeat.core import ConfigError, Layout, nearest, seed_for, shorten
from fedpeat.data import FederatedData, open_rows
from simulations.building import built
from simulations.evaluation import Personal, rows_at, spread
from strategies import Recipe

Settings = Mapping[str, Any]


def codec_of(settings: Settings, recipe: Recipe) -> Codec:
    """Return the codec that clients send their deltas by.

    Raises:
        ConfigError: If it remembers what it left out in a basis that the recipe changes in each round.
    """
    codec: Codec = built(settings["codec"])
    if codec.stateful and recipe.facts.rebases:
        raise ConfigError(
            f"codec={codec.name} does not go with strategy={recipe.name}",
            "the codec adds in the next round what it left out in this one, but the recipe starts each round from other"
            " factors, in which that means nothing",
            "choose a codec without memory (bf16, fp16, int8, int4, drive), or another strategy",
        )
    return codec


def check_recipe(settings: Settings, recipe: Recipe, layout: Layout) -> None:
    """Check that a recipe goes with what travels and with how clients train.

    Raises:
        ConfigError: If it needs LoRA factors or square cores and there are none, or the optimiser's memory would be of
            another basis.
    """
    needs, cored = recipe.facts.needs, any(pair.r for pair in layout.pairs)
    if needs == "pairs" and (not layout.pairs or cored):
        raise ConfigError(
            f"strategy={recipe.name} works on LoRA's factors",
            f"peft={settings['peft']['kind']} has none that travel",
            "choose peft=lora, or a strategy for any tensors such as fed_avg",
        )
    if needs == "cores" and not cored:
        raise ConfigError(
            f"strategy={recipe.name} works on square cores",
            f"peft={settings['peft']['kind']} has none",
            "choose peft=lora_sb",
        )
    if recipe.facts.rebases and settings["client"]["optimizer_state"] == "keep":
        raise ConfigError(
            f"client.optimizer_state=keep does not go with strategy={recipe.name}",
            "the recipe starts each round from other factors, in which a kept momentum means nothing",
            "set client.optimizer_state=reset",
        )
    if recipe.facts.server_takes_part == "needed" and str(settings["server"]["train"]) not in {"emulator", "full"}:
        raise ConfigError(
            f"strategy={recipe.name} measures clients by the server's own update",
            f"server.train={settings['server']['train']}",
            "set server.train=emulator (and data.server_share above 0)",
        )


def attackers_of(settings: Settings, clients: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what each attacker does, by name; nothing without an attack.

    Raises:
        ConfigError: If a named attacker is no client, or the share is none.
    """
    attack = settings["attack"]
    if not attack["kind"]:
        return {}
    named = attack["clients"]
    for name in named or ():
        if name not in clients:
            raise ConfigError(f"attack.clients names {name!r}", "no such client", nearest(str(name), clients))
    if not 0 <= attack["share"] <= 1:
        raise ConfigError(f"cannot use attack.share={attack['share']}", "it must be between 0 and 1", "change it")
    count = round(attack["share"] * len(clients))
    chosen = named or random.Random(seed_for(settings["seed"], "attackers")).sample(sorted(clients), count)
    if not chosen:
        raise ConfigError(
            f"attack.share={attack['share']} makes no attackers",
            f"there are {len(clients)} clients: {shorten(clients, 3)}",
            "raise attack.share, or name attack.clients",
        )
    return {name: {"kind": check_kind(attack["kind"]), "factor": float(attack["factor"])} for name in sorted(chosen)}


def personal_of(recipe: Recipe, data: FederatedData, *, folder: str, max_rows: int | None) -> Personal | None:
    """Return how each client's own model is scored, if the recipe has clients keep tensors and they have test rows."""
    if data.remote or not recipe.client(1).get("personal"):
        return None
    held = {client.name: open_rows(data.folder, client.name, "test") for client in data.clients}
    owners = [(name, row) for name, rows in held.items() for row in range(len(rows))]
    chosen: dict[str, list[int]] = {}
    for number in spread(len(owners), max_rows).tolist():
        name, row = owners[number]
        chosen.setdefault(name, []).append(row)
    rows = {name: rows_at(held[name], torch.tensor(numbers)) for name, numbers in chosen.items()}
    return Personal(rows, folder) if rows else None
