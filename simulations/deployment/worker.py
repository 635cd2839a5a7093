"""A client's resident worker: it has all imported, keeps its models, and serves one message after the other.

`python -m simulations.deployment.worker FOLDER`, the folder being the client's. It ends when its standard input closes,
and on SIGTERM; what a client keeps between rounds is on its disk, whole at any moment.
"""

import logging
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Error, Message

from simulations.deployment import frames
from simulations.deployment.local_socket import Taken, alone, listening
from simulations.deployment.names import REFUSED
from simulations.deployment.tether import end_with_parent

Answer = Callable[[Message, Context], Message]

PATIENCE_SECONDS = 60.0
"""How long the other end may send, or take, nothing at all once it is its turn."""

log = logging.getLogger(__name__)


def serve(listener: socket.socket, answer: Answer) -> None:
    """Answer messages, one at a time in the order of their connections, until the listener is shut down.

    Args:
        listener: A listening socket.
        answer: What a message and its context are answered.
    """
    while True:
        try:
            there, _ = listener.accept()
        except OSError:
            return
        with there:
            there.settimeout(PATIENCE_SECONDS)
            _serve_one(there, answer)


def _serve_one(there: socket.socket, answer: Answer) -> None:
    try:
        message, context = frames.receive_request(there)
    except frames.Closed:
        return  # somebody looked whether we listen, or gave up
    except (frames.BadParcel, OSError) as error:
        log.warning("worker: what came was no message: %s", error)
        return
    try:
        try:
            frames.send_reply(there, _answered(answer, message, context))
        except frames.BadParcel as error:
            frames.send_reply(there, _refused(f"the reply cannot be sent: {error}", message))
    except OSError as error:
        log.warning("worker: nobody waits for the reply any more (%s)", error.strerror or error)


def _answered(answer: Answer, message: Message, context: Context) -> Message:
    try:
        return answer(message, context)
    except Exception as error:  # handlers tell what goes wrong themselves; whatever else, the next message is served
        log.exception("worker: a message was not answered")
        return _refused(f"{type(error).__name__} in its worker; see client.log on its machine", message)


def _refused(reason: str, message: Message) -> Message:
    return Message(Error(code=REFUSED, reason=reason), reply_to=message)


def run_by_run(answer: Answer, forget: Callable[[], object]) -> Answer:
    """Return `answer`, with all forgotten that is kept in memory when a message of another run comes.

    Args:
        answer: What answers.
        forget: Drops what it keeps.
    """
    last: list[int] = []

    def answered(message: Message, context: Context) -> Message:
        if last != [context.run_id]:
            forget()
            last[:] = [context.run_id]
        return answer(message, context)

    return answered


def main() -> None:
    """Serve a client's folder."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    end_with_parent()
    try:
        with alone(Path(sys.argv[1]).absolute()) as place:
            from fedpeat.client import app as client  # torch and all: only for whom the folder is

            with listening(place) as listener:
                serve(listener, run_by_run(client.app, client.forget_models))
    except Taken as error:
        sys.exit(f"worker: error: {error}")


if __name__ == "__main__":
    main()
