"""What a client took and did not answer, once it asks for work again.

A node of Flower's has one message at a time: it asks for the next when it has answered the last. So one that asks has
nothing in hand, and what it took and did not answer is lost: its program was killed, or a link broke under it. Flower's
server notices that only if the run looks for the answer just while the node is offline, which may be for no time at
all, since a node is let in again as soon as it counts as gone. Else the run would wait for ever.
"""

from collections import Counter
from typing import Any

from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState

TIMES = 5
"""How often a message is handed out at most: one under which a client dies each time is not to stop it for ever."""


def hand_out_again() -> None:
    """Have the server that Flower makes in this process hand out again what a node took and did not answer.

    A message that had not come through whole then does. One that had is no longer there, since Flower drops it as soon
    as a node has it: Flower finds that out when the node asks, and the run is told that it is unavailable.
    """
    theirs = InMemoryLinkState.get_message_ins
    times: Counter[str] = Counter()

    def ours(self: InMemoryLinkState, node_id: int, limit: int | None, **others: Any) -> list[Message]:
        with self.lock:
            for message in _lost(self, node_id):
                message.metadata.delivered_at = ""
                times[message.metadata.message_id] += 1
                if times[message.metadata.message_id] == TIMES:
                    self.delete_messages({message.metadata.message_id})
            return theirs(self, node_id, limit, **others)

    InMemoryLinkState.get_message_ins = ours


def _lost(state: InMemoryLinkState, node: int) -> list[Message]:
    """Return what a node that asks took and did not answer; the server itself has its messages in another way."""
    return [
        message
        for identity, message in state.message_ins_store.items()
        if message.metadata.dst_node_id == node != SUPERLINK_NODE_ID
        and message.metadata.delivered_at
        and identity not in state.message_ins_id_to_message_res_id
    ]
