"""What happens between the server and its clients before round 1: who is there, bundles, and everyone's own rows."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedpeat.bundles import Bundle, parts_of, read_part
from fedpeat.client.site import ASKED_OF_DATA, VERSIONS
from fedpeat.core import EngineError, FedPeatError, shorten, write_json
from fedpeat.data import ClientShard, FederatedData
from fedpeat.wire import question, raw_arrays, read_answer, read_failure
from simulations.compose import Composed
from simulations.exchange import Interrupted, exchange
from simulations.federation import Observer
from simulations.report.wording import printable
from simulations.run import versions

Tell = Callable[[str], None]
Nodes = Mapping[str, int]

DELIVERY = "delivery.json"
"""The file in a run's folder with what each client is, was sent of its bundle, and holds."""

POLL_SECONDS = 0.5


def wait_for(
    grid: Grid, names: Sequence[str], *, keys: bool, seconds: float, stop: threading.Event, tell: Tell
) -> dict[str, int]:
    """Return the node id of each client when all are there.

    Args:
        grid: Flower's.
        names: Of all clients.
        keys: Whether nodes are known by the names that their keys were registered under; or else by what they say.
        seconds: How long to wait.
        stop: Set to end early.
        tell: Told who is missing.

    Raises:
        EngineError: If some are not there in time, or two nodes have one name.
        Interrupted: If `stop` was set.
    """
    deadline, told = time.monotonic() + seconds, None
    while True:
        nodes = _registered(grid) if keys else _named_by_themselves(grid, len(names), stop)
        missing = sorted(set(names) - set(nodes))
        if not missing:
            return {name: nodes[name] for name in sorted(names)}
        if missing != told:
            tell(f"waiting for {shorten(missing)}")
            told = missing
        if time.monotonic() > deadline:
            found = f"after {seconds:.0f} s these are not there: {shorten(missing)}"
            raise EngineError("all clients must be there before round 1", found, "start them: fedpeat deploy client")
        if stop.wait(POLL_SECONDS):
            raise Interrupted


def _registered(grid: Grid) -> dict[str, int]:
    return _once_each([(str(node.name), int(node.node_id)) for node in grid.get_nodes() if node.name])


def _named_by_themselves(grid: Grid, count: int, stop: threading.Event) -> dict[str, int]:
    nodes = list(grid.get_node_ids())
    if len(nodes) < count:
        return {}
    answers = ask(grid, {str(node): question("hello", {}, node=node) for node in nodes}, stop=stop)
    return _once_each([(str(answer.get("name")), int(node)) for node, answer in answers.items()])


def _once_each(online: Sequence[tuple[str, int]]) -> dict[str, int]:
    nodes = dict(online)
    if len(nodes) < len(online):
        found = shorten(name for name, _ in sorted(online))
        raise EngineError("each client is to be one node", found, "end the second one, and start the server anew")
    return nodes


def ask(grid: Grid, questions: Mapping[str, Message], *, stop: threading.Event) -> dict[str, dict[str, Any]]:
    """Ask each client its question, all at once; return the answers by name.

    Raises:
        EngineError: If one does not answer, with its reason.
        Interrupted: If `stop` was set.
    """
    replies = exchange(grid, questions.values(), window=max(len(questions), 1), stop=stop)
    answers, failures = {}, []
    for name, reply in zip(questions, replies, strict=True):
        try:
            if reply.has_error():
                reason = read_failure(reply, client=name, server_round=0).reason
                failures.append(f"{name}: {printable(reason, 300)}")
            else:
                answers[name] = read_answer(reply)
        except FedPeatError as error:
            failures.append(f"{name}: {error}")
    if failures:
        raise EngineError(
            f"{len(failures)} of {len(questions)} clients cannot take part", "; ".join(failures), "see there"
        )
    return answers


def greet(grid: Grid, nodes: Nodes, *, stop: threading.Event, tell: Tell) -> dict[str, dict[str, Any]]:
    """Ask each client who it is and what it has.

    Raises:
        EngineError: If one calls itself by another name than its key was registered by, or has another fedpeat.
    """
    answers = ask(grid, {name: question("hello", {}, node=node) for name, node in nodes.items()}, stop=stop)
    own = versions()
    for name, answer in answers.items():
        if answer.get("name") != name:
            found = f"the client with its key calls itself {printable(answer.get('name'))!r}"
            raise EngineError(f"{name!r} must be {name!r}", found, "give each machine the folder of its own client")
        theirs = answer.get("versions")
        theirs = theirs if isinstance(theirs, dict) else {}
        if theirs.get("fedpeat") != own["fedpeat"]:
            found = f"{name} has {printable(theirs.get('fedpeat'))}, the server {own['fedpeat']}"
            raise EngineError("one version of fedpeat must be on all machines", found, "install the server's there")
        other = [
            f"{key} {printable(theirs.get(key))} ({own[key]} here)" for key in VERSIONS if theirs.get(key) != own[key]
        ]
        if other:
            tell(f"{name} has {', '.join(other)}: results may differ in their last bits")
    return answers


