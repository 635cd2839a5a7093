"""A client's machine, from Python: what `fedpeat deploy client` does, while a program does something else."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedpeat.core import ConfigError, EngineError, nearest, read_json, write_json
from simulations.deployment.layout import ClientFolder, read_client_folder
from simulations.deployment.names import FILES

PROGRAM = (sys.executable, "-m", "simulations.cli", "deploy", "client")


@contextlib.contextmanager
def joined(folder: str | Path, data: Mapping[str, Any] | None = None) -> Iterator[subprocess.Popen[str]]:
    """Take part in a federation while in the block; yield the client's process once the server knows it.

    It serves one run after the other, and waits for a server that is away; it ends by itself where the server was
    started anew. It outlives a program that is killed and so cannot leave the block.

    Args:
        folder: The client's, of `fedpeat deploy init`, or its copy on this machine.
        data: Settings `data.*` of this machine, by name without `data.`; kept in `site.json`, as by the command.

    Raises:
        ConfigError: If the folder is none of a client, or a setting or file is not there.
        EngineError: If the server does not let it in.
    """
    client = read_client_folder(folder)
    keep_data(client, data or {})
    # A session of its own: Ctrl-C at a terminal ends this block, and the end of this block the client.
    process = subprocess.Popen(
        [*PROGRAM, str(client.folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        _wait_until_ready(process, client)
        yield process
    finally:
        process.terminate()
        process.wait()
        if process.stdout:
            process.stdout.close()


def _wait_until_ready(process: subprocess.Popen[str], client: ClientFolder) -> None:
    said = []
    for line in process.stdout or ():
        if line.startswith("ready"):
            return
        said.append(line.strip())
    asked = f"cannot take part as the client in {client.folder}"
    raise EngineError(asked, " ".join(said)[-500:] or "it said nothing", f"see {client.log}")


def keep_data(client: ClientFolder, data: Mapping[str, Any]) -> None:
    """Keep what is said of a machine's data in its `site.json`.

    Args:
        client: The client's folder.
        data: Settings by name, `path` among them: a file, folder or glob, or a list of these.

    Raises:
        ConfigError: If a name is unknown, a value out of range, or a file is not there.
    """
    from fedpeat.data import DataSpec  # loads torch, which what merely stays does without

    known = list(DataSpec.__dataclass_fields__)
    for key in data:
        if key not in known:
            raise ConfigError(f"data.{key}", "no such key", nearest(key, known))
    if not data:
        return
    given = dict(data)
    if "path" in given:
        paths = given["path"] if isinstance(given["path"], list | tuple) else [given["path"]]
        given["path"] = [_checked(str(path)) for path in paths]
    plain = read_json(client.site)
    plain["data"] |= given
    if plain["data"].get("path") is not None:
        DataSpec.of({"kind": FILES[0], "block_size": 2, **plain["data"]})
    write_json(client.site, plain)


def _checked(text: str) -> str:
    path = Path(text).expanduser().absolute()
    if not path.exists() and not set("*?[") & set(text):
        raise ConfigError(f"data.path={text}", "no such file on this machine", "name the file, folder or glob")
    return str(path)
