"""The words of a deployment: its README, with the commands for each machine, and its systemd units."""

import sys
from pathlib import Path

from simulations.deployment.layout import Deployment

_PROGRAM = Path(sys.executable).parent / "fedpeat"


def readme(deployment: Deployment) -> str:
    """Return the README of a deployment's folder."""
    first, others = deployment.names[0], len(deployment.names) - 1
    also = f"; so for the {others} other{'s' if others > 1 else ''}" if others else ""
    trust = (
        "**Without TLS and without authentication of clients**: for a trusted network only.\n"
        if deployment.insecure
        else "TLS is on, and only clients whose keys are in `keys/` are let in.\n"
    )
    return f"""# A federation of {len(deployment.names)} clients

Server: `{deployment.address}`. Clients: {", ".join(f"`{name}`" for name in deployment.names)}. {trust}
The same version of `fedpeat` must be installed on every machine; nothing is installed or called out for in a run.

## 1. The server's machine

```
fedpeat deploy server {deployment.folder}
```

It stays in the foreground, registers the clients' keys, and listens on port {deployment.port}, which clients must be
able to reach. As a service: `systemd/fedpeat-server.service`.

## 2. Each client's machine

Copy the folder `clients/{first}` (and nothing else of this folder) to the machine of `{first}`, by a way that nobody
else can read{also}. There:

```
chmod 700 {first}; chmod 600 {first}/key
fedpeat deploy client {first} data.path=/where/its/own/data.jsonl
```

The data's path is kept in `site.json`, so later `fedpeat deploy client {first}` is enough. Data stays on that machine:
what leaves it are updates of the travelling tensors, the number of rows, tokens and documents, training metrics, and
versions of packages. The machine runs the Python code that the server's app holds, as the user who starts this:
give that user only what it needs. As a service: `fedpeat-client.service` in that folder.

## 3. A run, on the server's machine

```
fedpeat deploy run {deployment.folder}
fedpeat deploy status {deployment.folder}
fedpeat deploy stop {deployment.folder}
```

`run` shows the progress and exits with 0 only if the federation finished; `status` shows rounds, clients, bytes and
failures; `stop` ends the run in order after what is being done. Each run has a folder in `runs/`, as a simulation's.

## What is what

| file | what |
|---|---|
| `config.yaml` | the resolved settings; `data.server_path` is the server's own text, on which models are evaluated |
| `deployment.json` | names, hosts, port |
| `app/` | the Flower app that `run` sends to all machines: three thin modules that use the installed `fedpeat` |
| `certificates/` | `ca.crt` (public) and `server.crt`, `server.key` for TLS; `ca.key` signs new ones |
| `keys/` | the clients' public keys: remove one to lock its client out at the next start of the server |
| `clients/NAME/` | what goes to a client's machine: `site.json`, its `key`, `ca.crt`; delete it here then |
| `flower/` | Flower's own folder, in place of `~/.flwr` |
| `server.log` | what Flower's programs say |
| `runs/` | the runs |

A client can also make its own key (`ssh-keygen -t ecdsa -b 384 -f key -N ''`) and hand over `key.pub` alone, to
`keys/NAME.pub`.
"""


def server_unit(deployment: Deployment) -> str:
    """Return the systemd unit of the server."""
    return _unit("fedpeat server", f"{_PROGRAM} deploy server {deployment.folder}", "network-online.target")


def client_unit(name: str) -> str:
    """Return the systemd unit of a client, whose folder is expected under /var/lib."""
    return _unit(
        f"fedpeat client {name}",
        f"/usr/local/bin/fedpeat deploy client /var/lib/fedpeat/{name}",
        "network-online.target",
    )


def _unit(what: str, command: str, after: str) -> str:
    return f"""# Copy to /etc/systemd/system/, set User= and the paths, then: systemctl enable --now <this unit>
[Unit]
Description={what}
After={after}
Wants={after}

[Service]
User=fedpeat
ExecStart={command}
Restart=always
RestartSec=10
NoNewPrivileges=true
PrivateTmp=true

[Install]
WantedBy=multi-user.target
"""
