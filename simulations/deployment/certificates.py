"""Who is who: a certificate authority of the deployment's own, the server's certificate, a key pair for each client."""

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpeat.core import ConfigError

YEARS = 10
LOCAL = ("localhost", "127.0.0.1", "::1")
"""Names of the server's machine for itself: Flower's programs on it talk to each other by TLS too."""

_RENEW = "replace it by one that the authority of ca.crt has signed, or make a new deployment"


class Pair(NamedTuple):
    """A private key and what is public of it, as written to files."""

    private: bytes
    public: bytes


def make_authority() -> Pair:
    """Return a new authority: its key and its certificate, PEM."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name("fedpeat deployment CA")
    usage = _usage(signs_certificates=True)
    certificate = (
        _builder(name, name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    return Pair(_private_pem(key), certificate.public_bytes(serialization.Encoding.PEM))


def make_server_certificate(authority: Pair, hosts: Sequence[str], *, days: int = 365 * YEARS) -> Pair:
    """Return the server's key and certificate, PEM, good for these host names and addresses and for the machine itself.

    Args:
        authority: Who signs it.
        hosts: Names and addresses.
        days: How long it is good, from yesterday on.

    Raises:
        ValueError: If a host can be no name.
    """
    signer = serialization.load_pem_private_key(authority.private, password=None)
    issuer = x509.load_pem_x509_certificate(authority.public)
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise ValueError("the authority's key is none of ours")
    key = ec.generate_private_key(ec.SECP384R1())
    names = [_general_name(host) for host in dict.fromkeys([*hosts, *LOCAL])]
    certificate = (
        _builder(_name("fedpeat server"), issuer.subject, key.public_key(), days=days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
            critical=False,
        )
        .sign(signer, hashes.SHA384())
    )
    return Pair(_private_pem(key), certificate.public_bytes(serialization.Encoding.PEM))


def check_dates(certificate: Path) -> None:
    """Refuse a certificate that is good no more, or not yet.

    Raises:
        ConfigError: If it is one, or none.
    """
    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{certificate} must be a certificate", str(error), _RENEW) from error
    now, first, last = datetime.datetime.now(datetime.UTC), found.not_valid_before_utc, found.not_valid_after_utc
    if not first <= now <= last:
        raise ConfigError(f"{certificate} must be good now", f"it is good from {first:%F} to {last:%F}", _RENEW)


def make_client_keys(name: str) -> Pair:
    """Return a client's key pair in OpenSSH's format, in which Flower wants it."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return Pair(private, public + f" {name}\n".encode())


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, days: int = 365 * YEARS
) -> x509.CertificateBuilder:
    begin = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)  # clocks differ between machines
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
