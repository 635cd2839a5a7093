"""Clients one after the other in this process: no Ray, no copies, exact, easy to debug."""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

Main = Callable[[Grid, Sequence[int]], Any]


class LocalGrid(Grid):
    """A Flower `Grid` that calls a `ClientApp` in this process, one message a pull.

    Args:
        client_app: The app to call.
        nodes: How many nodes to pretend there are.
    """

    def __init__(self, client_app: ClientApp, nodes: int) -> None:
        # Message() reads these class attributes; they are process-wide, so one run at a time.
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
        self._app = client_app
        self._contexts = {node: _context(node, nodes) for node in range(1, nodes + 1)}
        self._pending: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Any:
        """Return nothing: there is no run record."""
        return None

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message, as Flower's deprecated method of that name does."""
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes."""
        return list(self._contexts)

    def get_nodes(self) -> Iterable[Any]:
        """Return nothing: local nodes have no records."""
        return []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages in; return their ids. Nothing runs yet."""
        identities = []
        for message in messages:
            identity = str(uuid4())
            message.metadata.__dict__["_message_id"] = identity
            self._pending[identity] = message
            identities.append(identity)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the first of these messages that waits, and return its reply."""
        for identity in message_ids:
            message = self._pending.pop(identity, None)
            if message is not None:
                reply = self._app(message, self._contexts[message.metadata.dst_node_id])
                reply.metadata.__dict__["_message_id"] = str(uuid4())
                return [reply]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:  # noqa: ARG002 (Flower's signature)
        """Run all messages and return their replies."""
        identities = self.push_messages(messages)
        return [reply for identity in identities for reply in self.pull_messages([identity])]


def _context(node: int, nodes: int) -> Context:
    config: dict[str, Any] = {"partition-id": node - 1, "num-partitions": nodes}
    return Context(run_id=1, node_id=node, node_config=config, state=RecordDict(), run_config={})


@dataclass(frozen=True)
class SerialEngine:
    """Clients one after the other in this process."""

    name: str = "serial"
    workers: int = 1

    def run(self, main: Main, *, client_app: ClientApp, slots: int, stop: threading.Event) -> Any:  # noqa: ARG002 (one signature for all engines)
        """Return `main(grid, nodes)`."""
        grid = LocalGrid(client_app, slots)
        return main(grid, list(grid.get_node_ids()))


def serial() -> SerialEngine:
    """Return the engine that runs clients one after the other in this process."""
    return SerialEngine()
