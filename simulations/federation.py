"""The round loop: plan, train, aggregate, evaluate, report, keep."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from fedpeat.control import FixedControl
from fedpeat.core import (
    ClientFailure,
    ClientUpdate,
    DevicePlan,
    EngineError,
    Evaluation,
    RoundPlan,
    RoundReport,
    RunState,
    Tensors,
    count_bytes,
    peak_gpu_mib,
    peak_rss_mib,
)
from fedpeat.data import Rows
from fedpeat.peft import Tuned
from fedpeat.server import History, Participant, evaluate, margins, write_checkpoint
from fedpeat.wire import to_arrays
from simulations.exchange import exchange
from strategies import Recipe
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


@dataclass(frozen=True)
class Evaluator:
    """The server's evaluations: the same held-out rows for every model.

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

    def __call__(self, model: Any) -> Evaluation:
        """Return how well `model` predicts the held-out rows."""
        return evaluate(model, self.rows, batch_size=self.batch_size, threads=self.threads, device=self.device)


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
    initial: Tensors = field(default_factory=dict)

    @property
    def payload_bytes(self) -> int:
        """Tensor payload of one message to a device, bytes."""
        return count_bytes(self.initial)

    @property
    def window(self) -> int:
        """Messages on their way at once: enough to keep all workers busy, fewer where they are large."""
        by_size = WINDOW_BYTES // max(self.payload_bytes, 1)
        return max(2 * self.workers, min(by_size, WINDOW_MESSAGES))

    @property
    def slots(self) -> int:
        """Flower nodes to start: each message on its way has its own."""
        return min(self.window, len(self.control.clients))

    def evaluate(self, tensors: Tensors) -> dict[str, Evaluation]:
        """Return evaluations of the plug-in model and of each emulated one, tuned by `tensors`."""
        self.full.write(tensors)
        results = {"plug_in": self.evaluator(self.full.model)}
        for key, tuned in self.emulated.items():
            tuned.write(tensors)
            name = "emulator_tuned" if key == "default" else f"emulator_tuned/{key}"
            results[name] = self.evaluator(tuned.model)
        results.setdefault("emulator_tuned", results["plug_in"])
        return results


@dataclass
class _Clock:
    """Seconds by part; what is in no part is overhead."""

    started: float = field(default_factory=time.perf_counter)
    parts: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "evaluate": 0.0, "wire": 0.0})

    def run(self, part: str, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        try:
            return work()
        finally:
            self.parts[part] += time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        total = time.perf_counter() - self.started
        parts = {**self.parts, "train": max(0.0, self.parts["train"] - self.parts["wire"])}
        return {"total": total, **parts, "overhead": max(0.0, total - sum(parts.values()))}


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

    def bundle_of(device: DevicePlan) -> dict[str, str]:
        return {"bundle": str(federation.bundles[device.emulator])}

    return RecipeStrategy(
        federation.recipe,
        job=federation.job,
        node_of=lambda _: nodes[next(turn) % len(nodes)],
        job_of=bundle_of,
        server_update=federation.participant.train if server and federation.participant else None,
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
        tensors=federation.initial,
        server_step_state=federation.recipe.server.start(federation.initial),
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
    report = _before(federation, state)
    yield report, state
    while state.round < federation.rounds:
        clock = _Clock()
        plan, control_state = federation.control.choose(report, state.control_state)
        observer.round_started(plan)
        strategy.begin(plan, state.tensors, state.server_step_state)
        clock.run("train", lambda plan=plan: train_round(federation, grid, strategy, plan, stop))
        clock.parts["wire"] += strategy.wire_seconds
        done = strategy.aggregation
        if done is None:
            raise EngineError(f"round {plan.round} has no outcome", "no aggregation", "run with FEDPEAT_DEBUG=1")
        state = replace(
            state,
            round=plan.round,
            tensors=done.tensors,
            server_step_state=done.server_step_state,
            control_state=control_state,
            global_step=int(control_state["global_step"]),
        )
        due = plan.round % federation.evaluate_every == 0 or plan.round == federation.rounds
        evaluations: dict[str, Evaluation] = {}
        if due:
            now = clock.run("evaluate", lambda tensors=done.tensors: federation.evaluate(tensors))
            evaluations = {**federation.zero_shot, **now}
        report = _report(federation, plan, strategy, evaluations, clock)
        yield report, state


def train_round(
    federation: Federation, grid: Grid, strategy: RecipeStrategy, plan: RoundPlan, stop: threading.Event
) -> None:
    """Send a plan's work out and fold what comes back; the outcome is `strategy.aggregation`."""
    begin = time.perf_counter()
    arrays = to_arrays(strategy.tensors)
    strategy.wire_seconds = time.perf_counter() - begin
    messages = strategy.configure_train(plan.round, arrays, ConfigRecord(), grid)
    replies = exchange(grid, messages, window=federation.window, timeout_seconds=federation.timeout_seconds, stop=stop)
    strategy.aggregate_train(plan.round, replies)


def _before(federation: Federation, state: RunState) -> RoundReport:
    """Return the report of round 0: the state before any training."""
    clock = _Clock()
    results = clock.run("evaluate", lambda: federation.evaluate(state.tensors))
    return RoundReport(
        round=0,
        clients={},
        failures=(),
        evaluations={**federation.zero_shot, **results},
        bytes_down=0,
        bytes_up=0,
        seconds=clock.read(),
        metrics=margins({name: result.loss for name, result in results.items()}),
    )


def _report(
    federation: Federation,
    plan: RoundPlan,
    strategy: RecipeStrategy,
    evaluations: Mapping[str, Evaluation],
    clock: _Clock,
) -> RoundReport:
    done = strategy.aggregation
    participants = done.clients if done else {}
    down = float(federation.payload_bytes)
    clients = {
        name: {**metrics, "bytes_down": 0.0, "bytes_up": 0.0} if name == "server" else {**metrics, "bytes_down": down}
        for name, metrics in participants.items()
    }
    seconds = clock.read()
    tokens = sum(metrics["train_tokens"] for metrics in clients.values())
    losses = [metrics["train_loss"] for metrics in clients.values()]
    workers = [metrics["peak_rss_mib"] for metrics in clients.values() if "peak_rss_mib" in metrics]
    return RoundReport(
        round=plan.round,
        clients=clients,
        failures=tuple(strategy.failures),
        evaluations=evaluations,
        bytes_down=int(down) * len(plan.devices),
        bytes_up=int(sum(metrics["bytes_up"] for metrics in clients.values())),
        seconds=seconds,
        metrics={
            "train_loss": sum(losses) / max(len(losses), 1),
            "update_norm": done.update_norm if done else 0.0,
            "tokens_per_second": tokens / max(seconds["train"], 1e-9),
            "peak_rss_mib": max([peak_rss_mib(), *workers]),
            "peak_gpu_mib": peak_gpu_mib(),
            "global_step": float(plan.start_step),
            **margins({name: result.loss for name, result in evaluations.items()}),
        },
    )
