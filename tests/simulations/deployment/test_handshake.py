import contextlib
import json
import socket
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fedpeat.core import ConfigError, EngineError
from simulations.deployment import handshake
from simulations.deployment.certificates import check_dates, make_authority, make_server_certificate
from simulations.deployment.handshake import check_server
from simulations.deployment.layout import ClientFolder

AUTHORITY = make_authority()


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


class Quiet(ThreadingHTTPServer):
    def handle_error(self, *_):
        """A client that refuses us hangs up."""


@contextlib.contextmanager
def serving(folder, pair=None):
    server = Quiet(("127.0.0.1", 0), Healthy)
    if pair is not None:
        (folder / "server.key").write_bytes(pair.private)
        (folder / "server.crt").write_bytes(pair.public)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.crt", folder / "server.key")
        # Each handshake is in its own thread, when first read from: one that stalls must not hold up the others.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def client(tmp_path, monkeypatch):
    """A client's folder: `client(port, insecure=False)`."""
    monkeypatch.setattr(handshake, "SECONDS", 2.0)

    def make(port, *, insecure=False, authority=AUTHORITY):
        (tmp_path / "ca.crt").write_bytes(authority.public)
        (tmp_path / "site.json").write_text(json.dumps({"superlink": f"127.0.0.1:{port}", "insecure": insecure}))
        return ClientFolder(tmp_path)

    return make


def test_its_own_server_passes(client, tmp_path):
    with serving(tmp_path, make_server_certificate(AUTHORITY, ["example.org"])) as port:
        check_server(client(port))
    with serving(tmp_path) as port:
        check_server(client(port, insecure=True))


def test_an_authority_that_is_not_the_servers_is_refused(client, tmp_path):
    pair, told = make_server_certificate(AUTHORITY, []), r"get ca\.crt from the server's operator"
    with serving(tmp_path, pair) as port, pytest.raises(EngineError, match=told):
        check_server(client(port, authority=make_authority()))


def test_a_certificate_that_has_expired_is_refused(client, tmp_path):
    pair, told = make_server_certificate(AUTHORITY, [], days=0), "has expired; have its operator make a new certificate"
    with serving(tmp_path, pair) as port, pytest.raises(EngineError, match=told):
        check_server(client(port))


def test_a_server_without_tls_is_refused(client, tmp_path):
    with serving(tmp_path) as port, pytest.raises(EngineError, match="must use TLS; it answers without"):
        check_server(client(port))


def test_a_client_without_tls_is_told_that_the_server_has_it(client, tmp_path):
    pair, told = make_server_certificate(AUTHORITY, []), "that server uses TLS"
    with serving(tmp_path, pair) as port, pytest.raises(EngineError, match=told):
        check_server(client(port, insecure=True))


@pytest.mark.parametrize("insecure", [True, False])
def test_a_server_that_does_not_answer_yet_is_waited_for(client, insecure):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    check_server(client(port, insecure=insecure))


def test_the_servers_certificate_must_be_good_now(tmp_path):
    path = tmp_path / "server.crt"
    path.write_bytes(make_server_certificate(AUTHORITY, []).public)
    check_dates(path)
    path.write_bytes(make_server_certificate(AUTHORITY, [], days=0).public)
    with pytest.raises(ConfigError, match="must be good now; it is good from"):
        check_dates(path)
    path.write_text("no certificate")
    with pytest.raises(ConfigError, match="must be a certificate"):
        check_dates(path)
