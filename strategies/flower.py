"""The one Flower `Strategy`: messages from a plan, and replies to the next global state by a recipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedpeat.codecs import Codec, none
from fedpeat.core import (
    EMULATOR,
    ClientFailure,
    ClientUpdate,
    DevicePlan,
    EngineError,
    GlobalState,
    Layout,
    RoundPlan,
    UpdateRefused,
    count_bytes,
    with_prefix,
)
from fedpeat.wire import read_failure, read_update, to_arrays, train_message
from strategies.aggregate import Aggregation, aggregate, seen_by_recipe
from strategies.limits import Limits
from strategies.recipe import Recipe
from strategies.reducers import Situation
from strategies.traffic import Changes, checked, encoded_bytes, tensors_down, tensors_up

Observer = Callable[[ClientUpdate | ClientFailure], None]
ServerUpdate = Callable[[RoundPlan, GlobalState, Mapping[str, Any]], ClientUpdate]


class RecipeStrategy(Strategy):
    """Run a `Recipe` through Flower's hooks, streaming.

    Both hooks are lazy: `configure_train` yields messages one by one and `aggregate_train` folds replies as they are
    handed over, in the order of the plan's devices, so that a round's memory does not grow with its clients.

    Args:
        recipe: The aggregation rule.
        job: All that clients need beside the plan, JSON-like; `job_of` may add to it for one device.
        node_of: Flower's node id for a client's name.
        job_of: Returns what one device's job has beside `job` (its bundle, say).
        server_update: Returns the server's own update for a plan, or None where it takes no part.
        codec: How clients send their deltas.
        layout: The travelling tensors by role.
        population: How many clients the federation has.
        seed: The run's seed.
        exactness: Whether to measure how near each step on LoRA is to the mean of the clients' products.
        min_replies: Fewest usable client updates of a round; of one with fewer devices, all of theirs.
        timeout_seconds: How long a round may last.
        limits: What one client may claim.
        observer: Told of each update and failure as it comes.
    """

    def __init__(  # noqa: PLR0913
        self,
        recipe: Recipe,
        *,
        job: Mapping[str, Any],
        node_of: Callable[[str], int],
        job_of: Callable[[DevicePlan], Mapping[str, Any]] = lambda _: {},
        server_update: ServerUpdate | None = None,
        codec: Codec | None = None,
        layout: Layout | None = None,
        population: int = 1,
        seed: int = 0,
        exactness: bool = False,
        min_replies: int = 1,
        timeout_seconds: float | None = None,
        limits: Limits | None = None,
        observer: Observer = lambda _: None,
    ) -> None:
        self.recipe = recipe
        self.job = job
        self.node_of = node_of
        self.job_of = job_of
        self.server_update = server_update
        self.codec = codec or none()
        self.exactness = exactness
        self.min_replies = min_replies
        self.timeout_seconds = timeout_seconds
        self.limits = limits or Limits()
        self.observer = observer
        self.failures: list[ClientFailure] = []
        self.cut: list[str] = []
        self.surplus: list[str] = []
        self.aggregation: Aggregation | None = None
        self.situation = Situation(0, GlobalState({}), layout or Layout(), population, seed)
        self.plan: RoundPlan | None = None
        self.counted: Mapping[str, Sequence[int]] = {}
        self.changes = Changes()
        self.wire_seconds = 0.0
        self.bytes_down: dict[str, int] = {}
        self.asked = 0
        self._sizes: dict[Any, int] = {}

    def begin(
        self,
        plan: RoundPlan,
        state: GlobalState,
        changes: Changes | None = None,
        counted: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Set what the next round starts from.

        Args:
            plan: Of the round.
            state: Global, before it.
            changes: Of the emulator, which go down beside what the recipe sends.
            counted: The rounds in which a client's update counted, by name: what it keeps goes on from the last.
        """
        self.plan = plan
        self.asked = len(plan.devices)
        self.counted = counted or {}
        self.changes = changes or Changes()
        self.situation = replace(self.situation, round=plan.round, state=state)
        self.failures, self.cut, self.surplus = [], [], []
        self.aggregation = None
        self.wire_seconds = 0.0
        self.bytes_down = {}

    def leave_out(self, plan: RoundPlan, failures: Iterable[ClientFailure]) -> None:
        """Go on with the devices of `plan` alone; the others that were asked failed as told."""
        self.plan = plan
        for failure in failures:
            self._fail(failure)

    def sizes(self) -> list[tuple[int, int]]:
        """Return the payload of each device of the plan, bytes down and up, before anything is sent."""
        plan = self._plan(self.situation.round)
        down: dict[Any, int] = {}
        found = []
        for device in plan.devices:
            half = self._half(device)
            alike = self._alike(device, half)
            if alike not in down:
                sent = tensors_down(self.recipe, seen_by_recipe(self.situation), half, device.rank)
                down[alike] = count_bytes(sent) + self.changes.bytes_to(device.client)
            found.append((down[alike], self._size_up(device, half)))
        return found

    def _size_up(self, device: DevicePlan, half: Mapping[str, Any]) -> int:
        parts = tuple(half["train_only"]) if "train_only" in half else None
        alike = (device.rank, parts, tuple(half.get("personal", ())), bool(half.get("control_variates")))
        if alike not in self._sizes:
            like = tensors_up(self.situation.state.tensors, self.situation.layout, half, device.rank)
            extras = count_bytes(like) if half.get("control_variates") else 0
            self._sizes[alike] = encoded_bytes(self.codec, like) + extras
        return self._sizes[alike]

    def configure_train(
        self,
        server_round: int,
        arrays: ArrayRecord,  # noqa: ARG002 (what travels is the recipe's choice)
        config: ConfigRecord,  # noqa: ARG002 (Flower's signature)
        grid: Grid,  # noqa: ARG002 (Flower's signature)
    ) -> Iterator[Message]:
        """Yield one message a device of the plan; devices that get the same tensors share them."""
        plan = self._plan(server_round)
        facts = {"round": plan.round, "start_step": plan.start_step, "total_steps": plan.total_steps}
        seen, records = seen_by_recipe(self.situation), {}
        for device in plan.devices:
            half = self._half(device)
            alike = self._alike(device, half)
            if alike not in records:
                begin = time.perf_counter()
                changes = with_prefix(EMULATOR, self.changes.to(device.client))
                down = {**tensors_down(self.recipe, seen, half, device.rank), **changes}
                records[alike] = (to_arrays(down), count_bytes(down))
                self.wire_seconds += time.perf_counter() - begin
            record, size = records[alike]
            self.bytes_down[device.client] = size
            yield train_message(
                self._job(device, facts), record, node=self.node_of(device.client), ttl_seconds=self.timeout_seconds
            )

    def _alike(self, device: DevicePlan, half: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return what a device's message depends on: those for which it is equal get the same tensors."""
        parts = (tuple(half.get(key, ())) for key in ("fixed", "personal"))
        return device.rank, device.client in self.changes.held_by, *parts

    def _plan(self, server_round: int) -> RoundPlan:
        if self.plan is None or self.plan.round != server_round:
            raise UpdateRefused(f"round {server_round} has no plan", "begin() was not called", "call begin(plan, ...)")
        return self.plan

    def _job(self, device: DevicePlan, facts: Mapping[str, Any]) -> dict[str, Any]:
        own = {
            "weight_by": self.recipe.weight_by,
            "codec": dict(self.codec.description),
            "extras": self._half(device),
            "counted": list(self.counted.get(device.client, ())),
            "changes": self.changes.version,
        }
        return {**self.job, **facts, **asdict(device), **own, **self.job_of(device)}

    def _bundle(self, device: DevicePlan) -> str:
        """Return the version of the bundle that a device's job names: in a simulation, the last part of a path."""
        return Path({**self.job, **self.job_of(device)}.get("bundle", "")).name

    def _half(self, device: DevicePlan) -> dict[str, Any]:
        """Return the recipe's client half, with what the plan changes of it for this device."""
        return {**self.recipe.client(self.situation.round), **device.extras}

    def updates(self, server_round: int, replies: Iterable[Message]) -> Iterator[ClientUpdate]:
        """Yield the usable updates among `replies`, decoded; note the failures.

        Args:
            server_round: The round they must belong to.
            replies: One a device, in the order of the plan.
        """
        for device, reply in zip(self._plan(server_round).devices, replies, strict=True):
            try:
                if reply.has_error():
                    self._fail(read_failure(reply, client=device.client, server_round=server_round))
                    continue
                update = self._read(reply, device)
            except UpdateRefused as error:
                self._fail(ClientFailure(device.client, server_round, "refused", str(error)))
                continue
            self.observer(update)
            yield update

    def _read(self, reply: Message, device: DevicePlan) -> ClientUpdate:
        begin = time.perf_counter()
        state, layout = self.situation.state, self.situation.layout
        update = checked(
            read_update(reply),
            client=device.client,
            server_round=self.situation.round,
            like=tensors_up(state.tensors, layout, self._half(device), device.rank),
            half=self._half(device),
            codec=self.codec,
            bundle=self._bundle(device),
        )
        devices = self._plan(self.situation.round).devices
        update, cut = self.limits.applied(update, device, devices, self.recipe.weight_by)
        self.cut += [device.client] if cut else []
        self.wire_seconds += time.perf_counter() - begin
        return update

    def _with_failures(self, found: str) -> str:
        reasons = {failure.reason: failure.client for failure in self.failures}
        return "; ".join([found, *(f"{client}: {reason}" for reason, client in list(reasons.items())[:3])])

    def _fail(self, failure: ClientFailure) -> None:
        if failure.kind == "surplus":
            self.surplus.append(failure.client)
            return
        self.failures.append(failure)
        self.observer(failure)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold `replies` and then the server's own update into the next global state.

        Raises:
            EngineError: If fewer usable updates came than `min_replies`, or the rule cannot use what came.
        """
        plan = self._plan(server_round)  # those left out of it beforehand count as asked

        def everyone() -> Iterator[ClientUpdate]:
            yield from self.updates(server_round, replies)
            if self.server_update is not None:
                update = self.server_update(plan, self.situation.state, self.recipe.client(plan.round))
                self.observer(update)
                yield update

        least = min(self.min_replies, self.asked) + (self.server_update is not None)
        try:
            self.aggregation = aggregate(
                self.recipe,
                self.situation,
                everyone(),
                min_replies=least,
                exactness=self.exactness,
            )
        except EngineError as error:
            raise EngineError(error.asked, self._with_failures(error.found), error.remedy) from error
        metrics = MetricRecord({"update-norm": self.aggregation.update_norm})
        return to_arrays(self.aggregation.state.tensors), metrics

    def configure_evaluate(
        self,
        server_round: int,  # noqa: ARG002 (Flower's signature)
        arrays: ArrayRecord,  # noqa: ARG002 (Flower's signature)
        config: ConfigRecord,  # noqa: ARG002 (Flower's signature)
        grid: Grid,  # noqa: ARG002 (Flower's signature)
    ) -> Iterable[Message]:
        """Return nothing: the server evaluates, on pooled held-out data."""
        return []

    def aggregate_evaluate(
        self,
        server_round: int,  # noqa: ARG002 (Flower's signature)
        replies: Iterable[Message],  # noqa: ARG002 (Flower's signature)
    ) -> MetricRecord | None:
        """Return nothing: the server evaluates, on pooled held-out data."""
        return None

    def summary(self) -> None:
        """Log nothing: the report says what ran."""
