from datetime import timedelta

import pytest
from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, SUPERLINK_NODE_ID, ErrorCode, SubStatus
from flwr.common.serde import message_from_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate import in_memory_linkstate
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.servicer.fleet import fleet_handlers

from simulations.deployment.redelivery import TIMES, hand_out_again

GONE = 2 * HEARTBEAT_DEFAULT_INTERVAL + 1
"""Seconds without a heartbeat after which Flower lets a node in again."""


class Server:
    """Flower's own server, without its network, by a clock of its own."""

    def __init__(self, clock):
        self.clock, self.store = clock, InMemoryObjectStore()
        self.state = in_memory_linkstate.InMemoryLinkState(NoOpFederationManager(), self.store)
        self.run = self.state.create_run(None, None, None, {}, "@none/default", None, None, "flwr-serverapp")

    def join(self, key):
        """A new node."""
        node = self.state.create_node("", "", key, 0)
        assert self.state.activate_node(node, HEARTBEAT_DEFAULT_INTERVAL)
        return node

    def start_anew(self, node):
        """Kill a node; it is back as soon as it is let in, before anybody has looked."""
        self.clock.seconds += GONE
        assert self.state.activate_node(node, HEARTBEAT_DEFAULT_INTERVAL)

    def _stored(self, message):
        message.metadata.__dict__["_message_id"] = message.object_id
        session = self.state.start_session(self.run)
        stored, _ = self.state.store_message_and_object_tree(message, get_object_tree(message), session)
        assert stored
        for identity, part in get_all_nested_objects(message).items():
            self.store.put(identity, part.deflate())
        return message.metadata.message_id

    def push(self, node, number=0):
        """Send a node a message; return its identity."""
        metadata = Metadata(
            run_id=self.run,
            message_id="",
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=node,
            reply_to_message_id="",
            group_id="",
            created_at=in_memory_linkstate.now().timestamp(),
            ttl=43200.0,
            message_type="train",
        )
        return self._stored(make_message(metadata=metadata, content=RecordDict({"x": ConfigRecord({"n": number})})))

    def ask(self, node):
        """What a node is given when it asks for work."""
        request = PullMessagesRequest(node=Node(node_id=node))
        found = fleet_handlers.pull_messages(request, self.state, self.store)
        return [message_from_proto(message) for message in found.messages_list]

    def fetch(self, node, identity):
        """A node asks for a part of a message."""
        request = PullObjectRequest(node=Node(node_id=node), run_id=self.run, object_id=identity)
        return fleet_handlers.pull_object(request, self.state)

    def end_run(self):
        """The run comes to its end, without waiting for anybody."""
        (run,) = self.state.get_run_info(run_ids=[self.run])
        self.state.claim_task(run.primary_task_id)
        self.state.activate_task(run.primary_task_id)
        assert self.state.finish_task(run.primary_task_id, SubStatus.COMPLETED, "")

    def confirm(self, identity):
        """A node has all of a message."""
        self.store.delete(identity)

    def answer(self, message):
        """A node answers."""
        reply = Message(RecordDict(), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
        self._stored(reply)

    def poll(self, identity):
        """What the run finds: the error codes of its replies, 0 for none."""
        found = self.state.get_message_res({identity}, self.run)
        return [reply.error.code if reply.has_error() else 0 for reply in found]


@pytest.fixture
def server(monkeypatch):
    class Clock:
        seconds = 0.0

    now, clock, linkstate = in_memory_linkstate.now, Clock(), in_memory_linkstate.InMemoryLinkState
    monkeypatch.setattr(in_memory_linkstate, "now", lambda: now() + timedelta(seconds=clock.seconds))
    monkeypatch.setattr(linkstate, "get_message_ins", linkstate.get_message_ins)
    hand_out_again()
    return Server(clock)


def identities(messages):
    return [message.metadata.message_id for message in messages]


def test_what_a_client_was_killed_over_as_it_came_is_handed_out_again(server):
    node = server.join(b"ann")
    sent = server.push(node)
    assert identities(server.ask(node)) == [sent]
    server.start_anew(node)
    assert server.poll(sent) == []
    (again,) = server.ask(node)
    assert again.metadata.message_id == sent
    server.confirm(sent)
    server.answer(again)
    assert server.poll(sent) == [0]


def test_what_a_client_was_killed_over_in_training_is_an_error(server):
    node = server.join(b"ann")
    sent = server.push(node)
    server.ask(node)
    server.confirm(sent)
    server.start_anew(node)
    assert server.ask(node) == []
    assert server.poll(sent) == [ErrorCode.MESSAGE_UNAVAILABLE]


def test_what_was_lost_on_the_way_is_handed_out_again_without_a_new_start(server):
    node = server.join(b"ann")
    sent = server.push(node)
    assert [identities(server.ask(node)) for _ in range(2)] == [[sent], [sent]]
    assert server.poll(sent) == []


def test_what_never_comes_through_is_an_error_in_the_end_and_lets_the_next_pass(server):
    node = server.join(b"ann")
    sent, after = server.push(node, 1), server.push(node, 2)
    for _ in range(TIMES):
        assert identities(server.ask(node)) == [sent]
    assert identities(server.ask(node)) == [after]
    assert server.poll(sent) == [ErrorCode.MESSAGE_UNAVAILABLE]
    assert server.poll(after) == []


def test_what_is_of_a_run_that_ended_is_not_handed_out_for_ever(server):
    node = server.join(b"ann")
    sent = server.push(node)
    server.ask(node)
    server.end_run()
    server.ask(node)
    with pytest.raises(FlowerError):
        server.fetch(node, sent)
    assert server.ask(node) == []


def test_what_is_next_waits_for_it(server):
    node = server.join(b"ann")
    first, second = server.push(node, 1), server.push(node, 2)
    server.ask(node)
    (again,) = server.ask(node)
    assert again.metadata.message_id == first
    server.confirm(first)
    server.answer(again)
    assert identities(server.ask(node)) == [second]


def test_what_was_answered_is_not_handed_out_again(server):
    node = server.join(b"ann")
    sent = server.push(node)
    (message,) = server.ask(node)
    server.answer(message)
    assert server.ask(node) == []
    server.start_anew(node)
    assert server.ask(node) == []
    assert server.poll(sent) == [0]


def test_who_trains_keeps_what_it_has_while_others_ask(server):
    ann, bob = server.join(b"ann"), server.join(b"bob")
    sent = server.push(ann)
    server.ask(ann)
    server.confirm(sent)
    assert server.ask(bob) == []
    assert server.ask(SUPERLINK_NODE_ID) == []
    assert server.poll(sent) == []
