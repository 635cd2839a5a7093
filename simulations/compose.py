"""Settings to a `Federation`: everything is built once, here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedpeat.bundles import Bundle, build_emulated
from fedpeat.client import TrainingSpec
from fedpeat.client.app import resolve_device
from fedpeat.client.footprint import footprint
from fedpeat.core import ConfigError, Evaluation, digest
from fedpeat.data import FederatedData, Rows
from fedpeat.emulators import EmulatedModel, check_map_back, full_view
from fedpeat.models import LoadedModel, Split, find_blocks, load_model, make_split, model_tensors
from fedpeat.peft import Tuned, attach
from simulations.building import built
from simulations.conditions import attackers_of, check_recipe, codec_of, personal_of
from simulations.control import check_files, with_controller
from simulations.control_settings import check_control
from simulations.costs import Costs, costs_of, sizes_of
from simulations.devices import fleet_of, made_of_devices
from simulations.emulation import bundles_of, context_of, emulators_of, unfrozen_of, write_notes
from simulations.evaluation import Evaluator, evaluator_of
from simulations.extraction import check_extraction
from simulations.federation import Federation, Observer
from simulations.ladder import assigned
from simulations.participation import check_prefix, control_of, limits_of, participant_of, spec_of
from simulations.privacy import privacy_of
from simulations.realignment import realignment_of
from simulations.unfreezing import Unfreezing, check_policy
from simulations.zero_shot import cached_evaluation
from strategies import Recipe

Settings = Mapping[str, Any]

COUNTS = ("rounds", "evaluate_every", "client.local_steps", "round.min_replies", "server.local_steps", "checkpoints")


@dataclass(frozen=True)
class Composed:
    """A federation and what reports and exports need beside it.

    Attributes:
        federation: What the round loop runs.
        loaded: The full model as loaded; its weights are shared with `federation.full`.
        split: Which blocks are adapter.
        bundles: Each emulator's bundle, by key.
        data: The partitioned data.
        costs: What each emulator is and takes, by key.
        made_of: Hashes of what the run rests on, by name.
        privacy: What is known of its differential privacy before it runs; None without.
    """

    federation: Federation
    loaded: LoadedModel
    split: Split
    bundles: Mapping[str, Bundle]
    data: FederatedData
    costs: Costs
    made_of: Mapping[str, str]
    privacy: Mapping[str, Any] | None = None


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
    check_policy(settings)
    check_control(settings)
    check_files(settings)
    check_extraction(settings, data)
    device = resolve_device(settings["client"]["device"])
    loaded = load_model_of(settings, device)
    split = make_split(find_blocks(loaded.model).count, **settings["model"]["split"])
    recipe: Recipe = built(settings["strategy"])
    control = control_of(settings, data, recipe)
    privacy = privacy_of(settings, recipe, control)
    recipe, control = privacy.recipe, privacy.control
    evaluation = settings["evaluation"]
    evaluator = evaluator_of(evaluation, data, device)

    context = context_of(settings, data, loaded, split, cache=cache / "emulators", tell=observer.working)
    emulators = emulators_of(settings, loaded, split, context)
    write_notes(emulators, split, folder)
    bundles = bundles_of(loaded, split, emulators, cache / "bundles")
    views = {  # where nothing was left out, the emulated model is the full one, to the bit
        key: build_emulated(bundle, device=device) for key, bundle in bundles.items() if not bundle.whole
    }
    observer.message(f"evaluating {loaded.name} before tuning")
    on = {key: evaluation[key] for key in ("batch_size", "threads", "max_rows", "normalise")}
    on |= {"device": device, "data": data.folder.name, "attention": settings["model"]["attention"]}
    zero_shot = zero_shot_of(loaded, views, bundles, evaluator, on=on, cache=cache / "evaluations")
    sizes = sizes_of(loaded, split, views, bundles)
    unfrozen = unfrozen_of(settings, views)
    whole, policy = full_view(loaded, split), settings["client"]["unfreeze_policy"]
    mapped = check_map_back(views["default"], whole, unfrozen) if unfrozen and policy == "map_back" else []
    emulated = {key: attached(settings, view, unfrozen) for key, view in views.items()}
    full = attached(settings, whole, mapped)
    check_recipe(settings, recipe, full.layout)
    spec = spec_of(settings, full)
    check_prefix(spec, emulated.get("default", full))
    models = {key: emulated.get(key, full) for key in bundles}
    needs = needs_of(settings, models, evaluator.rows, spec)
    control = replace(control, emulator_of=assigned(settings, control.clients, needs))
    job = {
        "seed": settings["seed"],
        "method": settings["peft"],
        "frozen_digest": full.frozen_digest,
        "spec": spec,
        "device": settings["client"]["device"],
        "data": str(data.folder),
        "state_folder": str(folder / "clients"),
        "unfreeze": settings["client"]["unfreeze"],
        "unfreeze_blocks": settings["client"]["unfreeze_blocks"],
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
        enough=control.per_round if control.asked > control.per_round else None,
        limits=limits_of(settings, data),
        checkpoints=settings["checkpoints"],
        fleet=fleet_of(settings, control.clients, models, evaluator.rows, spec),
        bundle_bytes={key: bundle.payload_bytes for key, bundle in bundles.items()},
        workers=workers,
        seed=settings["seed"],
        method=settings["peft"],
        codec=codec_of(settings, recipe),
        attacks=attackers_of(settings, control.clients),
        personal=personal_of(recipe, data, folder=str(folder / "clients"), max_rows=evaluation["max_rows"]),
        exactness=evaluation["exactness"],
        epsilon=privacy.epsilon,
        realignment=realignment_of(settings, context, full, emulated),
        unfreezing=unfreezing_of(policy, emulated["default"]) if unfrozen else Unfreezing(),
    )
    federation = with_controller(
        settings,
        federation,
        data,
        {key: size["kept_share"] for key, size in sizes.items()},
        lambda key, rank: attached(
            {**settings, "peft": federation.method_at(rank)}, build_emulated(bundles[key], device=device), unfrozen
        ),
        observer,
    )
    if evaluation["costs"]:
        observer.message("measuring what a device needs")
    costs = costs_of(sizes, federation, data, measure=evaluation["costs"])
    hashes = {**made_of(bundles, data, full), **made_of_devices(federation.fleet)}
    return Composed(federation, loaded, split, bundles, data, costs, hashes, privacy.facts)


def made_of(bundles: Mapping[str, Bundle], data: FederatedData, full: Tuned) -> dict[str, str]:
    """Return hashes of all that a run rests on: a run that is resumed must find the same."""
    emulators = {f"bundle {key}": bundle.version for key, bundle in bundles.items()}
    return {"data": data.folder.name, "initial tensors": digest(full.initial), **emulators}


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
    for key in (
        "rounds",
        "evaluate_every",
        "client.local_steps",
        "round.min_replies",
        "server.local_steps",
        "checkpoints",
    ):
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


def needs_of(settings: Settings, models: Mapping[str, Tuned], rows: Rows, spec: Mapping[str, Any]) -> dict[str, int]:
    """Return the memory that a local step needs with each emulator, bytes; counted only where it decides anything."""
    if not settings["control"]["memory_mib"]:
        return dict.fromkeys(models, 0)
    return {key: footprint(tuned, rows, TrainingSpec(**spec)).total for key, tuned in models.items()}


def unfreezing_of(policy: str, emulated: Tuned) -> Unfreezing:
    """Return the policy for the unfrozen tensors of an emulated model."""
    return Unfreezing(policy, {name: emulated.initial[name] for name in emulated.layout.unfrozen})


def attached(settings: Settings, view: EmulatedModel, unfreeze: Sequence[str] = ()) -> Tuned:
    """Return `view` with its PEFT parameters, the same whatever its depth."""
    return attach(
        view.model,
        method=settings["peft"],
        path=view.path,
        sources=view.sources,
        adapter_positions=view.adapter_positions,
        seed=settings["seed"],
        unfreeze=unfreeze,
    )
