"""The round loop: plan, train, aggregate, evaluate, report, keep."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid

from fedpeat.codecs import Codec, none
from fedpeat.control import FixedControl
from fedpeat.core import (
    EMULATOR,
    ClientFailure,
    ClientUpdate,
    DevicePlan,
    EngineError,
    Evaluation,
    GlobalState,
    RoundPlan,
    RoundReport,
    RunState,
    Tensors,
    count_bytes,
    with_prefix,
)
from fedpeat.peft import Tuned
from fedpeat.server import History, Participant, write_checkpoint
from simulations.evaluation import Evaluator, Personal
from simulations.exchange import exchange
from simulations.realignment import Realignment
from simulations.round_report import Clock, report_before, report_of
from simulations.unfreezing import Unfreezing
from strategies import Recipe, start
from strategies.flower import RecipeStrategy

WINDOW_BYTES = 64 * 2**20
"""Most bytes of messages on their way at once, so that memory does not grow with the clients of a round."""

WINDOW_MESSAGES = 32
"""Most messages on their way at once: Flower's runtime goes through all of them for each of its nodes, ten times a
second, which with 200 of each took a core from the workers. Enough for 300 clients a second."""


class Observer(Protocol):
    """Who watches a run: progress on a terminal, trackers."""

    def round_started(self, plan: RoundPlan) -> None:
        """See a round begin."""

    def client_done(self, name: str, metrics: Mapping[str, float]) -> None:
        """See a participant's update come."""

    def client_failed(self, failure: ClientFailure) -> None:
        """See a client fail."""

    def round_finished(self, report: RoundReport) -> None:
        """See a round end."""

    def message(self, text: str) -> None:
        """See anything else."""

    def working(self, text: str, share: float | None) -> None:
        """See something long go on: what, and how much of it is done (0 to 1; None where that is not known)."""


