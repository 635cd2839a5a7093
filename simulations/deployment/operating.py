"""Flower's command line, as an operator uses it: keys are registered, runs started, asked for and ended."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedpeat.core import EngineError, write_json, write_text
from simulations.deployment.layout import CONNECTION, Deployment
from simulations.deployment.processes import BINARIES, environment


def write_connection(deployment: Deployment) -> None:
    """Tell Flower's command line where the server is."""
    trust = "insecure = true" if deployment.insecure else f"root-certificates = {json.dumps(str(deployment.ca))}"
    address = json.dumps(deployment.own_address)
    deployment.home.mkdir(parents=True, exist_ok=True)
    text = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = {address}\n{trust}\n'
    write_text(deployment.home / "config.toml", text)


def flwr(deployment: Deployment, *arguments: str) -> dict[str, Any]:
    """Run Flower's command line with `--format json`, and return what it answers.

    Raises:
        EngineError: If it fails.
    """
    command = [str(BINARIES / "flwr"), *arguments, "--format", "json"]
    ran = subprocess.run(command, env=environment(deployment.home), capture_output=True, text=True, check=False)
    found = re.search(r"\{.*\}", ran.stdout, flags=re.DOTALL)
    answer = json.loads(found.group()) if found else {}
    if ran.returncode or not answer.get("success"):
        told = answer.get("error-message") or (ran.stderr or ran.stdout).strip().splitlines()[-1:] or "no answer"
        raise EngineError(f"flwr {' '.join(arguments[:2])} failed", str(told)[:300], f"see {deployment.log}")
    return answer


def register(deployment: Deployment) -> dict[str, int]:
    """Register each client's public key under its name; return Flower's node ids by name.

    Raises:
        EngineError: If the server refuses one.
    """
    nodes = {}
    for name in deployment.names:
        key = deployment.public_key(name)
        if key.exists():  # a client may be locked out, or hand its key over later
            nodes[name] = int(
                flwr(deployment, "supernode", "register", str(key), CONNECTION, "--name", name)["node-id"]
            )
    write_json(deployment.nodes, {name: str(node) for name, node in nodes.items()})
    return nodes


def start_run(deployment: Deployment, folder: Path) -> subprocess.Popen[str]:
    """Start a run in `folder` and stream what its server says."""
    command = [str(BINARIES / "flwr"), "run", str(deployment.app), CONNECTION, "--stream"]
    return subprocess.Popen(
        [*command, "--run-config", f"folder={json.dumps(str(folder))}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(deployment.home),
        start_new_session=True,
    )


def lines_of(process: subprocess.Popen[str]) -> Iterator[str]:
    """Yield what a program says, line by line, without colours."""
    if process.stdout is None:
        return
    with process.stdout as said:
        for line in said:
            yield re.sub(r"\x1b\[[0-9;]*m", "", line.rstrip())


def run_status(deployment: Deployment, run: int) -> tuple[str, str]:
    """Return Flower's status of a run (`finished:completed`, say) and the details.

    Raises:
        EngineError: If the server does not know it.
    """
    runs = flwr(deployment, "list", CONNECTION, "--run-id", str(run)).get("runs", [])
    if not runs:
        raise EngineError(f"the server knows no run {run}", "it may have been started anew", "start the run again")
    return str(runs[0]["status"]), str(runs[0].get("status-details", ""))


def end_run(deployment: Deployment, run: int) -> None:
    """End a run, whatever it is doing.

    Raises:
        EngineError: If that fails.
    """
    flwr(deployment, "stop", str(run), CONNECTION)
