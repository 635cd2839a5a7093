"""`fedpeat deploy`: make a deployment, start its server and clients, run federations, look at them, end them."""

import contextlib
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from fedpeat.core import ConfigError, EngineError, StorageError, nearest, read_json, write_json, write_text
from simulations.deployment import operating, processes
from simulations.deployment.certificates import check_dates
from simulations.deployment.handshake import check_server
from simulations.deployment.joining import keep_data
from simulations.deployment.layout import RUN, STOP, ClientFolder, Deployment, read_client_folder, read_deployment
from simulations.deployment.names import FILES
from simulations.deployment.resident import resident
from simulations.deployment.scrape import serving

FAILED, INTERRUPTED = 1, 130
BINDS = ("0.0.0.0", "127.0.0.1")
"""Where the server can listen: at all addresses of its machine, or for clients on the same machine only."""

PATIENCE = 120
"""Seconds for a run to end whose server has said its last words."""

_NOISE = re.compile(r"(INFO|DEBUG)\s*:|Using SuperLink:|Successfully installed ")
"""Lines of Flower's own that tell an operator nothing."""

STOP_SECONDS = 600.0
"""Seconds for a run to end in order, until Flower is asked to end it."""

HELP = """fedpeat deploy: a federation on several machines, through Flower.

usage: fedpeat deploy init FOLDER names=[ann,bob] hosts=[server.example.org] [port=8000] [key=value ...] [--insecure]
       fedpeat deploy server FOLDER [bind=0.0.0.0] [metrics=PORT]
       fedpeat deploy client CLIENT_FOLDER [data.path=FILE] [data.KEY=VALUE]
       fedpeat deploy run FOLDER [resume=latest]
       fedpeat deploy status | stop FOLDER

  init      write all that is needed: app, settings, certificates, keys, services, and a README with the commands;
            data.path=FILE is the server's own text, on which models are evaluated; all other keys as for simulate
  server    start the server on its machine and let the clients in; stays until it is ended; metrics=9464 serves
            numbers to Prometheus, on this machine alone (metrics=0.0.0.0:9464: to others too)
  client    start a client on its machine, with that machine's own data; stays until it is ended
  run       run the federation; show its progress; exit with 0 only if it finished (130: it was stopped);
            resume=NAME (of a folder in runs/, or latest) goes on with one that was stopped, failed or was killed
  status    rounds, clients, bytes and failures of the newest run
  stop      end the newest run, in order

TLS and the authentication of clients are on; --insecure leaves both out, for a trusted network.
Exit code: 0 done, 1 failed, 2 a mistake in what was asked, 130 stopped.
"""


def deploy(arguments: Sequence[str], *, console: Console | None = None) -> int:
    """Carry out a command; return the exit code.

    Args:
        arguments: As typed.
        console: Where to write; standard output by default.

    Raises:
        FedPeatError: For a mistake in what was asked, or what cannot be had.
    """
    words = [word for word in arguments if not word.startswith("-")]
    flags = [word for word in arguments if word.startswith("-")]
    if not words or {"--help", "-h"} & set(flags):
        print(HELP, end="")
        return 0
    name, *rest = words
    if name not in {"init", *COMMANDS}:
        raise ConfigError(f"fedpeat deploy {name}", "no such command", nearest(name, ["init", *COMMANDS]))
    allowed = {"--insecure"} if name == "init" else set()
    for flag in flags:
        if flag not in allowed:
            raise ConfigError(f"fedpeat deploy {name} {flag}", "no such flag", "see fedpeat deploy --help")
    if not rest or "=" in rest[0]:
        raise ConfigError(f"fedpeat deploy {name} needs a folder", "none is named", "see fedpeat deploy --help")
    folder, others = Path(rest[0]).expanduser(), rest[1:]
    console = console or Console(highlight=False)
    if name == "init":
        from simulations.deployment.init import init  # it loads all that a run needs

        deployment = init(folder, others, insecure="--insecure" in flags)
        console.print(f"the commands for each machine: {deployment.folder / 'README.md'}", soft_wrap=True)
        return 0
    return COMMANDS[name](folder, others, console)