@dataclass(frozen=True)
class Federation:
    """A run, composed: everything that the round loop needs, built once.

    Attributes:
        recipe: The aggregation rule.
        control: Who does what in each round.
        job: What every client's job holds, JSON-like.
        bundles: Folder of each emulator's bundle, by key; `"default"` is the run's own.
        full: The full model with its PEFT parameters: the plug-in model.
        emulated: Emulated models by key; empty where nothing was left out, so that each equals the full one.
        zero_shot: Evaluations before tuning: `full_zero_shot`, `emulator_zero_shot`.
        evaluator: The server's evaluations.
        participant: The server's own part, or None.
        method: The PEFT method of clients, for those whose rank is their own.
        codec: How clients send their deltas.
        attacks: What attackers do, by client name.
        personal: How each client's own model is scored, where the recipe has clients keep tensors.
        exactness: Whether to measure each step on LoRA against the mean of the clients' products.
        unfreezing: What becomes of emulator tensors that train.
        realignment: How the emulator is kept in step with the adapter; None for not at all.
        rounds: How many.
        evaluate_every: Rounds between evaluations; the last round is always evaluated.
        min_replies: Fewest usable client updates of a round.
        timeout_seconds: How long a round may last, or None.
        workers: How many clients can run at once.
        seed: The run's seed.
    """

    recipe: Recipe
    control: FixedControl
    job: Mapping[str, Any]
    bundles: Mapping[str, Path]
    full: Tuned
    emulated: Mapping[str, Tuned]
    zero_shot: Mapping[str, Evaluation]
    evaluator: Evaluator
    participant: Participant | None
    rounds: int
    evaluate_every: int
    min_replies: int
    timeout_seconds: float | None
    workers: int
    seed: int
    method: Mapping[str, Any] = field(default_factory=dict)
    codec: Codec = field(default_factory=none)
    attacks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    personal: Personal | None = None
    exactness: bool = False
    unfreezing: Unfreezing = field(default_factory=Unfreezing)
    realignment: Realignment | None = None

    @property
    def initial(self) -> Tensors:
        """The travelling tensors before round 1."""
        return self.reference.initial

    @property
    def reference(self) -> Tuned:
        """The model whose trainable tensors are those that travel."""
        return self.emulated["default"] if self.unfreezing.start and self.emulated else self.full

    @property
    def payload_bytes(self) -> int:
        """Tensor payload of all travelling tensors, bytes: of a message to a device, for most recipes."""
        return count_bytes(self.initial)

    @property
    def window(self) -> int:
        """Messages on their way at once, as long as nothing is folded: see `window_of`."""
        return self.window_of(self.payload_bytes)

    def window_of(self, message_bytes: int) -> int:
        """Return how many messages of this size may be on their way: enough for all workers, fewer of large ones."""
        return max(2 * self.workers, min(WINDOW_BYTES // max(message_bytes, 1), WINDOW_MESSAGES))

    @property
    def slots(self) -> int:
        """Flower nodes to start: each message on its way has its own."""
        return min(self.window, len(self.control.clients))

    def evaluate(self, state: GlobalState) -> dict[str, Evaluation]:
        """Return evaluations of the plug-in model and of each emulated one, tuned to `state`."""
        results = {"plug_in": self.evaluator(self.plug_in(state).model)}
        for key, tuned in self.emulated.items():
            name = "emulator_tuned" if key == "default" else f"emulator_tuned/{key}"
            results[name] = self.evaluator(put_into(tuned, state).model)
        results.setdefault("emulator_tuned", results["plug_in"])
        if self.personal is not None:
            results["personal"] = self.personal(self.plug_in(state), self.evaluator)
        return results

    def plug_in(self, state: GlobalState) -> Tuned:
        """Return the full model, tuned to `state`."""
        return self.unfreezing.plug_in(self.full, state)

    def method_at(self, rank: int | None) -> dict[str, Any]:
        """Return the PEFT method of a device of this rank: of the run's own scaling."""
        if rank is None:
            return dict(self.method)
        return {**self.method, "rank": rank, "alpha": self.method["alpha"] * rank / self.method["rank"]}


def put_into(tuned: Tuned, state: GlobalState) -> Tuned:
    """Return `tuned`, tuned to what a federation has learnt."""
    tuned.fold(state.folds)
    tuned.write({name: state.tensors[name] for name in tuned.names})
    return tuned


def strategy_for(
    federation: Federation, nodes: Sequence[int], observer: Observer, *, server: bool = True, local: bool = False
) -> RecipeStrategy:
    """Return the Flower strategy of a federation; `server=False` leaves the server's own training out.

    Args:
        federation: The run.
        nodes: Flower's node ids; a client is given the next free one, whichever client it is.
        observer: Told of each participant.
        server: Whether the server takes part, if the run says so.
        local: Whether one usable update suffices.
    """
    turn = iter(range(10**15))

    def told(event: ClientUpdate | ClientFailure) -> None:
        if isinstance(event, ClientFailure):
            observer.client_failed(event)
        else:
            observer.client_done(event.client, event.metrics)

    def job_of(device: DevicePlan) -> dict[str, Any]:
        return {
            "bundle": str(federation.bundles[device.emulator]),
            "method": federation.method_at(device.rank),
            "attack": federation.attacks.get(device.client),
        }

    return RecipeStrategy(
        federation.unfreezing.asked_of(federation.recipe),
        job=federation.job,
        node_of=lambda _: nodes[next(turn) % len(nodes)],
        job_of=job_of,
        server_update=federation.participant.train if server and federation.participant else None,
        codec=federation.codec,
        layout=federation.reference.layout,
        population=len(federation.control.clients),
        seed=federation.seed,
        exactness=federation.exactness and not local,
        min_replies=1 if local else federation.min_replies,
        timeout_seconds=federation.timeout_seconds,
        observer=told,
    )


def run_rounds(
    federation: Federation,
    grid: Grid,
    nodes: Sequence[int],
    *,
    observer: Observer,
    folder: Path | None,
    stop: threading.Event,
) -> tuple[list[RoundReport], RunState]:
    """Run all rounds.

    Args:
        federation: The run.
        grid: Flower's grid.
        nodes: Its node ids.
        observer: Who watches.
        folder: Where history and checkpoint go as they happen; None to keep nothing.
        stop: Set to end the run early.

    Returns:
        A report for round 0 (before training) and for each round, and the final state.

    Raises:
        EngineError: If too few clients answered, or a worker died.
        Interrupted: If `stop` was set.
    """
    strategy = strategy_for(federation, nodes, observer)
    history = History(folder) if folder else None
    state = RunState(
        round=0,
        shared=start(federation.recipe, federation.initial),
        control_state=federation.control.start(),
        global_step=0,
        seed=federation.seed,
    )
    reports: list[RoundReport] = []
    for report, next_state in _rounds(federation, grid, strategy, state, observer, stop):
        reports.append(report)
        state = next_state
        if history and folder:
            history.append(report)
            write_checkpoint(folder / "checkpoint" / "state.safetensors", state)
        observer.round_finished(report)
    return reports, state


def _rounds(
    federation: Federation,
    grid: Grid,
    strategy: RecipeStrategy,
    state: RunState,
    observer: Observer,
    stop: threading.Event,
) -> Iterator[tuple[RoundReport, RunState]]:
    report = report_before(federation, state.shared)
    yield report, state
    while state.round < federation.rounds:
        clock = Clock()
        plan, control_state = federation.control.choose(report, state.control_state)
        observer.round_started(plan)
        emulator = clock.run("evaluate", partial(_realigned, federation, plan, state))
        strategy.begin(plan, state.shared, with_prefix(EMULATOR, emulator))
        clock.run("train", lambda plan=plan: train_round(federation, grid, strategy, plan, stop))
        clock.parts["wire"] += strategy.wire_seconds
        done = strategy.aggregation
        if done is None:
            raise EngineError(f"round {plan.round} has no outcome", "no aggregation", "run with FEDPEAT_DEBUG=1")
        state = replace(
            state,
            round=plan.round,
            shared=done.state,
            control_state=control_state,
            global_step=int(control_state["global_step"]),
            emulator=emulator,
        )
        due = plan.round % federation.evaluate_every == 0 or plan.round == federation.rounds
        evaluations: dict[str, Evaluation] = {}
        if due:
            now = clock.run("evaluate", lambda shared=done.state: federation.evaluate(shared))
            evaluations = {**federation.zero_shot, **now}
        report = report_of(plan, strategy, evaluations, clock)
        yield report, state


def _realigned(federation: Federation, plan: RoundPlan, state: RunState) -> Tensors:
    """Return what is changed of the emulator in a round, and change the server's own."""
    if federation.realignment is None:
        return {}
    changes = federation.realignment(plan.round, state.shared, state.emulator)
    federation.realignment.apply(changes)
    return changes


def train_round(
    federation: Federation, grid: Grid, strategy: RecipeStrategy, plan: RoundPlan, stop: threading.Event
) -> None:
    """Send a plan's work out and fold what comes back; the outcome is `strategy.aggregation`."""
    messages = strategy.configure_train(plan.round, ArrayRecord(), ConfigRecord(), grid)
    state = strategy.situation.state
    window = federation.window_of(sum(map(count_bytes, (state.tensors, state.folds, strategy.also))))
    replies = exchange(grid, messages, window=window, timeout_seconds=federation.timeout_seconds, stop=stop)
    strategy.aggregate_train(plan.round, replies)
