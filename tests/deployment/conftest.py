"""A server and three clients, each on a machine of its own as far as that can be played, up for all tests here."""

import ast
import json
import shutil
import sysconfig
from pathlib import Path

import pytest
import yaml

from tests.deployment.links import Link, Network, namespaces_allowed
from tests.deployment.machines import Disk, Federation, asked
from tests.processes import free_port
from tests.runs import conftest as runs

# What a run is, is the same here as in tests/runs; its text is another.
_one_thread, _runs, run, open_run = runs._one_thread, runs._runs, runs.run, runs.open_run
tiny, only, cache, model_folder = runs.tiny, runs.only, runs.cache, runs.model_folder
settings_of, read_json = runs.settings_of, runs.read_json

NAMES = ("ann", "bob", "eve")
TEXTS = {"ann": "email", "bob": "asyncio", "eve": "unittest", "held out": "concurrent"}
CHOSEN = ("rounds=3", "export=true", "peft.dropout=0.1", "client.optimizer_state=keep", "control.local_steps={eve: 4}")
CHOSEN = (*CHOSEN, "codec=top_k", "strategy=fed_adam")  # memory of clients and of the server


def docstrings(package, most=12, length=300):
    """Real text, the same on all machines: what a package of the standard library says of itself."""
    found = []
    for path in sorted((Path(sysconfig.get_path("stdlib")) / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and len(ast.get_docstring(node) or "") > 100:
                found.append(str(ast.get_docstring(node))[:length])
    return found[:most]


def write_texts(path, authors):
    path.write_text(
        "".join(
            json.dumps({"author": author, "text": text}) + "\n"
            for author in authors
            for text in docstrings(TEXTS[author])
        )
    )
    return path


@pytest.fixture(scope="session")
def notes(tmp_path_factory):
    """What the clients hold, in one file: for the simulation that a federation is compared with."""
    return write_texts(tmp_path_factory.mktemp("notes") / "notes.jsonl", NAMES)


@pytest.fixture(scope="session")
def held_out(tmp_path_factory):
    """The server's own text."""
    return write_texts(tmp_path_factory.mktemp("held_out") / "notes.jsonl", ["held out"])


@pytest.fixture(scope="session")
def machines(tmp_path_factory):
    """A folder for each machine."""
    folder = tmp_path_factory.mktemp("machines")
    for name in ("server", *NAMES, "home"):
        (folder / name).mkdir()
    return folder


@pytest.fixture(scope="session")
def network():
    """The machines' network: a namespace for each, or loopback for all."""
    with Network(NAMES, apart=namespaces_allowed()) as made:
        yield made


@pytest.fixture(scope="session")
def words(tiny, held_out):
    """What `init` is told beside names and hosts."""
    without = ("data.path", "data.server_path", "data.client_field", "cache")
    given = [word for word in tiny(*CHOSEN) if word.partition("=")[0] not in without]
    return [*given, f"data.path={held_out}", f"names=[{','.join(NAMES)}]"]


@pytest.fixture(scope="session")
def deployment(machines, network, words):
    """What `init` writes, on the server; the clients' folders are on their machines."""
    folder = machines / "server" / "federation"
    hosts = f"hosts=[{network.host},{network.outside}]" if network.apart else "hosts=[127.0.0.1]"
    code, said = asked("init", folder, *words, hosts, f"port={free_port()}", cwd=machines / "server")
    assert code == 0, said
    for name in NAMES:
        shutil.move(folder / "clients" / name, machines / name / "site")
    return folder


@pytest.fixture(scope="session")
def disks(machines, deployment):
    """Small disks for the server's runs and for bob's machine, made before anything starts."""
    kept = machines / "kept"
    shutil.move(machines / "bob" / "site", kept)
    made = {"server": Disk(deployment / "runs"), "bob": Disk(machines / "bob" / "site")}
    shutil.copytree(kept, machines / "bob" / "site", dirs_exist_ok=True)
    yield made
    for disk in made.values():
        disk.remove()


@pytest.fixture(scope="session")
def federation(machines, deployment, disks, network, only, read_json):
    """The server and its clients, until all tests are over; ann's way to the server is a link that can be cut."""
    made = Federation(machines, deployment, network, {name: only(name) for name in NAMES})
    plain = read_json(made.site("ann") / "site.json")
    host, _, port = plain["superlink"].rpartition(":")
    made.link = Link(network.outside, (host, int(port)))
    plain["superlink"] = f"{network.outside}:{made.link.port}"
    (made.site("ann") / "site.json").write_text(json.dumps(plain))
    try:
        made.start()
        yield made
    finally:
        made.end()
        made.link.close()


@pytest.fixture(scope="session")
def settle(deployment):
    """Set keys of `round` for the runs that are begun from now on: `settle(min_replies=1)`."""

    def change(**keys):
        settings = yaml.safe_load((deployment / "config.yaml").read_text())
        settings["round"] = {**settings["round"], **keys}
        (deployment / "config.yaml").write_text(yaml.safe_dump(settings))

    return change
