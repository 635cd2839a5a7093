"""What a device does with a plan: a number of optimiser steps on its own rows."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fedpeat.client.batches import batch_indices
from fedpeat.client.optimizers import build_optimizer, read_state, write_state
from fedpeat.client.schedules import SCHEDULES, factor
from fedpeat.core import ConfigError, DataError, UpdateRefused, all_finite, nearest, seed_for, subtract
from fedpeat.data import Rows
from fedpeat.peft import Tuned

_PRECISIONS = ("fp32", "bf16")
_UNSCORED = -100

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TrainingSpec:
    """How to train locally.

    Attributes:
        learning_rate: The optimiser's, before the schedule's factor.
        batch_size: Rows a forward pass.
        optimizer: A class of `torch.optim`.
        optimizer_options: Its keywords, the learning rate apart.
        optimizer_state: `reset` for a fresh optimiser each round, `keep` to go on from the client's last one.
        schedule: Of the learning rate, over the federation's global step: a name in `SCHEDULES`.
        warmup_steps: Global steps of linear rise before the schedule.
        clip_norm: Largest Euclidean norm of a step's gradient, None for no limit.
        accumulate: Forward passes an optimiser step; their tokens weigh alike, as if they were one batch.
        precision: `fp32`, or `bf16` for a forward pass under autocast; the trainable tensors are fp32 in both.
        proximal_mu: Weight of the pull towards the round's start, `mu / 2 * |local - start|^2` (FedProx).
        threads: Torch threads; their number changes float sums.
        compile: Compile the forward pass and the loss, once a model.
    """

    learning_rate: float
    batch_size: int
    optimizer: str = "AdamW"
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    optimizer_state: str = "reset"
    schedule: str = "constant"
    warmup_steps: int = 0
    clip_norm: float | None = None
    accumulate: int = 1
    precision: str = "fp32"
    proximal_mu: float = 0.0
    threads: int = 1
    compile: bool = False

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ConfigError: If one is out of range or unknown.
        """
        for key, options in (
            ("optimizer_state", ("reset", "keep")),
            ("schedule", tuple(SCHEDULES)),
            ("precision", _PRECISIONS),
        ):
            value = getattr(self, key)
            if value not in options:
                raise ConfigError(f"cannot use client.{key}={value}", "no such choice", nearest(str(value), options))
        for key, least in (
            ("learning_rate", 0),
            ("batch_size", 1),
            ("warmup_steps", 0),
            ("accumulate", 1),
            ("proximal_mu", 0),
            ("threads", 1),
        ):
            value = getattr(self, key)
            if not value >= least:
                raise ConfigError(
                    f"cannot use client.{key}={value}", f"it must be {least} or more", f"raise client.{key}"
                )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(
                f"cannot use client.clip_norm={self.clip_norm}", "it must be positive", "use null for none"
            )


@dataclass(frozen=True)
class TrainingResult:
    """What came of local training.

    Attributes:
        delta: `local - start` for each travelling tensor, fp32, by canonical name.
        metrics: `train_loss` (mean over steps), `train_loss_first`, `train_loss_last`, in nats a token;
            `train_tokens` (padding included), `train_examples` (rows read, repeats included), `train_seconds`.
        optimizer_state: Named tensors to go on from; None if the optimiser is reset each round or remembers nothing.
    """

    delta: dict[str, torch.Tensor]
    metrics: dict[str, float]
    optimizer_state: dict[str, torch.Tensor] | None