def deliver(
    grid: Grid,
    nodes: Nodes,
    composed: Composed,
    observer: Observer,
    *,
    settings: Mapping[str, Any],
    greetings: Mapping[str, Mapping[str, Any]],
    identity: str,
    folder: Path,
    stop: threading.Event,
) -> Composed:
    """Send each client its bundle, unless it has it, and have it prepare its rows; return what then runs.

    Args:
        grid: Flower's.
        nodes: Node ids by client.
        composed: As for a simulation.
        observer: Told what is being done.
        settings: The run's.
        greetings: What clients said of themselves.
        identity: The federation's, under which clients keep their state.
        folder: The run's, for the record.
        stop: Set to end early.

    Raises:
        EngineError: If a client cannot take its bundle, or has too little data.
    """
    bundle_of = {name: composed.bundles[composed.federation.control.emulator_of.get(name, "default")] for name in nodes}
    record = {name: {"node": str(nodes[name]), "versions": greetings[name].get("versions")} for name in nodes}
    for name, bundle in bundle_of.items():
        there = greetings[name].get("bundles")
        has = isinstance(there, list) and bundle.version in there
        record[name] |= {"bundle": bundle.version, "had": has, "parts": 0, "bytes_down": 0}
    wanting = {name: bundle_of[name] for name in nodes if not record[name]["had"]}
    _send(grid, nodes, wanting, record, stop=stop, tell=observer.message)
    for version in sorted({bundle.version for bundle in bundle_of.values()}):
        taken = [known["bytes_down"] for known in record.values() if known["bundle"] == version]
        observer.bundle_delivered(version, len(taken), sum(taken))
    shared = {
        "federation": identity,
        "data": {key: settings["data"][key] for key in ASKED_OF_DATA if key in settings["data"]},
        "seed": settings["seed"],
        "batch_size": settings["client"]["batch_size"],
    }
    observer.message("clients prepare their rows")
    questions = {
        name: question("begin", {**shared, "bundle": bundle_of[name].version}, node=node)
        for name, node in nodes.items()
    }
    held = {name: _counted(name, said) for name, said in ask(grid, questions, stop=stop).items()}
    for name in nodes:
        record[name] |= held[name]
    write_json(folder / DELIVERY, record)
    return _remote(composed, held, identity)


def _send(
    grid: Grid,
    nodes: Nodes,
    bundles: Mapping[str, Bundle],
    record: Mapping[str, dict[str, Any]],
    *,
    stop: threading.Event,
    tell: Tell,
) -> None:
    """Send bundles part by part: the next one when all clients have the last, so that memory stays bounded."""
    parts = {name: parts_of(bundle) for name, bundle in bundles.items()}
    most = max((len(cut) for cut in parts.values()), default=0)
    for number in range(most):
        questions, records = {}, {}
        for name, cut in parts.items():
            if number >= len(cut):
                continue
            bundle, part = bundles[name], cut[number]
            if bundle.version not in records:  # clients with one bundle share what is sent
                records[bundle.version] = raw_arrays(read_part(bundle, part))
            asked = {"version": bundle.version, "part": number, "parts": len(cut), "pieces": part}
            asked |= {"manifest": bundle.manifest} if number == 0 else {}
            questions[name] = question("bundle", asked, node=nodes[name], arrays=records[bundle.version])
            record[name]["parts"] += 1
            record[name]["bytes_down"] += sum(piece.size for piece in part)
        size = sum(int(record[name]["bytes_down"]) for name in questions)
        tell(f"bundles: part {number + 1} of {most} to {len(questions)} clients, {size / 2**20:.1f} MiB until then")
        ask(grid, questions, stop=stop)


def _counted(name: str, said: Mapping[str, Any]) -> dict[str, int]:
    """Return what a client says that it holds, checked."""
    counts = {key: said.get(key) for key in ("rows", "tokens", "documents")}
    held = {key: count for key, count in counts.items() if type(count) is int and 0 < count < 2**63}
    if len(held) < len(counts):
        raise EngineError(f"{name} must say what it holds", printable(counts, 200), "use one version of fedpeat")
    return held


def _remote(composed: Composed, held: Mapping[str, Mapping[str, int]], identity: str) -> Composed:
    """Return the same federation with jobs that name no path, and who holds how much."""
    federation = composed.federation
    job = {key: value for key, value in federation.job.items() if key not in {"data", "state_folder"}}
    # A job's bundle is what this mapping says: here a version, which each client finds in its own folder.
    versions = {key: Path(bundle.version) for key, bundle in composed.bundles.items()}
    limits = replace(federation.limits, rows={name: said["rows"] for name, said in held.items()})
    federation = replace(federation, job={**job, "federation": identity}, bundles=versions, limits=limits)
    return replace(composed, federation=federation, data=with_rows(composed.data, held))


def with_rows(data: FederatedData, held: Mapping[str, Mapping[str, int]]) -> FederatedData:
    """Return `data` with clients of these names, who hold what they said."""
    clients = tuple(
        ClientShard(
            name,
            rows=known.get("rows", 0),
            tokens=known.get("tokens", 0),
            documents=known.get("documents", 0),
            validation_rows=0,
            test_rows=0,
        )
        for name, known in sorted(held.items())
    )
    return replace(data, clients=clients, remote=True)
