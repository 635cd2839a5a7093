"""Does a client find the server that it expects? Asked before Flower's program starts, which would ask for ever."""

import http.client
import socket
import ssl

from fedpeat.core import EngineError, read_json
from simulations.deployment.layout import ClientFolder

SECONDS = 10.0

_EXPIRED, _NOT_YET, _OTHER_NAME = 10, 9, (62, 64)  # X509_V_ERR_*: has expired, not yet valid, host or address mismatch


def check_server(client: ClientFolder) -> None:
    """Refuse a server that is not the one this folder was made for; one that does not answer yet is left to Flower.

    Raises:
        EngineError: If it has another authority's certificate, one that has expired or is another machine's, or if
            only one of both ends uses TLS.
    """
    site = read_json(client.site)
    address = str(site["superlink"])
    host, _, port = address.rpartition(":")
    target = (host.strip("[]"), int(port))
    if site.get("insecure"):
        if not _answers(target) and _speaks_tls(target):
            found, remedy = "that server uses TLS", "get this client's folder anew from fedpeat deploy init"
            raise EngineError(f"{address} must be reached without TLS: this client's folder says so", found, remedy)
        return
    context = ssl.create_default_context(cafile=str(client.ca))
    try:
        with socket.create_connection(target, SECONDS) as plain, context.wrap_socket(plain, server_hostname=target[0]):
            return
    except ssl.SSLCertVerificationError as error:
        raise EngineError(f"cannot trust the server at {address}", *_wrong(error)) from error
    except ssl.SSLError as error:
        if not _answers(target):
            return  # whatever it is: Flower tries again
        found, remedy = "it answers without TLS", "start it by fedpeat deploy server, without --insecure at init"
        raise EngineError(f"the server at {address} must use TLS", found, remedy) from error
    except OSError:
        return


def _wrong(error: ssl.SSLCertVerificationError) -> tuple[str, str]:
    found = f"its certificate: {error.verify_message}"
    if error.verify_code == _EXPIRED:
        return found, "have its operator make a new certificate, and look at this machine's clock"
    if error.verify_code == _NOT_YET:
        return found, "look at the clocks of both machines"
    if error.verify_code in _OTHER_NAME:
        return found, "use a name or an address that stands in hosts=[...] of fedpeat deploy init"
    return found, "get ca.crt from the server's operator: this one belongs to another deployment"


def _answers(target: tuple[str, int]) -> bool:
    """Return whether something speaks plain HTTP there."""
    connection = http.client.HTTPConnection(*target, timeout=SECONDS)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status > 0
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _speaks_tls(target: tuple[str, int]) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # only whether, not who
    try:
        with socket.create_connection(target, SECONDS) as plain, context.wrap_socket(plain):
            return True
    except OSError:
        return False
