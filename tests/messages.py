"""Flower's messages as tests need them, without a server."""

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.serde import context_to_proto, message_to_proto


def asked(content=None, *, kind="train", error=None):
    """A message to a client."""
    metadata = Metadata(
        run_id=3,
        message_id="an id",
        src_node_id=1,
        dst_node_id=2**63 + 5,
        reply_to_message_id="",
        group_id="7",
        created_at=1e9,
        ttl=3600.0,
        message_type=kind,
    )
    if error is not None:
        return make_message(metadata=metadata, error=error)
    return make_message(metadata=metadata, content=RecordDict() if content is None else content)


def context(*, run=3, **node_config):
    """A client's context."""
    state = RecordDict({"kept": ConfigRecord({"word": "x"})})
    return Context(run, 2**63 + 5, node_config=node_config, state=state, run_config={"folder": ""})


def content(arrays):
    """Records of all kinds, with the bytes of arrays by name."""
    record = ArrayRecord({name: Array("uint8", (len(data),), "raw", data) for name, data in arrays.items()})
    return RecordDict(
        {"metrics": MetricRecord({"a": 1.5, "b": [1, 2]}), "arrays": record, "config": ConfigRecord({"job": "{}"})}
    )


def all_of(message):
    """All that a message is, to compare it by."""
    return message_to_proto(message).SerializeToString(deterministic=True)


def all_of_context(one):
    """All that a context is, to compare it by."""
    return context_to_proto(one).SerializeToString(deterministic=True)
