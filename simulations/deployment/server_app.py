"""The Flower ServerApp of a real federation: the same round loop as a simulation's, with clients elsewhere."""

import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpeat.core import ConfigError, FedPeatError, StorageError, write_text
from fedpeat.data import FederatedData
from simulations.compose import Composed
from simulations.corpus import prepare_data
from simulations.deployment.delivery import deliver, greet, wait_for, with_rows
from simulations.deployment.layout import STOP, Deployment, read_deployment
from simulations.federation import Observer
from simulations.keeping import settings_to_resume
from simulations.run import Where, simulate

WAIT_SECONDS = 600.0
"""How long all clients may take to be there before round 1."""

IDENTITY = "federation.id"

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation of the deployment that the run's folder is in; whatever goes wrong, Flower sees it."""
    if os.environ.get("FEDPEAT_DEBUG") != "1":
        logging.getLogger("flwr").setLevel(logging.CRITICAL)  # what fails comes back as replies, and is reported
    try:
        federate(grid, Path(str(context.run_config["folder"])))
    except FedPeatError as error:
        for label, text in (("error", error.asked), ("found", error.found), ("do", error.remedy)):
            print(f"{label:>6}: {text}", file=sys.stderr)
        raise
    except Exception:
        traceback.print_exc()
        raise


def federate(grid: Grid, folder: Path) -> dict[str, Any]:
    """Run a federation into `folder`, `<deployment>/runs/<name>`, or go on with the one there; return its summary.

    Raises:
        FedPeatError: For whatever cannot be had; what was done until then is in `folder`.
    """
    if not folder.is_absolute():
        raise ConfigError("a run needs a folder", f"{str(folder)!r}", "start it by fedpeat deploy run")
    deployment = read_deployment(folder.parents[1])
    resume = (folder / "config.yaml").exists()
    settings = settings_to_resume(folder, []) if resume else _settings_of(deployment)
    stop, ended = threading.Event(), threading.Event()
    threading.Thread(target=_watch, args=(folder / STOP, stop, ended), daemon=True).start()
    clients = _Clients(grid, deployment, folder, stop)
    try:
        where = Where(lambda _: clients, clients.data, clients.delivered, stop)
        return simulate(settings, folder, where, resume=resume)
    finally:
        ended.set()


def _settings_of(deployment: Deployment) -> dict[str, Any]:
    return yaml.safe_load(deployment.config.read_text(encoding="utf-8"))


def _watch(path: Path, stop: threading.Event, ended: threading.Event) -> None:
    while not ended.wait(0.5):
        if path.exists():
            stop.set()
            return


def identity_of(folder: Path) -> str:
    """Return the identity of the federation in a run's folder, made once: clients keep their state under it.

    Raises:
        StorageError: If it cannot be kept.
    """
    path = folder / IDENTITY
    if not path.exists():
        write_text(path, uuid4().hex + "\n")
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise StorageError(f"cannot read {path}", str(error), "start a new run") from error


class _Clients:
    """The clients of a real federation as a run sees them: an engine that executes them, and what they hold.

    Args:
        grid: Flower's.
        deployment: Whose clients they are.
        folder: The run's.
        stop: Set to end the run early.
    """

    name = "deployed"

    def __init__(self, grid: Grid, deployment: Deployment, folder: Path, stop: threading.Event) -> None:
        self._grid = grid
        self._deployment = deployment
        self._folder = folder
        self._stop = stop
        self._settings: Mapping[str, Any] = {}
        self._nodes: dict[str, int] = {}
        self._greetings: dict[str, dict[str, Any]] = {}

    @property
    def workers(self) -> int:
        """How many clients can run at once: all."""
        return len(self._deployment.names)

    def data(self, settings: Mapping[str, Any], tell: Callable[[str], None]) -> FederatedData:
        """Return the server's own data, when all clients are there; how much they hold is not known yet."""
        names, keys = self._deployment.names, not self._deployment.insecure
        wait = {"seconds": WAIT_SECONDS, "stop": self._stop, "tell": tell}
        self._settings = settings
        self._nodes = wait_for(self._grid, names, keys=keys, **wait)
        self._greetings = greet(self._grid, self._nodes, stop=self._stop, tell=tell)
        tell(f"{len(self._nodes)} clients are there")
        return with_rows(prepare_data(settings), {name: {} for name in names})

    def delivered(self, composed: Composed, observer: Observer) -> Composed:
        """Return what runs when clients have their bundles and have prepared their rows."""
        return deliver(
            self._grid,
            self._nodes,
            composed,
            observer,
            settings=self._settings,
            greetings=self._greetings,
            identity=identity_of(self._folder),
            folder=self._folder,
            stop=self._stop,
        )

    def run(self, main: Callable[[Grid, Mapping[str, int]], Any], **_: Any) -> Any:
        """Return `main(grid, nodes)`."""
        return main(self._grid, self._nodes)
