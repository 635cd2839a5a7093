"""Settings to a `Federation`: everything is built once, here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedpeat.client import TrainingSpec, build_optimizer
from fedpeat.client.app import resolve_device
from fedpeat.control import FixedControl
from fedpeat.core import ConfigError, Evaluation, digest
from fedpeat.data import POOLED, FederatedData, open_rows
from fedpeat.emulators import Bundle, build_emulated, full_view, open_bundle, write_bundle
from fedpeat.models import LoadedModel, Split, find_blocks, load_model, make_split, model_tensors
from fedpeat.peft import Tuned, attach
from fedpeat.server import Participant
from simulations.building import built
from simulations.conditions import attackers_of, check_recipe, codec_of, personal_of
from simulations.evaluation import Evaluator, rows_at, spread
from simulations.federation import Federation, Observer
from simulations.zero_shot import cached_evaluation
from strategies import Recipe

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Composed:
    """A federation and what reports and exports need beside it.

    Attributes:
        federation: What the round loop runs.
        loaded: The full model as loaded; its weights are shared with `federation.full`.
        split: Which blocks are adapter.
        bundles: Each emulator's bundle, by key.
        data: The partitioned data.
    """

    federation: Federation
    loaded: LoadedModel
    split: Split
    bundles: Mapping[str, Bundle]
    data: FederatedData


def compose(
    settings: Settings, data: FederatedData, *, folder: Path, cache: Path, workers: int, observer: Observer
) -> Composed:
    """Build the federation that `settings` describe.

    Args:
        settings: Plain and resolved.
        data: The partitioned data.
        folder: The run's folder.
        cache: Where bundles are kept.
        workers: How many clients can run at once.
        observer: Told what is being done.

    Raises:
        FedPeatError: Of the kind that fits, for settings that cannot be had.
    """
    check_counts(settings)
    device = resolve_device(settings["client"]["device"])
    loaded = load_model_of(settings, device)
    split = make_split(find_blocks(loaded.model).count, **settings["model"]["split"])
    recipe: Recipe = built(settings["strategy"])
    control = control_of(settings, data, recipe)
    evaluation = settings["evaluation"]
    held_out = open_rows(data.folder, "server", "test")
    rows = rows_at(held_out, spread(len(held_out), evaluation["max_rows"]))
    evaluator = Evaluator(rows, evaluation["batch_size"], evaluation["threads"], device)

    bundles = bundles_of(settings, loaded, split, cache / "bundles")
    views = {  # where nothing was left out, the emulated model is the full one, to the bit
        key: build_emulated(bundle, device=device)
        for key, bundle in bundles.items()
        if len(bundle.sources) < split.count
    }
    observer.message(f"evaluating {loaded.name} before tuning")
    on = {**evaluation, "device": device, "data": data.folder.name, "attention": settings["model"]["attention"]}
    zero_shot = zero_shot_of(loaded, views, bundles, evaluator, on=on, cache=cache / "evaluations")
    emulated = {key: attached(settings, view) for key, view in views.items()}
    full = attached(settings, full_view(loaded, split))
    check_recipe(settings, recipe, full.layout)
    spec = spec_of(settings, full)
    job = {
        "seed": settings["seed"],
        "method": settings["peft"],
        "frozen_digest": full.frozen_digest,
        "spec": spec,
        "device": settings["client"]["device"],
        "data": str(data.folder),
        "state_folder": str(folder / "clients"),
    }
    federation = Federation(
        recipe=recipe,
        control=control,
        job=job,
        bundles={key: bundle.folder for key, bundle in bundles.items()},
        full=full,
        emulated=emulated,
        zero_shot=zero_shot,
        evaluator=evaluator,
        participant=participant_of(settings, data, recipe, full, emulated.get("default", full)),
        rounds=settings["rounds"],
        evaluate_every=max(1, settings["evaluate_every"]),
        min_replies=settings["round"]["min_replies"],
        timeout_seconds=settings["round"]["timeout_seconds"],
        workers=workers,
        seed=settings["seed"],
        method=settings["peft"],
        codec=codec_of(settings, recipe),
        attacks=attackers_of(settings, control.clients),
        personal=personal_of(recipe, data, folder=str(folder / "clients"), max_rows=evaluation["max_rows"]),
        exactness=evaluation["exactness"],
    )
    return Composed(federation, loaded, split, bundles, data)


def zero_shot_of(
    loaded: LoadedModel,
    views: Mapping[str, Any],
    bundles: Mapping[str, Bundle],
    evaluator: Evaluator,
    *,
    on: Mapping[str, Any],
    cache: Path,
) -> dict[str, Evaluation]:
    """Return the evaluations before tuning, of the full model and each emulated one, from the cache if they are there.

    Args:
        loaded: The full model.
        views: The emulated models by key, before PEFT.
        bundles: What they were built from.
        evaluator: How to score.
        on: What else the numbers depend on: rows, batch size, threads, device.
        cache: Where evaluations are kept.
    """

    def scored(model: Any, content: str) -> Evaluation:
        return cached_evaluation(cache, {**on, "model": content, "torch": torch.__version__}, lambda: evaluator(model))

    tensors = {name: tensor for name, tensor, _ in model_tensors(loaded.model)}
    zero_shot = {"full_zero_shot": scored(loaded.model, digest(tensors))}
    for key, view in views.items():
        name = "emulator_zero_shot" if key == "default" else f"emulator_zero_shot/{key}"
        zero_shot[name] = scored(view.model, bundles[key].version)
    zero_shot.setdefault("emulator_zero_shot", zero_shot["full_zero_shot"])
    return zero_shot


def check_counts(settings: Settings) -> None:
    """Check what must be counted from 1; no rounds at all is an evaluation before tuning.

    Raises:
        ConfigError: If a count is less.
    """
    for key in ("rounds", "evaluate_every", "client.local_steps", "round.min_replies", "server.local_steps"):
        value: Any = settings
        for part in key.split("."):
            value = value[part]
        least = 0 if key == "rounds" else 1
        if value is not None and value < least:
            raise ConfigError(f"cannot use {key}={value}", f"it must be {least} or more", f"raise {key}")


def load_model_of(settings: Settings, device: str) -> LoadedModel:
    """Return the full model that `settings` name."""
    model = settings["model"]
    return load_model(
        model["name"],
        dtype=model["dtype"],
        attention=model["attention"],
        revision=model["revision"],
        device=device,
    )


def attached(settings: Settings, view: Any) -> Tuned:
    """Return `view` with its PEFT parameters, the same whatever its depth."""
    return attach(
        view.model,
        method=settings["peft"],
        path=view.path,
        sources=view.sources,
        adapter_positions=view.adapter_positions,
        seed=settings["seed"],
    )


def emulator_keys(settings: Settings) -> dict[str, int]:
    """Return the kept blocks of each further emulator that single devices use, by its key."""
    return {f"kept_{kept}": int(kept) for kept in sorted(set(settings["control"]["kept_blocks"].values()))}


def bundles_of(settings: Settings, loaded: LoadedModel, split: Split, folder: Path) -> dict[str, Bundle]:
    """Write (or find) the bundle of each emulator."""
    builders = {"default": built(settings["emulator"])}
    for key, kept in emulator_keys(settings).items():
        builders[key] = built(settings["emulator"], kept_blocks=kept)
    written = {
        key: write_bundle(loaded, split=split, builder=builder, folder=folder) for key, builder in builders.items()
    }
    return {key: open_bundle(bundle.folder) for key, bundle in written.items()}


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
        local_steps_of=control["local_steps"],
        emulator_of={client: f"kept_{kept}" for client, kept in control["kept_blocks"].items()},
        rank_of=control["rank"],
    )


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
