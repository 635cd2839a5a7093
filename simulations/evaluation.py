"""The server's evaluations on held-out rows: of one model for all, and of each client's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedpeat.client import Store
from fedpeat.core import Evaluation
from fedpeat.data import Choices, FederatedData, Rows, open_choices, open_rows
from fedpeat.peft import Tuned
from fedpeat.server import check_normalise, choose, evaluate


@dataclass(frozen=True)
class Evaluator:
    """Scores any model on the same held-out rows.

    Attributes:
        rows: Held-out rows.
        batch_size: Rows a forward pass.
        threads: Torch threads.
        device: Where the models are.
        choices: Held-out documents with every possible answer, where the data has such.
        normalise: How answers of unequal length are compared: see `fedpeat.server.choose`.
    """

    rows: Rows
    batch_size: int
    threads: int
    device: str
    choices: Choices | None = None
    normalise: str = "none"

    def __call__(self, model: Any, rows: Rows | None = None) -> Evaluation:
        """Return how well `model` predicts the held-out rows and picks answers, or predicts these rows."""
        how = {"batch_size": self.batch_size, "threads": self.threads, "device": self.device}
        found = evaluate(model, self.rows if rows is None else rows, **how)
        if self.choices is None or rows is not None:
            return found
        picked = choose(model, self.choices, normalise=self.normalise, **how)
        return replace(found, choice_accuracy=picked.accuracy)


def evaluator_of(evaluation: Mapping[str, Any], data: FederatedData, device: str) -> Evaluator:
    """Return the evaluator of a run.

    Args:
        evaluation: The settings `evaluation.*`.
        data: The partitioned data.
        device: Where the models are.

    Raises:
        ConfigError: If answers cannot be compared as asked.
    """
    held_out, most = open_rows(data.folder, "server", "test"), evaluation["max_rows"]
    return Evaluator(
        rows=rows_at(held_out, spread(len(held_out), most)),
        batch_size=evaluation["batch_size"],
        threads=evaluation["threads"],
        device=device,
        choices=open_choices(data.folder, lambda count: spread(count, most)),
        normalise=check_normalise(evaluation["normalise"]),
    )


@dataclass(frozen=True)
class Personal:
    """Scores each held-out row by its own client's model: the global tensors plus what that client keeps.

    Only a simulation can do this. In a real federation nobody holds both the full middle and a client's own tensors.

    Attributes:
        rows: Held-out rows by client.
        folder: Where clients keep their tensors.
    """

    rows: Mapping[str, Rows]
    folder: str

    def __call__(
        self, full: Tuned, evaluator: Evaluator, counted: Mapping[str, Sequence[int]] | None = None
    ) -> Evaluation:
        """Return the evaluation over all clients' rows, weighted by tokens.

        Args:
            full: The full model, tuned to the global state; it is afterwards too.
            evaluator: How to score.
            counted: The rounds in which each client's update counted, by name; None for whatever was written last.
        """
        shared, parts = full.read(), []
        for client, rows in self.rows.items():
            rounds = None if counted is None else counted.get(client, ())
            kept = Store(self.folder, client, counted=rounds).read("personal")
            full.write({**shared, **{name: tensor for name, tensor in kept.items() if name in shared}})
            parts.append(evaluator(full.model, rows))
        full.write(shared)
        tokens = sum(part.tokens for part in parts)
        return Evaluation(
            loss=sum(part.loss * part.tokens for part in parts) / tokens,
            accuracy=sum(part.accuracy * part.tokens for part in parts) / tokens,
            tokens=tokens,
        )


def rows_at(rows: Rows, chosen: torch.Tensor) -> Rows:
    """Return the rows of these numbers, `(count,)`."""
    mask = None if rows.attention_mask is None else rows.attention_mask[chosen]
    return Rows(rows.input_ids[chosen], rows.labels[chosen], mask)


def spread(count: int, limit: int | None) -> torch.Tensor:
    """Return at most `limit` of the numbers below `count`, at even distances, so that every client stays represented.

    >>> spread(10, 4).tolist()
    [0, 3, 6, 9]
    """
    if limit is None or count <= limit:
        return torch.arange(count)
    # In fp32 neighbours fall together from 4096 numbers on.
    return torch.linspace(0, count - 1, limit, dtype=torch.float64).round().long()
