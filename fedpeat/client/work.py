"""One participant's part in a round: the recipe's client half, for devices and for the server alike."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fedpeat.client.prefix import Prefix
from fedpeat.client.spec import Guidance, TrainingSpec
from fedpeat.client.store import Store
from fedpeat.client.train import probe_loss, train
from fedpeat.core import Tensors, UpdateRefused, add, clip, subtract, zeros_like
from fedpeat.data import Rows
from fedpeat.peft import Tuned


@dataclass(frozen=True)
class Task:
    """What a participant is asked to do in a round.

    Attributes:
        client: Its name, which its batch order and dropout follow.
        steps: Optimiser steps.
        start_step: The federation's global step before the first of them.
        total_steps: Global steps of the whole run, where schedules end.
        seed: The run's seed.
        half: The recipe's client half (see `strategies.Recipe.client`).
    """

    client: str
    steps: int
    start_step: int
    total_steps: int
    seed: int
    half: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Worked:
    """What came of a task.

    Attributes:
        delta: `local - global` of what is to be sent.
        extras: What the recipe has sent beside it.
        metrics: Those of `train`, `effective_steps`, and `start_loss` where asked for.
    """

    delta: dict[str, torch.Tensor]
    extras: dict[str, torch.Tensor]
    metrics: dict[str, float]


def work(
    tuned: Tuned, rows: Rows, *, task: Task, spec: TrainingSpec, tensors: Tensors, extras: Tensors, store: Store
) -> Worked:
    """Train as the recipe wants it, from the round's global tensors and what this participant kept.

    Args:
        tuned: The model, folds in place; it holds the global tensors afterwards.
        rows: What to train on.
        task: What to do.
        spec: How.
        tensors: The global travelling tensors, those left out that the recipe fixes or has clients keep.
        extras: What the recipe sends beside them.
        store: What this participant kept, and keeps.

    Raises:
        UpdateRefused: If tensors are missing or do not fit, or training went out of bounds.
        DataError: If there is nothing to train on.
    """
    half, layout = task.half, tuned.layout
    personal = layout.names(half.get("personal", ()))
    kept = store.read("personal")
    lost = bool(personal and store.lost("personal")) or bool(half.get("control_variates") and store.lost("control"))
    start = {**tuned.initial, **{name: kept[name] for name in personal if name in kept}, **tensors}
    _check_sent(tuned, tensors, personal | layout.names(half.get("fixed", ())))
    tuned.write(start)
    metrics = _probe(tuned, rows, half, spec)
    trained = layout.names(half["train_only"]) if "train_only" in half else frozenset(tuned.names)
    variates = _variates(tuned, half, store)
    part = tuned.only(trained)
    remembered = store.read("optimizer") if spec.optimizer_state == "keep" else {}
    result = train(
        part,
        rows,
        spec=spec,
        steps=task.steps,
        start_step=task.start_step,
        total_steps=task.total_steps,
        seed=task.seed,
        client=task.client,
        optimizer_state={name: value for name, value in remembered.items() if _tensor_of(name) in trained},
        guidance=Guidance(
            proximal_mu=float(half.get("proximal_mu", 0.0)),
            correction={name: extras[name] - variates[name] for name in part.names} if variates else {},
            record_gradients=bool(variates),
            tail_penalty=tuple(half["tail_penalty"]) if half.get("tail_penalty") else None,
        ),
        prefix=_prefix(part, rows, spec, store),
    )
    store.write("optimizer", {**remembered, **(result.optimizer_state or {})})
    if personal:
        here = {name: start[name] for name in personal}
        moved = {name: value for name, value in result.delta.items() if name in personal}
        store.write("personal", {**here, **add({name: here[name] for name in moved}, moved)})
    change = subtract(result.mean_gradient, variates) if variates else {}
    if variates:
        store.write("control", result.mean_gradient)
    delta = {name: value for name, value in result.delta.items() if name not in personal}
    metrics |= {**result.metrics, "effective_steps": effective_steps(spec, task.steps)}
    if lost:
        metrics["state_lost"] = 1.0
    if half.get("clip_delta"):
        delta, clipped = clip(delta, float(extras["clip_norm"]))
        metrics["clipped"] = float(clipped)
    return Worked(delta, change, metrics)


def _prefix(tuned: Tuned, rows: Rows, spec: TrainingSpec, store: Store) -> Prefix | None:
    if not spec.prefix_mib or store.folder is None:
        return None
    prefix = Prefix(tuned, rows, store.folder, limit_mib=spec.prefix_mib, precision=spec.precision)
    return prefix if prefix.useful else None


def _check_sent(tuned: Tuned, tensors: Tensors, left_out: frozenset[str]) -> None:
    missing = set(tuned.names) - set(tensors) - left_out
    if missing:
        raise UpdateRefused(
            "a round's global tensors must be all that travel",
            f"{len(missing)} are missing, {min(missing)!r} among them",
            "use one version of fedpeat on both ends",
        )


def _tensor_of(state_name: str) -> str:
    """Return the tensor that an entry of an optimiser's state, `<optimiser>/<tensor>/<key>`, belongs to."""
    return state_name.split("/")[1]


def _probe(tuned: Tuned, rows: Rows, half: Mapping[str, Any], spec: TrainingSpec) -> dict[str, float]:
    count = int(half.get("probe_rows", 0))
    if not count:
        return {}
    loss = probe_loss(tuned, rows, count=count, batch_size=spec.batch_size, threads=spec.threads)
    return {"start_loss": loss}


def _variates(tuned: Tuned, half: Mapping[str, Any], store: Store) -> dict[str, torch.Tensor]:
    """Return this client's control variates; nothing for recipes without them, and for the server, which keeps none."""
    if not half.get("control_variates") or not store.keeps:
        return {}
    return store.read("control") or zeros_like(tuned.initial)


def effective_steps(spec: TrainingSpec, steps: int) -> float:
    """Return how many plain gradient steps the optimiser's steps amount to, `|a|_1`.

    With momentum `rho` a gradient is counted again in each later step:
    `(tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho)`. Other optimisers, whose steps do not grow with the gradient,
    count each step as one.

    Source: FedNova, Wang et al. 2020, arXiv 2007.07481, section 4 (momentum).
    Departures: summed up step by step, so that dampening and Nesterov's look ahead count too.

    >>> effective_steps(TrainingSpec(0.1, 8, optimizer="SGD"), 5)
    5.0
    >>> effective_steps(TrainingSpec(0.1, 8, optimizer="SGD", optimizer_options={"momentum": 0.5}), 2)
    2.5
    """
    options = spec.optimizer_options if spec.optimizer == "SGD" else {}
    rho, fresh = float(options.get("momentum", 0.0)), 1.0 - float(options.get("dampening", 0.0))
    buffer = total = 0.0
    for step in range(steps):
        buffer = rho * buffer + (fresh if step and rho else 1.0)
        total += 1.0 + rho * buffer if options.get("nesterov") else buffer
    return total
