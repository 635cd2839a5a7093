"""Flower's messages over a local socket: protobuf by Flower's own rules, and the bytes of arrays beside it.

A parcel is a magic word, then frames: 8 bytes of length (big-endian), and as many bytes. The first frames are protobuf
(of a request: the context, then the message; of a reply: the message alone), with arrays that have no data; the data
follow, a frame an array, in the order of the message. So protobuf's limit of 2 GiB holds for what is no array, and an
array may have 64 GiB, but (Flower's own protobuf) no dimension of 2**31. Nothing is pickled, and a length that is not
followed by its bytes costs no memory.
"""

import socket
from collections.abc import Iterator

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.app.message import make_message
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage

MAGIC = b"fedpeat\x01"
MOST_PROTO = 2**31 - 1
"""Bytes of protobuf: its own limit."""

MOST_ARRAY = 2**36
_CHUNK = 2**18


class Closed(Exception):
    """The other end is gone, or went before all had come."""


class BadParcel(Exception):
    """What came is no parcel, or what is to go makes none."""


def send_request(there: socket.socket, message: Message, context: Context) -> None:
    """Send a message and its context.

    Raises:
        BadParcel: If protobuf cannot hold them; nothing is sent then.
        OSError: If the other end is gone.
    """
    _send(there, message, context)


def receive_request(there: socket.socket) -> tuple[Message, Context]:
    """Return a message and its context.

    Raises:
        Closed: If the other end is gone.
        BadParcel: If they are none.
    """
    _expect_magic(there)
    context = _receive(there, MOST_PROTO)
    message = _receive_message(there)
    try:
        return message, context_from_proto(ProtoContext.FromString(context))
    except Exception as error:  # protobuf's own, and whatever Flower raises at what is none of its
        raise BadParcel(f"no context: {error}") from error


def send_reply(there: socket.socket, reply: Message) -> None:
    """Send a reply.

    Raises:
        BadParcel: If protobuf cannot hold it; nothing is sent then.
        OSError: If the other end is gone.
    """
    _send(there, reply)


def receive_reply(there: socket.socket) -> Message:
    """Return a reply.

    Raises:
        Closed: If the other end is gone.
        BadParcel: If it is none.
    """
    _expect_magic(there)
    return _receive_message(there)


def _send(there: socket.socket, message: Message, context: Context | None = None) -> None:
    try:
        frames = [] if context is None else [context_to_proto(context).SerializeToString()]
        frames.append(_without_data(message))
    except Exception as error:  # protobuf's own, and ValueError: more than 2 GiB, or a dimension of 2**31
        raise BadParcel(f"it cannot be written: {error}") from error
    there.sendall(MAGIC)
    for frame in (*frames, *(array.data for array in _arrays(message))):
        there.sendall(len(frame).to_bytes(8, "big"))
        there.sendall(frame)


def _arrays(message: Message) -> Iterator[Array]:
    if message.has_content():
        for record in message.content.array_records.values():
            yield from record.values()


def _without_data(message: Message) -> bytes:
    """Return a message as protobuf, its arrays without data."""
    if message.has_content():
        records = {
            name: _emptied(record) if isinstance(record, ArrayRecord) else record
            for name, record in message.content.items()
        }
        message = make_message(metadata=message.metadata, content=RecordDict(records))
    return message_to_proto(message).SerializeToString()


def _emptied(record: ArrayRecord) -> ArrayRecord:
    return ArrayRecord({name: Array(one.dtype, one.shape, one.stype, b"") for name, one in record.items()})


def _expect_magic(there: socket.socket) -> None:
    magic = _take(there, len(MAGIC))
    if magic != MAGIC:
        raise BadParcel("it does not begin as one")


def _receive_message(there: socket.socket) -> Message:
    proto = _receive(there, MOST_PROTO)
    try:
        message = message_from_proto(ProtoMessage.FromString(proto))
        if message.has_content() == message.has_error():
            raise ValueError("it has content and an error, or neither")
    except Exception as error:  # protobuf's own, and whatever Flower raises at what is none of its
        raise BadParcel(f"no message: {error}") from error
    for array in _arrays(message):
        array.data = _receive(there, MOST_ARRAY)
    return message


def _receive(there: socket.socket, most: int) -> bytes:
    """Return a frame's bytes."""
    size = int.from_bytes(_take(there, 8), "big")
    if size > most:
        raise BadParcel(f"a frame of {size} bytes; {most} may be sent")
    return _take(there, size)


def _take(there: socket.socket, size: int) -> bytes:
    """Return `size` bytes; memory grows with what comes, not with what was announced."""
    parts, missing = [], size
    while missing:
        part = there.recv(min(missing, _CHUNK))
        if not part:
            raise Closed
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
