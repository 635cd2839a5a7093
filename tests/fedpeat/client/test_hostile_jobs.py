"""Whatever a message holds, a client answers with a reason: it neither crashes nor looks outside its folders."""

import json

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.client import app
from fedpeat.client.app import handle_train
from fedpeat.wire import to_arrays
from fedpeat.wire.messages import REFUSED
from simulations.engines.serial import LocalGrid, _context

KEYS = (
    "bundle",
    "client",
    "codec",
    "data",
    "device",
    "extras",
    "frozen_digest",
    "local_steps",
    "method",
    "round",
    "seed",
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def answer(content):
    LocalGrid(app.app, 1)  # sets what a message reads of its process
    message = Message(content, dst_node_id=1, message_type="train")
    message.metadata.__dict__["_message_id"] = "1"
    return handle_train(message, _context(1, 1))


def check(content):
    reply = answer(content)
    assert reply.has_error()
    assert reply.error.code == REFUSED
    assert reply.error.reason


@given(st.text(max_size=60))
def test_a_job_that_is_no_json(text):
    check(RecordDict({"config": ConfigRecord({"job": text}), "arrays": ArrayRecord()}))


@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), PLAIN, max_size=8))
def test_a_job_of_anything(job):
    check(RecordDict({"config": ConfigRecord({"job": json.dumps(job)}), "arrays": to_arrays({"w": torch.ones(2)})}))


def test_a_message_without_its_parts():
    check(RecordDict({}))
    check(RecordDict({"config": ConfigRecord({"job": "{}"})}))
    check(RecordDict({"arrays": ArrayRecord()}))