def _server(folder: Path, words: Sequence[str], console: Console) -> int:
    deployment = read_deployment(folder)
    given = _given("server", words, ("bind", "metrics"))
    bind = given.get("bind", BINDS[0])
    if bind not in BINDS:  # its own programs ask it at 127.0.0.1
        raise ConfigError(f"bind={bind}", "no such choice", f"choose from: {', '.join(BINDS)}")
    if processes.is_up(deployment):
        raise EngineError(f"something serves {deployment.own_address} already", "this deployment's server", "end it")

    def greet() -> None:
        if not deployment.insecure:
            console.print(f"clients with a key: {', '.join(operating.register(deployment))}", soft_wrap=True)
        console.print(f"ready: clients find the server at {deployment.address}", soft_wrap=True)

    with serving(deployment, given.get("metrics")) as scraped:
        if scraped:
            console.print(f"metrics: {scraped}", soft_wrap=True)
        if not deployment.insecure:
            check_dates(deployment.certificate)
        processes.shorten_log(deployment.log)
        process = processes.superlink(deployment, bind=bind)
        return processes.stay(process, lambda: processes.is_up(deployment), greet, "the server", deployment.log)


def _client(folder: Path, words: Sequence[str], console: Console) -> int:
    client = read_client_folder(folder)
    if words:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:  # torch would stay in this process
            apart.submit(_set_data, client, words).result()
    name = _checked_name(client)
    check_server(client)
    said = processes.shorten_log(client.log)

    def greet() -> None:
        console.print(f"ready: {name} is known to {read_json(client.site)['superlink']}", soft_wrap=True)

    process = processes.supernode(client)
    with resident(lambda: processes.worker(client), client.folder, process, log=client.log) as listens:

        def ready() -> bool:
            return processes.is_connected(client, said) and listens()

        return processes.stay(process, ready, greet, f"client {name}", client.log)


