"""Flower's server program, with all but what clients need closed to other machines.

Flower offers everything at one port: to clients' nodes, which it authenticates, and to whoever starts runs (that is,
runs Python code on all machines) or executes them, which it does not. So only programs on the server's own machine may
do the latter. What clients lose is handed out again (`redelivery`).
"""

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

FOR_CLIENTS = ("/v1/fleet/", "/health")
"""Where paths begin that other machines may ask for."""


class OnlyClients:
    """An ASGI middleware that refuses other machines whatever is not for clients.

    Args:
        app: What it stands in front of.
    """

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on a request, or refuse it."""
        if scope["type"] == "lifespan" or _may(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"only from the server's own machine"})


def _may(scope: Scope) -> bool:
    path, client = str(scope.get("path", "")), scope.get("client")
    return path.startswith(FOR_CLIENTS) or (client is not None and is_own(client[0]))


def is_own(host: str) -> bool:
    """Return whether a request from `host` comes from this machine itself, by its loopback device.

    >>> [is_own(host) for host in ("127.0.0.1", "::1", "::ffff:127.0.0.1", "10.0.0.2", "")]
    [True, True, True, False, False]
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def guard() -> None:
    """Put `OnlyClients` in front of the server that Flower makes in this process."""
    from flwr.superlink import extensions
    from starlette.middleware import Middleware

    theirs = extensions.get_middleware
    extensions.get_middleware = lambda: (Middleware(OnlyClients), *theirs())


def main() -> None:
    """Run `flower-superlink`, with what is ours; it reads its own arguments."""
    from flwr.superlink.cli.flower_superlink import flower_superlink

    from simulations.deployment.redelivery import hand_out_again

    guard()
    hand_out_again()
    flower_superlink()


if __name__ == "__main__":
    main()
