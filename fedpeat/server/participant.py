"""The server's own part in the tuning: one more update, from its own data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedpeat.client import Store, Task, TrainingSpec, weight_of, work
from fedpeat.core import ClientUpdate, GlobalState, RoundPlan
from fedpeat.data import Rows
from fedpeat.peft import Tuned

NAME = "server"


@dataclass(frozen=True)
class Participant:
    """The server as a participant.

    Attributes:
        tuned: The model it tunes: the full one (`server.train=full`) or an emulated one (`emulator`).
        rows: Its own training rows.
        spec: Its own optimiser settings.
        steps: Optimiser steps a round.
        weight: Its weight relative to a client that does the same work.
        weight_by: As the recipe's.
        seed: The run's seed.
    """

    tuned: Tuned
    rows: Rows
    spec: TrainingSpec
    steps: int
    weight: float
    weight_by: str
    seed: int

    def train(self, plan: RoundPlan, state: GlobalState, half: Mapping[str, Any]) -> ClientUpdate:
        """Return the server's update for the round of `plan`, trained from `state` as the recipe's client half says.

        What a recipe has clients keep (control variates, personal tensors) the server does without.
        """
        self.tuned.fold(state.folds)
        task = Task(NAME, self.steps, plan.start_step, plan.total_steps, self.seed, half)
        result = work(
            self.tuned, self.rows, task=task, spec=self.spec, tensors=state.tensors, extras={}, store=Store(None, NAME)
        )
        metrics: dict[str, Any] = {**result.metrics, "train_rows": float(len(self.rows))}
        weight = self.weight * weight_of(self.weight_by, metrics)
        return ClientUpdate(NAME, plan.round, result.delta, weight, metrics)


def margins(losses: Mapping[str, float], choices: Mapping[str, float | None] | None = None) -> dict[str, float]:
    """Return what a device lacks, by loss and by answers: the privacy margins, where both their parts are there.

    Args:
        losses: Of the tuned models, by name.
        choices: Their shares of right answers, where the data has choices.

    >>> margins({"emulator_tuned": 3.5, "plug_in": 3.25}, {"emulator_tuned": 0.5, "plug_in": 0.75})
    {'privacy_margin': 0.25, 'privacy_margin_accuracy': 0.25}
    """
    found = {}
    if "emulator_tuned" in losses and "plug_in" in losses:
        found["privacy_margin"] = losses["emulator_tuned"] - losses["plug_in"]
    right = choices or {}
    emulated, plug_in = right.get("emulator_tuned"), right.get("plug_in")
    if emulated is not None and plug_in is not None:
        found["privacy_margin_accuracy"] = plug_in - emulated
    return found
