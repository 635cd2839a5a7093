"""What the other tests here stand on: machines of their own, and a link that can be cut."""

import socket
import subprocess
import sys
import threading

import pytest

from tests.deployment.links import DELAY_MS, Link

pytestmark = pytest.mark.slow

ASK = """import socket, sys
one = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)
print(one.getsockname()[0])
"""


@pytest.fixture
def apart(network):
    if not network.apart:
        pytest.skip("network namespaces cannot be made here: they need Linux, iproute2 and root")
    return network


def reached(network, name, port):
    """The address that a machine comes from when it connects to this process; nothing if it cannot."""
    ask = [*network.inside(name), sys.executable, "-c", ASK, network.outside, str(port)]
    return subprocess.run(ask, capture_output=True, text=True, timeout=60, check=False).stdout.strip()


def test_machines_have_addresses_of_their_own(apart):
    with socket.create_server((apart.outside, 0)) as listener:
        port = listener.getsockname()[1]
        found = [reached(apart, name, port) for name in ("server", "ann", "bob")]
    assert found == [apart.address(name) for name in ("server", "ann", "bob")]
    assert len(set(found)) == 3


def test_a_cable_that_is_pulled_leads_nowhere(apart):
    with socket.create_server((apart.outside, 0)) as listener:
        port = listener.getsockname()[1]
        apart.plug("eve", up=False)
        assert reached(apart, "eve", port) == ""
        apart.plug("eve", up=True)
        assert reached(apart, "eve", port) == apart.address("eve")


def test_what_goes_to_a_machine_is_delayed(apart):
    if not apart.delayed:
        pytest.skip("tc netem cannot be added here: the kernel does not have it")
    ping = [*apart.inside("eve"), "ping", "-c", "1", apart.outside]
    said = subprocess.run(ping, capture_output=True, text=True, timeout=60, check=True).stdout
    assert float(said.partition("time=")[2].split()[0]) >= DELAY_MS


def test_a_link_is_cut_in_the_middle_and_mended():
    server = socket.create_server(("127.0.0.1", 0))
    link = Link("127.0.0.1", ("127.0.0.1", server.getsockname()[1]))

    def serve():
        for _ in range(2):
            one, _ = server.accept()
            with one:
                one.sendall(bytes(100_000))

    def fetched():
        with socket.create_connection(("127.0.0.1", link.port), timeout=60) as one:
            return sum(len(data) for data in iter(lambda: one.recv(1000), b""))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        link.cut_within("down", 50_000)
        assert 0 < fetched() < 100_000
        assert link.is_cut
        assert fetched() == 0
        link.mend()
        assert fetched() == 100_000
    finally:
        link.close()
        server.close()
        thread.join(60)
