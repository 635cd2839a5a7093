"""What a device does with a plan: a number of optimiser steps on its own rows."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from fedpeat.client.batches import batch_indices
from fedpeat.client.optimizers import build_optimizer, read_state, write_state
from fedpeat.client.prefix import Prefix
from fedpeat.client.schedules import factor
from fedpeat.client.spec import NO_GUIDANCE, Guidance, TrainingSpec
from fedpeat.client.steps import Stepper, loss_function, scored_tokens
from fedpeat.core import ConfigError, DataError, UpdateRefused, all_finite, nearest, seed_for
from fedpeat.data import Rows
from fedpeat.peft import Tuned


@dataclass(frozen=True)
class TrainingResult:
    """What came of local training.

    Attributes:
        delta: `local - start` for each travelling tensor, fp32, by canonical name.
        metrics: `train_loss` (mean over steps), `train_loss_first`, `train_loss_last`, in nats a token;
            `train_tokens` (padding included), `train_examples` (rows read, repeats included), `train_steps`,
            `train_seconds`.
        optimizer_state: Named tensors to go on from; None if the optimiser is reset each round or remembers nothing.
        mean_gradient: Mean over the steps of the raw gradients, by name, where the guidance wants it.
    """

    delta: dict[str, torch.Tensor]
    metrics: dict[str, float]
    optimizer_state: dict[str, torch.Tensor] | None
    mean_gradient: dict[str, torch.Tensor] = field(default_factory=dict)


def train(  # noqa: PLR0913
    tuned: Tuned,
    rows: Rows,
    *,
    spec: TrainingSpec,
    steps: int,
    start_step: int,
    total_steps: int,
    seed: int,
    client: str,
    optimizer_state: Mapping[str, torch.Tensor] | None = None,
    guidance: Guidance = NO_GUIDANCE,
    prefix: Prefix | None = None,
) -> TrainingResult:
    """Train from the tensors that `tuned` holds, and tell how far they moved.

    Pure: `tuned` holds the same tensors afterwards, the global random state and the thread count are left as they were,
    and equal arguments give equal bits. The batch order and the schedule go by `start_step`, so that rounds of a client
    that takes part in all of them, with its optimiser state kept, are one long run.

    Args:
        tuned: The model, its travelling tensors in place; of `tuned.only(names)` just these are trained.
        rows: What to train on.
        spec: How.
        steps: Optimiser steps.
        start_step: The federation's global step before the first of these.
        total_steps: Global steps of the whole run, where the schedule ends.
        seed: The run's seed.
        client: The client's name, which its batch order and dropout follow.
        optimizer_state: What the client's last `TrainingResult` held, with `optimizer_state="keep"`.
        guidance: What a recipe adds to each step.
        prefix: Hidden states of `rows` that need not be computed again.

    Raises:
        ConfigError: If there are no steps, the optimiser cannot be built, or its kept state belongs elsewhere.
        DataError: If there are no rows, or none has a token to score.
        UpdateRefused: If the loss or a tensor stopped being finite.
    """
    if steps < 1:
        raise ConfigError(
            f"cannot use client.local_steps={steps}", "a round takes 1 or more", "raise client.local_steps"
        )
    optimizer = build_optimizer(
        tuned, name=spec.optimizer, options=spec.optimizer_options, learning_rate=spec.learning_rate
    )
    if spec.optimizer_state == "keep" and optimizer_state:
        write_state(optimizer, tuned, optimizer_state)
    start = tuned.read()
    order = batch_indices(
        len(rows),
        batch_size=spec.batch_size,
        start=start_step * spec.accumulate,
        count=steps * spec.accumulate,
        seed=seed,
        client=client,
    )
    losses: list[torch.Tensor] = []
    with _training(tuned, start, spec.threads):
        began = time.perf_counter()
        stepper = Stepper(tuned, optimizer, spec, guidance, prefix)
        for step in range(start_step, start_step + steps):
            _seed(tuned.device, seed_for(seed, "dropout", client, step))
            rate = factor(spec.schedule, step, warmup_steps=spec.warmup_steps, total_steps=total_steps)
            chosen = [next(order) for _ in range(spec.accumulate)]
            losses += stepper.step([rows.batch(indices) for indices in chosen], rate, chosen)
        values = torch.stack(losses).tolist() if losses else []  # the only wait for a GPU
        seconds = time.perf_counter() - began
        kept = read_state(optimizer, tuned) if spec.optimizer_state == "keep" else {}
        optimizer.zero_grad()
        optimizer.state.clear()  # of whole weights these are gigabytes, and the delta is one more set
        delta = tuned.change_since(start)
    _check(values, delta, client, start_step)
    examples = steps * spec.accumulate * spec.batch_size
    metrics = {
        "train_loss": sum(values) / len(values),
        "train_loss_first": values[0],
        "train_loss_last": values[-1],
        "train_tokens": float(examples * rows.input_ids.shape[1]),
        "train_examples": float(examples),
        "train_steps": float(steps),
        "train_seconds": seconds,
    }
    return TrainingResult(delta, metrics, kept or None, stepper.mean_gradient())


@contextmanager
def _training(tuned: Tuned, start: Mapping[str, torch.Tensor], threads: int) -> Iterator[None]:
    """Put the model into training mode, and everything back as it was afterwards."""
    training, threads_before = tuned.model.training, torch.get_num_threads()
    mine = {id(parameter) for parameter in tuned.parameters}
    aside = [one for one in tuned.model.parameters() if one.requires_grad and id(one) not in mine]
    with torch.random.fork_rng([tuned.device] if tuned.device.type == "cuda" else []):
        torch.set_num_threads(threads)
        tuned.model.train()
        for parameter in aside:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            tuned.write(start)
            for parameter in tuned.parameters:
                parameter.grad = None
            for parameter in aside:
                parameter.requires_grad_(True)
            tuned.model.train(training)
            torch.set_num_threads(threads_before)


def _seed(device: torch.device, seed: int) -> None:
    # Not torch.manual_seed, which would reseed every GPU, also those whose state is not set aside.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def _check(values: list[float], delta: Mapping[str, torch.Tensor], client: str, start_step: int) -> None:
    if not values:
        raise DataError(
            f"client {client!r} cannot train", "none of its rows has a token to score", "raise data.block_size"
        )
    broken = next((number for number, value in enumerate(values) if not math.isfinite(value)), None)
    if broken is not None or not all_finite(delta):
        found = (
            f"the loss is {values[broken]} at global step {start_step + broken}"
            if broken is not None
            else "a tensor is not finite"
        )
        raise UpdateRefused(
            f"the training of client {client!r} went out of bounds",
            found,
            "lower client.learning_rate or set client.clip_norm",
        )


def weight_of(weight_by: str, metrics: Mapping[str, float]) -> float:
    """Return a participant's weight: the `tokens` it trained on, the `rows` it holds, or 1 (`equal`).

    Raises:
        UpdateRefused: If `weight_by` is none of these.

    >>> weight_of("tokens", {"train_tokens": 512.0, "train_rows": 9.0})
    512.0
    """
    if weight_by == "equal":
        return 1.0
    names = {"tokens": "train_tokens", "rows": "train_rows"}
    if weight_by not in names:
        raise UpdateRefused(
            f"cannot weight by {weight_by!r}", "no such weighting", nearest(weight_by, [*names, "equal"])
        )
    return metrics[names[weight_by]]


@torch.no_grad()
def probe_loss(tuned: Tuned, rows: Rows, *, count: int, batch_size: int, threads: int) -> float:
    """Return the mean loss, nats a token, of the model as it stands on the first `count` rows, dropout off.

    Raises:
        DataError: If none of these rows has a token to score.
    """
    training, before = tuned.model.training, torch.get_num_threads()
    loss_of, total, tokens = loss_function(tuned, TrainingSpec(learning_rate=0.0, batch_size=batch_size)), 0.0, 0
    torch.set_num_threads(threads)
    tuned.model.eval()
    try:
        for start in range(0, min(count, len(rows)), batch_size):
            batch = rows.batch(torch.arange(start, min(start + batch_size, count, len(rows))))
            scored = scored_tokens(batch["labels"])
            if scored:
                total += scored * float(loss_of({name: tensor.to(tuned.device) for name, tensor in batch.items()}))
                tokens += scored
    finally:
        tuned.model.train(training)
        torch.set_num_threads(before)
    if not tokens:
        raise DataError("cannot score a client's own rows", "none has a token to score", "raise data.block_size")
    return total / tokens