def train(
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
) -> TrainingResult:
    """Train from the tensors that `tuned` holds, and tell how far they moved.

    Pure: `tuned` holds the same tensors afterwards, the global random state and the thread count are left as they were,
    and equal arguments give equal bits. The batch order and the schedule go by `start_step`, so that rounds of a client
    that takes part in all of them, with its optimiser state kept, are one long run.

    Args:
        tuned: The model, its travelling tensors in place.
        rows: What to train on.
        spec: How.
        steps: Optimiser steps.
        start_step: The federation's global step before the first of these.
        total_steps: Global steps of the whole run, where the schedule ends.
        seed: The run's seed.
        client: The client's name, which its batch order and dropout follow.
        optimizer_state: What the client's last `TrainingResult` held, with `optimizer_state="keep"`.

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
        step_on = _stepper(tuned, optimizer, spec)
        for step in range(start_step, start_step + steps):
            _seed(tuned.device, seed_for(seed, "dropout", client, step))
            rate = factor(spec.schedule, step, warmup_steps=spec.warmup_steps, total_steps=total_steps)
            losses += step_on([rows.batch(next(order)) for _ in range(spec.accumulate)], rate)
        values = torch.stack(losses).tolist() if losses else []  # the only wait for a GPU
        seconds = time.perf_counter() - began
        delta = subtract(tuned.read(), start)
    _check(values, delta, client, start_step)
    examples = steps * spec.accumulate * spec.batch_size
    metrics = {
        "train_loss": sum(values) / len(values),
        "train_loss_first": values[0],
        "train_loss_last": values[-1],
        "train_tokens": float(examples * rows.input_ids.shape[1]),
        "train_examples": float(examples),
        "train_seconds": seconds,
    }
    kept = read_state(optimizer, tuned) if spec.optimizer_state == "keep" else {}
    return TrainingResult(delta, metrics, kept or None)


@contextmanager
def _training(tuned: Tuned, start: Mapping[str, torch.Tensor], threads: int) -> Iterator[None]:
    """Put the model into training mode, and everything back as it was afterwards."""
    training, threads_before = tuned.model.training, torch.get_num_threads()
    with torch.random.fork_rng([tuned.device] if tuned.device.type == "cuda" else []):
        torch.set_num_threads(threads)
        tuned.model.train()
        try:
            yield
        finally:
            tuned.write(start)
            for parameter in tuned.parameters:
                parameter.grad = None
            tuned.model.train(training)
            torch.set_num_threads(threads_before)


def _seed(device: torch.device, seed: int) -> None:
    # Not torch.manual_seed, which would reseed every GPU, also those whose state is not set aside.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def _stepper(
    tuned: Tuned, optimizer: torch.optim.Optimizer, spec: TrainingSpec
) -> Callable[[list[Batch], float], list[torch.Tensor]]:
    """Return a function that takes one optimiser step on some batches and returns its loss, if a token was scored."""
    loss_of = _loss_function(tuned, spec)
    anchors = [parameter.detach().clone() for parameter in tuned.parameters] if spec.proximal_mu else []

    def step(batches: list[Batch], rate: float) -> list[torch.Tensor]:
        scored = [_scored(batch["labels"]) for batch in batches]
        if not sum(scored):
            return []
        for group in optimizer.param_groups:
            group["lr"] = rate * spec.learning_rate
        optimizer.zero_grad(set_to_none=True)
        parts = []
        for batch, tokens in zip(batches, scored, strict=True):
            if tokens:
                part = loss_of({name: tensor.to(tuned.device) for name, tensor in batch.items()})
                # Each is a mean over its own tokens: weighted by these, they are the mean over all.
                part = part * (tokens / sum(scored)) if len(batches) > 1 else part
                part.backward()
                parts.append(part.detach())
        for parameter, anchor in zip(tuned.parameters, anchors, strict=bool(anchors)):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=spec.proximal_mu)
        if spec.clip_norm is not None:
            nn.utils.clip_grad_norm_(tuned.parameters, spec.clip_norm)
        optimizer.step()
        return [torch.stack(parts).sum() if len(parts) > 1 else parts[0]]

    return step


def _scored(labels: torch.Tensor) -> int:
    """Return how many tokens of `labels`, `(batch, tokens)`, are predicted and scored; the first of a row never is."""
    return int((labels[:, 1:] != _UNSCORED).sum())


def _loss_function(tuned: Tuned, spec: TrainingSpec) -> Callable[[Batch], torch.Tensor]:
    """Return the function from a batch to the mean loss of its scored tokens, compiled once a model if asked for."""
    # The closure must not hold `tuned`, which holds the compiled closure: a worker's models are freed when dropped.
    key, model, kind, rounded = f"loss/{spec.precision}", tuned.model, tuned.device.type, spec.precision == "bf16"

    def loss_of(batch: Batch) -> torch.Tensor:
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=rounded):
            return model(**batch, use_cache=False).loss

    if not spec.compile:
        return loss_of
    if key not in tuned.compiled:
        tuned.compiled[key] = torch.compile(loss_of)
    return tuned.compiled[key]


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
