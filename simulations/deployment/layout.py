"""Which file of a deployment is where, on the server and on a client's machine."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedpeat.core import ConfigError, StorageError, read_json
from simulations.deployment.names import SITE_FILE

FACTS = "deployment.json"
CONNECTION = "fedpeat"
"""The name of the server in Flower's own `config.toml`."""

RUN, STOP = "run.json", "stop"
"""Files in a run's folder: what Flower calls it, and the wish that it ends."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True)
class Deployment:
    """A folder of `fedpeat deploy init`, on the server's machine.

    Attributes:
        folder: The folder.
        names: The clients' names, sorted.
        hosts: Names and addresses of the server's machine; clients use the first.
        port: Of all that the server offers.
        insecure: Whether there is neither TLS nor authentication of clients.
    """

    folder: Path
    names: tuple[str, ...]
    hosts: tuple[str, ...]
    port: int
    insecure: bool = False

    @property
    def config(self) -> Path:
        """The resolved settings."""
        return self.folder / "config.yaml"

    @property
    def app(self) -> Path:
        """The Flower app."""
        return self.folder / "app"

    @property
    def home(self) -> Path:
        """What Flower takes for its own folder, in place of the one in the user's home."""
        return self.folder / "flower"

    @property
    def ca(self) -> Path:
        """The certificate that both ends trust."""
        return self.folder / "certificates" / "ca.crt"

    @property
    def ca_key(self) -> Path:
        """What certificates are signed by."""
        return self.folder / "certificates" / "ca.key"

    @property
    def certificate(self) -> Path:
        """The server's."""
        return self.folder / "certificates" / "server.crt"

    @property
    def key(self) -> Path:
        """The server's."""
        return self.folder / "certificates" / "server.key"

    @property
    def log(self) -> Path:
        """What the server's processes say."""
        return self.folder / "server.log"

    @property
    def nodes(self) -> Path:
        """Flower's node ids by client name, as registered by the server that runs now."""
        return self.folder / "nodes.json"

    @property
    def runs(self) -> Path:
        """A folder for each run."""
        return self.folder / "runs"

    def public_key(self, name: str) -> Path:
        """Return where a client's public key is; only this half is needed on the server."""
        return self.folder / "keys" / f"{name}.pub"

    def client(self, name: str) -> "ClientFolder":
        """Return the folder that goes to a client's machine."""
        return ClientFolder(self.folder / "clients" / name)

    @property
    def address(self) -> str:
        """Where clients find the server, `host:port`."""
        return joined(self.hosts[0], self.port)

    @property
    def own_address(self) -> str:
        """Where the server's own machine finds it."""
        return joined("127.0.0.1", self.port)

    def latest_run(self) -> Path | None:
        """Return the folder of the newest run."""
        found = sorted(path for path in self.runs.iterdir() if path.is_dir()) if self.runs.is_dir() else []
        return found[-1] if found else None


@dataclass(frozen=True)
class ClientFolder:
    """The folder of one client, on its own machine."""

    folder: Path

    @property
    def site(self) -> Path:
        """Who and where this machine is, and its data."""
        return self.folder / SITE_FILE

    @property
    def key(self) -> Path:
        """Its private key."""
        return self.folder / "key"

    @property
    def public_key(self) -> Path:
        """Its public key."""
        return self.folder / "key.pub"

    @property
    def ca(self) -> Path:
        """What it trusts."""
        return self.folder / "ca.crt"

    @property
    def home(self) -> Path:
        """What Flower takes for its own folder."""
        return self.folder / "flower"

    @property
    def log(self) -> Path:
        """What its processes say."""
        return self.folder / "client.log"


def joined(host: str, port: int) -> str:
    """Return `host:port`, an IPv6 address in brackets.

    >>> joined("::1", 8000)
    '[::1]:8000'
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return clients' names, sorted; they name files, services and keys.

    Raises:
        ConfigError: If there is none, or one is no plain word, reserved, or there twice.
    """
    if not names:
        raise ConfigError("a federation needs clients", "none is named", "add names=[ann,bob,eve]")
    for name in names:
        if _NAME.fullmatch(name) is None or name == "server":
            found = "letters, digits, '.', '_' and '-' make a name, and 'server' is taken"
            raise ConfigError(f"cannot call a client {name!r}", found, "choose another name")
    if len({name.lower() for name in names}) < len(names):
        raise ConfigError(f"cannot use names={list(names)}", "two are the same", "give each client a name of its own")
    return tuple(sorted(names))


def read_deployment(folder: str | Path) -> Deployment:
    """Return the deployment in a folder.

    Raises:
        ConfigError: If there is none.
    """
    folder = Path(folder).absolute()
    try:
        plain = read_json(folder / FACTS)
        return Deployment(folder, tuple(plain["names"]), tuple(plain["hosts"]), plain["port"], plain["insecure"])
    except (StorageError, KeyError, TypeError) as error:
        remedy = "name the folder of fedpeat deploy init"
        raise ConfigError(f"{folder} is no deployment", str(error).split(";")[0], remedy) from error


def read_client_folder(folder: str | Path) -> ClientFolder:
    """Return a client's folder.

    Raises:
        ConfigError: If it is none.
    """
    found = ClientFolder(Path(folder).absolute())
    if not found.site.is_file():
        remedy = "name the client's folder: clients/NAME of fedpeat deploy init, or its copy on this machine"
        raise ConfigError(f"{found.folder} is no client's folder", f"it has no {SITE_FILE}", remedy)
    return found
