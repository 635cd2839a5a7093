"""Who may join: what a stranger's client, a stranger's server, and one end without TLS come to."""

import json
import shutil

import pytest

from simulations.deployment import processes
from simulations.deployment.certificates import Pair, make_authority, make_client_keys, make_server_certificate
from simulations.deployment.init import init
from simulations.deployment.layout import read_deployment
from tests.deployment.machines import asked, started
from tests.processes import PATIENCE, end, free_port, listens, wait_for

pytestmark = pytest.mark.slow

CASES = ("unregistered", "stranger's authority", "plain client", "expired", "plain server")


@pytest.fixture(scope="module")
def strange(machines, words, tmp_path_factory):
    """Two servers that one of our clients should refuse, on this machine: their addresses by case."""
    folder, running, addresses = tmp_path_factory.mktemp("strange"), [], {}
    try:
        for case in ("expired", "plain server"):
            given = [*words, "hosts=[127.0.0.1]", f"port={free_port()}"]
            made = init(folder / case.replace(" ", "-"), given, insecure=case == "plain server")
            if case == "expired":
                authority = authority_of(machines)
                pair = make_server_certificate(authority, made.hosts, days=0)
                made.key.write_bytes(pair.private)
                made.certificate.write_bytes(pair.public)
                made.ca.write_bytes(authority.public)
            running.append(processes.superlink(made, bind="127.0.0.1"))
            addresses[case] = made
        for made in addresses.values():
            wait_for(lambda made=made: listens(made.port), what=made.log.read_text)
        yield addresses
    finally:
        for one in running:
            end(one)


def authority_of(machines):
    """The authority of the deployment whose clients are up."""
    deployment = read_deployment(machines / "server" / "federation")
    return Pair(deployment.ca_key.read_bytes(), deployment.ca.read_bytes())


@pytest.fixture(scope="module")
def refused(federation, strange, tmp_path_factory):
    """What each client said that was started in vain, all at once: `(exit code, words)` by case."""
    home, running = tmp_path_factory.mktemp("refused"), {}
    try:
        for case in CASES:
            folder = home / case.replace(" ", "-").replace("'", "")
            ignored = shutil.ignore_patterns("worker", "flower", "*.log", "bundles", "data", "federations")
            shutil.copytree(federation.site("bob"), folder, ignore=ignored)
            site = json.loads((folder / "site.json").read_text())
            if case == "unregistered":
                (folder / "key").write_bytes(make_client_keys("bob").private)
            elif case == "stranger's authority":
                (folder / "ca.crt").write_bytes(make_authority().public)
            elif case == "plain client":
                site["insecure"] = True
            else:
                site["superlink"] = strange[case].address
            (folder / "site.json").write_text(json.dumps(site))
            inside = () if case in strange else federation.network.inside("bob")
            log = home / f"{folder.name}.log"
            running[case] = (started("client", folder, log=log, cwd=folder, inside=inside), log)
        said = {}
        for case, (process, log) in running.items():
            code = process.wait(PATIENCE)
            said[case] = (code, " ".join(log.read_text().split()))
        yield said
    finally:
        for process, _ in running.values():
            end(process)


def test_a_key_that_is_not_registered_is_refused(refused):
    code, said = refused["unregistered"]
    assert code == 1, said
    assert "does not know this machine's key" in said
    assert "keys/" in said


def test_an_authority_that_is_not_the_servers_is_refused(refused):
    code, said = refused["stranger's authority"]
    assert code == 1, said
    assert "cannot trust the server" in said
    assert "get ca.crt from the server's operator" in said


def test_a_plain_connection_to_a_server_with_tls_is_refused(refused):
    code, said = refused["plain client"]
    assert code == 1, said
    assert "that server uses TLS" in said


def test_a_server_whose_certificate_has_expired_is_refused(refused):
    code, said = refused["expired"]
    assert code == 1, said
    assert "certificate has expired" in said
    assert "make a new certificate" in said


def test_a_server_without_tls_is_refused(refused):
    code, said = refused["plain server"]
    assert code == 1, said
    assert "must use TLS" in said


@pytest.mark.parametrize("case", CASES)
def test_nobody_was_waited_for(refused, case):
    assert f"not ready after {processes.READY_SECONDS:.0f} s" not in refused[case][1]


def test_the_clients_that_were_there_stay(refused, federation):
    assert all(client.is_ready() for client in federation.clients.values())


def test_a_server_does_not_start_with_a_certificate_that_has_expired(strange):
    made = strange["expired"]
    code, said = asked("server", made.folder, cwd=made.folder.parent)
    assert code == 2, said
    assert "must be good now" in said
