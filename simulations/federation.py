"""A run, composed: what the round loop needs, and who watches it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedpeat.codecs import Codec, none
from fedpeat.control import FixedControl, Observation, Problem
from fedpeat.core import (
    ClientFailure,
    ClientUpdate,
    DevicePlan,
    Evaluation,
    GlobalState,
    RoundPlan,
    RoundReport,
    Tensors,
    count_bytes,
)
from fedpeat.devices import Fleet
from fedpeat.peft import Tuned
from fedpeat.server import Participant
from simulations.evaluation import Evaluator, Personal
from simulations.realignment import Realignment
from simulations.unfreezing import Unfreezing
from strategies import Recipe
from strategies.flower import RecipeStrategy
from strategies.limits import Limits

WINDOW_BYTES = 64 * 2**20
"""Most bytes of messages on their way at once, so that memory does not grow with the clients of a round."""

WINDOW_MESSAGES = 32
"""Most messages on their way at once: Flower's runtime goes through all of them for each of its nodes, ten times a
second, which with 200 of each took a core from the workers. Enough for 300 clients a second."""


class Observer(Protocol):
    """Who watches a run: progress on a terminal, the run's log."""

    def resumed(self, done: int) -> None:
        """See a run go on after its round `done`."""

    def bundle_delivered(self, version: str, clients: int, sent: int) -> None:
        """See all clients of an emulator have its bundle: how many they are, and the bytes sent for it."""

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


class Controller(Protocol):
    """Who decides a round by what is known of its devices."""

    @property
    def problem(self) -> Problem:
        """What it decides."""
        ...

    def start(self) -> dict[str, Any]:
        """Return its state before round 1."""
        ...

    def choose(
        self, report: RoundReport | None, state: Mapping[str, Any], seen: Observation
    ) -> tuple[RoundPlan, dict[str, Any]]:
        """Return the plan of the round that is `seen`, and the next state."""
        ...


@dataclass(frozen=True)
class Federation:
    """A run, composed: everything that the round loop needs, built once.

    Attributes:
        recipe: The aggregation rule.
        control: Who there is, and what each does in each round where nobody else decides.
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
        epsilon: From rounds to what they may tell of a client; None without differential privacy.
        unfreezing: What becomes of emulator tensors that train.
        realignment: How the emulator is kept in step with the adapter; None for not at all.
        rounds: How many.
        evaluate_every: Rounds between evaluations; the last round is always evaluated.
        min_replies: Fewest usable client updates of a round.
        timeout_seconds: How long a round may last, or None.
        enough: Replies after which a round waits for no more; None for all.
        limits: What one client may claim in a round.
        checkpoints: How many of the newest checkpoints stay on the disk.
        fleet: The devices in simulated time; None without a model of them.
        bundle_bytes: Size of each emulator's bundle, bytes, by key.
        controller: Who decides the rounds by the devices' state; None for `control`.
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
    epsilon: Callable[[int], float] | None = None
    unfreezing: Unfreezing = field(default_factory=Unfreezing)
    realignment: Realignment | None = None
    enough: int | None = None
    limits: Limits = field(default_factory=Limits)
    checkpoints: int = 2
    fleet: Fleet | None = None
    bundle_bytes: Mapping[str, int] = field(default_factory=dict)
    controller: Controller | None = None

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

    def evaluate(self, state: GlobalState, counted: Mapping[str, Sequence[int]] | None = None) -> dict[str, Evaluation]:
        """Return evaluations of the plug-in model and of each emulated one, tuned to `state`.

        Args:
            state: What the federation has learnt.
            counted: The rounds in which each client's update counted, by name (for what clients keep).
        """
        results = {"plug_in": self.evaluator(self.plug_in(state).model)}
        for key, tuned in self.emulated.items():
            name = "emulator_tuned" if key == "default" else f"emulator_tuned/{key}"
            results[name] = self.evaluator(put_into(tuned, state).model)
        results.setdefault("emulator_tuned", results["plug_in"])
        if self.personal is not None:
            results["personal"] = self.personal(self.plug_in(state), self.evaluator, counted)
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
    federation: Federation,
    nodes: Sequence[int] | Mapping[str, int],
    observer: Observer,
    *,
    server: bool = True,
    local: bool = False,
) -> RecipeStrategy:
    """Return the Flower strategy of a federation; `server=False` leaves the server's own training out.

    Args:
        federation: The run.
        nodes: Flower's node ids. By client, where each has a node of its own; in a simulation a client is given the
            next free one, whichever client it is.
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
        node_of=nodes.__getitem__ if isinstance(nodes, Mapping) else lambda _: nodes[next(turn) % len(nodes)],
        job_of=job_of,
        server_update=federation.participant.train if server and federation.participant else None,
        codec=federation.codec,
        layout=federation.reference.layout,
        population=len(federation.control.clients),
        seed=federation.seed,
        exactness=federation.exactness and not local,
        min_replies=1 if local else federation.min_replies,
        timeout_seconds=federation.timeout_seconds,
        limits=federation.limits,
        observer=told,
    )
