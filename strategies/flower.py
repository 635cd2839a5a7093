"""The one Flower `Strategy`: messages from a plan, and replies to the next global state by a recipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedpeat.core import (
    ClientFailure,
    ClientUpdate,
    DevicePlan,
    EngineError,
    RoundPlan,
    Tensors,
    UpdateRefused,
    all_finite,
    check_like,
    count_bytes,
)
from fedpeat.wire import read_failure, read_update, to_arrays, train_message
from strategies.aggregate import Aggregation, aggregate, start
from strategies.recipes import Recipe

Observer = Callable[[ClientUpdate | ClientFailure], None]


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
        min_replies: Fewest usable client updates of a round.
        timeout_seconds: How long a round may last.
        observer: Told of each update and failure as it comes.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        job: Mapping[str, Any],
        node_of: Callable[[str], int],
        job_of: Callable[[DevicePlan], Mapping[str, Any]] = lambda _: {},
        server_update: Callable[[RoundPlan, Tensors], ClientUpdate] | None = None,
        min_replies: int = 1,
        timeout_seconds: float | None = None,
        observer: Observer = lambda _: None,
    ) -> None:
        self.recipe = recipe
        self.job = job
        self.node_of = node_of
        self.job_of = job_of
        self.server_update = server_update
        self.min_replies = min_replies
        self.timeout_seconds = timeout_seconds
        self.observer = observer
        self.failures: list[ClientFailure] = []
        self.aggregation: Aggregation | None = None
        self.tensors: Tensors = {}
        self.server_step_state: Tensors = {}
        self.plan: RoundPlan | None = None
        self.wire_seconds = 0.0

    def begin(self, plan: RoundPlan, tensors: Tensors, server_step_state: Tensors | None) -> None:
        """Set what the next round starts from; a server-step state of None is that before round 1."""
        self.plan = plan
        self.tensors = tensors
        self.server_step_state = start(self.recipe, tensors) if server_step_state is None else server_step_state
        self.failures = []
        self.aggregation = None

    def configure_train(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,  # noqa: ARG002 (Flower's signature)
        grid: Grid,  # noqa: ARG002 (Flower's signature)
    ) -> Iterator[Message]:
        """Yield one message a device of the plan; all share `arrays`."""
        plan = self._plan(server_round)
        facts = {"round": plan.round, "start_step": plan.start_step, "total_steps": plan.total_steps}
        for device in plan.devices:
            yield train_message(
                self._job(device, facts), arrays, node=self.node_of(device.client), ttl_seconds=self.timeout_seconds
            )

    def _plan(self, server_round: int) -> RoundPlan:
        if self.plan is None or self.plan.round != server_round:
            raise UpdateRefused(f"round {server_round} has no plan", "begin() was not called", "call begin(plan, ...)")
        return self.plan

    def _job(self, device: DevicePlan, facts: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.job, **facts, **asdict(device), **self.job_of(device), "weight_by": self.recipe.weight_by}

    def updates(self, server_round: int, replies: Iterable[Message]) -> Iterator[ClientUpdate]:
        """Yield the usable updates among `replies`; note the failures.

        Args:
            server_round: The round they must belong to.
            replies: One a device, in the order of the plan.
        """
        for device, reply in zip(self._plan(server_round).devices, replies, strict=True):
            try:
                if reply.has_error():
                    self._fail(read_failure(reply, client=device.client, server_round=server_round))
                    continue
                begin = time.perf_counter()
                update = read_update(reply)
                self.wire_seconds += time.perf_counter() - begin
                self._check(update, device)
            except UpdateRefused as error:
                self._fail(ClientFailure(device.client, server_round, "refused", str(error)))
                continue
            self.observer(update)
            yield update

    def _with_failures(self, found: str) -> str:
        reasons = {failure.reason: failure.client for failure in self.failures}
        return "; ".join([found, *(f"{client}: {reason}" for reason, client in list(reasons.items())[:3])])

    def _fail(self, failure: ClientFailure) -> None:
        self.failures.append(failure)
        self.observer(failure)

    def _check(self, update: ClientUpdate, device: DevicePlan) -> None:
        current = self.plan.round if self.plan else 0
        what = f"the update of {device.client!r} in round {current}"
        if update.round != current:
            raise UpdateRefused(f"{what} must belong to it", f"it is of round {update.round}", "one reply a message")
        if update.client != device.client:
            raise UpdateRefused(f"{what} must be its own", f"it is signed {update.client!r}", "one name per client")
        check_like(update.delta, self.tensors, what=what)
        if not all_finite(update.delta):
            raise UpdateRefused(f"{what} must be finite", "it has NaN or infinite entries", "lower its learning rate")

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold `replies` and then the server's own update into the next global state.

        Raises:
            EngineError: If fewer usable updates came than `min_replies`.
        """
        plan = self._plan(server_round)

        def everyone() -> Iterator[ClientUpdate]:
            yield from self.updates(server_round, replies)
            if self.server_update is not None:
                update = self.server_update(plan, self.tensors)
                self.observer(update)
                yield update

        extra = 1 if self.server_update is not None else 0
        try:
            self.aggregation = aggregate(
                self.recipe, self.tensors, self.server_step_state, everyone(), min_replies=self.min_replies + extra
            )
        except EngineError as error:
            raise EngineError(error.asked, self._with_failures(error.found), error.remedy) from error
        metrics = MetricRecord({"update-norm": self.aggregation.update_norm})
        return to_arrays(self.aggregation.tensors), metrics

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

    def message_bytes(self) -> int:
        """Return the tensor payload of one message to a device, bytes."""
        return count_bytes(self.tensors)
