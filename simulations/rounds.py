"""The round loop: plan, train, aggregate, evaluate, report, keep."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid

from fedpeat.core import (
    EngineError,
    Evaluation,
    RoundPlan,
    RoundReport,
    RunState,
    Tensors,
    count_bytes,
)
from fedpeat.server import SERVER, counted_after
from simulations.devices import Books
from simulations.exchange import exchange
from simulations.federation import Federation, Observer, strategy_for
from simulations.keeping import Keeper
from simulations.round_report import Clock, report_before, report_of
from strategies import start
from strategies.flower import RecipeStrategy


def run_rounds(
    federation: Federation,
    grid: Grid,
    nodes: Sequence[int] | Mapping[str, int],
    *,
    observer: Observer,
    folder: Path | None,
    stop: threading.Event,
    resume: bool = False,
) -> tuple[list[RoundReport], RunState]:
    """Run all rounds.

    Args:
        federation: The run.
        grid: Flower's grid.
        nodes: Its node ids, by client where each has its own.
        observer: Who watches.
        folder: Where history and checkpoint go as they happen; None to keep nothing.
        stop: Set to end the run early.
        resume: Whether to go on from the last checkpoint in `folder`, if there is one.

    Returns:
        A report for round 0 (before training) and for each round, and the final state.

    Raises:
        EngineError: If too few clients answered, or a worker died.
        StorageError: If the disk is full, or nothing can be read of the checkpoints to resume from.
        Interrupted: If `stop` was set.
    """
    strategy = strategy_for(federation, nodes, observer)
    keeper = Keeper(folder, federation.checkpoints)
    before = keeper.resume(observer.message) if resume else None
    reports, state = before or ([], _start(federation))
    if reports:
        observer.resumed(state.round)
    books = Books(federation.fleet, federation.bundle_bytes, reports)
    for report, next_state in _rounds(federation, grid, strategy, state, observer, stop, books, *reports[-1:]):
        reports.append(report)
        state = next_state
        keeper.keep(report, state)
        observer.round_finished(report)
    return reports, state


def _start(federation: Federation) -> RunState:
    return RunState(
        round=0,
        shared=start(federation.recipe, federation.initial),
        control_state=(federation.controller or federation.control).start(),
        global_step=0,
        seed=federation.seed,
    )


def _rounds(
    federation: Federation,
    grid: Grid,
    strategy: RecipeStrategy,
    state: RunState,
    observer: Observer,
    stop: threading.Event,
    books: Books,
    last: RoundReport | None = None,
) -> Iterator[tuple[RoundReport, RunState]]:
    report = last or report_before(federation, state.shared)
    if last is None:
        yield report, state
    while state.round < federation.rounds:
        clock = Clock()
        there = books.available(federation.control.clients, state.round + 1)
        plan, control_state = _chosen(federation, report, state, books, there)
        observer.round_started(plan)
        emulator = clock.run("evaluate", partial(_realigned, federation, plan, state))
        strategy.begin(plan, state.shared, books.changes(emulator), state.counted)
        played = books.play(plan, strategy, federation.enough)
        clock.run("train", lambda plan=plan: train_round(federation, grid, strategy, plan, stop))
        clock.parts["wire"] += strategy.wire_seconds
        done = strategy.aggregation
        if done is None:
            raise EngineError(f"round {plan.round} has no outcome", "no aggregation", "run with FEDPEAT_DEBUG=1")
        clients = [client for client in done.clients if client != SERVER]
        state = replace(
            state,
            round=plan.round,
            shared=done.state,
            control_state=control_state,
            global_step=int(control_state["global_step"]),
            emulator=emulator,
            counted=counted_after(state.counted, clients, plan.round, keep=federation.checkpoints),
        )
        due = plan.round % federation.evaluate_every == 0 or plan.round == federation.rounds
        evaluations: dict[str, Evaluation] = {}
        if due:
            now = clock.run("evaluate", lambda now=state: federation.evaluate(now.shared, now.counted))
            evaluations = {**federation.zero_shot, **now}
        spent = {} if federation.epsilon is None else {"epsilon": federation.epsilon(plan.round + state.repeated)}
        absent = set() if there is None else set(federation.control.clients) - set(there)
        devices, time = books.close(plan, strategy, played, absent)
        report = report_of(plan, strategy, evaluations, clock, also={**spent, **time}, devices=devices)
        yield report, state


def _chosen(
    federation: Federation, report: RoundReport, state: RunState, books: Books, there: Sequence[str] | None
) -> tuple[RoundPlan, dict[str, Any]]:
    """Return the next round's plan, and the controller's state."""
    controller = federation.controller
    if controller is None:
        return federation.control.choose(report, state.control_state, there)
    seen = books.observe(controller.problem, state.round + 1, books.changes(state.emulator))
    return controller.choose(report, state.control_state, seen)


def _realigned(federation: Federation, plan: RoundPlan, state: RunState) -> Tensors:
    """Return what is changed of the emulator in a round, and change the server's own."""
    if federation.realignment is None:
        return {}
    changes = federation.realignment(plan.round, state.shared, state.emulator, asked=plan.refresh)
    federation.realignment.apply(changes)
    return changes


def train_round(
    federation: Federation, grid: Grid, strategy: RecipeStrategy, plan: RoundPlan, stop: threading.Event
) -> None:
    """Send a plan's work out and fold what comes back; the outcome is `strategy.aggregation`."""
    messages = strategy.configure_train(plan.round, ArrayRecord(), ConfigRecord(), grid)
    state = strategy.situation.state
    window = federation.window_of(sum(map(count_bytes, (state.tensors, state.folds, strategy.changes.tensors))))
    replies = exchange(
        grid, messages, window=window, timeout_seconds=federation.timeout_seconds, stop=stop, enough=federation.enough
    )
    strategy.aggregate_train(plan.round, replies)
