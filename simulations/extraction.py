"""The extraction probe: how good a model a curious device makes of what it holds, by fine-tuning all of it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fedpeat.bundles import Bundle, build_emulated, open_bundle
from fedpeat.client import TrainingSpec, train
from fedpeat.core import ConfigError, Evaluation, UpdateRefused, add, nearest
from fedpeat.data import POOLED, FederatedData, open_rows
from fedpeat.peft import Tuned, attach
from simulations.costs import is_stored
from simulations.federation import Federation, Observer

Settings = Mapping[str, Any]


def check_extraction(settings: Settings, data: FederatedData) -> None:
    """Check the probe's settings, if it is wanted.

    Raises:
        ConfigError: If the client is unknown, or a number is out of range.
    """
    if not settings["baselines"]["extraction"]:
        return
    probe, names = settings["extraction"], [client.name for client in data.clients]
    if probe["client"] is not None and str(probe["client"]) not in names:
        asked = f"extraction.client={probe['client']}"
        raise ConfigError(asked, "no such client", nearest(str(probe["client"]), names))
    if probe["steps"] is not None and probe["steps"] < 1:
        found = "the probe takes 1 step or more"
        raise ConfigError(f"extraction.steps={probe['steps']}", found, "raise it, or set null for the run's own number")
    TrainingSpec(learning_rate=probe["learning_rate"], batch_size=1)


def run_extraction(settings: Settings, federation: Federation, data: FederatedData, *, observer: Observer) -> Any:
    """Let one client train everything that its bundle holds on its own rows, and score the result.

    It reads its bundle and its rows, as an honest-but-curious device could: same optimiser, batches and schedule as in
    the federation, other learning rate, no help from other clients.

    Args:
        settings: The run's.
        federation: The run.
        data: Who holds what.
        observer: Told if training went out of bounds.

    Returns:
        Loss, perplexity, accuracy and tokens on the run's held-out rows (None if training went out of bounds), `client`
        and `steps`.
    """
    client = curious_client(settings, data)
    key = federation.control.emulator_of.get(client, "default")
    bundle = open_bundle(federation.bundles[key], verify=False)
    tuned = everything(bundle, seed=federation.seed, device=federation.evaluator.device)
    steps = settings["extraction"]["steps"]
    if steps is None:
        steps = federation.rounds * federation.control.local_steps_of.get(client, federation.control.local_steps)
    rate = settings["extraction"]["learning_rate"]
    own = {"learning_rate": rate, "optimizer_state": "reset", "compile": False}
    place = {"start_step": 0, "total_steps": steps, "seed": federation.seed, "client": client}
    try:
        if steps:
            spec = replace(TrainingSpec(**federation.job["spec"]), **own)
            result = train(tuned, open_rows(data.folder, client, "train"), spec=spec, steps=steps, **place)
            tuned.write(add(tuned.initial, result.delta))
        found: Mapping[str, Any] = federation.evaluator(tuned.model).to_json()
    except (UpdateRefused, torch.OutOfMemoryError) as error:
        observer.message(f"extraction: {error}")
        found = dict.fromkeys(Evaluation(0.0, 0.0, 0).to_json())
    return {**found, "client": client, "steps": steps}


def curious_client(settings: Settings, data: FederatedData) -> str:
    """Return who tries: the client that is named, or else the one with most rows (of several, the first by name)."""
    if settings["extraction"]["client"] is not None:
        return str(settings["extraction"]["client"])
    if settings["clients"]["pool"]:
        return POOLED
    return min(data.clients, key=lambda client: (-client.rows, client.name)).name


def everything(bundle: Bundle, *, seed: int, device: str = "cpu") -> Tuned:
    """Return a bundle's model with all that it holds trainable: blocks, embeddings, head, norms.

    Layers that are stored in few bits or sparsely become plain linear ones first.
    """
    view = build_emulated(bundle, device=device)
    make_dense(view.model)
    outside = [
        name
        for name, parameter in view.model.named_parameters()
        if parameter.is_floating_point() and not name.startswith(f"{view.path}.")
    ]
    return attach(
        view.model,
        method={"kind": "full"},
        path=view.path,
        sources=view.sources,
        adapter_positions=range(len(view.sources)),
        seed=seed,
        unfreeze=outside,
    )


def make_dense(model: nn.Module) -> None:
    """Put a plain linear layer in the place of each that keeps its weight in another form, in place."""
    made: dict[tuple[int, ...], nn.Linear] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if is_stored(module):
            # A block at several places has its tensors once; so must its dense layers have theirs.
            key = tuple(id(parameter) for parameter in module.parameters())
            if key not in made:
                made[key] = _linear(module)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made[key])


def _linear(stored: nn.Module) -> nn.Linear:
    weight = stored.dense(getattr(stored, "dtype", torch.float32))  # type: ignore[operator]
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.register_parameter("bias", stored.bias)  # type: ignore[arg-type]
    return layer
