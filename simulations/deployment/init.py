"""`fedpeat deploy init`: all that an operator needs, in one folder."""

import contextlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import yaml

from fedpeat.client.site import CACHE_MIB
from fedpeat.core import ConfigError, StorageError, write_json, write_text
from simulations.compare.request import parse_word
from simulations.deployment.app_files import app_files
from simulations.deployment.certificates import Pair, make_authority, make_client_keys, make_server_certificate
from simulations.deployment.layout import FACTS, Deployment, check_names
from simulations.deployment.operating import write_connection
from simulations.deployment.readme import client_unit, readme, server_unit
from simulations.deployment.terms import deployed
from simulations.settings import load_settings

PORT = 8000
OWN_KEYS = ("names", "hosts", "port")


def init(folder: Path, words: Sequence[str], *, insecure: bool = False) -> Deployment:
    """Write a deployment into a folder that does not exist yet.

    Args:
        folder: The folder.
        words: `names=[...]`, `hosts=[...]`, `port=...`, and overrides as for `fedpeat simulate`.
        insecure: Leave out TLS and the authentication of clients.

    Raises:
        ConfigError: For a mistake in what was asked; nothing is written then.
        StorageError: If the folder cannot be written.
    """
    folder = folder.absolute()
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"cannot write a deployment to {folder}", "it is not empty", "name a new folder")
    own = {word.partition("=")[0]: word for word in words if word.partition("=")[0] in OWN_KEYS}
    deployment = Deployment(
        folder=folder,
        names=check_names(_listed(own.get("names"))),
        hosts=tuple(_listed(own.get("hosts")) or [socket.gethostname()]),
        port=_port(own.get("port")),
        insecure=insecure,
    )
    settings = load_settings([word for word in words if word not in own.values()])
    settings = deployed(settings, deployment.names, folder=folder)
    _write(deployment, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    return deployment


def _listed(word: str | None) -> list[str]:
    """Return the values of `key=a,b` or `key=[a,b]`."""
    if word is None:
        return []
    value = parse_word(word)
    found = value.value()
    if value.is_sweep_override():
        found = list(value.sweep_string_iterator())
    found = found if isinstance(found, list) else [found]
    return [str(item) for item in found if item is not None]


def _port(word: str | None) -> int:
    text = "" if word is None else word.partition("=")[2]
    if word is None:
        return PORT
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise ConfigError(f"port={text}", "a port is a whole number from 1 to 65535", f"leave it out for {PORT}")
    return int(text)


def _write(deployment: Deployment, config: str) -> None:
    write_json(
        deployment.folder / FACTS,
        {
            "names": list(deployment.names),
            "hosts": list(deployment.hosts),
            "port": deployment.port,
            "insecure": deployment.insecure,
        },
    )
    deployment.folder.chmod(0o700)
    write_text(deployment.config, config)
    for name, text in app_files().items():
        write_text(deployment.app / name, text)
    write_connection(deployment)
    authority = None
    if not deployment.insecure:
        authority = make_authority()
        try:
            server = make_server_certificate(authority, deployment.hosts)
        except ValueError as error:
            remedy = "name hosts and addresses, without https:// or a port"
            raise ConfigError(f"hosts={list(deployment.hosts)}", str(error), remedy) from error
        _write_pair(authority, deployment.ca_key, deployment.ca)
        _write_pair(server, deployment.key, deployment.certificate)
    for name in deployment.names:
        _write_client(deployment, name, authority)
    write_text(deployment.folder / "systemd" / "fedpeat-server.service", server_unit(deployment))
    write_text(deployment.folder / "README.md", readme(deployment))


def _write_client(deployment: Deployment, name: str, authority: Pair | None) -> None:
    client = deployment.client(name)
    write_json(
        client.site,
        {
            "name": name,
            "superlink": deployment.address,
            "insecure": deployment.insecure,
            "data": {"path": None},
            "cache_mib": CACHE_MIB,
        },
    )
    client.folder.chmod(0o700)
    write_text(client.folder / "fedpeat-client.service", client_unit(name))
    if authority is not None:
        keys = make_client_keys(name)
        _write_pair(keys, client.key, client.public_key)
        write_text(client.ca, authority.public.decode())
        write_text(deployment.public_key(name), keys.public.decode())


def _write_pair(pair: Pair, private: Path, public: Path) -> None:
    """Write a key that only its owner can read, at no moment anyone else, and what is public of it."""
    try:
        private.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            private.unlink()
        handle = os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(pair.private)
    except OSError as error:
        raise StorageError(f"cannot write {private}", str(error), "check the folder and its permissions") from error
    write_text(public, pair.public.decode())
