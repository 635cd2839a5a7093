"""One optimiser step on some batches, with what a recipe adds to it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import nn

from fedpeat.client.prefix import Prefix
from fedpeat.client.spec import Guidance, TrainingSpec
from fedpeat.peft import Tuned

_UNSCORED = -100

Batch = Mapping[str, torch.Tensor]


class Stepper:
    """Takes optimiser steps.

    Args:
        tuned: Whose tensors; where they stand now is the round's start.
        optimizer: Of these tensors.
        spec: How to train.
        guidance: What a recipe adds to each step.
        prefix: Hidden states that need not be computed again; None for none.
    """

    def __init__(
        self,
        tuned: Tuned,
        optimizer: torch.optim.Optimizer,
        spec: TrainingSpec,
        guidance: Guidance,
        prefix: Prefix | None = None,
    ) -> None:
        self.prefix = prefix
        self.tuned = tuned
        self.optimizer = optimizer
        self.spec = spec
        self.guidance = guidance
        self.loss_of = loss_function(tuned, spec)
        self.steps = 0
        self._start = [p.detach().clone() for p in tuned.parameters] if guidance.proximal_mu else []
        self._sums = [torch.zeros_like(p) for p in tuned.parameters] if guidance.record_gradients else []
        self._correction = [
            guidance.correction[name].to(parameter.device)
            for name, parameter in zip(tuned.names, tuned.parameters, strict=True)
            if guidance.correction
        ]
        self._tails = _tails(tuned, guidance.tail_penalty[1]) if guidance.tail_penalty else []

    def step(self, batches: list[Batch], rate: float, rows: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
        """Take one step at `rate` times the learning rate; return its loss, or nothing if no token was scored.

        Args:
            batches: Keywords for the model, a forward pass each.
            rate: Times the learning rate.
            rows: Which rows each batch holds, `(batch,)`: needed with a prefix.
        """
        scored = [scored_tokens(batch["labels"]) for batch in batches]
        if not sum(scored):
            return []
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self.spec.learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        parts = []
        for number, (batch, tokens) in enumerate(zip(batches, scored, strict=True)):
            if tokens:
                with self.prefix.serving(rows[number]) if self.prefix else nullcontext():
                    part = self.loss_of({name: tensor.to(self.tuned.device) for name, tensor in batch.items()})
                # Each is a mean over its own tokens: weighted by these, they are the mean over all.
                part = part * (tokens / sum(scored)) if len(batches) > 1 else part
                part.backward()
                parts.append(part.detach())
        self._guide()
        if self.spec.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.tuned.parameters, self.spec.clip_norm)
        self.optimizer.step()
        self.steps += 1
        return [torch.stack(parts).sum() if len(parts) > 1 else parts[0]]

    def _guide(self) -> None:
        """Record the raw gradients, then add what the recipe adds; clipping comes after both."""
        self._penalise_tails()
        for number, parameter in enumerate(self.tuned.parameters):
            if parameter.grad is None:
                continue
            if self._sums:
                self._sums[number].add_(parameter.grad)
            if self._correction:
                parameter.grad.add_(self._correction[number])
            if self._start:
                parameter.grad.add_(parameter.detach() - self._start[number], alpha=self.guidance.proximal_mu)

    def _penalise_tails(self) -> None:
        if self.guidance.tail_penalty and self._tails:
            weight = self.guidance.tail_penalty[0]
            torch.stack([weight * b[:, k:].norm() * a[k:].norm() for a, b, k in self._tails]).sum().backward()

    def mean_gradient(self) -> dict[str, torch.Tensor]:
        """Return the mean of the raw gradients so far, on the CPU, by name; nothing if they were not recorded."""
        return {
            name: (total / max(self.steps, 1)).cpu() for name, total in zip(self.tuned.names, self._sums, strict=False)
        }


def _tails(tuned: Tuned, share: float) -> list[tuple[nn.Parameter, nn.Parameter, int]]:
    """Return A, B and the first row of the tail of each LoRA layer that has one."""
    by_name = dict(zip(tuned.names, tuned.parameters, strict=True))
    found = []
    for pair in tuned.layout.pairs:
        if pair.a in by_name and pair.b in by_name:
            rank = by_name[pair.a].shape[0]
            if int(share * rank) < rank:
                found.append((by_name[pair.a], by_name[pair.b], int(share * rank)))
    return found


def scored_tokens(labels: torch.Tensor) -> int:
    """Return how many tokens of `labels`, `(batch, tokens)`, are predicted and scored; the first of a row never is."""
    return int((labels[:, 1:] != _UNSCORED).sum())


def loss_function(tuned: Tuned, spec: TrainingSpec) -> Callable[[Batch], torch.Tensor]:
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
