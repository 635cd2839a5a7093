"""Messages out, replies back: streaming, in order, with a window and a deadline."""

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from flwr.app import Error, Message
from flwr.serverapp import Grid

from fedpeat.core import EngineError

POLL_SECONDS, LONGEST_POLL_SECONDS = 0.005, 0.02
"""First and longest wait between looks for replies: workers on this machine need the CPU that looking takes."""
LONGEST_REST_SECONDS = 5.0
"""Longest wait after a look that took long: it may have been this process that stood still."""
TIMEOUT = 101
"""Error code of the reply that stands in for one that did not come in time."""
SURPLUS = 102
"""Error code of the reply that stands in for one that was not waited for, since enough others came."""


class Interrupted(Exception):
    """The person at the keyboard asked the run to stop."""


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    *,
    window: int,
    timeout_seconds: float | None = None,
    stop: threading.Event | None = None,
    enough: int | None = None,
) -> Iterator[Message]:
    """Send `messages` and yield one reply for each, in the order of the messages.

    At most `window` messages are on their way or held back out of order, so that memory does not grow with their
    number. A reply that has not come when the deadline passes, or when `enough` others came without an error, is stood
    in for by an error reply.

    Raises:
        EngineError: If a worker process died: Flower would hand it most of the messages that follow.
        Interrupted: If `stop` was set.
    """
    queue = iter(messages)
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    waiting: dict[str, int] = {}  # message id -> position
    sent: dict[int, Message] = {}
    ready: dict[int, Message] = {}
    position, pushed, good, nap = 0, 0, 0, POLL_SECONDS
    while True:
        if deadline is not None and time.monotonic() > deadline:
            yield from _give_up(queue, sent, ready, position, pushed, _timed_out)
            return
        if enough is not None and good >= enough:
            yield from _give_up(queue, sent, ready, position, pushed, _not_waited_for)
            return
        for message in itertools.islice(queue, window - (pushed - position)):
            (identity,) = grid.push_messages([message])
            waiting[identity], sent[pushed] = pushed, message
            pushed += 1
        if position == pushed:
            return
        if stop is not None and stop.is_set():
            raise Interrupted
        looked = time.perf_counter()
        came = _collect(grid, waiting, ready)
        good += sum(not reply.has_error() for reply in came)
        if came:
            nap = POLL_SECONDS
        else:
            # Looking takes longer the more is on its way: at most a tenth of the time goes into it.
            time.sleep(max(nap, min(9 * (time.perf_counter() - looked), LONGEST_REST_SECONDS)))
            nap = min(1.5 * nap, LONGEST_POLL_SECONDS)
        while position in ready:
            del sent[position]
            yield ready.pop(position)
            position += 1


def _collect(grid: Grid, waiting: dict[str, int], ready: dict[int, Message]) -> list[Message]:
    """Move the replies that came from `waiting` to `ready`, and return them."""
    came = []
    for reply in grid.pull_messages(list(waiting)):
        place = waiting.pop(reply.metadata.reply_to_message_id, None)
        if place is not None:
            _check_alive(reply)
            ready[place] = reply
            came.append(reply)
    return came


def _give_up(
    queue: Iterator[Message],
    sent: dict[int, Message],
    ready: dict[int, Message],
    position: int,
    pushed: int,
    stand_in: Callable[[Message], Message],
) -> Iterator[Message]:
    """Yield what came, and error replies for what did not."""
    for place in range(position, pushed):
        yield ready.get(place) or stand_in(sent[place])
    for message in queue:
        yield stand_in(message)


def _timed_out(message: Message) -> Message:
    return _error(message, TIMEOUT, "timeout: no reply within round.timeout_seconds")


def _not_waited_for(message: Message) -> Message:
    return _error(message, SURPLUS, "surplus: enough other clients were faster")


def _error(message: Message, code: int, reason: str) -> Message:
    if not message.metadata.message_id:
        message.metadata.__dict__["_message_id"] = "never sent"
    return Message(Error(code=code, reason=reason), reply_to=message)


def _check_alive(reply: Message) -> None:
    reason = (reply.error.reason or "") if reply.has_error() else ""
    if "ActorDied" in reason or "ActorUnavailable" in reason or "WorkerCrashed" in reason:
        raise EngineError(
            "a worker process died while a client was training",
            "the kernel may have killed it for its memory" if "OOM" in reason or "memory" in reason else reason[:200],
            "lower engine.workers or client.batch_size, or use engine=serial to see the client's own error",
        )