def _checked_name(client: ClientFolder) -> str:
    """Return a client's name, once it is clear that its data is named; the worker, which loads all, looks closer."""
    plain = read_json(client.site)
    name, data = (plain.get(key) for key in ("name", "data")) if isinstance(plain, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(data, dict):
        raise ConfigError(
            f"cannot use {client.site}", "it has no name or no data", "write it anew: fedpeat deploy init"
        )
    if data.get("path") is None and data.get("kind", FILES[0]) in FILES:
        raise ConfigError(
            f"{name!r} has no data", "data.path is not set", "fedpeat deploy client FOLDER data.path=FILE"
        )
    return name


def _set_data(client: ClientFolder, words: Sequence[str]) -> None:
    """Keep what was said of this machine's data, and check it."""
    from fedpeat.data import DataSpec
    from simulations.compare.request import parse_word

    known = [f"data.{key}" for key in DataSpec.__dataclass_fields__]
    given: dict[str, Any] = {}
    for key, text in _given("client", words, known).items():
        literal = key == "data.path" and text[:1] != "["
        given[key.removeprefix("data.")] = text if literal else parse_word(f"{key}={text}").value()
    keep_data(client, given)


def _given(command: str, words: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    given = {key: text for key, _, text in (word.partition("=") for word in words)}
    for key in given:
        if key not in known:
            raise ConfigError(f"fedpeat deploy {command} {key}", "no such key", nearest(key, known or ["FOLDER alone"]))
    return given


def _run(folder: Path, words: Sequence[str], console: Console) -> int:
    deployment = read_deployment(folder)
    place = _place(deployment, _given("run", words, ("resume",)).get("resume"))
    if not processes.is_up(deployment):
        found = f"nothing serves {deployment.own_address}"
        raise EngineError("the server must run", found, f"fedpeat deploy server {folder}")
    place.mkdir(parents=True, exist_ok=True)
    process, identity = operating.start_run(deployment, place), None
    with _ctrl_c(lambda: write_text(place / STOP, "")):
        for line in operating.lines_of(process):
            started = re.search(r"started run (\d+)", line)
            if started and identity is None:
                identity = int(started.group(1))
                write_json(place / RUN, {"run": str(identity)})
            elif not _NOISE.match(line):
                console.print(line, soft_wrap=True, markup=False)
        process.wait()
    if identity is None:
        raise EngineError("the run did not start", "the server took none", f"see above, and {deployment.log}")
    if not processes.is_up(deployment):
        remedy = f"start it again, then: fedpeat deploy run {folder} resume={place.name}"
        raise EngineError("the run has lost its server", f"nothing serves {deployment.own_address} any more", remedy)
    status, details = _ended(deployment, identity)
    return _code(place, status, details)


def _place(deployment: Deployment, resume: str | None) -> Path:
    """Return the folder of a run: a new one, or that of the run to go on with."""
    if resume is None:
        return deployment.runs / time.strftime("%Y-%m-%d-%H-%M-%S")
    place = deployment.latest_run() if resume == "latest" else deployment.runs / resume
    if place is None or not (place / "config.yaml").exists():
        known = sorted(path.name for path in deployment.runs.glob("*")) if deployment.runs.is_dir() else []
        raise ConfigError(f"cannot resume {resume}", "no such run", nearest(resume, ["latest", *known]))
    (place / STOP).unlink(missing_ok=True)
    return place


def _ended(deployment: Deployment, identity: int) -> tuple[str, str]:
    """Return how a run ended; the end of its words may come before its own."""
    for _ in range(PATIENCE):
        status, details = operating.run_status(deployment, identity)
        if status.startswith("finished"):
            return status, details
        time.sleep(1)
    return "not finished", "it says nothing any more"


def _code(place: Path, status: str, details: str) -> int:
    """Return the exit code of a run: what its folder says, if Flower says that it came to its end.

    Raises:
        EngineError: If it failed.
    """
    summary: Mapping[str, object] = {}
    with contextlib.suppress(StorageError):
        summary = read_json(place / "summary.json")
    if summary.get("status") == "interrupted":
        return INTERRUPTED
    if status != "finished:completed" or summary.get("status") != "finished":
        found = details.removeprefix("ServerApp failed with exception: ") or status
        raise EngineError("the federation failed", found, f"see above, and {place}")
    return 0


@contextlib.contextmanager
def _ctrl_c(work: Callable[[], None]) -> Iterator[None]:
    """Turn Ctrl-C, and the wish to end us, into `work`; a second time they end us."""

    def first(number: int, _frame: object) -> None:
        signal.signal(number, signal.default_int_handler)
        work()

    before = {number: signal.signal(number, first) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _status(folder: Path, words: Sequence[str], console: Console) -> int:
    _given("status", words, ())
    from simulations.deployment.status import status_table  # it loads what the server runs on

    deployment = read_deployment(folder)
    for part in status_table(deployment, up=processes.is_up(deployment)):
        console.print(part)
    return 0


def _stop(folder: Path, words: Sequence[str], console: Console) -> int:
    deployment = read_deployment(folder)
    _given("stop", words, ())
    place = deployment.latest_run()
    if place is None or not (place / RUN).exists():
        raise ConfigError("nothing to stop", "there is no run", f"fedpeat deploy run {folder}")
    identity = int(read_json(place / RUN)["run"])
    if (place / "summary.json").exists():
        console.print(f"{place.name} has ended already")
        return 0
    write_text(place / STOP, "")
    deadline = time.monotonic() + STOP_SECONDS
    while not operating.run_status(deployment, identity)[0].startswith("finished"):
        if time.monotonic() > deadline:
            operating.end_run(deployment, identity)
        time.sleep(0.5)
    console.print(f"{place.name} has ended")
    return 0


COMMANDS: dict[str, Callable[[Path, Sequence[str], Console], int]] = {
    "server": _server,
    "client": _client,
    "run": _run,
    "status": _status,
    "stop": _stop,
}
