"""What a federation is compared with, on the same data, steps and held-out text."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid

from fedpeat.codecs import none
from fedpeat.core import DevicePlan, Evaluation, GlobalState, RoundPlan, RoundReport, add
from simulations.exchange import exchange
from simulations.federation import Federation, Observer, strategy_for
from strategies import start
from strategies.general import fed_avg


class Quietly:
    """An observer that passes on clients and failures, and hides the rounds of a baseline."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer

    def resumed(self, done: int) -> None:
        """Show nothing."""

    def bundle_delivered(self, version: str, clients: int, sent: int) -> None:
        """Show nothing."""

    def round_started(self, plan: RoundPlan) -> None:
        """Show nothing."""

    def client_done(self, name: str, metrics: Mapping[str, float]) -> None:
        """Show nothing."""

    def client_failed(self, failure: Any) -> None:
        """Show the failure."""
        self.observer.message(f"baseline: {failure.client} failed: {failure.reason}")

    def round_finished(self, report: RoundReport) -> None:
        """Show nothing."""

    def message(self, text: str) -> None:
        """Pass it on."""
        self.observer.message(text)

    def working(self, text: str, share: float | None) -> None:
        """Pass it on."""
        self.observer.working(text, share)


def run_local_only(
    federation: Federation,
    grid: Grid,
    nodes: Sequence[int] | Mapping[str, int],
    *,
    observer: Observer,
    stop: threading.Event,
) -> dict[str, Any]:
    """Let each client tune alone, with as many steps as it would have in the federation, and plug each result in.

    Returns:
        `clients`: loss, perplexity and accuracy of each one's own plug-in model, by name; `mean`: those of the mean
        loss and accuracy over clients.
    """
    control = federation.control
    devices = tuple(
        DevicePlan(
            client=name,
            local_steps=federation.rounds * control.local_steps_of.get(name, control.local_steps),
            emulator=control.emulator_of.get(name, "default"),
        )
        for name in sorted(control.clients)
    )
    total = federation.rounds * control.local_steps
    plan = RoundPlan(round=1, start_step=0, total_steps=total, devices=devices)
    # Alone there is nobody to aggregate with: plain training, whatever the strategy, and nobody to attack.
    alone = replace(federation, recipe=fed_avg(), codec=none(), attacks={}, timeout_seconds=None)
    strategy = strategy_for(alone, nodes, Quietly(observer), server=False, local=True)
    strategy.job = {**strategy.job, "state_folder": None}
    strategy.begin(plan, start(alone.recipe, federation.initial))
    messages = strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)
    replies = exchange(grid, messages, window=federation.window, stop=stop)
    results: dict[str, Evaluation] = {}
    for update in strategy.updates(1, replies):
        start_there = {name: federation.initial[name] for name in update.delta}  # not all, where a policy keeps some
        tuned = federation.plug_in(GlobalState({**federation.initial, **add(start_there, update.delta)}))
        results[update.client] = federation.evaluator(tuned.model)
        observer.message(
            f"alone: {update.client} reaches plug-in perplexity {results[update.client].perplexity:.2f}"
            f" ({len(results)} of {len(devices)})"
        )
    count = max(len(results), 1)
    choices = [result.choice_accuracy for result in results.values() if result.choice_accuracy is not None]
    mean = Evaluation(
        loss=sum(result.loss for result in results.values()) / count,
        accuracy=sum(result.accuracy for result in results.values()) / count,
        tokens=max((result.tokens for result in results.values()), default=0),
        choice_accuracy=sum(choices) / count if choices else None,
    )
    return {"mean": mean.to_json(), "clients": {name: result.to_json() for name, result in results.items()}}


def whole_model_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the same federation without an emulator: PEFT on every block of the full model."""
    model = {**settings["model"], "split": {"first": 0, "last": 0, "blocks": "all"}}
    nothing: dict[str, Any] = {"kept_blocks": {}, "emulators": {}, "emulator": {}, "memory_mib": {}}
    return {
        **settings,
        "model": model,
        "emulator": {"_target_": "fedpeat.emulators.uniform", "kept_blocks": 0},
        "client": {**settings["client"], "unfreeze": None},
        "realign": {**settings["realign"], "every": None},
        "control": {**settings["control"], **nothing, "kind": "fixed", "menu": None},
        "devices": {"kind": None},
        "evaluate_every": settings["rounds"],
        "evaluation": {**settings["evaluation"], "costs": False},  # those of the run itself count
    }
