"""A message comes out of the socket as it went in; whatever else comes is refused, and costs no memory."""

import socket
import threading

import pytest
from flwr.app import Error
from hypothesis import given
from hypothesis import strategies as st

from simulations.deployment import frames
from tests.messages import all_of, all_of_context, asked, content, context

ARRAYS = st.dictionaries(st.text(max_size=8), st.binary(max_size=300), max_size=4)


class Pipe:
    """One end of a connection: `data` comes, a few bytes at a time, then nothing. It notes how much was asked for."""

    def __init__(self, data, step=7):
        self.data, self.step, self.most = data, step, 0

    def recv(self, size):
        self.most = max(self.most, size)
        part, self.data = self.data[: min(size, self.step)], self.data[min(size, self.step) :]
        return part


class Sink(bytearray):
    """One end of a connection that takes all."""

    def sendall(self, data):
        self.extend(data)


def sent(message, given=None):
    """The bytes of a request, or of a reply."""
    sink = Sink()
    if given is None:
        frames.send_reply(sink, message)
    else:
        frames.send_request(sink, message, given)
    return bytes(sink)


@given(ARRAYS)
def test_a_request_comes_as_it_went(arrays):
    message, its = asked(content(arrays)), context(site="/a/site.json")
    came, came_context = frames.receive_request(Pipe(sent(message, its)))
    assert all_of(came) == all_of(message)
    assert all_of_context(came_context) == all_of_context(its)
    assert {name: array.data for name, array in came.content["arrays"].items()} == arrays


@pytest.mark.parametrize("reply", [asked(error=Error(100, "no")), asked(), asked(content({"a": b"x"}))])
def test_a_reply_comes_as_it_went(reply):
    assert all_of(frames.receive_reply(Pipe(sent(reply)))) == all_of(reply)


def test_what_is_sent_is_left_as_it_was():
    message = asked(content({"a": b"abc"}))
    before = all_of(message)
    sent(message, context())
    assert all_of(message) == before


def test_the_bytes_of_arrays_are_no_protobuf():
    """It could not hold more than 2 GiB of them."""
    rest, sizes = sent(asked(content({"a": bytes(5000), "b": bytes(7000)})))[len(frames.MAGIC) :], []
    while rest:
        size = int.from_bytes(rest[:8], "big")
        sizes, rest = [*sizes, size], rest[8 + size :]
    assert sizes[1:] == [5000, 7000]
    assert sizes[0] < 1000


@given(ARRAYS, st.data())
def test_what_is_cut_short_is_seen(arrays, data):
    whole = sent(asked(content(arrays)), context())
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(frames.Closed):
        frames.receive_request(Pipe(whole[:cut], step=50))


@given(st.binary(max_size=200), st.booleans())
def test_garbage_is_refused(garbage, begins_well):
    came = (frames.MAGIC if begins_well else b"") + garbage
    with pytest.raises((frames.BadParcel, frames.Closed)):
        frames.receive_request(Pipe(came))


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_frames_of_garbage_are_refused(first, second):
    """Well-framed bytes are a message only if Flower's protobuf says so; most are none, and none is an accident."""
    came = frames.MAGIC + b"".join(len(part).to_bytes(8, "big") + part for part in (first, second))
    with pytest.raises((frames.BadParcel, frames.Closed)):
        frames.receive_request(Pipe(came))


@given(st.integers(0, 1000), st.integers(0, 255))
def test_a_byte_that_changed_never_does_more_than_change_the_message(place, byte):
    """Frames have no checksum, as the socket is the machine's own: any outcome but these is a fault."""
    whole = bytearray(sent(asked(content({"a": b"abc"})), context()))
    whole[place % len(whole)] = byte
    try:
        message, _ = frames.receive_request(Pipe(bytes(whole), step=50))
    except (frames.BadParcel, frames.Closed):
        return
    assert message.has_content()


@given(st.integers(frames.MOST_PROTO + 1, 2**64 - 1))
def test_an_absurd_length_is_refused(size):
    with pytest.raises(frames.BadParcel, match=str(size)):
        frames.receive_request(Pipe(frames.MAGIC + size.to_bytes(8, "big") + b"x"))


def test_a_length_alone_costs_no_memory():
    pipe = Pipe(frames.MAGIC + frames.MOST_PROTO.to_bytes(8, "big") + b"x" * 100)
    with pytest.raises(frames.Closed):
        frames.receive_request(pipe)
    assert pipe.most <= 2**18


def test_large_arrays_pass_a_real_socket():
    """Larger than any buffer of the system's: both ends have to take turns."""
    here, there = socket.socketpair()
    message = asked(content({"a": bytes(range(256)) * 2**16, "b": b""}))
    with here, there:
        sender = threading.Thread(target=frames.send_request, args=(here, message, context()))
        sender.start()
        came, _ = frames.receive_request(there)
        sender.join()
    assert all_of(came) == all_of(message)
