"""The server's evaluations on held-out rows: of one model for all, and of each client's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedpeat.client import Store
from fedpeat.core import Evaluation
from fedpeat.data import Rows
from fedpeat.peft import Tuned
from fedpeat.server import evaluate


@dataclass(frozen=True)
class Evaluator:
    """Scores any model on the same held-out rows.

    Attributes:
        rows: Held-out rows.
        batch_size: Rows a forward pass.
        threads: Torch threads.
        device: Where the models are.
    """

    rows: Rows
    batch_size: int
    threads: int
    device: str

    def __call__(self, model: Any, rows: Rows | None = None) -> Evaluation:
        """Return how well `model` predicts the held-out rows, or these."""
        chosen = self.rows if rows is None else rows
        return evaluate(model, chosen, batch_size=self.batch_size, threads=self.threads, device=self.device)


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

    def __call__(self, full: Tuned, evaluator: Evaluator) -> Evaluation:
        """Return the evaluation over all clients' rows, weighted by tokens.

        Args:
            full: The full model, tuned to the global state; it is afterwards too.
            evaluator: How to score.
        """
        shared, parts = full.read(), []
        for client, rows in self.rows.items():
            full.write({**shared, **Store(self.folder, client).read("personal")})
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
