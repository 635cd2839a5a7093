import asyncio
import importlib

import pytest

from simulations.deployment import redelivery, superlink
from simulations.deployment.superlink import OnlyClients, guard


def asked(path, client, kind="http"):
    """Whether a request went through, and the status of a refusal."""
    seen, sent = [], []

    async def app(scope, receive, send):
        seen.append(scope["path"])

    async def send(message):
        sent.append(message)

    async def receive():
        return {}

    scope = {"type": kind, "path": path, "client": None if client is None else (client, 5000)}
    asyncio.run(OnlyClients(app)(scope, receive, send))
    return bool(seen), sent[0]["status"] if sent else None


@pytest.mark.parametrize("client", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/runtime/acquire-task", "/v1/fleet/pull", "/docs"])
def test_the_servers_own_machine_may_do_all(path, client):
    assert asked(path, client) == (True, None)


@pytest.mark.parametrize("client", ["10.0.0.2", "2001:db8::2", "::ffff:10.0.0.2", "127.0.0.1.example.org", "", None])
def test_other_machines_reach_what_clients_need_and_nothing_else(client):
    assert asked("/v1/fleet/activate-node", client) == (True, None)
    assert asked("/health", client) == (True, None)
    for path in ("/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task", "/docs", "/", ""):
        assert asked(path, client) == (False, 403), path
        assert asked(path, client, kind="websocket") == (False, None), path


def test_it_stands_in_front_of_all_of_flowers_routes(monkeypatch):
    from flwr.superlink import extensions, main

    monkeypatch.setattr(extensions, "get_middleware", extensions.get_middleware)
    assert OnlyClients not in [middleware.cls for middleware in main._get_middleware()]
    guard()
    assert main._get_middleware()[0].cls is OnlyClients


def test_the_program_has_what_is_ours_before_it_starts(monkeypatch):
    done = []
    monkeypatch.setattr(superlink, "guard", lambda: done.append("guard"))
    monkeypatch.setattr(redelivery, "hand_out_again", lambda: done.append("hand out again"))
    theirs = importlib.import_module("flwr.superlink.cli.flower_superlink")
    monkeypatch.setattr(theirs, "flower_superlink", lambda: done.append("start"))
    superlink.main()
    assert done == ["guard", "hand out again", "start"]
