"""What an emulator is trained for: the full model's hidden states behind the middle, its logits, the text itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn import functional

from fedpeat.core import ConfigError, Tensors
from fedpeat.emulators.assemble import EmulatedModel
from fedpeat.emulators.training.hidden import (
    Tap,
    gap_parts,
    hidden_states,
    in_batches,
    meeting_taps,
    relative,
    without_labels,
)

_UNSCORED = -100


class Weights(NamedTuple):
    """The terms' weights: hidden gap, the text's own cross entropy, and `KL(full || emulated)` of the logits."""

    hidden: float
    lm: float
    logit: float

    def check(self) -> None:
        """Check that they can be minimised.

        Raises:
            ConfigError: If one is negative or not finite, or all are zero.
        """
        if not all(0 <= weight < float("inf") for weight in self) or not any(self):
            found = f"hidden_weight={self.hidden}, lm_weight={self.lm}, logit_weight={self.logit}"
            raise ConfigError("cannot train an emulator for this", found, "give weights >= 0, one of them above 0")


@dataclass(frozen=True)
class Objective:
    """How far an emulated model is from the full one, to be lowered.

    Attributes:
        full: The teacher.
        emulated: The student.
        weights: Of the terms.
        taps: Where the runs of middle blocks end, in both.
    """

    full: EmulatedModel
    emulated: EmulatedModel
    weights: Weights
    taps: tuple[tuple[Tap, ...], tuple[Tap, ...]] = field(init=False)

    def __post_init__(self) -> None:
        """Find where the two models meet."""
        object.__setattr__(self, "taps", meeting_taps(self.full, self.emulated))

    @torch.no_grad()
    def targets(self, inputs: Tensors) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Return the full model's hidden states, and its logits `(rows, tokens, vocabulary)` if they count."""
        further = self.weights.logit > 0
        states, output = hidden_states(
            self.full.model, self.full.path, self.taps[0], without_labels(inputs), further=further
        )
        return states, output.logits if further else None

    def loss(self, inputs: Tensors, targets: tuple[Sequence[torch.Tensor], torch.Tensor | None]) -> torch.Tensor:
        """Return the weighted loss of a batch, from the full model's `targets` on it; it runs no further than needed.

        Args:
            inputs: `input_ids`, `labels` if the text counts, perhaps `attention_mask`.
            targets: From `targets`.
        """
        weights = self.weights
        inputs = inputs if weights.lm else without_labels(inputs)
        further = weights.lm > 0 or weights.logit > 0
        states, output = hidden_states(self.emulated.model, self.emulated.path, self.taps[1], inputs, further=further)
        terms = []
        if weights.hidden:
            terms.append(weights.hidden * relative(gap_parts(targets[0], states, inputs)))
        if weights.lm:
            terms.append(weights.lm * output.loss)
        if weights.logit and targets[1] is not None:
            terms.append(weights.logit * divergence(targets[1], output.logits, inputs))
        return torch.stack(terms).sum()


def divergence(theirs: torch.Tensor, ours: torch.Tensor, inputs: Tensors) -> torch.Tensor:
    """Return the mean over tokens of `KL(theirs || ours)`, in nats, of logits `(rows, tokens, vocabulary)`."""
    target, own = (functional.log_softmax(logits.float(), dim=-1) for logits in (theirs, ours))
    apart = functional.kl_div(own, target, reduction="none", log_target=True).sum(-1)
    real = inputs.get("attention_mask")
    return apart.mean() if real is None else apart[real.bool()].mean()


def with_labels(rows: Tensors) -> dict[str, torch.Tensor]:
    """Return rows that have labels: where there are none, the tokens themselves, padding excepted."""
    if "labels" in rows:
        return dict(rows)
    labels = rows["input_ids"].clone()
    if "attention_mask" in rows:
        labels[rows["attention_mask"] == 0] = _UNSCORED
    return {**rows, "labels": labels}


@torch.no_grad()
def measure(full: EmulatedModel, emulated: EmulatedModel, rows: Tensors, *, batch_size: int) -> Mapping[str, float]:
    """Return the `gap` of hidden states and the emulated model's loss `lm`, in nats a token, over all of `rows`."""
    objective = Objective(full, emulated, Weights(1.0, 1.0, 0.0))
    sums, loss, scored = [], 0.0, 0
    for batch in in_batches(with_labels(rows), batch_size, emulated.model.device):
        theirs, _ = objective.targets(batch)
        ours, output = hidden_states(emulated.model, emulated.path, objective.taps[1], batch, further=True)
        sums.append(torch.stack([torch.stack(part) for part in gap_parts(theirs, ours, batch)]).double())
        tokens = int((batch["labels"][:, 1:] != _UNSCORED).sum())
        if tokens:
            loss, scored = loss + float(output.loss) * tokens, scored + tokens
    totals = torch.stack(sums).sum(0)
    gap = float((totals[:, 0] / totals[:, 1].clamp_min(torch.finfo(torch.float64).tiny)).mean())
    return {"gap": gap, "lm": loss / scored if scored else 0.0}
