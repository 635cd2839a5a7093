"""The Flower ClientApp of a client's machine: it hands a message to the resident worker, and its reply back.

Flower starts a process for each message. This one imports nothing that Flower has not imported in it already; torch,
models and data are the worker's (`worker`).
"""

from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from simulations.deployment import frames, local_socket
from simulations.deployment.names import REFUSED, SITE

WAIT_SECONDS = 60.0
"""How long to wait for a worker that is being started anew; on a busy machine imports alone take tens of seconds."""

ACTIONS = ("hello", "bundle", "begin")
"""What the server may ask beside training."""

app = ClientApp()


def relay(message: Message, context: Context) -> Message:
    """Return the worker's reply, or what went wrong, in one line that tells of no path of this machine."""
    try:
        with local_socket.connect(Path(str(context.node_config[SITE])).parent, WAIT_SECONDS) as there:
            frames.send_request(there, message, context)
            return frames.receive_reply(there)
    except KeyError:
        reason = f"its node config names no {SITE}; start it by fedpeat deploy client"
    except local_socket.NoWorker:
        reason = f"it has no worker, {WAIT_SECONDS:.0f} s long; see client.log on its machine"
    except (frames.Closed, ConnectionError):
        reason = "its worker ended while it had the message (killed, or out of memory); see client.log on its machine"
    except frames.BadParcel as error:
        reason = f"its worker and Flower's process for the message do not understand each other: {error}"
    except OSError as error:
        reason = (
            f"its worker cannot be reached: {error.strerror or type(error).__name__}; see client.log on its machine"
        )
    return Message(Error(code=REFUSED, reason=reason), reply_to=message)


app.train()(relay)
for _action in ACTIONS:
    app.query(_action)(relay)
