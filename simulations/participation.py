"""Who takes part in a round, and how each trains: devices by a controller, and the server."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from fedpeat.client import TrainingSpec, build_optimizer
from fedpeat.client.prefix import frozen_blocks
from fedpeat.control import FixedControl
from fedpeat.core import ConfigError
from fedpeat.data import POOLED, FederatedData, open_rows
from fedpeat.peft import Tuned
from fedpeat.server import Participant
from simulations.ladder import named_emulators
from strategies import Recipe
from strategies.limits import Limits

Settings = Mapping[str, Any]


SPEC = (
    "optimizer",
    "optimizer_options",
    "learning_rate",
    "batch_size",
    "schedule",
    "warmup_steps",
    "clip_norm",
    "accumulate",
    "precision",
    "optimizer_state",
    "threads",
    "compile",
    "prefix_mib",
)


def spec_of(settings: Settings, tuned: Tuned) -> dict[str, Any]:
    """Return the keywords of a client's `TrainingSpec`, checked against the tensors it will train.

    Raises:
        ConfigError: If a value is out of range, or the optimiser cannot be built.
    """
    spec = {name: settings["client"][name] for name in SPEC}
    checked = TrainingSpec(**spec)
    build_optimizer(
        tuned, name=checked.optimizer, options=checked.optimizer_options, learning_rate=checked.learning_rate
    )
    return spec


def check_prefix(spec: Mapping[str, Any], tuned: Tuned) -> None:
    """Check that there is something to keep if a client is to keep hidden states.

    Raises:
        ConfigError: If the first block trains, or the model draws at random in training.
    """
    if spec["prefix_mib"] and not frozen_blocks(tuned):
        raise ConfigError(
            f"client.prefix_mib={spec['prefix_mib']:g} has nothing to keep",
            "the first block trains, or the model's config has dropout",
            "set model.split.first=0 (an adapter at the end alone), or client.prefix_mib=0",
        )


def control_of(settings: Settings, data: FederatedData, recipe: Recipe) -> FixedControl:
    """Return the controller.

    Raises:
        ConfigError: If ranks differ between devices and the recipe cannot mix them.
    """
    control, clients = settings["control"], settings["clients"]
    ranks, peft = control["rank"], settings["peft"]
    if ranks and (peft["kind"] != "lora" or not all(1 <= int(rank) <= peft["rank"] for rank in ranks.values())):
        raise ConfigError(
            f"control.rank={ranks} must be LoRA ranks from 1 to peft.rank",
            f"peft={peft['kind']}, peft.rank={peft.get('rank')}",
            "choose peft=lora and raise peft.rank to the largest rank of a device",
        )
    if control["rank"] and not recipe.mixes_ranks:
        raise ConfigError(
            f"control.rank={control['rank']} asks for different ranks",
            f"strategy={recipe.name} adds tensors of one shape",
            "choose a strategy that can mix ranks, or leave control.rank empty",
        )
    wanted = len(data.clients) if clients["per_round"] is None else clients["per_round"]
    names: Sequence[str] = [POOLED] if clients["pool"] else [client.name for client in data.clients]
    per_round = len(names) if clients["pool"] else wanted
    return FixedControl(
        clients=names,
        per_round=per_round,
        local_steps=settings["client"]["local_steps"] * (wanted if clients["pool"] else 1),
        rounds=settings["rounds"],
        seed=settings["seed"],
        sampling=control["sampling"],
        over_select=over_select_of(settings),
        local_steps_of=control["local_steps"],
        emulator_of=named_emulators(settings),
        rank_of=control["rank"],
    )


def over_select_of(settings: Settings) -> float:
    """Return the share of clients that are asked in a round beyond those that are waited for.

    Raises:
        ConfigError: If it is below 0, or the sampling has no fixed number to wait for.
    """
    share = settings["round"]["over_select"]
    if share < 0 or (share and settings["control"]["sampling"] != "fixed"):
        found = "it is a share, 0 or more" if share < 0 else "control.sampling=poisson has no number to wait for"
        raise ConfigError(f"cannot use round.over_select={share:g}", found, "set round.over_select=0")
    return float(share)


def limits_of(settings: Settings, data: FederatedData) -> Limits:
    """Return what one client may claim in a round, from what it holds and is asked to do.

    Raises:
        ConfigError: If a bound is not above 0, or the share above 1.
    """
    asked, client = settings["round"], settings["client"]
    for key, most in (("max_update_norm", inf), ("max_weight_share", 1.0)):
        if asked[key] is not None and not 0 < asked[key] <= most:
            found = "it must be above 0" if most == inf else "it is a share: above 0, at most 1"
            raise ConfigError(f"cannot use round.{key}={asked[key]}", found, "or null for no bound")
    rows = {one.name: one.rows for one in data.clients}
    return Limits(
        update_norm=asked["max_update_norm"],
        rows={**rows, POOLED: sum(rows.values())},
        tokens_a_step=client["batch_size"] * client["accumulate"] * data.block_size,
        weight_share=asked["max_weight_share"],
    )


def participant_of(
    settings: Settings, data: FederatedData, recipe: Recipe, full: Tuned, emulated: Tuned
) -> Participant | None:
    """Return the server's own part in the tuning, or None.

    Raises:
        ConfigError: If `server.train` is unknown or the server has no data.
    """
    server = settings["server"]
    mode = "off" if server["train"] in {False, None} else str(server["train"])
    if mode == "off":
        return None
    if mode not in {"emulator", "full"}:
        raise ConfigError(f"server.train={mode}", "no such way to take part", "choose off, emulator or full")
    rows = open_rows(data.folder, "server", "train")
    if len(rows) == 0:
        raise ConfigError(
            f"server.train={mode} needs data of the server's own", "it has none", "set data.server_share, e.g. 0.1"
        )
    own = {name: server[name] for name in ("learning_rate", "batch_size", "optimizer", "optimizer_options")}
    spec = TrainingSpec(
        **{
            **spec_of(settings, full),
            **{k: v for k, v in own.items() if v is not None},
            "optimizer_state": "reset",
            "threads": settings["evaluation"]["threads"],
        }
    )
    return Participant(
        tuned=full if mode == "full" else emulated,
        rows=rows,
        spec=spec,
        steps=server["local_steps"] or settings["client"]["local_steps"],
        weight=server["weight"],
        weight_by=recipe.weight_by,
        seed=settings["seed"],
    )
